"""`mnemon bench ops`: the speed of the update rules, form by form."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnemon.cli.bench_options import DTYPES, check_device, check_dtype, choices, numbers, reporter, words
from mnemon.cli.display import command_line, silence_libraries
from mnemon.cli.options import JsonOption, OverwriteOption
from mnemon.errors import RunError
from mnemon.files import prepare_output_folder, read_text

if TYPE_CHECKING:
    from mnemon.bench.ops.settings import OpsSettings

_PARTS = ("forward", "backward", "step")
_CPU_LENGTHS, _CUDA_LENGTHS = "512,2k,4k,8k,64k", "2k,4k,8k,32k,64k"


def ops(
    rules: Annotated[
        str | None, typer.Option(help="Update rules, separated by commas. (default: all)", show_default=False)
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help=f"Tokens per sequence; 4k is 4096. (default: {_CPU_LENGTHS}; on a GPU {_CUDA_LENGTHS})"),
    ] = None,
    what: Annotated[str, typer.Option(help="What to measure; backward is forward and backward.")] = ",".join(_PARTS),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count; everybody takes turns.")] = 7,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of forward and backward.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Heads H.")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of keys and values per head.")] = 64,
    time_limit: Annotated[
        float, typer.Option(min=0, help="Leave out what is expected to take more seconds for one run.")
    ] = 10.0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, seconds: does everything run?")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results. (default: runs/bench/ops)")
    ] = None,
    json_output: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure update rules, form by form: `mnemon bench ops --rules gated_delta_net,gla`.

    Every form beside the others and beside published code, and one step beside a copy of the state. A rule that breaks
    the contract is not measured, and the exit code is 2. The folder gets results.json, table.md and figures.
    """
    parts = choices("--what", what, _PARTS)
    check_dtype(dtype)
    default_lengths = _CUDA_LENGTHS if device.startswith("cuda") else _CPU_LENGTHS
    sizes = numbers("--lengths", default_lengths if lengths is None else lengths)
    chosen = words("--rules", rules) if rules is not None else None
    target = check_device(device)

    from mnemon.bench.ops.settings import MIB, OpsSettings
    from mnemon.ops import get_rule, list_rules

    names = tuple(dict.fromkeys(get_rule(name).name for name in chosen or list_rules()))
    if quick:
        sizes, heads, head_dim = [64, 256], 2, 16
    settings = OpsSettings(
        parts=parts,
        rules=names,
        lengths=tuple(sorted(set(sizes))),
        repeats=repeats,
        time_limit=time_limit,
        device=target,
        dtype=dtype,
        threads=threads,
        batch_size=batch_size,
        num_heads=heads,
        head_dim=head_dim,
        num_slots=head_dim,
        step_bytes=MIB // 4 if quick else 64 * MIB,
        all_variants=not quick,
    )
    _measure(settings, prepare_output_folder(output or Path("runs/bench/ops"), overwrite, resumable=False), json_output)


def _measure(settings: "OpsSettings", folder: Path, json_output: bool) -> None:
    """Measure, write and print everything; then refuse if a rule is at fault."""
    silence_libraries()
    from dataclasses import asdict

    from mnemon.bench.ops.files import write
    from mnemon.bench.ops.measure import run_ops_benchmark

    run = run_ops_benchmark(settings, command_line(sys.argv), reporter(json_output))
    write(folder, run)
    print(json.dumps({"output": str(folder), **asdict(run)}) if json_output else read_text(folder / "table.md"))
    faults = run.faults()
    if faults:
        raise RunError(f"{'; '.join(faults)}; `mnemon rules NAME --check` shows more")
