"""Record linear memories: where tokens go, how full memories get, which words they take, where answers came from.

Recorders stand outside: forward hooks on the memory layers see what every call is given and returns. What is kept of a
call is added to columns at once. Contributions are found afterwards, from the end of the text to its start, by reading
it stretch by stretch again from states that were kept along the way.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mnemon.inspection.contributions import LayerCall, LayerContributions, joined, taken_by
from mnemon.inspection.emptied import emptied, memory_mixers, num_memories
from mnemon.inspection.knock_out import Part
from mnemon.inspection.reading import Reading, Segment
from mnemon.inspection.trace import Contribution, Floats, MixtureLayer, SpecialWord, column_means
from mnemon.inspection.words import Words, find_words
from mnemon.layers.memory_layer import MemoryLayer
from mnemon.layers.mixture_of_memories import MixtureOfMemories
from mnemon.layers.routing import Routing
from mnemon.models.memory_mixer import MemoryMixer
from mnemon.models.memory_model import MemoryModel
from mnemon.models.state import MemoryCache, MemoryState
from mnemon.ops.state import leaves

_MOST_WORDS = 12
_FEWEST_TIMES = 3
_PRIOR = 2.0  # times that a word is taken to have gone as all words go, beside the times that were counted
_STATES_KEPT = 16
_STRETCH = 2048  # tokens that are gone through at once on the way back


class MixtureRecorder:
    """Watch the linear memories of a model (a `mnemon.inspection.reading.Recorder`).

    - `weights`: the router's weights, which add up to 1 for every token; a memory that had no room for a token (see
      `has_room` in `mnemon.layers.routing`) keeps its weight here, and a note says how often that was so.
    - `load`: share of the choices, room or not. A single memory counts as one that every token chooses.
    - `state_norm`: root of the sum of squares of all numbers of a memory's state (a momentum, keys of slots included).
    - `special_words`: words (`mnemon.inspection.words`) that a memory took at least three times and more often than
      words on average; a word goes where its last token goes. With c times there of n words, the memory having taken a
      share p of all words, `lift` is (c + 2) / (n p + 2): near 1 for rare words, whatever their luck.
    - `contributions`: see `mnemon.inspection.contributions`.

    Args:
        model: who reads.
        tokenizer: for words; None = ids in their place.
        reading: what is read.
        state: what was read before; None = nothing.
        readers: tokens whose answers are split; None = the last one.
        more_readers: how many others: those after which a token came that is rare in the text and was expected with
            confidence (largest logarithm of its probability over its share of the text), one of a segment at most.
    """

    def __init__(
        self,
        model: MemoryModel,
        tokenizer: Any,
        reading: Reading,
        state: MemoryState | None = None,
        readers: Sequence[int] | None = None,
        more_readers: int = 3,
    ) -> None:
        self.notes: list[str] = []
        self._model, self._reading = model, reading
        words = find_words(tokenizer, reading.ids.tolist())
        self._layers = [_Layer(mixer, reading, words) for mixer in memory_mixers(model)]
        self._readers = [reading.num_tokens - 1] if readers is None else list(readers)
        self._more_readers = more_readers
        self._expected = _Expected(reading)
        self._stretches = _stretches(reading)
        self._apart = -(-len(self._stretches) // _STATES_KEPT)  # stretches between two states that are kept
        self._kept_before = {segments.start for segments in self._stretches[:: self._apart]}
        self._kept: dict[int, MemoryState | None] = {0: state}

    @contextlib.contextmanager
    def watch(self, segment: Segment) -> Iterator[None]:
        """Watch one call of the model on one segment."""
        watched = [self._model, *(layer.mixer.layer for layer in self._layers)]
        with _last_calls(watched) as calls:
            yield
        self._expected.take(segment, calls[self._model].output.logits[0])
        for layer in self._layers:
            layer.take(segment, calls[layer.mixer.layer])

    def read(self, segment: Segment, state: MemoryState) -> None:
        """Keep the state if a stretch begins here from which the way back will start again."""
        if segment.number + 1 in self._kept_before:
            self._kept[segment.number + 1] = state

    def layers(self) -> tuple[MixtureLayer, ...]:
        """Return what was recorded of every block with linear memories."""
        contributions = self._contributions()
        if refused := sum(layer.refused.sum() for layer in self._layers):
            share = refused / sum(layer.choices.sum() for layer in self._layers)
            self.notes.append(f"{share:.1%} of the router's choices found no room in their memory")
        return tuple(layer.result(contributions.get(layer.mixer.index, ())) for layer in self._layers)

    def _contributions(self) -> dict[int, tuple[Contribution, ...]]:
        """Split the readers' answers, by block; blocks whose rule is not linear in values are left out."""
        readers = sorted({*self._readers, *self._expected.best(self._more_readers)})
        if not readers:
            return {}
        splits = {}
        for layer in self._layers:
            module = layer.mixer.layer
            if module.rule.linear_in_values(**module.settings):
                splits[layer] = LayerContributions(module, readers, self._reading.column_of)
        if len(splits) < len(self._layers):
            name = self._layers[0].mixer.layer.rule.name
            self.notes.append(f"what {name} answers is not linear in the values, so it has no exact parts to show")
        if not splits:
            return {}
        with torch.inference_mode(False), torch.no_grad():
            for segments, state in self._stretches_backwards(max(readers)):
                first = self._reading.segment(segments.start).tokens.start
                calls: dict[_Layer, list[LayerCall]] = {layer: [] for layer in splits}
                for number in segments:
                    with _last_calls([layer.mixer.layer for layer in splits]) as seen:
                        state = self._read(range(number, number + 1), state)
                    for layer, found in calls.items():
                        found.append(LayerCall.of(layer.mixer.layer, *seen[layer.mixer.layer]))
                for layer, split in splits.items():
                    split.go_back(joined(calls[layer]), first)
        if self._more_readers:
            self.notes.append(
                "contributions are shown for a few tokens: the last of the text (before the answer), and those after "
                "which a token came that is rare in the text and was expected with most confidence"
            )
        return {layer.mixer.index: tuple(split.results()) for layer, split in splits.items()}

    def _stretches_backwards(self, last_token: int) -> Iterator[tuple[range, MemoryState | None]]:
        """Yield stretches of segments with the states before them, from the one with a token to the first."""
        number_of = next(
            number
            for number, segments in enumerate(self._stretches)
            if last_token < self._reading.segment(segments[-1]).tokens.stop
        )
        wanted = self._stretches[: number_of + 1]
        for first in range(0, len(wanted), self._apart)[::-1]:
            group = wanted[first : first + self._apart]
            states = [self._kept[group[0].start]]
            for segments in group[:-1]:
                states.append(self._read(segments, states[-1]))
            yield from zip(group[::-1], states[::-1], strict=True)

    def _read(self, segments: range, state: MemoryState | None) -> MemoryState | None:
        """Read segments again, cut as before; return the state after them."""
        cache = MemoryCache(state)
        for tokens in (self._reading.segment(number).tokens for number in segments):
            ids = torch.from_numpy(self._reading.ids[tokens.start : tokens.stop])[None]
            self._model(input_ids=ids.to(self._model.device), past_key_values=cache, logits_to_keep=1)
        return cache.state


