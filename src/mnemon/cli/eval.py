"""`mnemon eval`: one or more models on BABILong, with controls, intervals and paired tests, or on another suite."""

import difflib
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli.display import command_line, portable, question_bar, silence_libraries
from mnemon.cli.eval_all import Finished, evaluate_all, finished_babilong, finished_harness, finished_measures
from mnemon.cli.eval_harness import (
    HARNESS_SUITES,
    available_tasks,
    check_suite,
    data_source,
    evaluate_harness,
    share_in_model,
    task_options,
)
from mnemon.cli.eval_retrieval import (
    ChunkTokensOption,
    RetrieverModelOption,
    RetrieverOption,
    TopKOption,
    UnitOption,
    build_retriever,
)
from mnemon.cli.options import DeviceOption, JsonOption, OverwriteOption, ResumeOption, SeedOption, pick_device
from mnemon.errors import ConfigError
from mnemon.files import prepare_output_folder

if TYPE_CHECKING:
    from mnemon.evaluation.controls import ModelSpec
    from mnemon.evaluation.results import Layout
    from mnemon.evaluation.run import EvaluationRun
    from mnemon.evaluation.samples import FixedSamples
    from mnemon.evaluation.suite import SuiteOptions

_DEFAULT_LENGTHS = "0k,1k,2k,4k,8k,16k"
_DEFAULT_TASKS = "qa1,qa2,qa3,qa4,qa5,qa6,qa7,qa8,qa9,qa10"
_COMMON_OPTIONS = {"models", "suite", "limit", "controls", "device", "output", "json_output", "overwrite"}
_BATCHED = {"data", "batch_size", "max_batch_tokens", "resume", "profile"}
_HARNESS = _BATCHED | {"tasks", "context_length"}
_SUITES = {
    "babilong": _BATCHED
    | {"tasks", "lengths", "samples", "samples_at", "seed", "background", "babi", "layout", "diagnostics"}
    | {"max_new_tokens", "retriever", "top_k", "retrieval_unit", "chunk_tokens", "retriever_model"},
    "mqar": {"samples", "slices", "seed"},
    "perplexity": {"samples", "lengths", "background"},
    "mmlu": _HARNESS | {"num_fewshot"},
    "recall": _HARNESS | {"answer_length"},
    "commonsense": _HARNESS | {"num_fewshot"},
    "longbench": _HARNESS,
    "all": _BATCHED | {"samples", "lengths", "slices", "seed", "background"},
}
"""Suites and the options that only some of them know."""


