"""One line per sample and model, whatever was measured: what paired tests need.

    {"model": "LM2", "suite": "mqar", "task": "64x8", "id": "64x8-00007", "score": 0.875, "metric": "share_of_queries",
     "sample_sha256": "4f0c..."}

The higher a score the better; losses are written as their negative. Models are compared on equal ids only, and where
both lines name the digest of what was asked, on equal digests only. Further keys are left to whoever wrote them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from mnemon.errors import DataError
from mnemon.files import parse_object, read_text

SAMPLES = "samples.jsonl"
ADVICE = "; evaluate again"
"""What to do about a damaged result."""


@dataclass(frozen=True)
class SampleScore:
    """What one model made of one sample.

    Attributes:
        id: names the sample within the task; the same for every model.
        score: a finite number, the higher the better.
        metric: what that number is; "nats_..." are losses with the sign turned.
        sample_sha256: digest of what was asked.
    """

    model: str
    suite: str
    task: str
    id: str
    score: float
    metric: str = ""
    sample_sha256: str = ""


Sample = TypeVar("Sample", bound=SampleScore)


def sample_lines(samples: Iterable[SampleScore]) -> str:
    """Write samples as JSON lines."""
    return "".join(json.dumps(asdict(sample), ensure_ascii=False, allow_nan=False) + "\n" for sample in samples)


def read_sample_scores(path: Path) -> tuple[SampleScore, ...]:
    """Read a file of samples, whoever wrote it; keys of its own are passed over.

    Raises:
        DataError: see `read_samples`; or a line lacks a key or holds a score that is no finite number.
    """
    return read_samples(path, _sample)


def read_samples(path: Path, build: Callable[[dict[str, Any], str], Sample]) -> tuple[Sample, ...]:
    """Read a file of samples.

    Args:
        path: the file.
        build: makes a sample of a parsed line; told what names the line in messages.

    Raises:
        DataError: the file is missing, a line is malformed, or a sample of a model stands there twice; file and line
            are named.
    """
    samples: dict[tuple[str, str, str, str], Sample] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        sample = build(parse_object(line, where, ADVICE), where)
        key = (sample.model, sample.suite, sample.task, sample.id)
        if key in samples:
            raise DataError(f"{where}: the sample {sample.id} of {sample.model} stands there a second time{ADVICE}")
        samples[key] = sample
    return tuple(samples.values())


def digest(data: bytes) -> str:
    """Identify what was asked by its content."""
    return hashlib.sha256(data).hexdigest()


def _sample(value: dict[str, Any], where: str) -> SampleScore:
    names = {}
    for key in ("model", "suite", "task", "id"):
        if not isinstance(value.get(key), str):
            raise DataError(f"{where}: expected a text under {key!r}, got {value.get(key)!r}{ADVICE}")
        names[key] = value[key]
    score = value.get("score")
    if isinstance(score, bool):
        score = float(score)
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise DataError(f"{where}: expected a finite number under 'score', got {score!r}{ADVICE}")
    extra = {key: str(value.get(key) or "") for key in ("metric", "sample_sha256")}
    return SampleScore(**names, score=float(score), **extra)
