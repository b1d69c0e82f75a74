"""How active the units of a memory were on every token of a text, as a typed value and a file.

A *unit* is what an explanation is about: a slot of an LM2 bank, or a memory of a MoM layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mnemon.errors import ConfigError, ShapeError
from mnemon.inspection.trace import Floats, Integers
from mnemon.typed_files import FileFormat, read_typed, write_typed

ACTIVATIONS = FileFormat("mnemon activations", version=1)

KINDS = {
    "read": "the share of the token's reads of the memory that falls on this slot",
    "write": "the share of what this slot is written from, within its segment, that falls on the token",
    "route": "the weight with which the token is sent to this memory, 0 where it is sent elsewhere",
}
"""What activations are, by their kind."""


@dataclass(frozen=True)
class Unit:
    """What can be explained.

    Attributes:
        name: in words: "block 0, slot 3", "block 1, memory 2".
        block: number of the decoder block.
        index: number of the slot or memory.
    """

    name: str
    block: int
    index: int


@dataclass(frozen=True)
class UnitActivations:
    """Activations of U units on a text of T tokens.

    Attributes:
        model: name of the model.
        kind: one of `KINDS`.
        units: the units.
        pieces: texts of the tokens.
        ids: their ids, [T].
        values: activations, float16, [T, U].
    """

    model: str
    kind: str
    units: tuple[Unit, ...]
    pieces: tuple[str, ...]
    ids: Integers
    values: Floats

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            ShapeError: naming the sizes.
        """
        expected = (len(self.pieces), len(self.units))
        if self.values.shape != expected or self.ids.shape != expected[:1]:
            raise ShapeError(
                f"expected activations of {expected[0]} tokens and {expected[1]} units, got values "
                f"{list(self.values.shape)} and ids {list(self.ids.shape)}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens T."""
        return len(self.pieces)

    def select(self, columns: Sequence[int]) -> "UnitActivations":
        """Return the activations of some units, by their numbers in `units`."""
        chosen = tuple(self.units[column] for column in columns)
        return replace(self, units=chosen, values=self.values[:, list(columns)])

    def column(self, block: int, index: int) -> int:
        """Return the number of a unit in `units`.

        Raises:
            ConfigError: the unit was not recorded.
        """
        for column, unit in enumerate(self.units):
            if (unit.block, unit.index) == (block, index):
                return column
        raise ConfigError(f"block {block}, unit {index} was not recorded; recorded: {_names(self.units)}")


def save_activations(path: str | Path, activations: UnitActivations, overwrite: bool = False) -> Path:
    """Write activations (see `mnemon.typed_files.write_typed` for what is refused)."""
    return write_typed(path, activations, ACTIVATIONS, overwrite)


def load_activations(path: str | Path) -> UnitActivations:
    """Read activations (see `mnemon.typed_files.read_typed` for what is refused)."""
    return read_typed(path, UnitActivations, ACTIVATIONS)


def most_varied(activations: UnitActivations, count: int) -> tuple[int, ...]:
    """Return the numbers of the units whose activation varies most over the text, the most varied first.

    A unit that is equally active everywhere says nothing about any token, however active it is. Of units that vary
    equally the earlier one comes first.
    """
    return tuple(_rank(activations.values.astype(np.float32).std(axis=0), count))


def _rank(spread: NDArray[np.floating], count: int) -> list[int]:
    return [int(column) for column in np.argsort(-spread, kind="stable")[:count]]


def _names(units: Sequence[Unit]) -> str:
    shown = [unit.name for unit in units[:4]]
    return "; ".join([*shown, f"... ({len(units)} in all)"] if len(units) > 4 else shown)