class _Call(NamedTuple):
    """What a module was given, and what it returned."""

    args: tuple[Any, ...]
    output: Any


@contextlib.contextmanager
def _last_calls(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, _Call]]:
    """Note the last call of every module within the context: before the first, a model may try itself out."""
    found: dict[nn.Module, _Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found[module] = _Call(args, output)

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Layer:
    """What is recorded of one block.

    Args:
        mixer: the block's memories.
        reading: what is read.
        words: its words.
    """

    def __init__(self, mixer: MemoryMixer, reading: Reading, words: Words) -> None:
        self.mixer = mixer
        self.reading = reading
        self.words = words
        routed = mixer.layer.num_memories if isinstance(mixer.layer, MixtureOfMemories) else 1
        self.weights = np.zeros((reading.num_columns, routed))
        self.entropy = np.zeros(reading.num_columns)
        self.choices = np.zeros(routed)
        self.refused = np.zeros(routed)
        self.norms = np.zeros((reading.num_segments, num_memories(mixer.layer)))
        self.times = np.zeros((routed, len(words.texts)), dtype=np.int64)

    def take(self, segment: Segment, call: _Call) -> None:
        """Take the layer's call on a segment."""
        layer, output = self.mixer.layer, call.output
        taken = taken_by(layer, output[2] if len(output) > 2 else None, len(segment.tokens)).numpy()
        taken = taken[:, : len(self.choices)]
        weights: Floats = np.ones((len(taken), 1))
        entropy: Floats = np.zeros(len(taken))
        chosen = taken
        if isinstance(layer, MixtureOfMemories):
            weights, entropy, chosen = _routed(output[2])
        columns = slice(segment.columns.start, segment.columns.stop)
        starts = self.reading.starts[segment.columns.start : segment.columns.stop + 1] - segment.tokens.start
        self.weights[columns] = column_means(weights, starts)
        self.entropy[columns] = column_means(entropy, starts)
        self.choices += chosen.sum(axis=0)
        self.refused += (chosen & ~taken).sum(axis=0)
        self.norms[segment.number] = _norms(layer, output[1])
        tokens = slice(segment.tokens.start, segment.tokens.stop)
        ends, numbers = self.words.is_last[tokens], self.words.number[tokens]
        for memory, went in enumerate((taken & ends[:, None]).T):
            np.add.at(self.times[memory], numbers[went], 1)

    def result(self, contributions: tuple[Contribution, ...]) -> MixtureLayer:
        """Return the record."""
        layer = self.mixer.layer
        return MixtureLayer(
            layer=self.mixer.index,
            rule=layer.rule.name,
            shared=isinstance(layer, MixtureOfMemories) and layer.shared_memory,
            weights=self.weights.astype(np.float32),
            entropy=self.entropy.astype(np.float32),
            load=(self.choices / self.choices.sum()).astype(np.float32),
            state_norm=self.norms.astype(np.float32),
            special_words=special_words(self.words, self.times) if len(self.times) > 1 else ((),),
            contributions=contributions,
        )


def _stretches(reading: Reading) -> list[range]:
    """Return neighbouring segments that are gone through at once on the way back."""
    stretches = [range(0, 1)]
    for number in range(1, reading.num_segments):
        first = reading.segment(stretches[-1].start).tokens.start
        if reading.segment(number).tokens.stop - first <= _STRETCH:
            stretches[-1] = range(stretches[-1].start, number + 1)
        else:
            stretches.append(range(number, number + 1))
    return stretches


def _routed(routing: Routing) -> tuple[Floats, Floats, np.ndarray]:
    """Return the weights [T, E], entropies [T] and choices [T, E] of the router for one row."""
    probabilities, memories = routing.probabilities[0], routing.memories[0]
    weights = torch.zeros_like(probabilities).scatter(1, memories, routing.weights[0])
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, memories, True)
    return weights.cpu().numpy(), entropy.cpu().numpy(), chosen.cpu().numpy()


