"""Record what a memory does while a model reads a text: one reading, all recorders side by side.

Which recorders watch depends on what the model holds, and a model may hold several (LM2 on a base with mixtures):

    memory banks       BankRecorder(model, tokenizer, reading, state)          .blocks() -> tuple[BankBlock, ...]
    linear memories    MixtureRecorder(model, tokenizer, reading, state)       .layers() -> tuple[MixtureLayer, ...]
    memory tokens      TokenMemoryRecorder(model, tokenizer, reading, state)   .memory() -> TokenMemory

Each is a `mnemon.inspection.reading.Recorder`; its method named above is called once, after the last segment, outside
of any watch, and may read parts of the text again (`reading.ids`, states it kept in `read`). `state` is what the model
had read before (None = nothing). `notes` says in words what was grouped or left out.

The parts that can be knocked out are lists of `mnemon.inspection.knock_out.Part`; each list holds one of kind "all":

    bank_parts(model, tail, most)    in mnemon.inspection.knock_out
    mixture_parts(model)             in mnemon.inspection.record_mixture
    token_memory_parts(model)        in mnemon.inspection.record_token_memory

"Without the memory" is what the model's own `knock_out_memory` does; for a model that has no such thing, it is the
model without the part "all".
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mnemon.errors import ConfigError, ShapeError
from mnemon.inspection.emptied import memory_mixers
from mnemon.inspection.knock_out import Tail, bank_parts, knock_out
from mnemon.inspection.predictions import NextTokens, greedy_answer
from mnemon.inspection.reading import Reading, Recorder, plan_reading, read_segments, segment_length
from mnemon.inspection.record_bank import BankRecorder, most_read_slots
from mnemon.inspection.record_mixture import MixtureRecorder, mixture_parts
from mnemon.inspection.record_token_memory import TokenMemoryRecorder, token_memory_parts
from mnemon.inspection.trace import KnockOuts, Predictions, ReadText, Source, Trace
from mnemon.models.memory_model import MemoryModel
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.modeling_rmt import RMTForCausalLM
from mnemon.models.provenance import model_fingerprint
from mnemon.models.segmented_decoder import evaluating
from mnemon.models.state import LM2State, MemoryCache, MemoryState

MAX_COLUMNS = 4000
MAX_SLOTS = 64
MAX_KNOCK_OUTS = 32
_FEWEST_SLOTS = 8
_BUDGET_BYTES = 5_000_000
_BYTES_PER_COLUMN = 3 * 2  # of one slot of one block
_BYTES_PER_SEGMENT = 3 * 2 + 4
_MOST_LOOK_UPS = 16
_MOST_LOOKED_UP = 8_000  # times slots and blocks
_LAST_WORDS = 8  # tokens
_LONGEST_ANSWER = 16
_BROKEN = "\ufffd"  # what a tokenizer gives for a part of a character
_LONGEST_CHARACTER = 16  # tokens, generously

Progress = Callable[[int, int], None]
"""Called with the tokens read so far, and all."""


def record(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    source: Source,
    target: Sequence[int] | None = None,
    question_start: int | None = None,
    state: MemoryState | None = None,
    name: str | None = None,
    max_columns: int = MAX_COLUMNS,
    max_slots: int = MAX_SLOTS,
    max_knock_outs: int = MAX_KNOCK_OUTS,
    progress: Progress | None = None,
) -> Trace:
    """Let a model read a text and record what its memory does.

    The text is read twice, with the memory and without it; a third time, before, if only some slots are to be shown, to
    see which are read most. What single tokens gave to the target takes further readings: one or two of a MoM model's
    text, one for the attention shares of an RMT model. Memory needed is that of one segment and of the trace.

    Args:
        model: an LM2, MoM or RMT model.
        tokenizer: its tokenizer.
        ids: token ids of the text, at least one.
        source: what is read.
        target: token ids of the right answer, which are read after the text and measured. None = after a memory the
            model's own answer is, else the last words of the text are what is measured.
        question_start: number of the question's first token; the causal check then reads from there, or from the
            beginning of its segment if the model has segments. None = from the segment in which the target begins.
        state: what the model has read before, with one row; None = nothing. Tokens that wait in it (see `memorize`)
            are read first, and shown.
        name: name of the model in the trace; None = where it was loaded from.
        max_columns: columns of the trace at most, unless there are more segments.
        max_slots: slots to show at most, per block.
        max_knock_outs: slots to knock out at most.
        progress: told after every segment.

    Returns:
        The trace, without explanations.

    Raises:
        ConfigError: for a model without a memory.
        ShapeError: for a text without a token, or of more than the decoder has positions for.
        StateError: for a state of another model, or of several rows.
    """
    if not isinstance(model, MemoryModel) or not (has_banks(model) or memory_mixers(model) or _is_rmt(model)):
        raise ConfigError(f"{type(model).__name__} has no memory to look into; expected an LM2, MoM or RMT model")
    if not len(ids):
        raise ShapeError("there is nothing to read: expected at least one token")
    with evaluating(model):
        waiting: tuple[int, ...] = ()
        if state is not None:
            state, waiting = _settled(model, state)
            ids = [*waiting, *ids]
            question_start = None if question_start is None else len(waiting) + question_start
        answers_itself = target is None and source.kind == "memory"
        if answers_itself:
            target = greedy_answer(model, ids, state, tokenizer.eos_token_id, _LONGEST_ANSWER)
        text, num_target = [*ids, *(target or ())], len(target) if target else min(_LAST_WORDS, len(ids) - 1)
        columns, slots = _sizes(model, len(text), max_columns, max_slots)
        reading = plan_reading(model, text, columns, state)
        _check_length(model, state, len(text))
        recorders = _recorders(model, tokenizer, reading, state, slots, asked=len(ids) - 1)
        tail_segment = _segment_of_tail(reading, num_target, question_start)
        predictions, before_tail = _read(model, tokenizer, reading, recorders.all(), state, tail_segment, progress)
        notes = _notes(model, reading)
        knock_outs = None
        if num_target:
            first, before = reading.segment(tail_segment).tokens.start, before_tail
            if question_start is not None and not _knocks_itself_out(model):  # which has segments of our making only
                first, before = _read_up_to(model, reading, first, question_start, num_target, before)
            tail = Tail(reading.ids[first:], num_target, before)
            knock_outs, left_out = _knock_outs(model, tokenizer, tail, max_knock_outs)
            notes += [f"parts were knocked out while the last {len(tail.ids)} tokens were read", *left_out]
        if waiting:
            notes.append(f"the first {len(waiting)} tokens are the memory's: they waited in it to be read")
        if answers_itself and target:
            notes.append("the answer at the end is the model's own: its likeliest words, one after the other")
        found = recorders.found()  # may add notes
    return Trace(
        model=name or model.config._name_or_path or type(model).__name__,
        family=model.config.model_type,
        fingerprint=model_fingerprint(model),
        source=source,
        text=ReadText(column_texts(reading, tokenizer), reading.starts, reading.segments, reading.complete),
        predictions=predictions,
        knock_outs=knock_outs,
        notes=(*notes, *(note for recorder in recorders.all() for note in recorder.notes)),
        **found,
    )


def has_banks(model: MemoryModel) -> TypeGuard[LM2ForCausalLM]:
    """Say whether a model has a memory bank."""
    return isinstance(model, LM2ForCausalLM) and bool(model.banks)


def column_texts(reading: Reading, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the text of every column, with the blanks that its tokens stand for.

    A character that is made of the tokens of two columns belongs to the second.
    """

    def decoded(end: int) -> str:
        return str(tokenizer.decode(reading.ids[context:end].tolist(), clean_up_tokenization_spaces=False))

    longest_wait = _LONGEST_CHARACTER + int(np.diff(reading.starts).max())
    texts = []
    context, done = 0, 0  # first token that is decoded, and how many characters of what is decoded have been given out
    for end in reading.starts[1:].tolist():
        text = decoded(end)
        is_open = text.endswith(_BROKEN) and end < reading.num_tokens and end - context < longest_wait
        text = text.rstrip(_BROKEN) if is_open else text
        texts.append(text[done:])
        done = max(done, len(text))
        if not is_open:  # alone, some tokenizers drop the blank in front of a token, so the last one stays in front
            context = end - 1
            done = len(decoded(end))
    return tuple(texts)


