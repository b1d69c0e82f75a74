"""Retrieval baseline: a model reads only the parts of a text that a retriever found for the question.

The text of every sample is cut into units, sentences or chunks of tokens; a ranker scores each against the question;
the best `top_k` are kept in the order of the text and take the place of the text in the prompt. Nothing else changes,
so that any model can be measured with and without retrieval on the same questions.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from mnemon.data.sample import Sample
from mnemon.data.sentences import split_sentences
from mnemon.errors import BackendUnavailable, ConfigError
from mnemon.evaluation.results import RetrievalCounts
from mnemon.evaluation.samples import sample_digest

Kind = Literal["bm25", "dense"]
Unit = Literal["sentence", "chunk"]
KINDS: tuple[Kind, ...] = get_args(Kind)
UNITS: tuple[Unit, ...] = get_args(Unit)
CHUNK_TOKENS = 64

Span = tuple[int, int]


@dataclass(frozen=True)
class RetrievalSettings:
    """What decides which parts of a text are read.

    Attributes:
        kind: "bm25" (shared words) or "dense" (similar embeddings).
        top_k: units to read, at least 1; more of them find more facts and bring in more unrelated text.
        unit: "sentence" or "chunk".
        chunk_tokens: tokens of a chunk under the model's own tokenizer, at least 1; means nothing for sentences.
        model: folder of the embedding model; for "dense" only.
    """

    kind: Kind = "bm25"
    top_k: int = 5
    unit: Unit = "sentence"
    chunk_tokens: int = CHUNK_TOKENS
    model: str = ""

    def __post_init__(self) -> None:
        """Check the values; ConfigError names the option."""
        if self.kind not in KINDS:
            raise ConfigError(f"unknown retriever {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.unit not in UNITS:
            raise ConfigError(f"unknown retrieval unit {self.unit!r}; expected one of {', '.join(UNITS)}")
        for name, value in (("top_k", self.top_k), ("chunk_tokens", self.chunk_tokens)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if (self.kind == "dense") != bool(self.model):
            raise ConfigError(
                "a dense retriever, and no other, needs the folder of an embedding model (retriever-model)"
            )

    @property
    def name(self) -> str:
        """Name the retriever for labels, for example "bm25, 5 sentences"."""
        kind = self.kind if self.kind == "bm25" else f"dense {Path(self.model).name}"
        units = f"{self.unit}{'' if self.top_k == 1 else 's'}"
        return f"{kind}, {self.top_k} {units}" + (f" of {self.chunk_tokens} tokens" if self.unit == "chunk" else "")

    def value(self) -> dict[str, Any]:
        """Give what identifies the retrieval in stored results; only what has an effect."""
        value = {name: item for name, item in asdict(self).items() if item != ""}
        if self.unit != "chunk":
            del value["chunk_tokens"]
        return value


class Ranker(Protocol):
    """Scores the units of one text against a question."""

    def scores(self, units: Sequence[str], question: str) -> NDArray[np.floating[Any]]:
        """Give one score per unit, [U]; the higher the better."""
        ...


class Bm25Ranker:
    """Okapi BM25 in Lucene's variant (k1 1.5, b 0.75), English stop words left out, words not stemmed.

    score(u) = Σ_w idf(w) tf(w, u) / (tf(w, u) + k1 (1 − b + b |u| / mean |u|)),
    idf(w) = ln(1 + (U − n_w + ½) / (n_w + ½)) for U units, n_w of them with the word w.

    Raises:
        BackendUnavailable: if the package bm25s is not installed.

    Source:
        S. Robertson, H. Zaragoza, The probabilistic relevance framework: BM25 and beyond, 2009; C. Kamphuis et al.,
        Which BM25 do you mean?, ECIR 2020 (variants).
    """

    def __init__(self) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise BackendUnavailable(
                "the retriever bm25 needs the package bm25s; install it with: pip install 'mnemon[rag]'"
            ) from error
        self._bm25s = bm25s

    def scores(self, units: Sequence[str], question: str) -> NDArray[np.floating[Any]]:
        """Score every unit; 0 where no word is shared."""
        words = self._bm25s.tokenize([question], stopwords="en", return_ids=False, show_progress=False)[0]
        corpus = self._bm25s.tokenize(list(units), stopwords="en", show_progress=False)
        known = [word for word in words if word in corpus.vocab]
        if not known:
            return np.zeros(len(units), dtype=np.float32)
        index = self._bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        index.index(corpus, show_progress=False)
        scores: NDArray[np.float32] = index.get_scores(known)
        return scores


class DenseRanker:
    """Cosine similarity of embeddings.

    Args:
        encoder: has `encode(list of texts) -> [N, D]`, as a `SentenceTransformer` has.
    """

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def scores(self, units: Sequence[str], question: str) -> NDArray[np.floating[Any]]:
        """Score every unit, in -1..1."""
        vectors = np.asarray(self._encoder.encode([question, *units], show_progress_bar=False), dtype=np.float32)
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        similarity: NDArray[np.float32] = vectors[1:] @ vectors[0]
        return similarity


@dataclass(frozen=True)
class Reading:
    """What is left of a text.

    Attributes:
        text: the units found, in the order of the text.
        recall: share of the supporting facts that stand whole in it; None where the sample does not say which they are.
        seconds: wall time of finding them.
    """

    text: str
    recall: float | None
    seconds: float


@dataclass
class Retriever:
    """Finds the units of a sample's text that fit its question, once per sample however many models read them."""

    settings: RetrievalSettings
    ranker: Ranker
    _kept: dict[tuple[str, int], Reading] = field(default_factory=dict, repr=False)

    def read(self, sample: Sample, tokenizer: Any) -> Reading:
        """Retrieve from one sample.

        Equal scores are ranked by their place, the earlier one first.

        Args:
            sample: text and question.
            tokenizer: the model's; it cuts chunks.

        Raises:
            ConfigError: if chunks are wanted and the tokenizer cannot say where its tokens lie.
        """
        key = (sample_digest(sample), id(tokenizer) if self.settings.unit == "chunk" else 0)
        if key not in self._kept:
            self._kept[key] = self._read(sample, tokenizer)
        return self._kept[key]

    def read_all(self, samples: Sequence[Sample], tokenizer: Any) -> tuple[list[Sample], RetrievalCounts]:
        """Retrieve from every sample of a cell; count tokens, facts found and time."""
        readings = [self.read(sample, tokenizer) for sample in samples]
        known = [reading.recall for reading in readings if reading.recall is not None]
        texts = [reading.text for reading in readings]
        counts = RetrievalCounts(
            text_tokens=sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])),
            recall=sum(known) / len(known) if known else None,
            num_known=len(known),
            seconds=sum(reading.seconds for reading in readings),
        )
        return [replace(sample, input=text) for sample, text in zip(samples, texts, strict=True)], counts

    def _read(self, sample: Sample, tokenizer: Any) -> Reading:
        started = time.perf_counter()
        text = sample.input
        if self.settings.unit == "chunk":
            spans = chunk_spans(text, tokenizer, self.settings.chunk_tokens)
        else:
            spans = sentence_spans(text)
        if not spans:
            return Reading("", _recall(sample, []), 0.0)
        scores = self.ranker.scores([text[start:end] for start, end in spans], sample.question)
        best = np.argsort(-scores, kind="stable")[: self.settings.top_k]
        passages = _joined(spans, sorted(best.tolist()))
        kept = " ".join(text[start:end].strip() for start, end in passages)
        return Reading(kept, _recall(sample, passages), time.perf_counter() - started)


