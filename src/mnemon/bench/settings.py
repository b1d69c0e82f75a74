"""What a benchmark of LM2 measures: one value that goes through all of it and stands beside its results."""

from dataclasses import dataclass

from mnemon.bench.cost import MemoryShape, ModelShape

PARTS = ("train", "prefill", "decode")


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        parts: which of `PARTS`.
        shape: the Llama.
        memories: configurations of the training step.
        readers: configurations of prefill and decoding, with an attention span.
        tokens: tokens T of a training sequence.
        default_segment: segment length the targets are set for.
        contexts: context lengths of prefill and decoding, rising.
        new_tokens: new tokens per round of decoding.
        repeats: rounds that count.
        time_limit: longest expected reading of one context in seconds.
    """

    parts: tuple[str, ...]
    shape: ModelShape
    memories: tuple[MemoryShape, ...]
    readers: tuple[MemoryShape, ...]
    tokens: int
    batch_sizes: tuple[int, ...]
    default_segment: int
    contexts: tuple[int, ...]
    new_tokens: int
    repeats: int
    time_limit: float
    device: str
    dtype: str
    threads: int
    optimiser: bool = False
