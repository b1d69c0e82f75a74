"""The retrieval baseline: what is found, what a model reads of it, and the command line around it."""

import importlib.util
import itertools
import json
import random
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemon.cli.app import main
from mnemon.data.sample import Sample
from mnemon.errors import BackendUnavailable, ConfigError
from mnemon.evaluation.babilong import evaluate_babilong
from mnemon.evaluation.comparison import Comparison
from mnemon.evaluation.controls import ModelSpec, all_rows
from mnemon.evaluation.retrieval import (
    Bm25Ranker,
    DenseRanker,
    RetrievalSettings,
    Retriever,
    chunk_spans,
    fact_spans,
    make_retriever,
    sentence_spans,
)
from mnemon.evaluation.run import read_run
from mnemon.evaluation.tables import retrieval_grid

FACTS = ("Mary went to the office.", "John took the milk there.", "Mary went to the garden.")
NOISE = "The old ship sailed over the calm sea. Nobody on deck said a word for hours. "


def sample(question: str = "Where is Mary?", supporting: tuple[int, ...] = (2,)) -> Sample:
    text = NOISE + FACTS[0] + " " + NOISE + FACTS[1] + " " + NOISE + FACTS[2] + " " + NOISE.strip()
    return Sample("qa1", 1000, text, question, "garden", facts=FACTS, supporting=supporting)


def bm25(**settings: Any) -> Retriever:
    return make_retriever(RetrievalSettings("bm25", **settings))


def test_what_fits_the_question_is_found_and_stays_in_the_order_of_the_text(tokenizer: Any) -> None:
    reading = bm25(top_k=2).read(sample(), tokenizer)
    assert reading.text == "Mary went to the office. Mary went to the garden."
    assert reading.recall == 1.0
    assert bm25(top_k=1).read(sample("Where is John?"), tokenizer).text == FACTS[1]


def test_equal_scores_are_ranked_by_their_place(tokenizer: Any) -> None:
    one = bm25(top_k=1).read(sample(), tokenizer)
    assert (one.text, one.recall) == (FACTS[0], 0.0)
    nothing_shared = bm25(top_k=1).read(sample("Zebra?"), tokenizer)
    assert nothing_shared.text == "The old ship sailed over the calm sea."


def test_scores_are_those_of_the_formula() -> None:
    units = ["mary office", "mary mary garden", "ship sea calm deck", "john milk"]
    scores = Bm25Ranker().scores(units, "Is Mary in the garden?")
    lengths = np.array([2, 3, 4, 2])
    counts = {"mary": np.array([1, 2, 0, 0]), "garden": np.array([0, 1, 0, 0])}
    expected = np.zeros(4)
    for word, tf in counts.items():
        n = {"mary": 2, "garden": 1}[word]
        idf = np.log(1 + (4 - n + 0.5) / (n + 0.5))
        expected += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * lengths / lengths.mean()))
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_more_units_than_there_are_give_the_whole_text(tokenizer: Any) -> None:
    assert bm25(top_k=99).read(sample(), tokenizer).text == sample().input
    assert bm25(top_k=99, unit="chunk", chunk_tokens=7).read(sample(), tokenizer).text == sample().input


def test_an_empty_text_and_unknown_facts_are_no_error(tokenizer: Any) -> None:
    empty = Sample("qa1", 0, "", "Where is Mary?", "office")
    assert bm25().read(empty, tokenizer).text == ""
    assert bm25().read(empty, tokenizer).recall is None


@given(st.lists(st.sampled_from(["Mary went home", "He said 3.5 is no", "Dr. Who ran", "yes", "x\n\ny"]), max_size=8))
def test_sentences_are_parts_of_the_text_in_order(parts: list[str]) -> None:
    text = ". ".join(parts)
    spans = sentence_spans(text)
    assert all(start < end <= len(text) for start, end in spans)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())