def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[LABEL=]MODEL...",
            help="Local folders, names of checkpoints that ship with mnemon, or Hugging Face hub names.",
            show_default=False,
        ),
    ],
    suite: Annotated[
        str,
        typer.Option(
            help="What to measure: babilong, mqar, perplexity (of held-out text), mmlu, recall, commonsense, "
            "longbench, or all there is data for."
        ),
    ] = "babilong",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks, separated by commas. (default: all of the suite; for BABILong what the first model was "
            "trained on, else qa1-qa10)"
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help=f"Context lengths in tokens, separated by commas. (default: {_DEFAULT_LENGTHS}; for perplexity the "
            "trained length times 1, 2, 4 and 8)"
        ),
    ] = None,
    slices: Annotated[
        str | None,
        typer.Option(
            help="For mqar: LENGTHxPAIRS, separated by commas. (default: what the first model was trained on)"
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Samples per task and length, or per slice; for perplexity the most windows.")
    ] = 100,
    samples_at: Annotated[
        str | None,
        typer.Option(help="Other numbers at some lengths, such as 8k=50,16k=25. (default: --samples everywhere)"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many samples per task and length, for a quick look.")
    ] = None,
    seed: SeedOption = 0,
    background: Annotated[
        str | None,
        typer.Option(
            help="Text that hides the facts, or that is read: stdlib, a folder of .txt files, or hf:NAME. (default: "
            "stdlib; for perplexity what the first model was trained on)"
        ),
    ] = None,
    babi: Annotated[
        Path | None,
        typer.Option(help="Folder of bAbI files qaN_*_test.txt[.gz]: hide these stories, not generated ones."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="For BABILong published samples: a file qaN/LENGTH.json or a folder of them; repeatable. For the "
            "suites of the harness a folder of TASK/SPLIT.jsonl, or sample for a few made questions. (default: the hub)"
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Prompt: short or official. (default: what the first model was trained for, else official)"),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls/--no-controls",
            help="Add every LM2 and RMT with its memory knocked out; beside a retriever, the models that read all.",
        ),
    ] = True,
    retriever: RetrieverOption = None,
    top_k: TopKOption = None,
    retrieval_unit: UnitOption = None,
    chunk_tokens: ChunkTokensOption = None,
    retriever_model: RetrieverModelOption = None,
    diagnostics: Annotated[
        bool, typer.Option("--diagnostics", help="Also show what every memory does: reads, gates, slots, by length.")
    ] = False,
    batch_size: Annotated[
        str, typer.Option(help="Prompts per call: a number, or auto for what fits into --max-batch-tokens.")
    ] = "auto",
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most prompt tokens per call, with padding. (default: chosen for each model)"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 20,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Examples before every question. (default: 5 for mmlu, else 0)", show_default=False),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens of a prompt with its answer; longer ones are cut. (default: 2048 for recall and "
            "commonsense, else what a model reads)",
        ),
    ] = None,
    answer_length: Annotated[
        int | None, typer.Option(min=1, help="Longest answer of the recall tasks in tokens. (default: 48)")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also say how much of the time the models themselves took.")
    ] = False,
    device: DeviceOption = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results. (default: runs/eval/<first model>)")
    ] = None,
    json_output: JsonOption = False,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
) -> None:
    """Measure models on BABILong or another suite: `mnemon eval babilong-tiny-lm2 babilong-tiny-plain --lengths 0k,4k`.

    All models answer the same questions. The folder gets results.json and table.md; for BABILong also
    predictions.jsonl, figures and report.html.
    """
    _check_suite(context, suite)
    names = [_split_label(name) for name in models]
    num_samples = samples if limit is None else min(samples, limit)
    folder = output or Path("runs") / "eval" / _file_name(names[0][0] or Path(names[0][1]).name)
    batch, where = _parse_batch_size(batch_size), pick_device(device)
    wanted = None if tasks is None else _words(tasks)

    def babilong(place: Path, specs: "list[ModelSpec] | None" = None) -> "Finished":
        if specs is not None:
            _need_tokenizers(specs)
        fixed = _published(data, babi, num_samples) if specs is None else None
        options = _options(
            names[0][1],
            tasks=tasks,
            lengths=lengths,
            num_samples=num_samples,
            samples_at=_parse_samples_at(samples_at, limit),
            seed=seed,
            background=background or "stdlib",
            babi=babi,
            layout=layout,
            controls=controls,
            diagnostics=diagnostics,
            batch_size=batch,
            max_batch_tokens=max_batch_tokens,
            max_new_tokens=max_new_tokens,
            fixed=fixed,
            retriever=build_retriever(retriever, top_k, retrieval_unit, chunk_tokens, retriever_model, where),
        )
        specs = specs or [_load(label, name, where) for label, name in names]
        prepare_output_folder(place, overwrite, resume and place.exists())
        run, clock = _run(specs, options, fixed, place, show_progress=not json_output)
        return finished_babilong(run, place, clock if profile else "")

    def measured(name: str, place: Path, specs: "list[ModelSpec]", trained: dict[str, Any], again: bool) -> "Finished":
        from mnemon.cli.eval_suites import evaluate_perplexity, evaluate_recall

        common: dict[str, Any] = {"num_samples": num_samples, "folder": place, "overwrite": again}
        common["show_progress"] = not json_output
        if name == "mqar":
            run = evaluate_recall(specs, trained, slices=slices, seed=seed, **common)
        else:
            asked = lengths if suite == "perplexity" else None  # in a run of all suites they are BABILong's
            run = evaluate_perplexity(specs, trained, lengths=asked, background=background, **common)
        return finished_measures(run, place)

    if suite == "babilong":
        finished = babilong(folder)
    elif suite in ("mqar", "perplexity"):
        specs, trained = _load_rows(names, where, controls)
        finished = measured(suite, folder, specs, trained, overwrite)
    else:
        from mnemon.evaluation.controls import with_controls

        suites = HARNESS_SUITES if suite == "all" else (suite,)
        options = task_options(limit, num_fewshot, context_length, answer_length)
        source = data_source(data)
        for name in suites:
            check_suite(name, wanted, options)
        loaded, trained = _load_rows(names, where, controls=False)
        rows = with_controls(loaded) if controls else loaded

        def harness(name: str, place: Path, asked: list[str] | None) -> "Finished":
            run = evaluate_harness(
                name,
                rows,
                source,
                options,
                tasks=asked,
                batch_size=batch,
                max_batch_tokens=max_batch_tokens,
                folder=place,
                overwrite=overwrite,
                resume=resume and place.exists(),
                show_progress=not json_output,
            )
            return finished_harness(run, place, profile)

        def if_there(name: str, place: Path) -> "Finished":
            return harness(name, place, available_tasks(source, name))

        if suite == "all":
            prepare_output_folder(folder, overwrite, resume)
            every: dict[str, Callable[[Path], Finished]] = {
                "babilong": lambda place: babilong(place, loaded),
                "mqar": lambda place: measured("mqar", place, rows, trained, resume),
                "perplexity": lambda place: measured("perplexity", place, rows, trained, resume),
                **{name: partial(if_there, name) for name in HARNESS_SUITES},
            }
            finished = evaluate_all(folder, every, command_line(sys.argv), show_titles=not json_output)
        else:
            finished = harness(suite, folder, wanted)
    finished.print(folder, json_output)


