"""`mnemon eval --suite mqar` and `--suite perplexity`: the suites that need no generation."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemon.cli.display import command_line, token_bar
from mnemon.errors import ConfigError
from mnemon.files import prepare_output_folder

if TYPE_CHECKING:
    from mnemon.data.mqar import MqarSettings
    from mnemon.evaluation.controls import ModelSpec
    from mnemon.evaluation.measures import Measured, MeasuredRun, Progress

_DEFAULT_SLICES = "64x4,64x8,64x16,128x32,256x64"
_DEFAULT_LENGTH = 512


def evaluate_recall(
    specs: "Sequence[ModelSpec]",
    trained: dict[str, Any],
    *,
    slices: str | None,
    num_samples: int,
    seed: int,
    folder: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure recall on MQAR, write and print it.

    Args:
        specs: models.
        trained: `data` section of the first model's recipe, which fills in what is not asked for; empty if unknown.
        slices: LENGTHxPAIRS, separated by commas; None = the trained ones.
        num_samples: samples per slice.
        seed: of the samples.
        folder: output folder.
        overwrite: empty it first.
        as_json: print JSON.
    """
    from mnemon.evaluation.measures import recall_rows

    settings = _slices(slices, trained if trained.get("kind") == "mqar" else {}, specs[0].model.config.vocab_size)
    total = len(specs) * num_samples * sum(part.length for part in settings)
    about = {"slices": [vars(part) for part in settings], "samples": num_samples, "seed": seed}
    _run(
        "mqar",
        specs,
        about,
        lambda progress: recall_rows(specs, settings, num_samples, seed, progress),
        total,
        folder,
        overwrite,
        as_json,
    )


def evaluate_perplexity(
    specs: "Sequence[ModelSpec]",
    trained: dict[str, Any],
    *,
    lengths: str | None,
    background: str | None,
    num_samples: int,
    folder: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure perplexity on held-out text, write and print it.

    Args:
        specs: models with their tokenizers.
        trained: `data` section of the first model's recipe, which fills in what is not asked for; empty if unknown.
        lengths: block lengths in tokens, separated by commas; None = the trained one times 1, 2, 4 and 8.
        background: text; None = the trained one, else `stdlib`.
        num_samples: most windows of the longest length.
        folder: output folder.
        overwrite: empty it first.
        as_json: print JSON.
    """
    from mnemon.data.sample import parse_length
    from mnemon.evaluation.measures import perplexity_rows
    from mnemon.metrics.perplexity import FACTORS

    known = trained if trained.get("kind") == "text" else {}
    source = background or str(known.get("background", "stdlib"))
    if lengths is None:
        blocks = [factor * int(known.get("length", _DEFAULT_LENGTH)) for factor in FACTORS]
    else:
        blocks = sorted({parse_length(word.strip()) for word in lengths.split(",") if word.strip()})
    if not blocks:
        raise ConfigError(f"--lengths takes numbers of tokens such as 256,512, got {lengths!r}")
    for spec in specs:
        if spec.tokenizer is None:
            raise ConfigError(f"{spec.label} has no tokenizer, so it reads no text; use --suite mqar")
    total = len(specs) * num_samples * max(blocks) * len(blocks)
    about = {"background": source, "lengths": blocks, "samples": num_samples}
    _run(
        "perplexity",
        specs,
        about,
        lambda progress: perplexity_rows(specs, blocks, num_samples, source, progress),
        total,
        folder,
        overwrite,
        as_json,
    )


def _slices(asked: str | None, trained: dict[str, Any], vocab_size: int) -> "list[MqarSettings]":
    """Return the settings of every slice, from the command line or else from the first model's recipe."""
    from mnemon.data.mqar import MqarSettings

    options: dict[str, Any] = {"vocab_size": vocab_size}
    for name in ("vocab_size", "power_a", "num_passes", "random_non_queries"):
        if name in trained:
            options[name] = trained[name]
    pairs = [(part["length"], part["num_pairs"]) for part in trained.get("slices", ())]
    if asked is not None or not pairs:
        pairs = [_parse_slice(word.strip()) for word in (asked or _DEFAULT_SLICES).split(",") if word.strip()]
    if not pairs:
        raise ConfigError(f"--slices takes LENGTHxPAIRS such as {_DEFAULT_SLICES}, got {asked!r}")
    return [MqarSettings(length=length, num_pairs=count, **options) for length, count in pairs]


def _parse_slice(word: str) -> tuple[int, int]:
    length, _, pairs = word.partition("x")
    if not length.isdecimal() or not pairs.isdecimal():
        raise ConfigError(f"--slices takes LENGTHxPAIRS such as {_DEFAULT_SLICES}, got {word!r}")
    return int(length), int(pairs)


def _run(
    suite: str,
    specs: "Sequence[ModelSpec]",
    settings: dict[str, Any],
    measure: "Callable[[Progress], Measured]",
    total: int,
    folder: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    from mnemon.evaluation.machine import describe_machine
    from mnemon.evaluation.measures import MeasuredRun, write_measures

    prepare_output_folder(folder, overwrite)
    with token_bar(not as_json, total) as progress:
        rows, samples = measure(progress)
    machine = describe_machine(str(specs[0].model.device))
    run = MeasuredRun(suite, settings, rows, command_line(sys.argv), machine, samples)
    write_measures(folder, run)
    _print(run, folder, as_json)


def _print(run: "MeasuredRun", folder: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"output": str(folder), **run.value()}, ensure_ascii=False))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mnemon.evaluation.measures import NOTES, TABLE, TITLES, measures_grid, model_lines

    grid = measures_grid(run, with_models=False)
    table = Table(title=TITLES[run.suite], box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    for number, name in enumerate(grid.head):
        table.add_column(name.replace("[", "\\["), justify="left" if number == 0 else "right", no_wrap=True)
    for line in grid.lines:
        table.add_row(*(text.replace("[", "\\[") for text in line))
    console = Console()
    console.print(table)
    for note in (*model_lines(run), NOTES[run.suite]):
        console.print(note, style="dim", markup=False)
    print(f"Table: {folder / TABLE}")
