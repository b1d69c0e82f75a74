"""What an answer loses without one part of the memory: the causal check beside the pictures.

A text's last words, the target, are read again from the state before the segment in which its *tail* begins (the
question, or else the target itself), once with the whole memory and once without each part:

    | segment | segment | segment ... question ... target |
                        ^ state is branched here; only what stands right of it is read again

What is knocked out are therefore the *reads* of the tail. What the text before it wrote stays written, and what earlier
tokens read stays in the keys and values that the tail's attention sees. Where the tail runs over the end of a segment,
its own update takes place, from tokens that read without the part.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemon.errors import ShapeError
from mnemon.inspection.predictions import target_log_probabilities
from mnemon.inspection.record_bank import counting_reads
from mnemon.inspection.taps import calls_through
from mnemon.inspection.trace import Floats, Integers, KnockOut
from mnemon.layers.memory_bank import ReadResult, SegmentRead
from mnemon.models.memory_model import MemoryModel
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.state import MemoryCache, MemoryState


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


@dataclass(frozen=True)
class Tail:
    """The end of a text, and what the model had read before it.

    Attributes:
        ids: token ids of the tail, [n].
        num_target: how many of them, at the end, are the target: at least 1, fewer than n.
        state: state before the tail; None = nothing was read.
    """

    ids: Integers
    num_target: int
    state: MemoryState | None


def knock_out(model: MemoryModel, tail: Tail, parts: Sequence[Part]) -> tuple[float, tuple[KnockOut, ...]]:
    """Measure what a tail's target loses without each part.

    Args:
        model: who reads, in evaluation mode.
        tail: what is read, and from which state.
        parts: what is knocked out, one at a time.

    Returns:
        The mean log-probability of the target's tokens with the whole memory, and every part, the most important first.

    Raises:
        ShapeError: for a target of no token, or one that nothing precedes.
    """
    if not 1 <= tail.num_target < len(tail.ids):
        raise ShapeError(
            f"expected a target of 1 to {len(tail.ids) - 1} tokens, with at least one before it, got {tail.num_target}"
        )
    whole = log_probability(model, tail)
    found = [
        KnockOut(part.kind, part.name, part.block, part.index, log_probability(model, tail, part)) for part in parts
    ]
    return whole, tuple(sorted(found, key=lambda entry: entry.log_probability))


def log_probability(model: MemoryModel, tail: Tail, without: Part | None = None) -> float:
    """Return the mean natural log-probability of a tail's target, with the whole memory or without one part."""
    ids = torch.from_numpy(np.asarray(tail.ids, dtype=np.int64))[None].to(model.device)
    cache = MemoryCache(None if tail.state is None else tail.state.branch())
    with torch.no_grad(), nullcontext() if without is None else without.removed():
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=tail.num_target + 1).logits[0]
    return float(target_log_probabilities(logits[:-1], tail.ids[-tail.num_target :]).mean())


def bank_parts(model: LM2ForCausalLM, tail: Tail, most_slots: int) -> tuple[list[Part], list[str]]:
    """Return the parts of memory banks: slots, the bank of every block, all banks.

    A slot that is knocked out is left out of the softmax of the reads, as if the bank were smaller; the shares of the
    others grow. With `read_top_k`, the next slot takes its place. In flow `depth`, where one bank runs through all
    blocks, a slot is knocked out in all of them; in flow `layer` every block has slots of its own. Of a block, or all,
    nothing is read: the memory term is zero.

    Args:
        model: an LM2 model with at least one bank.
        tail: what will be read; its reads say which slots are worth trying.
        most_slots: slots to try at most, those that the tail reads most.

    Returns:
        The parts, and notes in words on what was left out.
    """
    with counting_reads(model) as counts:
        log_probability(model, tail)
    blocks = [int(block) for block in model.memory]
    every = range(len(blocks))
    if model.config.flow == "depth":
        slots = [
            Part("slot", f"slot {slot}", None, slot, partial(_without_slot, model, every, slot))
            for slot in _most(counts.sum(axis=0), most_slots)
        ]
    else:
        pairs = [divmod(index, counts.shape[1]) for index in _most(counts.reshape(-1), most_slots)]
        slots = [
            Part("slot", f"slot {slot} of block {blocks[order]}", blocks[order], slot,
                 partial(_without_slot, model, [order], slot))
            for order, slot in pairs
        ]  # fmt: skip
    total = model.config.num_slots * (1 if model.config.flow == "depth" else len(blocks))
    left_out = f"of {total} slots, the {len(slots)} that these tokens read most were knocked out"
    parts = [Part("block", f"block {blocks[o]}", blocks[o], None, partial(_without_banks, model, [o])) for o in every]
    whole = Part("all", "all banks", None, None, partial(_without_banks, model, every))
    return [*slots, *parts, whole], [left_out] if len(slots) < total else []


def _most(counts: Floats, most: int) -> list[int]:
    return [int(index) for index in np.argsort(-counts, kind="stable")[:most]]


@contextmanager
def _without_slot(model: LM2ForCausalLM, orders: Sequence[int], slot: int) -> Iterator[None]:
    """Let the banks of some blocks be read as if one slot were not there."""

    def read(original: Any, x: Tensor, segment: SegmentRead, **options: Any) -> ReadResult:
        others = [index for index in range(segment.keys.shape[2]) if index != slot]
        if not others:
            return _nothing(original(x, segment, **options))
        fewer = segment._replace(keys=segment.keys[:, :, others], values=segment.values[:, :, others])
        result: ReadResult = original(x, fewer, **options)
        return result

    with _reads_replaced(model, orders, read):
        yield


@contextmanager
def _without_banks(model: LM2ForCausalLM, orders: Sequence[int]) -> Iterator[None]:
    """Let some blocks get nothing from their banks."""

    def read(original: Any, x: Tensor, segment: SegmentRead, **options: Any) -> ReadResult:
        return _nothing(original(x, segment, **options))

    with _reads_replaced(model, orders, read):
        yield


def _nothing(result: ReadResult) -> ReadResult:
    return result._replace(term=torch.zeros_like(result.term))


@contextmanager
def _reads_replaced(model: LM2ForCausalLM, orders: Sequence[int], read: Callable[..., ReadResult]) -> Iterator[None]:
    with ExitStack() as stack:
        for order in orders:
            stack.enter_context(calls_through(model.banks[order], "read", read))
        yield