@pytest.mark.parametrize("size", [1, 5, 16, 1000])
def test_chunks_have_so_many_tokens_and_cover_the_text(tokenizer: Any, size: int) -> None:
    text = sample().input + " Ünïcode — 漢字."
    spans = chunk_spans(text, tokenizer, size)
    assert "".join(text[start:end] for start, end in spans) == text
    assert len(spans) <= -(-len(tokenizer(text, add_special_tokens=False)["input_ids"]) // size)


def test_a_fact_cut_by_a_chunk_counts_only_when_both_halves_are_read(tokenizer: Any) -> None:
    told = sample()
    start, end = fact_spans(told)[2]
    cut = (start + end) // 2

    class Both:
        def scores(self, units: Any, question: str) -> Any:
            wanted = {told.input[start:cut], told.input[cut:end]}
            return np.array([float(any(unit in w or w in unit for w in wanted)) for unit in units])

    for top_k, recall in ((1, 0.0), (99, 1.0)):
        settings = RetrievalSettings("bm25", top_k=top_k, unit="chunk", chunk_tokens=3)
        assert Retriever(settings, Both()).read(told, tokenizer).recall == recall


def test_a_slow_tokenizer_cannot_cut_chunks() -> None:
    with pytest.raises(ConfigError, match="fast tokenizer"):
        bm25(unit="chunk").read(sample(), object())


class FakeEncoder:
    """Embeds a text as the letters it has; stands in for a sentence-transformers model."""

    def __init__(self, folder: str = "", device: str = "cpu", local_files_only: bool = True) -> None:
        self.calls = 0

    def encode(self, texts: list[str], show_progress_bar: bool = True) -> Any:
        self.calls += 1
        return np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])


def test_a_dense_retriever_embeds_a_text_once_however_many_models_read_it(tokenizer: Any) -> None:
    encoder = FakeEncoder()
    retriever = Retriever(RetrievalSettings("dense", top_k=1, model="minilm"), DenseRanker(encoder))
    readings = [retriever.read(sample("John took milk?"), tokenizer) for _ in range(3)]
    assert encoder.calls == 1
    assert [reading.text for reading in readings] == [FACTS[1]] * 3
    scores = DenseRanker(encoder).scores(["zzz", "qq"], "zz")
    np.testing.assert_allclose(scores, [1.0, 0.0], atol=1e-6)


def test_a_dense_model_is_loaded_from_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = RetrievalSettings("dense", model=str(tmp_path))
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = FakeEncoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    assert make_retriever(settings).ranker.scores(["aa", "b"], "a").shape == (2,)
    with pytest.raises(ConfigError, match="no such folder"):
        make_retriever(RetrievalSettings("dense", model=str(tmp_path / "nowhere")))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'mnemon\[dense\]'"):
        make_retriever(settings)