def make_retriever(settings: RetrievalSettings, device: str = "cpu") -> Retriever:
    """Build a retriever; packages and models are loaded here and nowhere else.

    Args:
        settings: what to build.
        device: torch device of an embedding model.

    Raises:
        BackendUnavailable: if the package it needs is not installed.
        ConfigError: if the embedding model is not there or cannot be loaded.
    """
    ranker: Ranker = Bm25Ranker() if settings.kind == "bm25" else DenseRanker(_load_encoder(settings.model, device))
    return Retriever(settings, ranker)


def sentence_spans(text: str) -> list[Span]:
    """Give start and end of every sentence of a text, in order."""
    spans, position = [], 0
    for sentence in split_sentences(text):
        start = text.index(sentence, position)
        position = start + len(sentence)
        spans.append((start, position))
    return spans


def chunk_spans(text: str, tokenizer: Any, num_tokens: int) -> list[Span]:
    """Cut a text into chunks of so many tokens, the last one shorter; together they are the text.

    Raises:
        ConfigError: if the tokenizer is a slow one, which does not say where its tokens lie.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError("chunks need a fast tokenizer, got a slow one; use --retrieval-unit sentence")
    offsets = backend.encode(text, add_special_tokens=False).offsets
    starts = [start for start, _ in offsets[::num_tokens]]
    bounds = [0, *starts[1:], len(text)]
    return [(start, end) for start, end in itertools.pairwise(bounds) if end > start]


def fact_spans(sample: Sample) -> list[Span]:
    """Give where each fact of a sample stands in its text; empty if one is not there."""
    spans, position = [], 0
    for fact in sample.facts:
        start = sample.input.find(fact, position)
        if start < 0:
            return []
        position = start + len(fact)
        spans.append((start, position))
    return spans


def _joined(spans: Sequence[Span], chosen: Sequence[int]) -> list[Span]:
    """Give the spans chosen, neighbours made one so that the text between them is kept as it was."""
    passages: list[Span] = []
    last = None
    for index in chosen:
        start, end = spans[index]
        if last is not None and index == last + 1:
            passages[-1] = (passages[-1][0], end)
        else:
            passages.append((start, end))
        last = index
    return passages


def _recall(sample: Sample, passages: Sequence[Span]) -> float | None:
    facts = fact_spans(sample)
    if not facts or not sample.supporting:
        return None
    found = sum(
        any(start <= facts[index][0] and facts[index][1] <= end for start, end in passages)
        for index in sample.supporting
    )
    return found / len(sample.supporting)


def _load_encoder(folder: str, device: str) -> Any:
    if not Path(folder).is_dir():
        raise ConfigError(f"--retriever-model {folder}: no such folder; expected a saved embedding model")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise BackendUnavailable(
            "the retriever dense needs the package sentence-transformers; install it with: pip install 'mnemon[dense]'"
        ) from error
    try:
        return SentenceTransformer(folder, device=device, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"--retriever-model {folder}: cannot be loaded as an embedding model ({first})") from error
