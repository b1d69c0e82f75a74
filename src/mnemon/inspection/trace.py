"""What a recorder saw of a memory while a model read a text, as a typed value and a file.

A trace needs no model to be read. Its texts are cut into *columns*, each a few consecutive tokens (one, where the text
is short), which never reach over the end of a *segment*, the stretch after which a memory is updated:

    tokens    0 1 2 3 4 5 6 7 8 9
    columns   |   |   | |   |   |       starts   0 2 4 5 7 9 (10)
    segments  |         |         |     segments 0 3 6       (columns at which segments start)

N columns, S segments, J slots, E routed memories, M memories in all, m memory tokens. Shares are numbers in [0, 1].
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mnemon.errors import ShapeError
from mnemon.typed_files import FileFormat, read_typed, write_typed

TRACE = FileFormat("mnemon trace", version=1)

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]


@dataclass(frozen=True)
class Source:
    """What was read.

    Attributes:
        kind: "text", "babilong" or "memory" (a file that `mnemon memorize` wrote; nothing but the prompt was read).
        name: file name, or the sample's name such as "qa2:4k:0".
        question: what is asked at the end of the text, if something is.
        answer: the right answer to it.
    """

    kind: str
    name: str
    question: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class ReadText:
    """The text in columns.

    Attributes:
        pieces: text of every column, N of them.
        starts: first token of every column, and the number of tokens, [N + 1].
        segments: first column of every segment, and N, [S + 1].
        complete: whether the last segment is complete, so that the memory was updated after it.
    """

    pieces: tuple[str, ...]
    starts: Integers
    segments: Integers
    complete: bool

    @property
    def num_tokens(self) -> int:
        """Tokens read."""
        return int(self.starts[-1])

    @property
    def num_columns(self) -> int:
        """Columns N."""
        return len(self.pieces)

    @property
    def num_segments(self) -> int:
        """Segments S."""
        return len(self.segments) - 1


@dataclass(frozen=True)
class Predictions:
    """How well the text is predicted with the memory and without it.

    Attributes:
        with_memory: mean log-probability (natural) of the column's tokens, each given the tokens before it, [N]; NaN
            where nothing precedes a token.
        without_memory: the same with the memory knocked out.
        likeliest_with: the likeliest next token after every column.
        likeliest_without: the same with the memory knocked out.
    """

    with_memory: Floats
    without_memory: Floats
    likeliest_with: tuple[str, ...]
    likeliest_without: tuple[str, ...]


@dataclass(frozen=True)
class BankBlock:
    """The memory bank at one block of an LM2 model.

    Attributes:
        block: number of the decoder block.
        slots: the slots the arrays speak of (all, or of very many the most read), [J].
        read: share of the reads of a column that fell on each slot, mean over heads and tokens, [N, J].
        read_after: the same tokens asking the bank as it stood after their segment's update, [N, J]; NaN in an
            incomplete segment.
        write: share of a slot's write attention, within its segment, that fell on each column, [N, J].
        output_gate: mean output gate, [N].
        read_on_written: share of the read mass that fell on written content, [N].
        input_gate: mean input gate at every update, [S, J]; NaN after an incomplete segment.
        forget_gate: mean forget gate, [S, J]; likewise.
        written_share: written share of every slot after the update, [S, J]; likewise.
        change: norm of what the update changed over the norm of the slot after it, [S, J]; likewise.
        half_life: segments after which half of what a slot held is left, at its mean forgetting, [J]; infinite for a
            slot that forgets nothing, NaN if no segment was complete.
        word_segments: segments after which the nearest words were looked up, [L]; -1 = before the text, where the
            memory held something.
        words: the nearest vocabulary words of every slot through the output embedding, [L][J][few].
        word_scores: their logits, [L, J, few].
    """

    block: int
    slots: Integers
    read: Floats
    read_after: Floats
    write: Floats
    output_gate: Floats
    read_on_written: Floats
    input_gate: Floats
    forget_gate: Floats
    written_share: Floats
    change: Floats
    half_life: Floats
    word_segments: Integers
    words: tuple[tuple[tuple[str, ...], ...], ...]
    word_scores: Floats


@dataclass(frozen=True)
class SpecialWord:
    """A word that goes to a memory more often than others do.

    Attributes:
        word: the word; where its last token goes, it goes.
        count: how often it went there.
        lift: its share of the memory's words over its share of all words, drawn towards 1 where it is rare.
    """

    word: str
    count: int
    lift: float


@dataclass(frozen=True)
class Contribution:
    """Where what a token read came from: the exact split of a linear memory's answer over the tokens before.

    Attributes:
        reader: the token that reads, a number in the text.
        memory: the memory that is read; the shared one comes after the routed ones.
        shares: part of the answer, along the answer, that each column contributed, [N]; they and `before` add up to 1.
        before: the part that came from the state before the text.
    """

    reader: int
    memory: int
    shares: Floats
    before: float


@dataclass(frozen=True)
class MixtureLayer:
    """The memories of one MoM layer; the memory of a single-memory layer counts as one that every token goes to.

    Attributes:
        layer: number of the decoder block.
        rule: name of the update rule.
        shared: whether the last memory is shared by all tokens.
        weights: router weight that each routed memory had in a column, mean over its tokens, [N, E]; rows add up to 1.
        entropy: entropy of the router's probabilities, in nats, [N].
        load: share of the choices that fell on each memory, [E].
        state_norm: norm of every memory's state after every segment, [S, M].
        special_words: for every routed memory, the words that go there most above average.
        contributions: for a few readers, where their answer came from; empty where the rule is not linear.
    """

    layer: int
    rule: str
    shared: bool
    weights: Floats
    entropy: Floats
    load: Floats
    state_norm: Floats
    special_words: tuple[tuple[SpecialWord, ...], ...]
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True)
class TokenMemory:
    """The memory tokens of an RMT model (associative memories: one entry per block instead of one per token).

    Attributes:
        units: what the m entries are: "memory token 0" ..., or "memory of block 0" ...
        norm: norm of every entry after every segment, [S, m].
        change: norm of what the segment changed over that norm, [S, m]; 0 after an incomplete segment.
        read: share of a column's attention that fell on each memory token, mean over blocks and heads, [N, m]; empty
            [N, 0] where the memory is read otherwise.
    """

    units: tuple[str, ...]
    norm: Floats
    change: Floats
    read: Floats


@dataclass(frozen=True)
class KnockOut:
    """What the answer loses without one part of the memory.

    Attributes:
        kind: "slot", "block", "memory" or "all".
        name: in words, such as "slot 3", "block 1", "memory 2 of block 0".
        block: the block, if it is about one.
        index: the slot or memory, if it is about one.
        log_probability: mean log-probability (natural) of the target's tokens without that part.
    """

    kind: str
    name: str
    block: int | None
    index: int | None
    log_probability: float


@dataclass(frozen=True)
class KnockOuts:
    """A causal check: what happens to a text's last words when parts of the memory are knocked out.

    Attributes:
        target: the words whose probability is measured: the right answer, or the last words of the text.
        log_probability: mean log-probability (natural) of its tokens with the whole memory.
        parts: the parts that were knocked out, the most important first.
    """

    target: str
    log_probability: float
    parts: tuple[KnockOut, ...]


@dataclass(frozen=True)
class Excerpt:
    """A few tokens with an activation each.

    Attributes:
        tokens: texts of the tokens.
        activations: one per token.
    """

    tokens: tuple[str, ...]
    activations: Floats


@dataclass(frozen=True)
class Explanation:
    """What a slot or memory is about, as an explainer put it, and how well that predicts it.

    Attributes:
        unit: name of the unit: "block 0, slot 3", "block 1, memory 2".
        block: the block.
        index: the slot or memory.
        explainer: who explained.
        text: the explanation; None if the explainer failed.
        score: correlation of simulated and true activations on held-out text; None where it is undefined.
        num_tokens: held-out tokens the score is of.
        excerpts: where the unit is most active.
        note: what went wrong, or None.
        baseline: what the same simulation scores on other units: the score of an explanation that is about nothing in
            particular; None where it is undefined.
        meaning: what the unit's activations are, in words.
    """

    unit: str
    block: int
    index: int
    explainer: str
    text: str | None
    score: float | None
    num_tokens: int
    excerpts: tuple[Excerpt, ...]
    note: str | None = None
    baseline: float | None = None
    meaning: str = ""


@dataclass(frozen=True)
class Trace:
    """Everything that was recorded of one reading.

    Attributes:
        model: name of the model.
        family: "lm2", "mom" or "rmt".
        fingerprint: which model it is (`mnemon.models.provenance.model_fingerprint`).
        source: what was read.
        text: the text in columns.
        predictions: with and without the memory.
        bank: one entry per block with a memory bank.
        mixture: one entry per block with linear memories.
        token_memory: memory tokens or associative memories.
        knock_outs: the causal check, if something could be asked.
        explanations: of the units that were explained.
        notes: what was grouped or left out, in words, for whoever looks at the trace.
    """

    model: str
    family: str
    fingerprint: str
    source: Source
    text: ReadText
    predictions: Predictions | None = None
    bank: tuple[BankBlock, ...] = ()
    mixture: tuple[MixtureLayer, ...] = ()
    token_memory: TokenMemory | None = None
    knock_outs: KnockOuts | None = None
    explanations: tuple[Explanation, ...] = ()
    notes: tuple[str, ...] = ()


def save_trace(path: str | Path, trace: Trace, overwrite: bool = False) -> Path:
    """Write a trace (see `mnemon.typed_files.write_typed` for what is refused)."""
    return write_typed(path, trace, TRACE, overwrite)


def load_trace(path: str | Path) -> Trace:
    """Read a trace (see `mnemon.typed_files.read_typed` for what is refused)."""
    return read_typed(path, Trace, TRACE)


def group_columns(segment_lengths: list[int], most: int) -> tuple[Integers, Integers]:
    """Cut a text into columns of equal size, at most about `most` of them, without reaching over a segment's end.

    Args:
        segment_lengths: tokens of every segment, each at least 1.
        most: columns wanted at most; there are never fewer than segments.

    Returns:
        `starts` [N + 1] and `segments` [S + 1] of a `ReadText`.

    Raises:
        ShapeError: there is no token.
    """
    if not segment_lengths or min(segment_lengths) < 1:
        raise ShapeError(f"expected segments of at least one token, got {segment_lengths[:4]}")
    size = max(1, -(-sum(segment_lengths) // most))
    while size < max(segment_lengths) and sum(-(-length // size) for length in segment_lengths) > most:
        size += 1
    starts: list[int] = []
    segments, first = [0], 0
    for length in segment_lengths:
        starts += range(first, first + length, size)
        first += length
        segments.append(len(starts))
    return np.array([*starts, first], dtype=np.int32), np.array(segments, dtype=np.int32)


def column_means(values: Floats, starts: Integers) -> Floats:
    """Return the means of per-token values [T, ...] over the tokens of every column, [N, ...]."""
    sums = np.add.reduceat(values.astype(np.float64), starts[:-1], axis=0)
    counts = np.diff(starts).reshape(-1, *(1,) * (values.ndim - 1))
    return np.asarray(sums / counts)
