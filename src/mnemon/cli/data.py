"""`mnemon data`: write bAbI stories, BABILong and MQAR samples to files."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mnemon.cli.options import SeedOption
from mnemon.errors import CheckpointError, ConfigError
from mnemon.files import atomic_write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mnemon.data.sample import Sample

DEFAULT_TOKENIZER = "babilong-tiny-lm2"
PROGRESS_DELAY_SECONDS = 2.0

data_app = typer.Typer(help="Make data: bAbI stories, BABILong and MQAR samples.", no_args_is_help=True)

TaskOption = Annotated[str, typer.Option("--task", help="Task, qa1 ... qa10.")]
FileOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File to write; standard output when left out.", show_default=False),
]
OverwriteFileOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it exists.")]


@data_app.command("babi")
def babi(
    task: TaskOption = "qa1",
    stories: Annotated[int, typer.Option("--stories", min=1, help="Number of stories, of up to 5 questions.")] = 10,
    seed: SeedOption = 0,
    output: FileOption = None,
    overwrite: OverwriteFileOption = False,
) -> None:
    """Write generated bAbI stories in the official text format: `mnemon data babi --task qa2 --stories 3`."""
    from mnemon.data.babi import format_stories, generate

    _check_output(output, overwrite)
    _write(format_stories(generate(task, stories, seed)), output)


@data_app.command("babilong")
def babilong(
    task: TaskOption = "qa1",
    length: Annotated[
        str, typer.Option("--length", help="Length of a text in tokens: 0k (facts only), 1k, 2k, ... 512k, 1M, 10M.")
    ] = "4k",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Number of samples.")] = 100,
    tokenizer: Annotated[
        str,
        typer.Option("--tokenizer", help="What counts the tokens: a shipped checkpoint, a local folder or a hub name."),
    ] = DEFAULT_TOKENIZER,
    background: Annotated[
        str, typer.Option("--background", help="Text that hides the facts: stdlib, a folder of .txt files, or hf:NAME.")
    ] = "stdlib",
    split: Annotated[str, typer.Option("--split", help="Split of stories and background: train or test.")] = "test",
    seed: SeedOption = 0,
    output: FileOption = None,
    overwrite: OverwriteFileOption = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object that says what was made (needs -o).")
    ] = False,
) -> None:
    """Write BABILong samples in the published JSON form: `mnemon data babilong --length 1k -o 1k.json`."""
    from mnemon.data.babi.story import GENERATED_TASKS, check_task
    from mnemon.data.babilong import format_json, generate, parse_length

    check_task(task, GENERATED_TASKS)
    tokens = parse_length(length)
    _check_json(json_output, output)
    _check_output(output, overwrite)
    made = generate(
        task, tokens, samples, _load_tokenizer(tokenizer), background=background, split=_as_split(split), seed=seed
    )
    _write(format_json(_with_progress(made, samples, f"{task} {length}")), output, quiet=json_output)
    if json_output:
        facts = {"task": task, "length": tokens, "samples": samples, "tokenizer": tokenizer}
        print(json.dumps({**facts, "background": background, "split": split, "seed": seed, "file": str(output)}))


@data_app.command("mqar")
def mqar(
    length: Annotated[int, typer.Option("--length", help="Tokens of a sample, even.")] = 64,
    pairs: Annotated[int, typer.Option("--pairs", help="Key-value pairs; each key is asked for once.")] = 4,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Token ids, more than the length.")] = 8192,
    power_a: Annotated[
        float, typer.Option("--power-a", help="Where queries stand: 0.01 mostly early, 1 anywhere.")
    ] = 0.01,
    passes: Annotated[int, typer.Option("--passes", help="How often all pairs are shown.")] = 1,
    random_non_queries: Annotated[
        bool,
        typer.Option("--random-non-queries/--zero-fillers", help="Between the queries: any tokens, or the token 0."),
    ] = True,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Number of samples.")] = 100,
    seed: SeedOption = 0,
    output: FileOption = None,
    overwrite: OverwriteFileOption = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object that says what was made (needs -o).")
    ] = False,
) -> None:
    """Write MQAR samples, one JSON object per line: `mnemon data mqar --length 64 --pairs 8 -o mqar.jsonl`.

    A line holds `input_ids`, `labels` (the value at the index of its query, not shifted; -100 elsewhere) and `gaps`
    (tokens from a pair to its query; 0 elsewhere), all of the same length.
    """
    from mnemon.data.mqar import MqarSettings, generate

    settings = MqarSettings(vocab_size, length, pairs, power_a, passes, random_non_queries)
    _check_json(json_output, output)
    _check_output(output, overwrite)
    lines = (json.dumps(record) + "\n" for record in generate(settings, samples, seed=seed).records())
    _write("".join(lines), output, quiet=json_output)
    if json_output:
        print(json.dumps({**asdict(settings), "samples": samples, "seed": seed, "file": str(output)}))


def _check_json(json_output: bool, output: Path | None) -> None:
    if json_output and output is None:
        raise ConfigError("--json describes the file that was written; name one with -o FILE")


def _check_output(output: Path | None, overwrite: bool) -> None:
    """Refuse a file that exists before any work is done."""
    if output is None:
        return
    if output.is_dir():
        raise ConfigError(f"{output}: is a folder, expected a file to write")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: exists already; use --overwrite or another name")


def _as_split(name: str) -> Literal["train", "test"]:
    if name == "train":
        return "train"
    if name == "test":
        return "test"
    raise ConfigError(f"expected the split train or test, got {name!r}")


def _load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder, a shipped checkpoint or a hub model."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from mnemon.models.loading import resolve
    from mnemon.models.registration import register

    logging.set_verbosity_error()
    register()
    folder = Path(name).expanduser()
    source = str(folder) if (folder / "tokenizer.json").is_file() else resolve(name)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"cannot load the tokenizer of {name}: {first}") from error


def _with_progress(made: "Iterable[Sample]", total: int, title: str) -> "Iterator[Sample]":
    """Pass samples on; after two seconds show a bar on the terminal's standard error."""
    if not sys.stderr.isatty():
        yield from made
        return
    from rich.console import Console
    from rich.progress import Progress

    start = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(title, total=total, visible=False)
        for sample in made:
            progress.update(bar, advance=1, visible=time.monotonic() - start > PROGRESS_DELAY_SECONDS)
            yield sample


def _write(text: str, output: Path | None, quiet: bool = False) -> None:
    if output is None:
        sys.stdout.write(text)
        return
    atomic_write_text(output, text)
    if not quiet:
        print(f"wrote {output} ({len(text.encode()):,} bytes)", file=sys.stderr)
