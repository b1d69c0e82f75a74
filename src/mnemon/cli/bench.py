"""`mnemon bench`: what a memory costs beside the plain decoder, in time and in memory."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnemon.cli.bench_generation import generation
from mnemon.cli.bench_mom import mom
from mnemon.cli.bench_ops import ops
from mnemon.cli.bench_options import DTYPES, check_device, check_dtype, choices, numbers, reporter, words
from mnemon.cli.bench_rmt import rmt
from mnemon.cli.display import command_line, silence_libraries, token_bar
from mnemon.cli.options import JsonOption, OverwriteOption
from mnemon.errors import ConfigError
from mnemon.files import atomic_write_bytes, atomic_write_text, prepare_output_folder, read_text

if TYPE_CHECKING:
    from mnemon.bench.run import BenchRun
    from mnemon.bench.settings import Settings

bench_app = typer.Typer(help="Measure speed and memory against what one would otherwise use.", no_args_is_help=True)
bench_app.command("ops")(ops)
bench_app.command("mom")(mom)
bench_app.command("rmt")(rmt)
bench_app.command("generation")(generation)

_PARTS = ("train", "prefill", "decode")
_FLOWS = ("depth", "layer")


@bench_app.command("lm2")
def lm2(
    what: Annotated[str, typer.Option(help="What to measure, separated by commas.")] = "train,prefill,decode",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count; the models take turns.")] = 7,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens T of a training sequence.")] = 1024,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes of the training step.")] = "1,4",
    segments: Annotated[
        str | None, typer.Option(help="Segment lengths C, of which the first has the targets. (default: 256,64,T)")
    ] = None,
    memory: Annotated[
        str, typer.Option(help="Memories: compact (64 slots, W = D/4), full (256 slots, W = D) or SLOTSxWIDTH.")
    ] = "compact,full",
    contexts: Annotated[str, typer.Option(help="Contexts of prefill and decode; 4k is 4096.")] = "1k,4k,16k,32k,128k",
    long: Annotated[bool, typer.Option("--long", help="Add a context of 1M tokens.")] = False,
    span: Annotated[
        int | None, typer.Option(min=1, help="Tokens LM2's attention sees in prefill and decode. (default: 2C)")
    ] = None,
    flow: Annotated[
        str, typer.Option(help="depth: one bank runs through all blocks; layer: every block keeps its own.")
    ] = "depth",
    new_tokens: Annotated[int, typer.Option(min=1, help="New tokens per round of decode.")] = 32,
    time_limit: Annotated[
        float, typer.Option(min=1, help="Leave out a context whose reading is expected to take more seconds.")
    ] = 120.0,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Include AdamW in the training step.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, seconds: does everything run?")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results. (default: runs/bench/lm2)")
    ] = None,
    json_output: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure LM2 against a plain Llama: `mnemon bench lm2 --what train --repeats 9`.

    Training step, prefill and decoding, both models in one process, beside what the multiply-adds predict. The folder
    gets results.json, table.md and figures.
    """
    parts = choices("--what", what, _PARTS)
    check_dtype(dtype)
    if flow not in _FLOWS:
        raise ConfigError(f"--flow: unknown {flow!r}; expected {' or '.join(_FLOWS)}")
    sizes = numbers("--contexts", contexts) + ([2**20] if long else [])
    chosen_segments = numbers("--segments", segments) if segments is not None else [256, 64, tokens]
    settings = _settings(
        quick=quick,
        parts=parts,
        memories=words("--memory", memory),
        segments=chosen_segments,
        span=span,
        flow=flow,
        tokens=tokens,
        batch_sizes=tuple(numbers("--batch-sizes", batch_sizes)),
        contexts=tuple(sorted(set(sizes))),
        new_tokens=new_tokens,
        repeats=repeats,
        time_limit=time_limit,
        device=check_device(device),
        dtype=dtype,
        threads=threads,
        optimiser=optimizer,
    )
    folder = prepare_output_folder(output or Path("runs") / "bench" / "lm2", overwrite, resumable=False)
    run = _run(settings, folder, quiet=json_output)
    if json_output:
        from dataclasses import asdict

        print(json.dumps({"output": str(folder), **asdict(run)}))
    else:
        print(read_text(folder / "table.md"))