def test_without_the_package_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    words = ["eval", "babilong-tiny-plain", "--tasks", "qa1", "--lengths", "0k", "--retriever", "bm25"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().endswith("pip install 'mnemon[rag]'")
    assert not (tmp_path / "out").exists()


def test_nothing_is_imported_before_it_is_needed() -> None:
    assert importlib.util.find_spec("bm25s") is not None
    source = Path(importlib.util.find_spec("mnemon.evaluation.retrieval").origin or "")  # type: ignore[union-attr]
    top = [line for line in source.read_text().splitlines() if line.startswith(("import ", "from "))]
    assert not any("bm25s" in line or "sentence_transformers" in line for line in top)


def test_a_text_of_128k_tokens_is_searched_in_moments(tokenizer: Any) -> None:
    rng = random.Random(0)
    words = [f"word{i}" for i in range(5000)]
    sentences = [" ".join(rng.choice(words) for _ in range(18)).capitalize() + "." for _ in range(6000)]
    for place, fact in zip((100, 3000, 5900), FACTS, strict=True):
        sentences[place] = fact
    told = Sample("qa1", 128_000, " ".join(sentences), "Where is Mary?", "garden", facts=FACTS, supporting=(2,))
    started = time.perf_counter()
    reading = bm25(top_k=2).read(told, tokenizer)
    assert time.perf_counter() - started < 20  # about half a second on an idle core
    assert reading.text == f"{FACTS[0]} {FACTS[2]}"


def test_a_model_reads_only_what_was_found_and_the_samples_stay_the_same(
    plain: Any, tokenizer: Any, fake_source: Any
) -> None:
    options = {"tasks": ["qa1"], "lengths": ["0k"], "num_samples": 5, "samples": fake_source, "max_new_tokens": 2}
    whole = evaluate_babilong(plain, tokenizer, label="whole", **options)
    found = evaluate_babilong(plain, tokenizer, label="found", retriever=bm25(top_k=1), **options)
    assert [p.sample_sha256 for p in found.predictions()] == [p.sample_sha256 for p in whole.predictions()]
    assert [p.prompt_sha256 for p in found.predictions()] != [p.prompt_sha256 for p in whole.predictions()]
    assert found.cells[0].prompt_tokens < whole.cells[0].prompt_tokens
    assert (found.model.role, whole.model.role) == ("retrieval", "plain")
    counts = found.cells[0].retrieval
    assert counts is not None
    assert 0 < counts.text_tokens < whole.cells[0].prompt_tokens
    assert counts.recall is None  # these samples do not name their supporting facts
    assert retrieval_grid(Comparison([whole, found])).lines[0][:4] == ("0k", "found", "–", "–")


def test_rows_that_read_whole_texts_are_the_controls_of_retrieval(lm2: Any, plain: Any, tokenizer: Any) -> None:
    specs = [ModelSpec("LM2", lm2, tokenizer), ModelSpec("plain", plain, tokenizer)]
    retriever = bm25(top_k=3, unit="chunk", chunk_tokens=32)
    labels = [row.label for row in all_rows(specs, retriever, controls=True)]
    name = "(bm25, 3 chunks of 32 tokens)"
    assert labels == ["LM2", "LM2 (knocked out)", "plain", f"LM2 {name}", f"plain {name}"]
    assert [row.label for row in all_rows(specs, retriever, controls=False)] == labels[-2:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, plain: Any, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_command_reports_recall_and_resumes_by_the_settings_of_the_retriever(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(saved), "--tasks", "qa1", "--lengths", "0k,1k", "--samples", "3", "--layout", "short"]
    words += ["--max-new-tokens", "2", "--retriever", "bm25", "-o", str(tmp_path / "out")]
    assert main([*words, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [result["label"] for result in value["results"]] == ["tiny", "tiny (bm25, 5 sentences)"]
    assert value["results"][1]["model"]["retrieval"] == {"kind": "bm25", "top_k": 5, "unit": "sentence"}
    long = value["results"][1]["cells"][1]["retrieval"]
    assert 0 <= long["recall"] <= 1
    assert long["num_known"] == 3
    assert long["text_tokens"] < 3 * 500
    assert value["results"][0]["cells"][1]["retrieval"] is None

    assert main([*words, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "recall [95 %]" in printed
    assert "Retrieval" in printed
    folder = tmp_path / "out"
    run = read_run(folder)
    assert run.results[1].cells[1].retrieval is not None
    assert "What the retriever found" in (folder / "table.md").read_text()
    assert "What the retriever found" in (folder / "report.html").read_text()

    cell = next((folder / "cells").glob("*bm25*/qa1-1k.json"))
    cell.write_text(cell.read_text().replace('"top_k": 5', '"top_k": 7'))
    assert main([*words, "--resume"]) == 2
    assert "was made with retrieval={'kind': 'bm25', 'top_k': 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--retriever", "tfidf"], "unknown retriever 'tfidf'; expected one of bm25, dense"),
        (["--retriever", "bm25", "--retrieval-unit", "page"], "unknown retrieval unit 'page'"),
        (["--retriever", "bm25", "--chunk-tokens", "9"], "--chunk-tokens is for chunks"),
        (["--retriever", "bm25", "--retriever-model", "x"], "--retriever-model is for --retriever dense"),
        (["--retriever", "dense"], "add --retriever-model FOLDER"),
        (["--retriever", "dense", "--retriever-model", "nowhere"], "nowhere: no such folder"),
        (["--top-k", "3"], "--top-k says nothing without a retriever"),
        (["--retriever", "bm25", "--top-k", "0"], "top-k"),
        (["--suite", "mqar", "--retriever", "bm25"], "--retriever is for --suite babilong"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["eval", str(saved), "-o", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mnemon: error:")
    assert message in error


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"top_k": 0}, {"chunk_tokens": 0}, {"kind": "x"}, {"unit": "x"}, {"model": "x"}, {"kind": "dense"}):
        with pytest.raises(ConfigError):
            RetrievalSettings(**wrong)  # type: ignore[arg-type]
