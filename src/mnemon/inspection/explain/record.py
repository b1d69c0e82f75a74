"""Record how active the units of a memory are on every token, from outside the model and segment by segment."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mnemon.errors import ConfigError
from mnemon.inspection.explain.activations import KINDS, Unit, UnitActivations, most_varied
from mnemon.inspection.explain.explainer import Explainer
from mnemon.inspection.explain.run import explain
from mnemon.inspection.reading import Segment, plan_reading, read_segments
from mnemon.inspection.record import column_texts
from mnemon.inspection.record_bank import mean_read_weights
from mnemon.inspection.taps import calls_through
from mnemon.inspection.trace import Explanation
from mnemon.layers.memory_bank import MemoryBank, ReadResult, SegmentRead, WriteStatistics
from mnemon.layers.mixture_of_memories import MixtureOfMemories
from mnemon.layers.routing import Routing
from mnemon.models.memory_mixer import MemoryMixer
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.state import MemoryState

_MOST_BYTES = 256 * 2**20
_COMPARED = 16  # units recorded besides those that are explained, to compare with

Take = Callable[[Segment, int, Tensor], None]
"""Takes the activations [T, units of the block] of one segment and block."""


def record_activations(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    kind: str | None = None,
    units: Sequence[Unit] | None = None,
    state: MemoryState | None = None,
    name: str | None = None,
) -> UnitActivations:
    """Let a model read a text and record how active units of its memory are on every token.

    The text is read segment by segment; what grows with it are the activations, two bytes per token and unit.

    Args:
        model: an LM2 or MoM model.
        tokenizer: its tokenizer.
        ids: token ids of the text, at least one.
        kind: "read" or "write" for the slots of an LM2 bank (mean over the heads), "route" for the memories of MoM
            layers (see `KINDS`); None = "read" for LM2, else "route".
        units: the units to record (`units_of`); None = all.
        state: what the model has read before, with one row; None = nothing.
        name: name of the model; None = where it was loaded from.

    Raises:
        ConfigError: the model has no units of that kind, or all of them together need too much memory.
        ShapeError: there is no token.
    """
    watcher = _watcher(model, kind)
    chosen = tuple(watcher.units if units is None else units)
    unknown = next((unit for unit in chosen if unit not in watcher.units), None)
    if unknown is not None:
        raise ConfigError(f"{unknown.name} is no unit of this model; choose from units_of(model, {watcher.kind!r})")
    if units is None and 2 * len(ids) * len(chosen) > _MOST_BYTES:
        raise ConfigError(
            f"{len(chosen)} units on {len(ids)} tokens are more than {_MOST_BYTES >> 20} MiB; name the units to record"
        )
    places: dict[int, list[int]] = {}
    for column, unit in enumerate(chosen):
        places.setdefault(unit.block, []).append(column)
    values = np.zeros((len(ids), len(chosen)), dtype=np.float16)

    def take(segment: Segment, block: int, found: Tensor) -> None:
        columns = places.get(block)
        if columns is not None:
            own = found[:, [chosen[column].index for column in columns]]
            values[segment.tokens.start : segment.tokens.stop, columns] = own.float().cpu().numpy()

    reading = plan_reading(model, ids, len(ids), state)
    watcher.follow(ids, take, state)
    return UnitActivations(
        model=name or model.config._name_or_path or type(model).__name__,
        kind=watcher.kind,
        units=chosen,
        pieces=column_texts(reading, tokenizer),
        ids=reading.ids.astype(np.int32),
        values=values,
    )


def units_of(model: Any, kind: str | None = None) -> tuple[Unit, ...]:
    """Return all units of a model.

    Args:
        model: an LM2 or MoM model.
        kind: as in `record_activations`.

    Raises:
        ConfigError: the model has no units of that kind.
    """
    return _watcher(model, kind).units


def explain_memory(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    explainer: Explainer,
    count: int = 8,
    kind: str | None = None,
    state: MemoryState | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Explanation, ...]:
    """Explain the units of a memory whose activation varies most over a text, the most varied first.

    The text is read once to find them and, where all units together would need too much memory, once more to record
    them.

    Args:
        model: an LM2 or MoM model.
        tokenizer: its tokenizer.
        ids: token ids of the text, at least one.
        explainer: who explains (`mnemon.inspection.explain.choose.explainer_from_option`).
        count: units to explain at most.
        kind: as in `record_activations`.
        state: what the model has read before; None = nothing.
        seed: as in `mnemon.inspection.explain.run.explain`.
        progress: likewise.

    Raises:
        ConfigError: the model has no units of that kind.
        ShapeError: there is no token.
    """
    watcher = _watcher(model, kind)
    units: Sequence[Unit] | None = None
    if 2 * len(ids) * len(watcher.units) > _MOST_BYTES:
        units = _most_varied_units(watcher, ids, count + _COMPARED, state)
    activations = record_activations(model, tokenizer, ids, watcher.kind, units, state)
    return explain(activations, explainer, most_varied(activations, count), seed, progress)


class _Watcher:
    """Watches the units of one kind: a recorder of a reading that hands on what it sees."""

    kind: str
    units: tuple[Unit, ...]

    def __init__(self, model: Any) -> None:
        self.model = model
        self.notes: list[str] = []
        self._take: Take | None = None

    def follow(self, ids: Sequence[int], take: Take, state: MemoryState | None) -> None:
        """Let the model read a text, and give `take` what is seen."""
        self._take = take
        was_training = self.model.training
        self.model.eval()
        try:
            reading = plan_reading(self.model, ids, 1, state)
            for _ in read_segments(self.model, reading, [self], state, logits_to_keep=1):
                pass
        finally:
            self.model.train(was_training)

    @contextmanager
    def watch(self, segment: Segment) -> Iterator[None]:
        """Watch one call of the model on one segment."""
        assert self._take is not None
        with ExitStack() as stack:
            self._enter(stack, partial(self._take, segment))
            yield

    def read(self, segment: Segment, state: MemoryState) -> None:
        """Do nothing: everything is seen during the call."""

    def _enter(self, stack: ExitStack, take: Callable[[int, Tensor], None]) -> None:
        raise NotImplementedError


class _SlotWatcher(_Watcher):
    """Watches who reads the slots of memory banks, or what they are written from."""

    def __init__(self, model: LM2ForCausalLM, kind: str) -> None:
        super().__init__(model)
        self.kind = kind
        self.banks = {int(block): bank for block, bank in zip(model.memory, model.banks, strict=True)}
        slots = range(model.config.num_slots)
        self.units = tuple(Unit(f"block {block}, slot {slot}", block, slot) for block in self.banks for slot in slots)

    def _enter(self, stack: ExitStack, take: Callable[[int, Tensor], None]) -> None:
        method, see = ("read", _see_read) if self.kind == "read" else ("gather", _see_gather)
        for block, bank in self.banks.items():
            stack.enter_context(calls_through(bank, method, partial(see, bank, partial(take, block))))


def _see_read(
    bank: MemoryBank, take: Callable[[Tensor], None], read: Any, x: Tensor, segment: SegmentRead, **options: Any
) -> ReadResult:
    result: ReadResult = read(x, segment, **options)
    take(mean_read_weights(bank, bank.read_queries(x), segment))
    return result


def _see_gather(
    bank: MemoryBank,
    take: Callable[[Tensor], None],
    gather: Any,
    residual: Tensor,
    positions: Tensor,
    valid: Tensor | None,
    segment: SegmentRead,
    past: WriteStatistics,
    *others: Any,
) -> WriteStatistics:
    statistics: WriteStatistics = gather(residual, positions, valid, segment, past, *others)
    take(bank.write_shares(residual, positions, segment, past, statistics)[0].mean(dim=0).T)
    return statistics


class _RouteWatcher(_Watcher):
    """Watches which memories tokens are sent to."""

    kind = "route"

    def __init__(self, model: Any, mixers: Sequence[MemoryMixer]) -> None:
        super().__init__(model)
        self.mixers = [(mixer.index, mixer.layer) for mixer in mixers if isinstance(mixer.layer, MixtureOfMemories)]
        self.units = tuple(
            Unit(f"block {block}, memory {memory}", block, memory)
            for block, layer in self.mixers
            for memory in range(layer.num_memories)
        )

    def _enter(self, stack: ExitStack, take: Callable[[int, Tensor], None]) -> None:
        for block, layer in self.mixers:
            handle = layer.router.register_forward_hook(partial(_see_routing, partial(take, block)))
            stack.callback(handle.remove)


def _see_routing(take: Callable[[Tensor], None], module: nn.Module, inputs: Any, routing: Routing) -> None:
    weights = routing.weights if routing.taken is None else routing.weights * routing.taken
    take(torch.zeros_like(routing.probabilities).scatter(2, routing.memories, weights)[0])


def _watcher(model: Any, kind: str | None) -> _Watcher:
    """Return what watches a kind of unit; None = the kind that a model has first.

    Raises:
        ConfigError: there is no such kind, or the model has none.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"unknown kind of activation {kind!r}; expected one of {', '.join(KINDS)}")
    found: list[_Watcher] = []
    if isinstance(model, LM2ForCausalLM) and model.banks:
        found += [_SlotWatcher(model, name) for name in ("read", "write")]
    mixers = [module for module in model.modules() if isinstance(module, MemoryMixer)]
    if any(isinstance(mixer.layer, MixtureOfMemories) for mixer in mixers):
        found.append(_RouteWatcher(model, mixers))
    for watcher in found:
        if kind in (None, watcher.kind):
            return watcher
    has = f"it has {', '.join(watcher.kind for watcher in found)}" if found else "it has neither slots nor a router"
    raise ConfigError(f"{type(model).__name__} has no units {f'of kind {kind!r} ' if kind else ''}to explain: {has}")


def _most_varied_units(
    watcher: _Watcher, ids: Sequence[int], count: int, state: MemoryState | None
) -> tuple[Unit, ...]:
    """Read a text to find the units that vary most, without keeping their activations."""
    sums: dict[int, NDArray[np.float64]] = {}

    def take(_: Segment, block: int, found: Tensor) -> None:
        values = found.double().cpu().numpy()
        sums[block] = sums.get(block, 0) + np.stack([values.sum(axis=0), np.square(values).sum(axis=0)])

    watcher.follow(ids, take, state)
    means = np.concatenate([sums[block] for block in dict.fromkeys(unit.block for unit in watcher.units)], axis=1)
    variance = means[1] / len(ids) - np.square(means[0] / len(ids))
    return tuple(watcher.units[number] for number in np.argsort(-variance, kind="stable")[:count])