def _options(
    first_model: str,
    *,
    tasks: str | None,
    lengths: str | None,
    layout: str | None,
    background: str,
    babi: Path | None,
    fixed: "FixedSamples | None",
    **others: Any,
) -> "SuiteOptions":
    """Check the options that need no model, and fill in what the first model was trained for."""
    from mnemon.evaluation.checkpoints import has_tokenizer, trained_data, trained_layout, trained_tasks
    from mnemon.evaluation.samples import check_lengths, check_tasks
    from mnemon.evaluation.suite import SuiteOptions, read_test_stories
    from mnemon.models.loading import resolve

    folder = resolve(first_model)
    if not has_tokenizer(first_model) and trained_data(folder).get("kind") == "mqar":
        raise ConfigError(f"{first_model} was trained on mqar and has no tokenizer; use --suite mqar")
    known_tasks = trained_tasks(folder) or _DEFAULT_TASKS.split(",")
    known_lengths = _DEFAULT_LENGTHS.split(",")
    names: dict[str, Any] = {"background_name": portable(background)}
    if fixed is not None:
        known_tasks, known_lengths = fixed.tasks(), fixed.lengths()
        names |= {"background_name": "as published", "stories_name": "as published"}
    chosen = check_tasks(known_tasks if tasks is None else _words(tasks))
    if babi is not None:
        others["stories"] = read_test_stories(babi, chosen)
        names["stories_name"] = portable(str(babi))
    return SuiteOptions(
        tasks=chosen,
        lengths=check_lengths(known_lengths if lengths is None else _words(lengths)),
        layout=trained_layout(folder) if layout is None else _check_layout(layout),
        background=background,
        **names,
        **others,
    )


def _published(data: list[Path] | None, babi: Path | None, num_samples: int) -> "FixedSamples | None":
    if not data:
        return None
    if [str(path) for path in data] == ["sample"]:
        raise ConfigError("babilong makes its own samples; leave out --data sample, and see --limit")
    if babi is not None:
        raise ConfigError("--data and --babi exclude each other; give one of them")
    from mnemon.evaluation.suite import read_published

    return read_published(data, num_samples)


