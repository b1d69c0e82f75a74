"""`mnemon bench rmt`: what memory tokens cost beside the plain decoder."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mnemon.cli.bench_options import DTYPES, check_device, check_dtype, numbers, reporter
from mnemon.cli.display import command_line, silence_libraries
from mnemon.cli.options import JsonOption, OverwriteOption
from mnemon.files import prepare_output_folder, read_text


def rmt(
    tokens: Annotated[int, typer.Option(min=2, help="Tokens T of a training sequence.")] = 1024,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes of the training step.")] = "1,4",
    segment: Annotated[int, typer.Option(min=1, help="Segment length C.")] = 256,
    memory_tokens: Annotated[int, typer.Option(min=1, help="Memory tokens.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count; the models take turns.")] = 7,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, seconds: does everything run?")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results. (default: runs/bench/rmt)")
    ] = None,
    json_output: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure RMT and ARMT against a plain Llama: `mnemon bench rmt --repeats 9`.

    Forward and backward of a training step, all models in one process, beside what the multiply-adds predict. The
    folder gets results.json and table.md.
    """
    check_dtype(dtype)
    sizes, target = numbers("--batch-sizes", batch_sizes), check_device(device)

    from mnemon.bench.cost import ModelShape
    from mnemon.bench.rmt import RMTSettings, run_rmt_benchmark, write

    shape = ModelShape()
    if quick:
        shape, tokens, segment, memory_tokens, sizes = ModelShape(64, 128, 2, 4, 4, 256), 64, 16, 2, [1]
    settings = RMTSettings(
        shape=shape,
        tokens=tokens,
        batch_sizes=tuple(sorted(set(sizes))),
        segment_length=segment,
        num_memory_tokens=memory_tokens,
        repeats=repeats,
        device=target,
        dtype=dtype,
        threads=threads,
    )
    folder = prepare_output_folder(output or Path("runs/bench/rmt"), overwrite, resumable=False)
    silence_libraries()

    run = run_rmt_benchmark(settings, command_line(sys.argv), reporter(json_output))
    write(folder, run)
    print(json.dumps({"output": str(folder), **asdict(run)}) if json_output else read_text(folder / "table.md"))
