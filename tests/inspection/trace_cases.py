"""Traces made of thin air for the page's tests: random, but normalised as recorders leave them."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mnemon.inspection.trace import (
    BankBlock,
    Contribution,
    Excerpt,
    Explanation,
    Floats,
    KnockOut,
    KnockOuts,
    MixtureLayer,
    Predictions,
    ReadText,
    Source,
    SpecialWord,
    TokenMemory,
    Trace,
    group_columns,
)

STORY = (
    "Mary went to the garden. John took the milk to the office. The hills were green, and nobody knew why the river "
    "had changed its bed that year. Daniel moved to the kitchen. Sandra got the apple there. It rained for weeks on "
    "end, so that the mill stood still. Mary picked up the football. John dropped the milk. In the evening the "
    "travellers sat by the fire and told each other of the sea. Mary journeyed to the bathroom. "
)
HOSTILE = (
    '</script><img src="https://example.org/x.png" onerror="alert(1)">',
    "<b>bold</b> & \u2028",
    "\ud83d",
    "\n\n",
)
"""Tokens as a model may really read them: they must not become anything but text."""


def words_of(count: int) -> list[str]:
    """Return so many words of a story, each with the blank before it."""
    words = [f" {word}" for word in STORY.split()]
    return [words[index % len(words)] for index in range(count)]


def text_of(
    segment_lengths: list[int], most_columns: int, complete: bool = True, first: tuple[str, ...] = ()
) -> ReadText:
    starts, segments = group_columns(segment_lengths, most_columns)
    words = [*first, *words_of(sum(segment_lengths))]
    pieces = tuple("".join(words[start:end]) for start, end in pairwise(starts))
    return ReadText(pieces, starts, segments, complete)


def shares(numbers: np.random.Generator, shape: tuple[int, ...], sharpness: float = 3.0) -> NDArray[np.float32]:
    """Return shares whose last axis adds up to 1, most of them small."""
    values = np.exp(sharpness * numbers.standard_normal(shape))
    return np.asarray(values / values.sum(axis=-1, keepdims=True), dtype=np.float32)


def predictions_of(numbers: np.random.Generator, columns: int) -> Predictions:
    without = -np.abs(numbers.normal(2.2, 1.0, columns)).astype(np.float32)
    with_memory = np.minimum(without + numbers.normal(0.15, 0.5, columns), -0.01).astype(np.float32)
    with_memory[0] = without[0] = np.nan
    words = words_of(columns + 7)
    return Predictions(with_memory, without, tuple(words[1 : columns + 1]), tuple(words[5 : columns + 5]))


def bank_block(numbers: np.random.Generator, text: ReadText, block: int, num_slots: int) -> BankBlock:
    columns, segments = text.num_columns, text.num_segments
    liking = 1.5 * numbers.standard_normal(num_slots)  # some slots are read more than others
    raw = np.exp(2.0 * numbers.standard_normal((columns, num_slots)) + liking)
    read = raw / raw.sum(axis=1, keepdims=True)
    after = np.exp(np.log(raw) + 0.8 * numbers.standard_normal(raw.shape))
    write = np.exp(2.5 * numbers.standard_normal((columns, num_slots)))
    for first, last in pairwise(text.segments):
        write[first:last] /= write[first:last].sum(axis=0, keepdims=True)
    gates = [np.clip(numbers.beta(a, b, (segments, num_slots)), 0, 1) for a, b in ((1.2, 4), (8, 1.5), (2, 2))]
    gates[2] = np.sort(gates[2], axis=0)
    if not text.complete:
        for gate in gates:
            gate[-1] = np.nan
    half_life = numbers.gamma(2.0, 8.0, num_slots)
    half_life[0] = np.inf
    looked_up = np.unique(np.linspace(0, segments - 1, min(6, segments)).astype(np.int32))
    words = words_of(500)
    near = tuple(
        tuple(tuple(words[int(at)] for at in numbers.integers(0, 500, 4)) for _ in range(num_slots)) for _ in looked_up
    )
    return BankBlock(
        block=block,
        slots=np.arange(num_slots, dtype=np.int32) * 3,
        read=read.astype(np.float16),
        read_after=(after / after.sum(axis=1, keepdims=True)).astype(np.float16),
        write=write.astype(np.float16),
        output_gate=numbers.beta(3, 4, columns).astype(np.float16),
        read_on_written=np.clip(np.linspace(0, 0.9, columns) + numbers.normal(0, 0.05, columns), 0, 1),
        input_gate=gates[0].astype(np.float16),
        forget_gate=gates[1].astype(np.float16),
        written_share=gates[2].astype(np.float16),
        change=numbers.gamma(1.5, 0.2, (segments, num_slots)),
        half_life=half_life,
        word_segments=looked_up,
        words=near,
        word_scores=-np.sort(-numbers.normal(4, 1, (len(looked_up), num_slots, 4)), axis=2),
    )


def knock_outs_of(names: list[tuple[str, str, int | None, int | None]], numbers: np.random.Generator) -> KnockOuts:
    losses = sorted(numbers.gamma(0.7, 0.6, len(names)) - 0.1, reverse=True)
    parts = tuple(KnockOut(*name, -0.35 - float(loss)) for name, loss in zip(names, losses, strict=True))
    return KnockOuts("The milk is in office", -0.35, parts)


def explanations_of(numbers: np.random.Generator, unit: str = "slot") -> tuple[Explanation, ...]:
    excerpts = tuple(
        Excerpt(tuple(words_of(14)), np.asarray(numbers.random(14) ** 4, dtype=np.float16)) for _ in range(3)
    )
    return (
        Explanation(f"block 0, {unit} 3", 0, 3, "built-in", "names of persons, after “and”", 0.62, 512, excerpts),
        Explanation(f"block 1, {unit} 7", 1, 7, "http://localhost:1/v1", None, None, 512, excerpts, "nobody answers"),
    )


def lm2_trace(
    segment_lengths: list[int] | None = None,
    most_columns: int = 4000,
    num_slots: int = 16,
    num_blocks: int = 2,
    complete: bool = True,
    first: tuple[str, ...] = HOSTILE,
) -> Trace:
    numbers = np.random.default_rng(7)
    text = text_of(segment_lengths or [32] * 12, most_columns, complete, first)
    parts = [("slot", f"slot {3 * index}", None, 3 * index) for index in range(10)]
    parts += [("block", f"block {block}", block, None) for block in range(num_blocks)]
    return Trace(
        model="babilong-tiny-lm2",
        family="lm2",
        fingerprint="0123456789abcdef" * 4,
        source=Source("babilong", "qa2:4k:0", "Where is the milk? <i>", "office"),
        text=text,
        predictions=predictions_of(numbers, text.num_columns),
        bank=tuple(bank_block(numbers, text, block, num_slots) for block in range(num_blocks)),
        knock_outs=knock_outs_of([("all", "the whole memory", None, None), *parts], numbers),
        explanations=explanations_of(numbers),
        notes=(f"{text.starts[1]} consecutive tokens are one piece",) if text.num_columns < text.num_tokens else (),
    )


def long_trace() -> Trace:
    """Return what is recorded of 100,000 tokens: about 4,000 columns, 64 slots, 4 blocks."""
    return lm2_trace([256] * 390 + [160], 4000, num_slots=64, num_blocks=4, complete=False, first=())


def mixture_layer(
    numbers: np.random.Generator, text: ReadText, layer: int, memories: int, linear: bool
) -> MixtureLayer:
    columns, segments = text.num_columns, text.num_segments
    weights = shares(numbers, (columns, memories), 2.5)
    load = weights.mean(axis=0)
    words = words_of(60)
    special = tuple(
        tuple(SpecialWord(words[int(at)], int(numbers.integers(3, 40)), float(numbers.gamma(3, 1.2)) + 1) for at in row)
        for row in numbers.integers(0, 60, (memories, 8))
    )
    contributions = []
    for reader in (columns - 1, columns // 2):
        parts = numbers.standard_normal(columns) * (numbers.random(columns) < 0.1)
        parts[reader + 1 :] = 0
        parts = parts / np.abs(parts).sum()
        contributions.append(
            Contribution(int(text.starts[reader]), reader % memories, parts.astype(np.float32), 1 - float(parts.sum()))
        )
    return MixtureLayer(
        layer=layer,
        rule="gated_deltanet",
        shared=True,
        weights=weights,
        entropy=-(weights * np.log(weights)).sum(axis=1),
        load=load,
        state_norm=np.cumsum(numbers.gamma(2, 1, (segments, memories + 1)), axis=0) ** 0.6,
        special_words=special,
        contributions=tuple(contributions) if linear else (),
    )


def mom_trace() -> Trace:
    numbers = np.random.default_rng(8)
    text = text_of([64] * 8 + [20], 4000, complete=False)
    return Trace(
        model="mom-tiny",
        family="mom",
        fingerprint="f" * 64,
        source=Source("text", "story.txt"),
        text=text,
        predictions=None,
        mixture=tuple(mixture_layer(numbers, text, layer, 4, layer != 3) for layer in (0, 1, 3)),
        knock_outs=knock_outs_of([("memory", f"memory {m} of block 0", 0, m) for m in range(4)], numbers),
    )


def rmt_trace(reads: bool = True) -> Trace:
    numbers = np.random.default_rng(9)
    text = text_of([48] * 14, 4000)
    units, segments = 10, text.num_segments
    read: Floats = (
        shares(numbers, (text.num_columns, units + 1))[:, :units] if reads else np.zeros((text.num_columns, 0))
    )
    change = numbers.gamma(2, 0.1, (segments, units)) / np.arange(1, segments + 1)[:, None] ** 0.3
    memory = TokenMemory(
        tuple(f"memory token {unit}" for unit in range(units)),
        4 + numbers.normal(0, 0.2, (segments, units)).cumsum(axis=0),
        change,
        read,
    )
    return Trace(
        model="rmt-tiny",
        family="rmt",
        fingerprint="e" * 64,
        source=Source("memory", "book.memory.safetensors", "Who is in the garden?"),
        text=text,
        predictions=predictions_of(numbers, text.num_columns),
        token_memory=memory,
    )


def empty_trace() -> Trace:
    """Return a trace of one token with nothing recorded about it."""
    return Trace("tiny", "lm2", "a" * 64, Source("text", "a.txt"), text_of([1], 1))
