"""What an answer loses without one part of the memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """A part of a memory that can be knocked out.

    Attributes:
        kind: "slot", "block", "memory" or "all".
        name: in words, such as "slot 3", "block 1", "memory 2 of block 0".
        block: the block, if it is about one.
        index: the slot or memory, if it is about one.
        removed: returns a context in which the model reads without that part. It acts from outside (hooks, wrapped
            methods), leaves the model as it was, and changes reads alone: the state itself stays as it is.
    """

    kind: str
    name: str
    block: int | None
    index: int | None
    removed: Callable[[], AbstractContextManager[Any]]