def _norms(layer: MemoryLayer, state: Any) -> Floats:
    """Return the norm of the state of every memory, [M]."""
    memory = state.memories.memory if isinstance(layer, MixtureOfMemories) else state.memory
    numbers = [leaf.reshape(num_memories(layer), -1) for leaf in leaves(memory) if leaf.is_floating_point()]
    return np.asarray(torch.cat(numbers, dim=1).double().norm(dim=1).cpu().numpy())


class _Expected:
    """Which tokens of a text were followed by a rare token that the model expected; the best of every segment.

    Args:
        reading: what is read.
    """

    def __init__(self, reading: Reading) -> None:
        self.ids = reading.ids
        different, counts = np.unique(reading.ids, return_counts=True)
        self.log_share = np.log(counts / counts.sum())[np.searchsorted(different, reading.ids)]
        self.found: list[tuple[float, int]] = []

    def take(self, segment: Segment, logits: Tensor) -> None:
        """Take the logits of a segment's last tokens, [at least 1, vocabulary]."""
        tokens = np.arange(segment.tokens.stop - len(logits), segment.tokens.stop)
        known = tokens < len(self.ids) - 1
        if not known.any():
            return
        following = tokens[known] + 1
        log_p = logits[: int(known.sum())].float().log_softmax(dim=-1).cpu()
        gain = log_p.gather(1, torch.from_numpy(self.ids[following])[:, None])[:, 0].numpy() - self.log_share[following]
        best = int(gain.argmax())
        self.found.append((float(gain[best]), int(tokens[best])))

    def best(self, count: int) -> list[int]:
        """Return the best tokens, at most one of every segment."""
        return [token for gain, token in sorted(self.found, reverse=True)[:count] if gain > 0]


def special_words(words: Words, times: np.ndarray) -> tuple[tuple[SpecialWord, ...], ...]:
    """Return for every memory the words that it takes most above average.

    Args:
        words: all words of the text.
        times: how often each memory took each word, [E, different words].
    """
    every = np.bincount(words.number[words.is_last], minlength=len(words.texts))
    shares = times.sum(axis=1) / max(every.sum(), 1)
    result = []
    for counts, share in zip(times, shares, strict=True):
        lift = (counts + _PRIOR) / (every * share + _PRIOR)
        order = np.argsort(-lift, kind="stable")
        chosen = [number for number in order if counts[number] >= _FEWEST_TIMES and lift[number] > 1][:_MOST_WORDS]
        result.append(tuple(SpecialWord(words.texts[n], int(counts[n]), float(lift[n])) for n in chosen))
    return tuple(result)


def mixture_parts(model: MemoryModel) -> list[Part]:
    """Return what can be knocked out of a model's linear memories: each memory of a mixture, each block, all.

    Parts are knocked out by their content: see `mnemon.inspection.emptied`.
    """
    mixers = memory_mixers(model)
    parts = []
    for mixer in mixers:
        count, block = num_memories(mixer.layer), mixer.index
        for memory in range(count) if isinstance(mixer.layer, MixtureOfMemories) else ():
            is_shared = mixer.layer.shared_memory and memory == count - 1
            name = f"{'shared memory' if is_shared else f'memory {memory}'} of block {block}"
            parts.append(Part("memory", name, block, memory, partial(emptied, {mixer: [memory]})))
        parts.append(Part("block", f"memories of block {block}", block, None, partial(emptied, {mixer: range(count)})))
    everything = {mixer: range(num_memories(mixer.layer)) for mixer in mixers}
    return [*parts, Part("all", "all linear memories", None, None, partial(emptied, everything))]
