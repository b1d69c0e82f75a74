"""What the benchmark's tests share: sizes so small that everything runs in a moment."""

import pytest

from mnemon.bench.cost import MemoryShape, ModelShape
from mnemon.bench.settings import Settings


@pytest.fixture
def settings() -> Settings:
    return Settings(
        parts=("train", "prefill", "decode"),
        shape=ModelShape(32, 64, 2, 4, 2, 64),
        memories=(MemoryShape("compact", 4, 8, 8),),
        readers=(MemoryShape("compact", 4, 8, 8, attention_span=16),),
        tokens=16,
        batch_sizes=(1, 2),
        default_segment=8,
        contexts=(24, 48),
        new_tokens=3,
        repeats=2,
        time_limit=60.0,
        device="cpu",
        dtype="float32",
        threads=1,
    )
