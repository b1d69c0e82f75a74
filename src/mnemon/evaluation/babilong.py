"""BABILong runner: one model, tasks x lengths, every prediction recorded.

The runner works cell by cell (one task at one length); tasks whose prompts of one length fit into one batch are
answered together, which keeps the machine busy at long lengths, where samples are few. A finished cell is written at
once when a folder is given, so an interrupted evaluation goes on where it stopped. Comparing several models is the
business of `comparison`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mnemon.data.babilong import Sample
from mnemon.data.encoding import evaluation_prompt
from mnemon.errors import ConfigError, DataError
from mnemon.evaluation.controls import ModelSpec, describe_model
from mnemon.evaluation.generation import BatchLimits, batch_limits, generate_answers
from mnemon.evaluation.results import (
    LAYOUTS,
    BabilongResult,
    Cell,
    EvaluationSettings,
    Layout,
    ModelInfo,
    Prediction,
    RetrievalCounts,
    cell_from_dict,
    parse_json,
)
from mnemon.evaluation.retrieval import Retriever
from mnemon.evaluation.samples import (
    OFFICIAL_RESERVE,
    GeneratedSamples,
    SampleSource,
    check_lengths,
    check_tasks,
    sample_digest,
    slug,
    text_digest,
)
from mnemon.evaluation.scoring import score
from mnemon.files import atomic_write_json

Progress = Callable[[str, str, int], None]
"""Called with (tasks, length, number of samples just finished), first with 0 samples when they are begun."""


def evaluate_babilong(
    model: Any,
    tokenizer: Any,
    *,
    tasks: Sequence[str],
    lengths: Sequence[str],
    num_samples: int,
    samples_at: Mapping[str, int] | None = None,
    seed: int = 0,
    background: str = "stdlib",
    split: Literal["train", "test"] = "test",
    batch_size: int | None = None,
    max_batch_tokens: int | None = None,
    max_new_tokens: int = 20,
    layout: Layout = "short",
    generate_kwargs: Mapping[str, Any] | None = None,
    label: str = "model",
    source: str = "",
    training: Mapping[str, Any] | None = None,
    samples: SampleSource | None = None,
    stories: str = "generated",
    retriever: Retriever | None = None,
    cells_folder: Path | None = None,
    progress: Progress | None = None,
) -> BabilongResult:
    """Let a model answer BABILong questions, greedily, and mark the answers.

    Args:
        model: any Hugging Face causal language model.
        tokenizer: the model's tokenizer.
        tasks: task names, "qa1" ... "qa20".
        lengths: length names such as "0k", "4k" (decimal thousands of tokens).
        num_samples: samples per task and length, at least 1.
        samples_at: another number, at least 1, at some of the lengths.
        seed: seed of the samples; the same seed (and tokenizer) gives the same ones.
        background: "stdlib", a folder of text files or "hf:<name>".
        split: half of the stories and of the background to draw from.
        batch_size: most prompts per call; None leaves it to the token budget.
        max_batch_tokens: most padded prompt tokens per call; None chooses for the model.
        max_new_tokens: longest answer in tokens.
        layout: "short" (context, question, "Answer:") or the benchmark's "official" prompt.
        generate_kwargs: further arguments of `model.generate`, for example `knock_out_memory=True`.
        label: name of the model in tables.
        source: where the model came from, for the record.
        training: facts about its training, for the record.
        samples: a source shared with other models; None makes one with this tokenizer.
        stories: where the stories came from, for the record.
        retriever: finds the part of every text that the model reads; None reads the whole text.
        cells_folder: folder for finished cells; those already there are taken over instead of computed.
        progress: told before and after every batch.

    Returns:
        Predictions, marks and times of every cell.

    Raises:
        ConfigError: if a task, length, layout or number is wrong, or a stored cell was made with other settings.
        DataError: if a stored cell cannot be read.
    """
    for count in (num_samples, *(samples_at or {}).values()):
        if count < 1:
            raise ConfigError(f"num_samples must be at least 1, got {count}")
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}")
    settings = EvaluationSettings(
        tasks=check_tasks(tasks),
        lengths=check_lengths(lengths),
        num_samples=num_samples,
        seed=seed,
        background=str(background),
        stories=stories,
        split=split,
        layout=layout,
        max_new_tokens=max_new_tokens,
        samples_at=dict(samples_at or {}),
    )
    spec = ModelSpec(label, model, tokenizer, dict(generate_kwargs or {}), source, dict(training or {}), retriever)
    info = describe_model(spec)
    if samples is None:
        reserve = OFFICIAL_RESERVE if layout == "official" else 0
        samples = GeneratedSamples(
            tokenizer, num_samples, str(background), split, seed, reserve, samples_at=settings.samples_at
        )
    store = _CellStore(cells_folder, spec, info, settings)

    limits = batch_limits(model, max_batch_tokens)
    cells = []
    for length in settings.lengths:
        found = {task: store.read(task, length) for task in settings.tasks}
        for task, cell in found.items():
            if cell is not None and progress is not None:
                progress(task, length, len(cell.predictions))
        missing = (_ask(spec, samples, settings, task, length) for task in settings.tasks if found[task] is None)
        for together in _groups(missing, tokenizer, batch_size, limits):
            for cell in _answer(together, spec, settings, length, batch_size, max_batch_tokens, progress):
                store.write(cell)
                found[cell.task] = cell
        cells += [cell for cell in found.values() if cell is not None]
    return BabilongResult(label, info, settings, spec.generate_kwargs, tuple(cells))


class _Asked(NamedTuple):
    """What is asked in one cell: the samples, the prompts shown of them, and what a retriever found."""

    task: str
    samples: Sequence[Sample]
    prompts: list[str]
    retrieval: RetrievalCounts | None


def _ask(spec: ModelSpec, source: SampleSource, settings: EvaluationSettings, task: str, length: str) -> _Asked:
    samples = source.cell(task, length)[: settings.samples_at.get(length)]
    if not samples:
        raise DataError(f"there is no sample for {task} at {length}")
    shown, counts = samples, None
    if spec.retriever is not None:
        shown, counts = spec.retriever.read_all(samples, spec.tokenizer)
    return _Asked(task, samples, [evaluation_prompt(sample, settings.layout) for sample in shown], counts)


def _groups(
    asked: Iterable[_Asked], tokenizer: Any, batch_size: int | None, limits: BatchLimits
) -> Iterator[list[_Asked]]:
    """Put tasks together as long as all their prompts fit into one batch."""
    group: list[_Asked] = []
    rows = longest = 0
    for cell in asked:
        # Prompts of one length are about equally long: the first one stands for all, with a tenth to spare.
        width = int(1.1 * len(tokenizer(cell.prompts[0])["input_ids"]))
        rows, longest = rows + len(cell.prompts), max(longest, width)
        if group and not (rows <= (batch_size or rows) and limits.hold(rows, longest)):
            yield group
            group, rows, longest = [], len(cell.prompts), width
        group.append(cell)
    if group:
        yield group


def _answer(
    asked: Sequence[_Asked],
    spec: ModelSpec,
    settings: EvaluationSettings,
    length: str,
    batch_size: int | None,
    max_batch_tokens: int | None,
    progress: Progress | None,
) -> list[Cell]:
    """Answer the prompts of some tasks in common batches; time is split by their tokens."""
    names = ", ".join(cell.task for cell in asked)
    if progress is not None:
        progress(names, length, 0)
    answers = generate_answers(
        spec.model,
        spec.tokenizer,
        [prompt for cell in asked for prompt in cell.prompts],
        batch_size=batch_size,
        max_batch_tokens=max_batch_tokens,
        max_new_tokens=settings.max_new_tokens,
        generate_kwargs=spec.generate_kwargs,
        on_batch=None if progress is None else lambda count: progress(names, length, count),
    )
    cells, start = [], 0
    for cell in asked:
        part = answers.part(start, start + len(cell.prompts))
        start += len(cell.prompts)
        predictions = tuple(
            _prediction(cell.task, length, index, sample, prompt, text)
            for index, (sample, prompt, text) in enumerate(zip(cell.samples, cell.prompts, part.texts, strict=True))
        )
        counts = (part.seconds, part.prompt_tokens, part.new_tokens)
        cells.append(Cell(cell.task, length, predictions, *counts, cell.retrieval))
    return cells


def _prediction(task: str, length: str, index: int, sample: Sample, prompt: str, text: str) -> Prediction:
    marks = score(task, sample.question, sample.target, text)
    return Prediction(
        sample_id=f"{task}-{length}-{index:04d}",
        task=task,
        length=length,
        sample_sha256=sample_digest(sample),
        prompt_sha256=text_digest(prompt),
        question=sample.question,
        target=sample.target,
        output=text,
        exact=marks.exact,
        official=marks.official,
    )


class _CellStore:
    """Finished cells of one model on disk, each beside the settings that it was made with."""

    def __init__(self, folder: Path | None, spec: ModelSpec, info: ModelInfo, settings: EvaluationSettings) -> None:
        self._folder = None if folder is None else Path(folder) / slug(spec.label)
        made_with = asdict(settings) | {"label": spec.label, "generate_kwargs": spec.generate_kwargs}
        # Tasks and lengths only choose cells; a later run may ask for more of them.
        choosing = ("tasks", "lengths", "samples_at")
        self._made_with = {key: value for key, value in made_with.items() if key not in choosing}
        self._made_with["weights"] = info.weights
        if info.retrieval:
            self._made_with["retrieval"] = info.retrieval
        self._settings = settings

    def read(self, task: str, length: str) -> Cell | None:
        """Give a stored cell, or None; ConfigError if it was made with other settings."""
        if self._folder is None or not (path := self._path(task, length)).is_file():
            return None
        value = parse_json(path.read_text(encoding="utf-8"), str(path))
        stored = value.get("made_with", {})
        for key, wanted in self._cell_made_with(length).items():
            if stored.get(key) != wanted:
                raise ConfigError(
                    f"{path} was made with {key}={stored.get(key)!r}, this run has {wanted!r}; "
                    "use --overwrite or another output folder"
                )
        return cell_from_dict(value.get("cell", {}), name=str(path))

    def write(self, cell: Cell) -> None:
        """Keep a finished cell."""
        if self._folder is not None:
            value = {"made_with": self._cell_made_with(cell.length), "cell": asdict(cell)}
            atomic_write_json(self._path(cell.task, cell.length), value)

    def _cell_made_with(self, length: str) -> dict[str, Any]:
        return self._made_with | {"num_samples": self._settings.samples_for(length)}

    def _path(self, task: str, length: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{task}-{length}.json"
