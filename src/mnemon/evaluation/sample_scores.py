"""One line per sample and model, whatever was measured: what paired tests need.

    {"model": "LM2", "suite": "mqar", "task": "64x8", "id": "64x8-00007", "score": 0.875, "metric": "share_of_queries",
     "sample_sha256": "4f0c..."}

The higher a score the better; losses are written as their negative. Models are compared on equal ids only, and where
both lines name the digest of what was asked, on equal digests only. Further keys are left to whoever wrote them.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from mnemon.errors import DataError
from mnemon.files import read_text

SAMPLES = "samples.jsonl"


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


def sample_lines(samples: Iterable[SampleScore]) -> str:
    """Write samples as JSON lines."""
    return "".join(json.dumps(asdict(sample), ensure_ascii=False, allow_nan=False) + "\n" for sample in samples)


def read_sample_scores(path: Path) -> tuple[SampleScore, ...]:
    """Read a file of samples.

    Raises:
        DataError: if the file is missing, a line is malformed, lacks a key or holds a score that is no finite number,
            or a sample of a model stands there twice; file and line are named.
    """
    samples: dict[tuple[str, str, str, str], SampleScore] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        sample = _sample(parse_line(line, where), where)
        key = (sample.model, sample.suite, sample.task, sample.id)
        if key in samples:
            raise DataError(
                f"{where}: the sample {sample.id} of {sample.model} stands there a second time; evaluate again"
            )
        samples[key] = sample
    return tuple(samples.values())


def parse_line(line: str, where: str) -> dict[str, Any]:
    """Parse one line as a JSON object without NaN or infinity; DataError that says where if it is none."""

    def refuse(word: str) -> NoReturn:
        raise DataError(f"{where}: expected finite numbers, got {word}; evaluate again")

    try:
        value = json.loads(line, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg}); evaluate again") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}; evaluate again")
    return value


def digest(data: bytes) -> str:
    """Identify what was asked by its content."""
    return hashlib.sha256(data).hexdigest()


def _sample(value: dict[str, Any], where: str) -> SampleScore:
    names = {}
    for key in ("model", "suite", "task", "id"):
        if not isinstance(value.get(key), str):
            raise DataError(f"{where}: expected a text under {key!r}, got {value.get(key)!r}; evaluate again")
        names[key] = value[key]
    score = value.get("score")
    if isinstance(score, bool):
        score = float(score)
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise DataError(f"{where}: expected a finite number under 'score', got {score!r}; evaluate again")
    extra = {key: str(value.get(key) or "") for key in ("metric", "sample_sha256")}
    return SampleScore(**names, score=float(score), **extra)