def _check_suite(context: typer.Context, suite: str) -> None:
    """Refuse an unknown suite, and options that say nothing about this one."""
    if suite not in _SUITES:
        near = difflib.get_close_matches(suite.lower(), _SUITES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown suite {suite!r}; {hint}expected one of {', '.join(_SUITES)}")
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and name not in _COMMON_OPTIONS and name not in _SUITES[suite]:
            homes = [other for other, names in _SUITES.items() if name in names]
            raise ConfigError(f"{parameter.opts[0]} is for --suite {', '.join(homes)}; for {suite} leave it out")


def _load_rows(
    names: list[tuple[str | None, str]], device: str, controls: bool
) -> "tuple[list[ModelSpec], dict[str, Any]]":
    """Load models with or without tokenizers, and what the first one was trained on."""
    from mnemon.evaluation.checkpoints import has_tokenizer, load_network_spec, trained_data
    from mnemon.evaluation.controls import with_controls
    from mnemon.models.loading import resolve

    specs = []
    for label, name in names:
        if has_tokenizer(name):
            specs.append(_load(label, name, device))
        else:
            silence_libraries()
            specs.append(load_network_spec(label or Path(name).name, name, device=device, source=portable(name)))
    return with_controls(specs) if controls else specs, trained_data(resolve(names[0][1]))


def _load(label: str | None, name: str, device: str) -> "ModelSpec":
    from mnemon.evaluation.checkpoints import load_spec

    silence_libraries()
    return load_spec(label or Path(name).name, name, device=device, source=portable(name))


def _run(
    specs: "list[ModelSpec]", options: "SuiteOptions", fixed: "FixedSamples | None", folder: Path, show_progress: bool
) -> "tuple[EvaluationRun, str]":
    """Evaluate and write everything, and say how much of the time the models took.

    An interruption leaves the finished cells for --resume.
    """
    from mnemon.evaluation.clock import TimedSamples, forward_clock
    from mnemon.evaluation.run import write_run
    from mnemon.evaluation.suite import evaluate_models, generated_samples, number_of_questions

    source = TimedSamples(generated_samples(specs[0].tokenizer, options) if fixed is None else fixed)
    try:
        with ExitStack() as stack:
            clocks = [stack.enter_context(forward_clock(spec.model)) for spec in specs]
            progress = stack.enter_context(question_bar(show_progress, number_of_questions(specs, options)))
            started = time.perf_counter()
            run = evaluate_models(
                specs,
                options,
                samples=source,
                cells_folder=folder / "cells",
                command=command_line(sys.argv),
                progress=progress,
            )
            seconds = time.perf_counter() - started
    except KeyboardInterrupt:
        print(f"{folder}: finished cells are kept; go on with --resume", file=sys.stderr)
        raise
    write_run(folder, run)
    share = share_in_model(sum(clock.seconds for clock in clocks), seconds - source.seconds)
    return run, f"{share}; making the samples took {source.seconds:.2f} s more"


def _need_tokenizers(specs: "list[ModelSpec]") -> None:
    for spec in specs:
        if spec.tokenizer is None:
            raise ConfigError(f"{spec.label} has no tokenizer, so it reads no text")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _split_label(argument: str) -> tuple[str | None, str]:
    label, equals, name = argument.partition("=")
    if equals and label.strip() and name and "/" not in label:
        return label.strip(), name
    return None, argument


def _check_layout(layout: str) -> "Layout":
    from mnemon.evaluation.results import LAYOUTS

    for known in LAYOUTS:
        if layout == known:
            return known
    raise ConfigError(f"unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}")


def _parse_batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--batch-size must be auto or a number of at least 1, got {text!r}")
    return int(text)


def _parse_samples_at(text: str | None, limit: int | None) -> dict[str, int]:
    from mnemon.evaluation.samples import check_lengths

    numbers: dict[str, int] = {}
    for entry in _words(text or ""):
        length, _, number = entry.partition("=")
        if not number.isdecimal() or int(number) < 1:
            raise ConfigError(f"--samples-at takes LENGTH=NUMBER pairs such as 8k=50,16k=25, got {entry!r}")
        numbers[check_lengths([length])[0]] = int(number) if limit is None else min(int(number), limit)
    return numbers


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "model"
