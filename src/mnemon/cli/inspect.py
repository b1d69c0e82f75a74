"""`mnemon inspect`: record what a memory does while a model reads, and write a page about it."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli.display import silence_libraries
from mnemon.cli.memory import MemoryOption, as_memory_model, read_memory
from mnemon.cli.options import DeviceOption, JsonOption, pick_device
from mnemon.errors import ConfigError
from mnemon.files import read_text

if TYPE_CHECKING:
    from mnemon.inspection.explain.explainer import Explainer
    from mnemon.inspection.sources import Reader
    from mnemon.inspection.trace import Trace

    Source = Callable[[Any, Any], Reader]
    """From a model and its tokenizer to what is read."""


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A local folder, the name of a checkpoint that ships with mnemon, or a Hugging Face hub name.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Read this text file.")] = None,
    babilong: Annotated[
        str | None, typer.Option(metavar="TASK:LENGTH:SEED", help="Read a BABILong sample, such as qa1:4k:0.")
    ] = None,
    memory: MemoryOption = None,
    prompt: Annotated[str | None, typer.Option(help="With --memory: what is read after it.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Show this trace, which --save-trace wrote; without MODEL.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    encoding: Annotated[str, typer.Option(help="With --text: how the file is encoded.")] = "utf-8",
    save_trace: Annotated[Path | None, typer.Option(help="Also write what was recorded, as a file.")] = None,
    explain: Annotated[int, typer.Option(min=0, help="Explain so many slots or memories.")] = 0,
    explainer: Annotated[
        str | None,
        typer.Option(
            help="With --explain: built-in (the default), a model, or the address of an OpenAI-compatible endpoint."
        ),
    ] = None,
    explainer_model: Annotated[str | None, typer.Option(help="With an endpoint: the model to ask there.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Look into a memory: what is written, what is read, and what it is good for, as one HTML page.

    `mnemon inspect babilong-tiny-lm2 --babilong qa1:4k:0 -o report.html`

    `mnemon inspect babilong-tiny-lm2 --text story.txt -o report.html --save-trace story.trace.safetensors`

    `mnemon inspect --trace story.trace.safetensors -o report.html`
    """
    from mnemon.inspection.page import write_page
    from mnemon.inspection.trace import load_trace
    from mnemon.inspection.trace import save_trace as write_trace

    _check(model, {"--text": text, "--babilong": babilong, "--memory": memory, "--trace": trace}, prompt)
    _check_explainer(explain, explainer, explainer_model)
    for path in (output, save_trace):
        if path is not None and path.exists() and not overwrite:  # before anything is read
            raise ConfigError(f"{path}: exists already; use --overwrite or another name")
    if trace is not None:
        if explain or save_trace is not None:
            raise ConfigError("--trace shows what was recorded; leave out --explain and --save-trace, or record again")
        shown = load_trace(trace)
    else:
        assert model is not None
        source = _source(text, encoding, babilong, memory, prompt)
        who = _explainer(explainer, explainer_model, device) if explain else None
        shown = _record(model, source, device, who, explain, show_progress=not json_output)
    if save_trace is not None:
        write_trace(save_trace, shown, overwrite)
    write_page(shown, output, overwrite)
    _report(shown, output, save_trace, json_output)


def _check(model: str | None, sources: dict[str, Any], prompt: str | None) -> None:
    """Refuse options that do not fit together."""
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise ConfigError(f"expected one of --text, --babilong, --memory and --trace, got {got}")
    if (model is None) != (given == ["--trace"]):
        problem = "--trace needs no MODEL; leave it out" if model else f"{given[0]} needs a MODEL that reads; name one"
        raise ConfigError(problem)
    if (prompt is None) == (given == ["--memory"]):
        problem = (
            "--prompt goes with --memory" if prompt is not None else "--memory needs a --prompt to be read after it"
        )
        raise ConfigError(problem)


