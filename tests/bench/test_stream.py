"""`mnemon bench stream`: what it says of a reading is what was seen."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lm2_cases import llama_config, lm2

from mnemon.bench.stream import Sample, StreamRun, markdown, read_results, stream, write
from mnemon.cli.app import main
from mnemon.errors import ConfigError, DataError

MIB = 2**20


def run_of(*samples: tuple[int, float, int]) -> StreamRun:
    return StreamRun("tiny", samples[-1][0], tuple(Sample(*sample) for sample in samples), "mnemon bench stream", {})


def test_the_first_ten_thousand_tokens_do_not_count() -> None:
    run = run_of((0, 0.0, 5 * MIB), (10_000, 1.0, 100 * MIB), (20_000, 2.0, 103 * MIB), (30_000, 4.0, 98 * MIB))
    assert run.memory_spread() == (-2.0, 3.0)
    assert run.speeds(parts=2) == [10_000.0, 5_000.0]
    assert "-2.0 to +3.0 MiB" in markdown(run, "figure.png")


def test_a_run_is_written_and_read_back(tmp_path: Path) -> None:
    run = run_of((10_000, 1.0, MIB), (20_000, 2.0, MIB), (40_000, 4.0, MIB))
    write(tmp_path, run)
    assert read_results(tmp_path) == run
    assert (tmp_path / "stream.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "results.json").write_text(json.dumps({"model": "x"}))
    with pytest.raises(DataError, match="expected the results of `mnemon bench stream`"):
        read_results(tmp_path)


def test_every_token_is_counted_once_and_in_order() -> None:
    model = lm2(llama_config(), attention_span=64, segment_length=64, num_slots=4, slot_dim=6)
    seen: list[int] = []
    samples = stream(model, torch.randint(3, 50, (1, 40_000)), 4_096, seen.append)
    assert [sample.tokens for sample in samples][-1] == 40_000 == seen[-1]
    assert len(samples) == 40_000 // 4_096 + 1
    assert all(later.seconds >= earlier.seconds for earlier, later in pairwise(samples))
    with pytest.raises(ConfigError, match="too short; give at least 40000"):
        stream(model, torch.ones(1, 100, dtype=torch.long), 256, seen.append)


def test_a_model_without_a_memory_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "stream", "babilong-tiny-plain", "-o", str(tmp_path / "out")]) == 2
    assert "has no memory; expected an LM2" in capsys.readouterr().err


def test_a_text_too_short_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    assert main(["bench", "stream", "babilong-tiny-lm2", "--tokens", "5k", "-o", str(folder)]) == 2
    assert "too short; give at least 40000" in capsys.readouterr().err
    assert not folder.exists()
