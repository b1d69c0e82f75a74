"""Runs the tasks of a suite on several models; what is finished is on disk and never measured twice.

A cell is one model on one task. Its file is named after a digest of everything that decides its numbers (weights,
tokenizer, documents, settings, versions), so that a cell of other weights or other settings is simply not found.
"""

import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lm_eval

from mnemon import __version__
from mnemon.errors import ConfigError, DataError
from mnemon.evaluation.clock import forward_clock
from mnemon.evaluation.controls import ModelSpec, weights_fingerprint
from mnemon.evaluation.harness.catalogue import SUITES, Suite, TaskEntry
from mnemon.evaluation.harness.data import DataSource
from mnemon.evaluation.harness.language_model import HarnessModel
from mnemon.evaluation.harness.records import (
    HarnessRun,
    HarnessSample,
    Row,
    estimate,
    sample_from_dict,
)
from mnemon.evaluation.harness.tasks import (
    PreparedTask,
    TaskOptions,
    at_work,
    check_options,
    columns_of,
    prepare,
)
from mnemon.evaluation.machine import describe_machine
from mnemon.evaluation.measures import model_facts
from mnemon.evaluation.samples import slug, text_digest
from mnemon.files import atomic_write_json, parse_object, read_text

Progress = Callable[[str, str], None]
"""Called with (model label, task) when a cell is done."""

_Cell = tuple[tuple[Row, ...], tuple[HarnessSample, ...]]


def evaluate_suite(
    name: str,
    specs: Sequence[ModelSpec],
    source: DataSource,
    options: TaskOptions,
    *,
    tasks: Sequence[str] | None = None,
    batch_size: int | None = None,
    max_batch_tokens: int | None = None,
    cells_folder: Path | None = None,
    command: str = "",
    progress: Progress = lambda *_: None,
) -> HarnessRun:
    """Measure several models on the same samples of a suite.

    Args:
        name: `mmlu`, `recall`, `commonsense` or `longbench`.
        specs: models with their tokenizers, labels all different.
        source: of the data.
        options: how the tasks are measured.
        tasks: names of tasks; None for all there is data for.
        batch_size: most rows per call; None leaves it to the token budget alone.
        max_batch_tokens: most padded tokens per call; None chooses for every model.
        cells_folder: folder for finished cells; those already there are taken over instead of measured.
        command: command line for the record.
        progress: told after every cell.

    Returns:
        All numbers and samples, models outermost.

    Raises:
        ConfigError: a task is unknown, an option is wrong, a model has no tokenizer or reads too little.
        DataError: data are missing or malformed, or a stored cell is damaged.
        BackendUnavailable: the hub, or a package that a score needs, is not there.
    """
    suite = SUITES[name]
    if len({spec.label for spec in specs}) != len(specs):
        raise ConfigError(f"every model needs a label of its own, got {', '.join(spec.label for spec in specs)}")
    check_options(suite, options)
    entries, left_out = _entries(suite, source, tasks)
    rows: list[Row] = []
    samples: list[HarnessSample] = []
    models: dict[str, Mapping[str, Any]] = {}
    for spec in specs:
        wrapped = _wrap(suite, spec, options, batch_size, max_batch_tokens)
        weights = weights_fingerprint(spec.model)
        models[spec.label] = {**_facts(spec), "weights": weights, "context_length": wrapped.context_length}
        store = _CellStore(cells_folder, suite, spec, weights, wrapped.context_length)
        for entry in entries:
            found = _cell(suite, entry, spec, wrapped, source, options, store)
            rows += found[0]
            samples += found[1]
            progress(spec.label, entry.name)
    settings = {
        **asdict(options),
        "context_length": options.context_length or suite.context_length,
        "answer_length": options.answer_length or suite.answer_length,
        "data": source.name,
        "tasks": [entry.name for entry in entries],
        "tasks_in_suite": len(suite.tasks),
    }
    machine = {**describe_machine(str(specs[0].model.device)), "lm_eval": importlib.metadata.version("lm_eval")}
    return HarnessRun(name, settings, models, tuple(rows), tuple(samples), command, machine, left_out)


def _entries(
    suite: Suite, source: DataSource, tasks: Sequence[str] | None
) -> tuple[tuple[TaskEntry, ...], dict[str, str]]:
    """Return the tasks to measure, and the subjects that the data do not hold."""
    entries = suite.entries(tasks)
    if tasks is not None or suite.tasks[0].subject is None:
        return entries, {}
    known = {entry.subject for entry in suite.tasks}
    held = source.subjects(suite.tasks[0])
    for subject in held:
        if subject not in known:
            raise DataError(f"{suite.tasks[0].data}: unknown subject {subject!r}; expected the names of the hub's set")
    missing = {entry.name: "no row with this subject" for entry in entries if entry.subject not in held}
    return tuple(entry for entry in entries if entry.name not in missing), missing


def _wrap(
    suite: Suite, spec: ModelSpec, options: TaskOptions, batch_size: int | None, max_batch_tokens: int | None
) -> HarnessModel:
    """Wrap a model; the suite's own context length gives way to what the model reads, one asked for does not."""
    wrapped = HarnessModel(
        spec, context_length=options.context_length, batch_size=batch_size, max_batch_tokens=max_batch_tokens
    )
    if options.context_length is None and suite.context_length is not None:
        wrapped.context_length = min(suite.context_length, wrapped.context_length or suite.context_length)
    return wrapped


def _facts(spec: ModelSpec) -> dict[str, Any]:
    facts = model_facts(spec)
    del facts["model"]
    return facts


