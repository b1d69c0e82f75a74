"""`mnemon bench generation`: what new tokens cost after a prefix of any length."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mnemon.cli.bench_options import DTYPES, check_device, check_dtype, numbers, reporter, words
from mnemon.cli.display import command_line, silence_libraries
from mnemon.cli.options import JsonOption, OverwriteOption
from mnemon.errors import ConfigError
from mnemon.files import prepare_output_folder, read_text


def generation(
    models: Annotated[
        str,
        typer.Option(
            help="plain, lm2, lm2-full-attention, rmt, armt, mom, rules (one memory of every update rule), or rules' "
            "names."
        ),
    ] = "plain,lm2,rmt,mom,rules",
    prefixes: Annotated[str, typer.Option(help="Tokens read before; 4k is 4096.")] = "1k,8k,32k,128k",
    long: Annotated[bool, typer.Option("--long", help="Add a prefix of 1M tokens.")] = False,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after each prefix.")] = 1024,
    width: Annotated[int, typer.Option(min=1, help="Model width.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Blocks.")] = 2,
    heads: Annotated[int, typer.Option(min=1, help="Heads; divide the width.")] = 2,
    feed_forward: Annotated[
        int | None, typer.Option(min=1, help="Width of the plain model's feed-forward layers. (default: 4 x width)")
    ] = None,
    segment: Annotated[int, typer.Option(min=1, help="Segment length C of LM2, RMT and ARMT.")] = 256,
    span: Annotated[
        int | None, typer.Option(min=1, help="Tokens LM2's attention sees. (default: 2C)", show_default=False)
    ] = None,
    rule: Annotated[str, typer.Option(help="Update rule of the mixture.")] = "gated_delta_net",
    memories: Annotated[int, typer.Option(min=1, help="Routed memories of the mixture.")] = 4,
    top_k: Annotated[int, typer.Option(min=1, help="Memories that a token goes to, besides a shared one.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of generation; the models take turns.")] = 1,
    time_limit: Annotated[
        float, typer.Option(min=1, help="Seconds for all of a model; what is expected to take longer is left out.")
    ] = 75.0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, seconds: does everything run?")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results. (default: runs/bench/generation)")
    ] = None,
    json_output: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure generation after long prefixes: `mnemon bench generation --models plain,lm2,mom,gla`.

    Time and peak memory to generate 1,024 tokens after 1K to 128K tokens, all models of one width and depth with
    equally many parameters per token, each in a process of its own. The folder gets results.json, table.md and
    generation.png.
    """
    check_dtype(dtype)
    places = numbers("--prefixes", prefixes) + ([2**20] if long else [])
    chosen, target = words("--models", models), check_device(device)

    from mnemon.bench.cost import ModelShape
    from mnemon.bench.generation.measure import run_generation_benchmark
    from mnemon.bench.generation.report import write
    from mnemon.bench.generation.settings import GenerationSettings, model_names
    from mnemon.layers.mixture_of_memories import check_routing
    from mnemon.ops import get_rule

    names = model_names(chosen)
    check_routing(memories, top_k, None)
    if quick:
        width, layers, heads, feed_forward, segment, span = 32, 1, 2, 128, 16, 32
        places, new_tokens, repeats = [64, 256], 8, 2
    if width % heads or (width // heads) % 2:
        raise ConfigError(f"--width {width} with --heads {heads}: every head needs the same even width; change one")
    reach = 2 * segment if span is None else span
    if reach < segment:
        raise ConfigError(f"--span {reach} is below the segment length {segment}; raise it")
    settings = GenerationSettings(
        models=names,
        shape=ModelShape(width, feed_forward or 4 * width, layers, heads, heads, 256 if quick else 2048),
        prefixes=tuple(sorted(set(places))),
        new_tokens=new_tokens,
        repeats=repeats,
        time_limit=time_limit,
        segment_length=segment,
        attention_span=reach,
        num_slots=8 if quick else 64,
        num_memory_tokens=2 if quick else 16,
        mixture_rule=get_rule(rule).name,
        num_memories=memories,
        top_k=top_k,
        device=target,
        dtype=dtype,
        threads=threads,
    )
    folder = prepare_output_folder(output or Path("runs/bench/generation"), overwrite, resumable=False)
    silence_libraries()
    run = run_generation_benchmark(settings, command_line(sys.argv), reporter(json_output))
    write(folder, run)
    print(json.dumps({"output": str(folder), **asdict(run)}) if json_output else read_text(folder / "table.md"))
