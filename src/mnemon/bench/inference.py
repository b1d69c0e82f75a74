"""Reading and continuing long contexts: prefill speed, time per new token, state and peak memory."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from mnemon.bench.cost import MemoryShape, ModelShape
from mnemon.bench.models import build_model, random_tokens
from mnemon.bench.peak import Probe, measure_peak
from mnemon.bench.timing import interleave
from mnemon.errors import BackendUnavailable
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.models.state import MemoryCache, MemoryState

PIECE = 4096
"""Tokens that LM2 is given per call while it reads; the plain model is given the whole context at once."""
_SLOW_SECONDS = 10.0


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
    """Read and continue text with either model.

    Args:
        model: a plain Llama or an LM2 in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Place:
        """Read a context [1, T]."""
        if not isinstance(self.model, LM2ForCausalLM):
            output = self.model(ids, use_cache=True, logits_to_keep=1)
            return Place(ids, output.logits[:, -1:].argmax(-1), output.past_key_values)
        cache = MemoryCache()
        for piece in ids.split(PIECE, dim=1):
            output = self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        assert cache.state is not None
        return Place(ids, output.logits[:, -1:].argmax(-1), cache.state)

    @torch.inference_mode()
    def decode(self, place: Place, tokens: int) -> Tensor:
        """Continue greedily by one forward call per token; returns the new tokens, [1, tokens]."""
        cache, token, found = _fresh_cache(place), place.next_token, []
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
            continued = model.generate(prompt, past_key_values=_fresh_cache(place), **options)
        return cast(Tensor, continued)[:, -tokens:]


def measure_inference(
    shape: ModelShape,
    memories: Sequence[MemoryShape],
    *,
    contexts: Sequence[int],
    prefill: bool,
    decode: bool,
    new_tokens: int,
    repeats: int,
    time_limit: float,
    device: str,
    dtype: str,
    threads: int,
    compiled: bool,
    report: Callable[[str], None],
) -> list[InferenceRow]:
    """Measure every model at every context; models take turns within a context.

    A reading that is expected to take longer than `time_limit` seconds is left out and said so: time is taken to grow
    with the square of the context in the plain model, and in proportion to it with a memory.

    Args:
        prefill: time the reading.
        decode: time new tokens.
        new_tokens: new tokens per round.
        compiled: compile the single-token step of both models (CUDA graphs).
    Raises:
        BackendUnavailable: for `compiled` on another device than CUDA.
    """
    if compiled and not device.startswith("cuda"):
        raise BackendUnavailable(f"--compile needs --device cuda, got {device}; leave it out")
    shapes = {"plain": None, **{memory.name: memory for memory in memories}}
    readers = {name: Reader(build_model(shape, memory, device, dtype).eval()) for name, memory in shapes.items()}
    last: dict[str, tuple[int, float]] = {}
    rows = []
    for context in contexts:
        ids = random_tokens(shape, 1, context, device)
        expected = {name: _expected(last.get(name), context, 2 if name == "plain" else 1) for name in readers}
        active = {name: reader for name, reader in readers.items() if expected[name] <= time_limit}
        report(f"context {context}: reading ({', '.join(active)})")
        places: dict[str, Place] = {}

        def read(name: str, reader: Reader, ids: Tensor, places: dict[str, Place]) -> None:
            places[name] = reader.prefill(ids)

        slow = sum(expected[name] for name in active) > _SLOW_SECONDS
        runs = {name: _bind(read, name, reader, ids, places) for name, reader in active.items()}
        seconds = interleave(runs, (1 if slow else repeats) if prefill else 1, device, warm_ups=0 if slow else 1)
        last |= {name: (context, min(seconds[name])) for name in active}
        forward, generated = _decode(active, places, new_tokens, repeats, device, compiled) if decode else ({}, {})
        for name in readers:
            if name not in active:
                reason = f"reading it would take about {expected[name]:.0f} s, limit {time_limit:.0f} s"
                rows.append(InferenceRow(name, context, [], [], [], 0, 0, reason))
                continue
            report(f"context {context}: memory of {name}")
            probe = Probe("infer", shape, shapes[name], context, 1, device, dtype, threads)
            rows.append(
                InferenceRow(
                    name,
                    context,
                    seconds[name] if prefill else [],
                    forward.get(name, []),
                    generated.get(name, []),
                    places[name].num_bytes(),
                    measure_peak(probe).peak_bytes,
                )
            )
    return rows


def _decode(
    readers: dict[str, Reader],
    places: dict[str, Place],
    new_tokens: int,
    repeats: int,
    device: str,
    compiled: bool,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Time new tokens by forward calls and by `generate()`; seconds per token."""
    if compiled:
        for reader in readers.values():
            reader.model.compile(mode="reduce-overhead")
    by_forward = {name: _bind(reader.decode, places[name], new_tokens) for name, reader in readers.items()}
    by_generate = {name: _bind(reader.generate, places[name], new_tokens) for name, reader in readers.items()}
    return tuple(  # type: ignore[return-value]
        {name: [value / new_tokens for value in values] for name, values in interleave(runs, repeats, device).items()}
        for runs in (by_forward, by_generate)
    )


def _bind(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def _fresh_cache(place: Place) -> Any:
    """Make a cache that continues from a place and leaves it as it is (both kinds grow by making new tensors)."""
    if isinstance(place.carried, MemoryState):
        return MemoryCache(place.carried)
    cache = copy.copy(place.carried)
    cache.layers = [copy.copy(layer) for layer in place.carried.layers]
    return cache


def _expected(last: tuple[int, float] | None, context: int, exponent: int) -> float:
    return 0.0 if last is None else last[1] * (context / last[0]) ** exponent