@bench_app.command("stream")
def stream(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="An LM2: a folder, a shipped checkpoint or a hub name."),
    ],
    tokens: Annotated[str, typer.Option(help="Length of the text; 1M is 1,048,576.")] = "1M",
    every: Annotated[int, typer.Option(min=256, help="Tokens between two looks at memory and clock.")] = 10_240,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results. (default: runs/bench/stream)")
    ] = None,
    json_output: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Read one very long text in one call: `mnemon bench stream babilong-tiny-lm2 --tokens 1M`.

    Shows whether memory and speed stay flat. The folder gets results.json, table.md and stream.png.
    """
    length = numbers("--tokens", tokens)[0]
    target = check_device(device)
    from mnemon.bench.run import circumstances
    from mnemon.bench.stream import StreamRun, check_length, long_text, write
    from mnemon.bench.stream import stream as measure
    from mnemon.evaluation.machine import describe_machine
    from mnemon.models.loading import load_model
    from mnemon.models.modeling_lm2 import LM2ForCausalLM

    check_length(length)
    silence_libraries()
    import torch

    torch.set_num_threads(threads)
    loaded, tokenizer = load_model(model, device=target)
    if not isinstance(loaded, LM2ForCausalLM):
        raise ConfigError(f"{model} has no memory; expected an LM2")
    folder = prepare_output_folder(output or Path("runs") / "bench" / "stream", overwrite, resumable=False)
    ids = long_text(tokenizer, length).to(target)
    with token_bar(not json_output, ids.shape[1]) as report:
        samples = measure(loaded, ids, every, report)
    machine = {**describe_machine(target), **circumstances()}
    run = StreamRun(Path(model).name, ids.shape[1], tuple(samples), command_line(sys.argv), machine)
    write(folder, run)
    if json_output:
        low, high = run.memory_spread()
        print(json.dumps({"output": str(folder), "memory_mib": [low, high], "tokens_per_second": run.speeds()}))
    else:
        print(read_text(folder / "table.md"))


def _settings(
    *,
    quick: bool,
    memories: list[str],
    segments: list[int],
    span: int | None,
    flow: str,
    tokens: int,
    batch_sizes: tuple[int, ...],
    contexts: tuple[int, ...],
    new_tokens: int,
    **others: object,
) -> "Settings":
    """Turn names into sizes; with `quick` everything becomes small."""
    from mnemon.bench.cost import MemoryShape, ModelShape
    from mnemon.bench.settings import Settings

    shape = ModelShape()
    if quick:
        shape = ModelShape(64, 128, 2, 4, 4, 256)
        segments, tokens, batch_sizes, contexts, new_tokens = [16], 64, (1,), (256,), 4
        span = min(span or 32, 32)
    sizes = {name: _memory_sizes(name, shape.hidden_size, quick) for name in memories}
    reach = 2 * segments[0] if span is None else span
    if reach < segments[0]:
        raise ConfigError(f"--span {reach} is below the segment length {segments[0]}; raise it")
    return Settings(
        shape=shape,
        memories=tuple(
            MemoryShape(name, *size, segment, flow=flow)
            for segment in dict.fromkeys(segments)
            for name, size in sizes.items()
        ),
        readers=tuple(
            MemoryShape(name, *size, segments[0], attention_span=reach, flow=flow) for name, size in sizes.items()
        ),
        tokens=tokens,
        batch_sizes=batch_sizes,
        default_segment=segments[0],
        contexts=contexts,
        new_tokens=new_tokens,
        **others,  # type: ignore[arg-type]
    )


def _run(settings: "Settings", folder: Path, quiet: bool) -> "BenchRun":
    """Measure and write everything."""
    from mnemon.bench.plots import all_charts
    from mnemon.bench.report import markdown
    from mnemon.bench.run import run_benchmark, write_results

    silence_libraries()

    run = run_benchmark(settings, command_line(sys.argv), reporter(quiet))
    charts = all_charts(run)
    write_results(folder, run)
    for chart in charts:
        atomic_write_bytes(folder / chart.name, chart.png)
    atomic_write_text(folder / "table.md", markdown(run, [(chart.title, chart.name) for chart in charts]))
    return run


def _memory_sizes(name: str, hidden_size: int, quick: bool) -> tuple[int, int]:
    """Return slots and slot width of a named memory."""
    shrink = 8 if quick else 1
    named = {"compact": (64 // shrink, hidden_size // 4), "full": (256 // shrink, hidden_size)}
    if name in named:
        return named[name]
    slots, times, width = name.partition("x")
    if not (times and slots.isdecimal() and width.isdecimal() and int(slots) and int(width) and int(width) % 4 == 0):
        raise ConfigError(f"--memory takes compact, full or SLOTSxWIDTH (width a multiple of 4), got {name!r}")
    return int(slots), int(width)
