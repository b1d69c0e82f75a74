"""Option types that several commands share, so that one name means one thing everywhere."""

from typing import Annotated

import typer

from mnemon.errors import ConfigError

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local folder, the name of a checkpoint that ships with mnemon, or a Hugging Face hub name.",
        show_default=False,
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Empty an output folder that holds an earlier run.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, help="Seed of every random choice; the same seed gives the same result.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text for people.")]
KnockOutOption = Annotated[
    bool,
    typer.Option("--knock-out-memory", help="Silence the memory, to see what the model does without it."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or another torch device.")]


def pick_device(name: str) -> str:
    """Return the name of a torch device that this machine has."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: this machine has no CUDA device; use cpu or auto")
    return name
