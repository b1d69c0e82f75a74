"""`mnemon bench mom`: mixtures of memories beside single memories."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mnemon.cli.bench_options import DTYPES, check_device, check_dtype, choices, numbers, reporter, words
from mnemon.cli.display import command_line, silence_libraries
from mnemon.cli.options import JsonOption, OverwriteOption
from mnemon.files import prepare_output_folder, read_text

_PARTS = ("layer", "decode")


def mom(
    rules: Annotated[str, typer.Option(help="Update rules, separated by commas, or all.")] = "gated_delta_net,gla",
    what: Annotated[str, typer.Option(help="What to measure.")] = ",".join(_PARTS),
    memories: Annotated[int, typer.Option(min=1, help="Routed memories.")] = 4,
    top_k: Annotated[int, typer.Option(min=1, help="Memories that a token goes to.")] = 2,
    shared: Annotated[bool, typer.Option(help="One more memory gets every token.")] = True,
    width: Annotated[int, typer.Option(min=1, help="Model width.")] = 256,
    heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of keys and values per head.")] = 64,
    tokens: Annotated[str, typer.Option(help="Tokens per sequence of the layer's passes; 4k is 4096.")] = "2k",
    batch_sizes: Annotated[str, typer.Option(help="Sequences of the layer's passes.")] = "1,4",
    contexts: Annotated[str, typer.Option(help="Tokens read before decoding.")] = "1k,16k,128k",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count; everybody takes turns.")] = 7,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, seconds: does everything run?")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results. (default: runs/bench/mom)")
    ] = None,
    json_output: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure mixtures of memories against single memories: `mnemon bench mom --rules gated_delta_net,gla`.

    Forward and backward of a layer against as many single-memory layers as a token has memories; decoding time and
    state over the context. The folder gets results.json, table.md and decode.png.
    """
    parts = choices("--what", what, _PARTS)
    check_dtype(dtype)
    length = numbers("--tokens", tokens)[0]
    sizes, places = numbers("--batch-sizes", batch_sizes), numbers("--contexts", contexts)
    chosen = words("--rules", rules)
    target = check_device(device)

    from mnemon.bench.mom import MoMSettings, run_mom_benchmark, write
    from mnemon.layers.mixture_of_memories import check_routing
    from mnemon.ops import get_rule, list_rules

    check_routing(memories, top_k, None)
    names = tuple(dict.fromkeys(get_rule(name).name for name in (list_rules() if chosen == ["all"] else chosen)))
    if quick:
        width, heads, head_dim, length, sizes, places, repeats = 32, 2, 16, 128, [1, 2], [64, 256], 2
    settings = MoMSettings(
        parts=parts,
        rules=names,
        hidden_size=width,
        num_heads=heads,
        head_dim=head_dim,
        num_memories=memories,
        top_k=top_k,
        shared_memory=shared,
        tokens=length,
        batch_sizes=tuple(sorted(set(sizes))),
        contexts=tuple(sorted(set(places))),
        new_tokens=4 if quick else 64,
        repeats=repeats,
        device=target,
        dtype=dtype,
        threads=threads,
    )
    folder = prepare_output_folder(output or Path("runs/bench/mom"), overwrite, resumable=False)
    silence_libraries()

    run = run_mom_benchmark(settings, command_line(sys.argv), reporter(json_output))
    write(folder, run)
    print(json.dumps({"output": str(folder), **asdict(run)}) if json_output else read_text(folder / "table.md"))
