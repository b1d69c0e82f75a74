"""What the benchmarks share on the command line: option values, whose mistakes are one line, and words on the way."""

import sys
from collections.abc import Callable

from mnemon.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(name: str) -> None:
    """Refuse a dtype that the benchmarks do not have."""
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; expected one of {', '.join(DTYPES)}")


def check_device(name: str) -> str:
    """Return the name of a torch device that this machine has."""
    import torch

    if name != "cpu" and not name.startswith("cuda"):
        raise ConfigError(f"unknown device {name!r}; expected cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: this machine has no CUDA device; use cpu")
    return name


def words(option: str, text: str) -> list[str]:
    """Split at commas; at least one word must be there."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise ConfigError(f"{option} is empty; name at least one")
    return found


def choices(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Split at commas; every word must be known."""
    chosen = words(option, text)
    for word in chosen:
        if word not in known:
            raise ConfigError(f"{option}: unknown {word!r}; expected some of {', '.join(known)}")
    return tuple(chosen)


def numbers(option: str, text: str) -> list[int]:
    """Split at commas into numbers of at least 1; 4k is 4096 and 1M is 1,048,576."""
    found = []
    for word in words(option, text):
        factor = {"k": 2**10, "m": 2**20}.get(word[-1].lower(), 1)
        digits = word if factor == 1 else word[:-1]
        if not digits.isdecimal() or int(digits) < 1:
            raise ConfigError(f"{option} takes numbers of at least 1 such as 256 or 4k, got {word!r}")
        found.append(int(digits) * factor)
    return found


def reporter(quiet: bool) -> Callable[[str], None]:
    """Return what tells the user, on standard error, what is measured next; nothing if `quiet`."""
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr))