@dataclass(frozen=True)
class _Recorders:
    """The recorders of what a model holds."""

    bank: BankRecorder | None
    mixture: MixtureRecorder | None
    tokens: TokenMemoryRecorder | None

    def all(self) -> list[Recorder]:
        """Return those there are."""
        several: tuple[Recorder | None, ...] = (self.bank, self.mixture, self.tokens)
        return [recorder for recorder in several if recorder is not None]

    def found(self) -> dict[str, Any]:
        """Return what was recorded, under the names it has in a trace."""
        return {
            "bank": () if self.bank is None else self.bank.blocks(),
            "mixture": () if self.mixture is None else self.mixture.layers(),
            "token_memory": None if self.tokens is None else self.tokens.memory(),
        }


def _recorders(
    model: MemoryModel,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    state: MemoryState | None,
    most_slots: int,
    asked: int,
) -> _Recorders:
    bank = None
    if has_banks(model):
        own = cast(LM2State | None, state)
        slots = None if model.config.num_slots <= most_slots else most_read_slots(model, reading, own, most_slots)
        shown = min(most_slots, model.config.num_slots) * len(model.banks)
        look_ups = max(2, min(_MOST_LOOK_UPS, _MOST_LOOKED_UP // shown))
        bank = BankRecorder(model, tokenizer, reading, own, slots, look_ups)
    mixture = MixtureRecorder(model, tokenizer, reading, state, readers=[asked]) if memory_mixers(model) else None
    tokens = TokenMemoryRecorder(model, tokenizer, reading, state) if _is_rmt(model) else None
    return _Recorders(bank, mixture, tokens)


def _knock_outs(
    model: MemoryModel, tokenizer: PreTrainedTokenizerBase, tail: Tail, most_slots: int
) -> tuple[KnockOuts, list[str]]:
    """Knock out everything that can be, one part at a time; with notes on what was left out."""
    parts, notes = bank_parts(model, tail, most_slots) if has_banks(model) else ([], [])
    parts += mixture_parts(model) if memory_mixers(model) else []
    parts += token_memory_parts(model) if _is_rmt(model) else []
    words = str(tokenizer.decode(tail.ids[-tail.num_target :].tolist())).strip()
    return KnockOuts(words, *knock_out(model, tail, parts)), notes


def _is_rmt(model: MemoryModel) -> TypeGuard[RMTForCausalLM]:
    return isinstance(model, RMTForCausalLM)


def _knocks_itself_out(model: MemoryModel) -> bool:
    return "knock_out_memory" in inspect.signature(model.forward).parameters


def _read(
    model: MemoryModel,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    recorders: Sequence[Recorder],
    state: MemoryState | None,
    tail_segment: int,
    progress: Progress | None,
) -> tuple[Predictions, MemoryState | None]:
    """Read the text with and without the memory, side by side.

    Returns:
        The predictions, and the state before the segment `tail_segment`.
    """
    if _knocks_itself_out(model):
        controls = read_segments(model, reading, [], state, knock_out_memory=True)
    else:
        (everything,) = (part for part in mixture_parts(model) if part.kind == "all")
        controls = read_segments(model, reading, [], state, around=everything.removed)
    seen, unseen = NextTokens(reading), NextTokens(reading)
    before_tail = state
    for (segment, logits, after), (_, control, _) in zip(
        read_segments(model, reading, recorders, state), controls, strict=True
    ):
        seen.take(segment, logits)
        unseen.take(segment, control)
        if segment.number + 1 == tail_segment:
            before_tail = after
        if progress is not None:
            progress(segment.tokens.stop, reading.num_tokens)
    words = (seen.words(tokenizer), unseen.words(tokenizer))
    return Predictions(seen.column_means(), unseen.column_means(), *words), before_tail


@torch.no_grad()
def _read_up_to(
    model: MemoryModel, reading: Reading, first: int, question: int, num_target: int, state: MemoryState | None
) -> tuple[int, MemoryState | None]:
    """Read on from a token to the question, or to what predicts the target; return where that is, and the state."""
    stop = min(question, reading.num_tokens - num_target - 1)
    if stop <= first:
        return first, state
    cache = MemoryCache(state)
    ids = torch.from_numpy(reading.ids[first:stop])[None].to(model.device)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return stop, cache.state


def _sizes(model: MemoryModel, num_tokens: int, max_columns: int, max_slots: int) -> tuple[int, int]:
    """Return how many columns and slots keep a trace below its budget: fewer columns first, down to the segments."""
    if not has_banks(model):
        return max_columns, max_slots
    slots, blocks = min(max_slots, model.config.num_slots), len(model.banks)
    segments = num_tokens // segment_length(model, num_tokens) + 2
    of_segments = segments * _BYTES_PER_SEGMENT
    columns = (_BUDGET_BYTES // (blocks * slots) - of_segments) // _BYTES_PER_COLUMN
    columns = max(min(columns, max_columns), segments)
    fitting = _BUDGET_BYTES // (blocks * (columns * _BYTES_PER_COLUMN + of_segments))
    return columns, max(min(slots, fitting), min(slots, _FEWEST_SLOTS))


def _segment_of_tail(reading: Reading, num_target: int, question_start: int | None) -> int:
    """Return the segment from which the question and the target are read again."""
    last = max(reading.num_tokens - num_target - 1, 0)  # what predicts the target's first token
    first = last if question_start is None else min(question_start, last)
    return int(np.searchsorted(reading.starts[reading.segments], first, side="right")) - 1


def _notes(model: MemoryModel, reading: Reading) -> list[str]:
    notes = []
    if not _knocks_itself_out(model):
        length = max(len(reading.segment(number).tokens) for number in range(reading.num_segments))
        notes.append(
            f"predictions without the memory: every stretch of {length} tokens is read as if the memories held nothing "
            "before it"
        )
    size = int(np.diff(reading.starts).max())
    if size > 1:
        notes.append(
            f"tokens are shown in columns of up to {size}: shares, gates and log-probabilities are their means"
        )
    if not reading.complete and _knocks_itself_out(model):
        notes.append("the last segment is incomplete: the memory was not updated after it")
    return notes


def _settled(model: MemoryModel, state: MemoryState) -> tuple[MemoryState, tuple[int, ...]]:
    """Return a state, of this model and on its device, that nothing waits in, and the tokens that did.

    Raises:
        StateError: if the state is of another model, or of several rows.
    """
    own: MemoryState = model.adopt(state.to(model.device), 1, weights=True)
    return replace(own, pending=()), own.pending[0] if own.pending else ()


def _check_length(model: MemoryModel, state: MemoryState | None, num_tokens: int) -> None:
    """Refuse a text that full attention was not made for."""
    total = num_tokens + (0 if state is None else state.counts[0])
    if model.longest_text is not None and total > model.longest_text:
        raise ShapeError(
            f"{total:,} tokens are more than the {model.longest_text:,} positions of {model.config.model_type}, whose "
            "attention sees all of them; read a shorter text, or give the model an attention_span"
        )