def _check_explainer(explain: int, explainer: str | None, explainer_model: str | None) -> None:
    """Refuse an explainer that has nothing to explain."""
    if explainer_model is not None and explainer is None:
        raise ConfigError("--explainer-model says which model to ask at an endpoint; add --explainer http://...")
    if explainer is not None and not explain:
        raise ConfigError("--explainer says who explains; add --explain N, how many units")


def _source(
    text: Path | None, encoding: str, babilong: str | None, memory: Path | None, prompt: str | None
) -> "Source":
    """Return what tells, once there is a model, what it is to read; a text is read from its file at once."""
    from mnemon.inspection.sources import babilong_source, memory_source, text_source

    if text is not None:
        name, contents = text.name, read_text(text, encoding)
        return lambda _, tokenizer: text_source(contents, name, tokenizer)
    if babilong is not None:
        return lambda _, tokenizer: babilong_source(babilong, tokenizer)
    assert memory is not None
    assert prompt is not None
    return lambda model, tokenizer: memory_source(read_memory(memory, model, tokenizer), memory.name, prompt, tokenizer)


def _explainer(name: str | None, model: str | None, device: str) -> "Explainer":
    """Return who explains; what is wrong with that is said before anything is read."""
    from mnemon.inspection.explain.choose import BUILT_IN, explainer_from_option

    return explainer_from_option(name or BUILT_IN, model, pick_device(device))


def _record(
    name: str, source: "Source", device: str, explainer: "Explainer | None", explain: int, show_progress: bool
) -> "Trace":
    """Let a model read, and return what was recorded, with the explanations that were asked for."""
    from mnemon.inspection.record import record
    from mnemon.models.loading import load_model, resolve

    silence_libraries(keep_bars=not Path(resolve(name)).is_dir())  # only a download is worth a bar
    loaded, tokenizer = load_model(name, device=pick_device(device))
    model = as_memory_model(loaded, name)
    if explainer is not None:
        from mnemon.inspection.explain.record import explain_memory, units_of

        units_of(model)  # refuses a model that has none before the text is read
    reader = source(model, tokenizer)
    with _bar(show_progress, "tokens") as progress:
        trace = record(model, tokenizer, **vars(reader), name=Path(name).name, progress=progress)
    if explainer is None:
        return trace
    with _bar(show_progress, "units explained") as progress:
        explanations = explain_memory(
            model, tokenizer, reader.ids, explainer, explain, state=reader.state, progress=progress
        )
    return replace(trace, explanations=explanations)


@contextmanager
def _bar(show: bool, unit: str) -> "Iterator[Callable[[int, int], None] | None]":
    """Show on standard error how much is done."""
    if not show or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.completed:,} of {task.total:,} {task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(unit, total=1)
        yield lambda done, all_: bar.update(task, completed=done, total=all_)


def _report(trace: "Trace", output: Path, saved: Path | None, json_output: bool) -> None:
    """Say what was written."""
    text = trace.text
    if json_output:
        about = {
            "page": str(output),
            "trace": None if saved is None else str(saved),
            "model": trace.model,
            "source": trace.source.name,
            "tokens": text.num_tokens,
            "segments": text.num_segments,
            "columns": text.num_columns,
            "explanations": len(trace.explanations),
            "notes": [*trace.notes, *_unexplained(trace)],
        }
        print(json.dumps(about, ensure_ascii=False))
        return
    for note in (*trace.notes, *_unexplained(trace)):
        print(f"note: {note}", file=sys.stderr)
    also = f"; {saved}: what was recorded" if saved is not None else ""
    print(f"{output}: {trace.model}, {text.num_tokens:,} tokens in {text.num_segments:,} segments{also}")


def _unexplained(trace: "Trace") -> list[str]:
    """Say for how many units the explainer found no words, one line for every reason."""
    reasons = Counter(unit.note for unit in trace.explanations if unit.text is None)
    every = len(trace.explanations)
    return [f"{number} of {every} units were not explained: {reason}" for reason, number in reasons.items()]
