"""`mnemon convert`: published checkpoints of MoM to mnemon's format, and back."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mnemon.cli.display import silence_libraries
from mnemon.cli.options import JsonOption

if TYPE_CHECKING:
    from mnemon.models.mom_tensors import Correspondence


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a checkpoint: config.json and safetensors.")],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to write; it appears whole or not at all.")
    ],
    to: Annotated[
        Literal["mnemon", "fla"],
        typer.Option("--to", help="mnemon, or fla for flash-linear-attention's own MoM format."),
    ] = "mnemon",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that mnemon has written earlier.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Convert a published MoM or Gated DeltaNet checkpoint, or one of mnemon's to flash-linear-attention.

    SRC may be of type mom or gated_deltanet (flash-linear-attention) or mom_gated_deltanet (the MoM authors).

    What cannot be converted is refused with the reason. Nothing is fetched, and no pickle is ever read.

    `mnemon convert MoM-Gated-Deltanet-340M mom-340m`

    `mnemon generate mom-340m --prompt "The capital of France"`

    `mnemon convert mom-340m mom-340m-fla --to fla`
    """
    from mnemon.models.conversion import convert as run

    silence_libraries(keep_bars=False)
    done = run(source, destination, to=to, overwrite=overwrite, track=_with_progress)
    if json_output:
        about = {"source": str(source), "destination": str(destination), **vars(done)}
        print(json.dumps(about, ensure_ascii=False))
        return
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    formats = f"{done.source_format} to {done.target_format}"
    print(f"{destination}: {done.parameters:,} parameters in {done.dtype}, {formats}")


def _with_progress(work: "Sequence[Correspondence]") -> "Iterator[Correspondence]":
    """Pass the work on, with a bar on the terminal's standard error."""
    if not sys.stderr.isatty():
        yield from work
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(work, description="tensors", console=Console(stderr=True), transient=True)
