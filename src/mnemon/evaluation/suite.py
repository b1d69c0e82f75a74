"""A whole evaluation: several models, their controls, the same samples for all, one run to write down.

This is what `mnemon eval` and the demo call. Where the samples come from is decided here once, so that no model is
measured on samples of its own.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mnemon.data.babilong import Sample
from mnemon.errors import ConfigError, DataError
from mnemon.evaluation.babilong import evaluate_babilong
from mnemon.evaluation.controls import ModelSpec, all_rows
from mnemon.evaluation.diagnostics import measure_memory
from mnemon.evaluation.machine import describe_machine
from mnemon.evaluation.results import Layout
from mnemon.evaluation.retrieval import Retriever
from mnemon.evaluation.run import EvaluationRun
from mnemon.evaluation.samples import (
    OFFICIAL_RESERVE,
    FixedSamples,
    GeneratedSamples,
    SampleSource,
    check_lengths,
    check_tasks,
)

_PROMPT_SHOWN = 1500

SuiteProgress = Callable[[str, str, str, int], None]
"""Called with (model label, task, length, number of samples just finished)."""


@dataclass(frozen=True)
class SuiteOptions:
    """What to measure, besides the models.

    Attributes:
        tasks: "qa1" ... "qa10" (any of the twenty with stories or files of one's own).
        lengths: length names such as "0k", "4k".
        num_samples: samples per task and length.
        samples_at: another number at some lengths, by length name; long texts cost more and may have to be fewer.
        background: "stdlib", a folder of text files or "hf:<name>".
        layout: "short" or "official" prompt.
        stories: per task, stories in place of generated ones.
        stories_name: where the stories came from, for the record.
        background_name: how to name the background in the record; empty for the background itself.
        batch_size: most prompts per call; None leaves it to the token budget.
        max_batch_tokens: most padded prompt tokens per call; None chooses for each model.
        controls: add the knocked-out row of every model with a memory, and with a retriever the rows that read whole
            texts.
        retriever: let every model read only what this finds in a text.
        diagnostics: look at what every memory does, on a few samples of each length.
    """

    tasks: tuple[str, ...]
    lengths: tuple[str, ...]
    num_samples: int = 100
    seed: int = 0
    background: str = "stdlib"
    layout: Layout = "short"
    stories: Mapping[str, Sequence[Any]] | None = None
    stories_name: str = "generated"
    background_name: str = ""
    batch_size: int | None = None
    max_batch_tokens: int | None = None
    max_new_tokens: int = 20
    controls: bool = True
    diagnostics: bool = False
    samples_at: Mapping[str, int] = field(default_factory=dict)
    retriever: Retriever | None = None


def evaluate_models(
    specs: Sequence[ModelSpec],
    options: SuiteOptions,
    *,
    samples: SampleSource | None = None,
    cells_folder: Path | None = None,
    command: str = "",
    progress: SuiteProgress | None = None,
) -> EvaluationRun:
    """Evaluate several models on the same samples.

    Args:
        specs: the models, at least one; those with a memory get their knocked-out row unless `options.controls` is off.
        options: what to measure.
        samples: a source of samples; None generates them, cut to length with the first model's tokenizer.
        cells_folder: folder for finished cells; those already there are taken over.
        command: command line for the record.
        progress: told after every batch.

    Returns:
        Results of all models, ready for `write_run`.

    Raises:
        ConfigError: if there is no model, or an option is wrong.
        DataError: if samples or stored cells cannot be used.
    """
    if not specs:
        raise ConfigError("no model given; name at least one")
    rows = all_rows(specs, options.retriever, controls=options.controls)
    if len({row.label for row in rows}) != len(rows):
        raise ConfigError(f"every model needs a label of its own, got {', '.join(row.label for row in rows)}")
    options = replace(options, tasks=check_tasks(options.tasks), lengths=check_lengths(options.lengths))
    source = samples or generated_samples(specs[0].tokenizer, options)
    results = []
    for row in rows:
        report = None if progress is None else _for_model(progress, row.label)
        result = evaluate_babilong(
            row.model,
            row.tokenizer,
            tasks=options.tasks,
            lengths=options.lengths,
            num_samples=options.num_samples,
            samples_at=options.samples_at,
            seed=options.seed,
            background=options.background_name or options.background,
            batch_size=options.batch_size,
            max_batch_tokens=options.max_batch_tokens,
            max_new_tokens=options.max_new_tokens,
            layout=options.layout,
            generate_kwargs=row.generate_kwargs,
            label=row.label,
            source=row.source,
            training=row.training,
            samples=source,
            stories=options.stories_name,
            retriever=row.retriever,
            cells_folder=cells_folder,
            progress=report,
        )
        results.append(result)
    machine = describe_machine(str(specs[0].model.device))
    reports = []
    if options.diagnostics:
        reports = measure_memory(specs, source, options.tasks, options.lengths, options.layout)
    return EvaluationRun(tuple(results), command, machine, _example_prompt(source, options), tuple(reports))


def number_of_questions(specs: Sequence[ModelSpec], options: SuiteOptions) -> int:
    """Give how many questions `evaluate_models` will ask, for a progress bar."""
    rows = all_rows(specs, options.retriever, controls=options.controls)
    per_task = sum(options.samples_at.get(length, options.num_samples) for length in options.lengths)
    return len(rows) * len(options.tasks) * per_task


def generated_samples(tokenizer: Any, options: SuiteOptions) -> GeneratedSamples:
    """Make the source of fresh samples that the options describe, cut to length with this tokenizer."""
    return GeneratedSamples(
        tokenizer,
        options.num_samples,
        background=options.background,
        seed=options.seed,
        reserve_tokens=OFFICIAL_RESERVE if options.layout == "official" else 0,
        stories=options.stories,
        samples_at=options.samples_at,
    )


def read_test_stories(folder: Path, tasks: Sequence[str]) -> dict[str, list[Any]]:
    """Read the official bAbI test files `qaN_*_test.txt` (or `.txt.gz`) of some tasks.

    Raises:
        DataError: if a task has no file or several, or a file cannot be read.
    """
    from mnemon.data.babi import read

    stories = {}
    for task in tasks:
        found = sorted(folder.glob(f"{task}_*_test.txt")) or sorted(folder.glob(f"{task}_*_test.txt.gz"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise DataError(f"{folder}: expected one file {task}_*_test.txt or .txt.gz, found {names}")
        stories[task] = list(read(found[0]))
    return stories


def read_published(paths: Sequence[Path], num_samples: int | None = None) -> FixedSamples:
    """Read published BABILong sets: JSON files named `qaN/LENGTH.json`, or folders that hold such files.

    Args:
        paths: files and folders; task and length are taken from the last two parts of every file's path.
        num_samples: use only the first so many samples of each file; None for all.

    Returns:
        The samples by task and length.

    Raises:
        DataError: if a path names no task and length, there is no file, or a file cannot be read.
    """
    from mnemon.data.babilong import read_json

    cells: dict[tuple[str, str], Sequence[Sample]] = {}
    files = [file for path in paths for file in (sorted(path.glob("**/*.json")) if path.is_dir() else [path])]
    for file in files:
        task, length = re.fullmatch(r"qa\d+", file.parent.name), re.fullmatch(r"\d+[kM]", file.stem)
        if task is None or length is None:
            raise DataError(f"{file}: expected a name such as qa1/4k.json, which says task and length")
        cells[task.group(), length.group()] = read_json(file, task.group(), length.group())
    if not cells:
        raise DataError(f"{', '.join(map(str, paths)) or 'no path'}: no file such as qa1/4k.json")
    return FixedSamples(cells, num_samples)


def _for_model(progress: SuiteProgress, label: str) -> Callable[[str, str, int], None]:
    return lambda task, length, count: progress(label, task, length, count)


def _example_prompt(source: SampleSource, options: SuiteOptions) -> str:
    from mnemon.data.encoding import evaluation_prompt

    prompt = evaluation_prompt(source.cell(options.tasks[0], options.lengths[0])[0], options.layout)
    if len(prompt) <= _PROMPT_SHOWN:
        return prompt
    half = _PROMPT_SHOWN // 2
    return f"{prompt[:half]}\n[... {len(prompt) - 2 * half:,} characters ...]\n{prompt[-half:]}"