def _cell(
    suite: Suite,
    entry: TaskEntry,
    spec: ModelSpec,
    wrapped: HarnessModel,
    source: DataSource,
    options: TaskOptions,
    store: "_CellStore",
) -> _Cell:
    started = time.perf_counter()
    if entry.definition is None:  # what the model can read decides where texts are cut
        options = replace(options, context_length=wrapped.context_length)
    prepared = prepare(suite, entry, source, options, spec.tokenizer)
    made_with = store.made_with(prepared, options)
    stored = store.read(entry, made_with)
    if stored is not None:
        return stored
    wrapped.num_cut = 0
    with forward_clock(spec.model) as clock, at_work():
        outcome = lm_eval.evaluate(
            lm=wrapped,
            task_dict={"tasks": {prepared.task.task_name: prepared.task}},
            bootstrap_iters=0,
            log_samples=True,
        )
    assert outcome is not None
    documents = [columns_of(entry, [row])[0] for row in source.rows(entry, entry.split)]
    samples = tuple(
        _sample(suite, entry, spec.label, prepared.numbers[int(logged["doc_id"])], documents, logged)
        for logged in outcome["samples"][prepared.task.task_name]
    )
    seconds = time.perf_counter() - started
    rows = tuple(
        _row(entry, spec.label, number, samples, prepared, wrapped.num_cut, seconds, clock.seconds)
        for number in range(len(entry.metrics))
    )
    store.write(entry, made_with, (rows, samples))
    return rows, samples


def _sample(
    suite: Suite,
    entry: TaskEntry,
    label: str,
    number: int,
    documents: Sequence[Mapping[str, Any]],
    logged: Mapping[str, Any],
) -> HarnessSample:
    values = {name: _numbers(logged[name]) for name, _ in entry.metrics}
    metric, kind = entry.metrics[0]
    first = values[metric]
    generated = entry.definition is None or kind == "score"
    return HarnessSample(
        model=label,
        suite=suite.name,
        task=entry.name,
        id=f"{entry.name}-{number:05d}",
        score=first[0] / first[1] if kind == "word_perplexity" else first[0],
        metric="nats_per_word" if kind == "word_perplexity" else metric,
        sample_sha256=_digest(documents[number]),
        values=values,
        output=str(logged["filtered_resps"][0]) if generated else None,
    )


def _numbers(value: Any) -> list[float]:
    return [float(number) for number in value] if isinstance(value, tuple | list) else [float(value)]


def _row(
    entry: TaskEntry,
    label: str,
    number: int,
    samples: Sequence[HarnessSample],
    prepared: PreparedTask,
    num_truncated: int,
    seconds: float,
    forward_seconds: float,
) -> Row:
    metric, kind = entry.metrics[number]
    found = estimate(kind, [sample.values[metric] for sample in samples])
    return Row(
        model=label,
        task=entry.name,
        metric=metric,
        kind=kind,
        value=found.value,
        low=found.low,
        high=found.high,
        stderr=found.stderr,
        counts_first=number == 0,
        num_samples=len(samples),
        num_dropped=prepared.num_dropped,
        num_cut=prepared.num_cut,
        num_not_found=prepared.num_not_found,
        num_truncated=num_truncated,
        num_fewshot=prepared.num_fewshot,
        version=str(prepared.task.VERSION),
        seconds=seconds,
        forward_seconds=forward_seconds,
    )


class _CellStore:
    """Finished cells of one model on disk."""

    def __init__(
        self, folder: Path | None, suite: Suite, spec: ModelSpec, weights: str, context_length: int | None
    ) -> None:
        self._folder = None if folder is None else folder / slug(spec.label)
        self._label = spec.label
        self._common = {
            "suite": suite.name,
            "weights": weights,
            "tokenizer": _digest(sorted(spec.tokenizer.get_vocab().items())),
            "generate_kwargs": spec.generate_kwargs,
            "context_length": context_length,
            "lm_eval": importlib.metadata.version("lm_eval"),
            "mnemon": __version__,
        }

    def made_with(self, prepared: PreparedTask, options: TaskOptions) -> dict[str, Any]:
        """Return everything that decides the numbers of a cell."""
        examples = list(prepared.task.dataset.get(prepared.entry.fewshot_split) or []) if prepared.num_fewshot else []
        return self._common | {
            "task": prepared.entry.name,
            "version": str(prepared.task.VERSION),
            "num_fewshot": prepared.num_fewshot,
            "answer_length": options.answer_length,
            "documents": _digest([prepared.documents(), [dict(row) for row in examples]]),
        }

    def read(self, entry: TaskEntry, made_with: Mapping[str, Any]) -> _Cell | None:
        """Give the stored cell that was made exactly so, or None; DataError if it is damaged."""
        path = self._path(entry, made_with)
        if path is None or not path.is_file():
            return None
        value = parse_object(read_text(path), str(path))
        if value.get("made_with") != made_with:
            return None
        try:
            rows = tuple(replace(Row(**row), model=self._label) for row in value["rows"])
            samples = tuple(sample_from_dict(sample, str(path)) for sample in value["samples"])
        except (TypeError, KeyError) as error:
            raise DataError(f"{path}: a field is missing or unknown ({error}); delete it or --overwrite") from None
        return rows, tuple(replace(sample, model=self._label) for sample in samples)

    def write(self, entry: TaskEntry, made_with: Mapping[str, Any], cell: _Cell) -> None:
        """Keep a finished cell."""
        path = self._path(entry, made_with)
        if path is not None:
            rows, samples = ([asdict(record) for record in records] for records in cell)
            atomic_write_json(path, {"made_with": made_with, "rows": rows, "samples": samples})

    def _path(self, entry: TaskEntry, made_with: Mapping[str, Any]) -> Path | None:
        return None if self._folder is None else self._folder / f"{entry.name}-{_digest(made_with)[:16]}.json"


def _digest(value: Any) -> str:
    return text_digest(json.dumps(value, sort_keys=True, ensure_ascii=False))
