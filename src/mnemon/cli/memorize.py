"""`mnemon memorize`: read texts of any size once, and keep what the model remembers as a file."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnemon.cli.display import silence_libraries
from mnemon.cli.memory import as_memory_model, read_memory
from mnemon.cli.options import DeviceOption, JsonOption, ModelArgument, pick_device
from mnemon.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemon.data.text_stream import TextSource
    from mnemon.data.token_stream import TokenStream
    from mnemon.models.memory_model import MemoryModel
    from mnemon.models.state import MemoryState

_TOKENS_AT_ONCE = 1024  # between two looks at the clock


def memorize(
    model: ModelArgument,
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE...", help="Texts, plain or .gz; - or none is standard input.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the memory: NAME.memory.safetensors.")
    ] = None,
    append_to: Annotated[
        Path | None, typer.Option(help="Go on from the memory in this file, as if all had been read in one go.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="How the texts are encoded: utf-8, latin-1, cp1252, ...")] = "utf-8",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output file that exists.")] = False,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Read texts and keep what the model remembers: `mnemon memorize MODEL FILE... -o NAME.memory.safetensors`."""
    target = _check_output(output, overwrite)
    sources = _sources(files or [], encoding)

    from mnemon.data.token_stream import TokenStream
    from mnemon.models.loading import load_model, resolve

    silence_libraries(keep_bars=not Path(resolve(model)).is_dir())
    loaded, tokenizer = load_model(model, device=pick_device(device))
    reader = as_memory_model(loaded, model)
    stream = TokenStream(tokenizer)
    before = None if append_to is None else read_memory(append_to, reader, tokenizer)
    start = time.perf_counter()
    with _bar(sources) as report:
        state = _read(reader, tokenizer, stream, sources, before, report)
    seconds = time.perf_counter() - start
    state.save(target, tokenizer, overwrite)
    read = state.tokens_read[0] - (0 if before is None else before.tokens_read[0])
    if stream.forced_cuts:
        print(
            f"note: {stream.forced_cuts} stretches without a place to cut between two tokens were cut all the same",
            file=sys.stderr,
        )
    if json_output:
        result = {"model": model, "files": [source.name for source in sources], "memory": str(target)}
        numbers = {"tokens": read, "tokens_remembered": state.tokens_read[0], "bytes": target.stat().st_size}
        speed = {"seconds": seconds, "tokens_per_second": read / max(seconds, 1e-9)}
        print(json.dumps({**result, **numbers, **speed, "forced_cuts": stream.forced_cuts}, ensure_ascii=False))
    else:
        print(
            f"wrote {target} ({target.stat().st_size:,} bytes): {state.tokens_read[0]:,} tokens remembered, {read:,} "
            f"read now, {read / max(seconds, 1e-9):,.0f} tokens/s",
            file=sys.stderr,
        )


def _check_output(output: Path | None, overwrite: bool) -> Path:
    """Refuse what could not be written, before any work is done."""
    if output is None:
        raise ConfigError("there is no place for the memory; name a file with -o NAME.memory.safetensors")
    if output.is_dir():
        raise ConfigError(f"{output}: is a folder, expected a file to write")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: exists already; use --overwrite or another name")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{output}: cannot be written ({folder} is no folder to write to); choose another place")
    return output


def _sources(names: Sequence[str], encoding: str) -> "list[TextSource]":
    from mnemon.data.text_stream import STANDARD_INPUT, TextSource

    if not names:
        if sys.stdin is None or sys.stdin.isatty():
            raise ConfigError("there is no text; name a file, or give text on standard input")
        names = [STANDARD_INPUT]
    if list(names).count(STANDARD_INPUT) > 1:
        raise ConfigError("standard input (-) can be read only once")
    return [TextSource(name, encoding) for name in names]


def _read(
    model: "MemoryModel",
    tokenizer: object,
    stream: "TokenStream",
    sources: "Sequence[TextSource]",
    state: "MemoryState | None",
    report: "Callable[[int, int], None]",
) -> "MemoryState":
    """Read all texts, each tokenised by itself; the first of a new memory begins as the tokenizer begins a text.

    `report` is told the tokens read and the tokens known of so far.
    """
    import torch

    from mnemon.data.token_stream import beginning_ids

    read = known = 0
    for source in sources:
        for ids in stream.tokens(source.pieces()):
            if state is None:
                ids = [*beginning_ids(tokenizer), *ids]  # type: ignore[arg-type]
            known += len(ids)
            for first in range(0, len(ids), _TOKENS_AT_ONCE):
                some = ids[first : first + _TOKENS_AT_ONCE]
                state = model.memorize(torch.tensor([some]), state=state)
                read += len(some)
                report(read, known)
    assert state is not None  # an empty text has been refused
    return state


@contextmanager
def _bar(sources: "Sequence[TextSource]") -> "Iterator[Callable[[int, int], None]]":
    """Show on the terminal's standard error how many tokens are read, at what speed, and how long it will take."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.completed:,.0f} tokens"),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    sizes = [source.progress.total_bytes for source in sources]
    size = None if None in sizes else sum(filter(None, sizes))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task("reading", total=None, speed="")
        started = time.monotonic()

        def report(read: int, known: int) -> None:
            done = sum(source.progress.bytes_read for source in sources)
            # Every token is known once all bytes are in; until then there are as many per byte as there were so far.
            total = known * size / done if size and done else None
            speed = read / max(time.monotonic() - started, 1e-9)
            bar.update(line, completed=read, total=total, speed=f"{speed:,.0f} tokens/s")

        yield report
