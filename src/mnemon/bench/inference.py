"""Reading and continuing long contexts: prefill speed, time per new token, state and peak memory."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from mnemon.bench.models import build_model, random_tokens
from mnemon.bench.peak import Probe, measure_peak
from mnemon.bench.settings import Settings
from mnemon.bench.timing import interleave
from mnemon.models.memory_model import MemoryModel
from mnemon.models.state import MemoryCache, MemoryState

PIECE = 4096
"""Tokens that a model with a memory is given per call while it reads; a plain one gets the whole context at once."""
_SLOW_SECONDS = 10.0
_PLAIN = "plain"


@dataclass(frozen=True)
class InferenceRow:
    """One model at one context length; where it was skipped the lists are empty.

    Attributes:
        model: "plain" or the memory's name.
        context: tokens read.
        prefill_seconds: seconds of every reading of the context.
        decode_seconds: seconds per new token of every round, by repeated forward calls (greedy).
        generate_seconds: seconds per new token of every round, by `generate()`.
        state_bytes: what is carried to the next token: key/value cache, or memory state.
        peak_bytes: peak memory of prefill and four new tokens over the built model.
        skipped: why there are no numbers, or an empty string.
    """

    model: str
    context: int
    prefill_seconds: list[float]
    decode_seconds: list[float]
    generate_seconds: list[float]
    state_bytes: int
    peak_bytes: int
    skipped: str = ""


@dataclass(frozen=True)
class Place:
    """A point in a text that can be continued any number of times: what was read, and the most likely next token."""

    ids: Tensor
    next_token: Tensor
    carried: DynamicCache | MemoryState

    def num_bytes(self) -> int:
        """Return the bytes carried to the next token."""
        if isinstance(self.carried, MemoryState):
            return self.carried.num_bytes()
        layers = cast(list[Any], self.carried.layers)
        return sum(part.numel() * part.element_size() for layer in layers for part in (layer.keys, layer.values))


class Reader:
    """Read and continue text with any model.

    Args:
        model: a plain Llama or a model with a memory, in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.inference_mode()
    def prefill(self, ids: Tensor, start: Place | None = None) -> Place:
        """Read a context [1, T], with a memory also from where an earlier reading ended."""
        if not isinstance(self.model, MemoryModel):
            assert start is None, "a plain model reads a context as a whole"
            output = self.model(ids, use_cache=True, logits_to_keep=1)
            return Place(ids, output.logits[:, -1:].argmax(-1), output.past_key_values)
        cache = MemoryCache() if start is None else fresh_cache(start)
        for piece in ids.split(PIECE, dim=1):
            output = self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        assert cache.state is not None
        return Place(ids, output.logits[:, -1:].argmax(-1), cache.state)

    @torch.inference_mode()
    def decode(self, place: Place, tokens: int) -> Tensor:
        """Continue greedily by one forward call per token; returns the new tokens, [1, tokens]."""
        return self.advance(fresh_cache(place), place.next_token, tokens)

    @torch.inference_mode()
    def advance(self, cache: Any, token: Tensor, tokens: int) -> Tensor:
        """Do the same from a cache and a token after it; the cache goes along, what it held before is let go."""
        found = []
        for _ in range(tokens):
            found.append(token)
            output = self.model(token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        return torch.cat(found, dim=1)

    @torch.inference_mode()
    def generate(self, place: Place, tokens: int) -> Tensor:
        """Continue greedily by `generate()`; returns the tokens after `place.next_token`, [1, tokens]."""
        options: Any = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        model = cast(Any, self.model)
        if isinstance(place.carried, MemoryState):
            continued = model.generate(place.next_token, memory=place.carried, **options)
        else:
            prompt = torch.cat([place.ids, place.next_token], dim=1)
            continued = model.generate(prompt, past_key_values=fresh_cache(place), **options)
        return cast(Tensor, continued)[:, -tokens:]


def measure_inference(settings: Settings, report: Callable[[str], None]) -> list[InferenceRow]:
    """Measure every model at every context; models take turns within a context.

    A reading that is expected to take longer than the time limit is left out and said so: time is taken to grow with
    the square of the context in the plain model, and in proportion to it with a memory.

    Args:
        settings: `readers`, `contexts`, `new_tokens`, `time_limit` and how to run.
        report: told what is measured next.
    """
    device = settings.device
    shapes = {_PLAIN: None, **{memory.name: memory for memory in settings.readers}}
    readers = {
        name: Reader(build_model(settings.shape, memory, device, settings.dtype).eval())
        for name, memory in shapes.items()
    }
    fastest: dict[str, tuple[int, float]] = {}
    rows = []
    for context in settings.contexts:
        expected = {name: _expected(fastest.get(name), context, 2 if name == _PLAIN else 1) for name in readers}
        active = {name: reader for name, reader in readers.items() if expected[name] <= settings.time_limit}
        report(f"context {context}: reading ({', '.join(active)})")
        ids = random_tokens(settings.shape, 1, context, device)
        slow = "prefill" not in settings.parts or sum(expected[name] for name in active) > _SLOW_SECONDS
        places, reading = _read(active, ids, 1 if slow else settings.repeats, device, warm_ups=0 if slow else 1)
        fastest |= {name: (context, min(reading[name])) for name in active}
        forward, generated = _continue(active, places, settings) if "decode" in settings.parts else ({}, {})
        for name in readers:
            if name not in active:
                reason = f"reading it would take about {expected[name]:.0f} s, limit {settings.time_limit:.0f} s"
                rows.append(InferenceRow(name, context, [], [], [], 0, 0, reason))
                continue
            report(f"context {context}: memory of {name}")
            probe = Probe("infer", settings.shape, shapes[name], context, 1, device, settings.dtype, settings.threads)
            rows.append(
                InferenceRow(
                    name,
                    context,
                    reading[name] if "prefill" in settings.parts else [],
                    forward.get(name, []),
                    generated.get(name, []),
                    places[name].num_bytes(),
                    measure_peak(probe).peak_bytes,
                )
            )
    return rows


def _read(
    readers: dict[str, Reader], ids: Tensor, repeats: int, device: str, warm_ups: int
) -> tuple[dict[str, Place], dict[str, list[float]]]:
    """Read a context with every model in turn; returns where they stand afterwards, and seconds per reading."""
    places: dict[str, Place] = {}

    def read(name: str) -> None:
        places.pop(name, None)  # two copies of a long context's keys and values may not fit
        places[name] = readers[name].prefill(ids)

    return places, interleave({name: partial(read, name) for name in readers}, repeats, device, warm_ups)


def _continue(
    readers: dict[str, Reader], places: dict[str, Place], settings: Settings
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Time new tokens by forward calls and by `generate()`; seconds per token."""
    tokens = settings.new_tokens
    by_forward = {name: partial(reader.decode, places[name], tokens) for name, reader in readers.items()}
    by_generate = {name: partial(reader.generate, places[name], tokens) for name, reader in readers.items()}
    first, second = (interleave(runs, settings.repeats, settings.device) for runs in (by_forward, by_generate))
    return _per_token(first, tokens), _per_token(second, tokens)


def _per_token(seconds: dict[str, list[float]], tokens: int) -> dict[str, list[float]]:
    return {name: [value / tokens for value in values] for name, values in seconds.items()}


def fresh_cache(place: Place) -> Any:
    """Make a cache that continues from a place and leaves it as it is (both kinds grow by making new tensors)."""
    if isinstance(place.carried, MemoryState):
        return MemoryCache(place.carried)
    cache = copy.copy(place.carried)
    cache.layers = [copy.copy(layer) for layer in place.carried.layers]
    return cache


def _expected(last: tuple[int, float] | None, context: int, exponent: int) -> float:
    return 0.0 if last is None else last[1] * (context / last[0]) ** exponent
