"""The benchmark of RMT: its page, its arithmetic, and what it refuses."""

import json
import runpy
from pathlib import Path

import pytest

from mnemon.bench.cost import ModelShape
from mnemon.bench.rmt import RMTRow, RMTRun, RMTSettings, arithmetic_ratio, read_results, write
from mnemon.cli.app import main
from mnemon.errors import DataError
from mnemon.models.configuration_rmt import RMTConfig


def test_a_quick_run_writes_results_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "rmt"
    assert main(["bench", "rmt", "--quick", "--repeats", "2", "-o", str(folder)]) == 0
    page = (folder / "table.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    run = read_results(folder)
    assert [(row.memory, row.batch_size) for row in run.rows] == [("tokens", 1), ("associative", 1)]
    assert all(len(row.seconds) == len(row.plain_seconds) == 2 for row in run.rows)
    tokens, associative = run.rows
    assert tokens.state_bytes == 2 * 64 * 4
    assert associative.state_bytes == 2 * (64 + 1) * 6 * 64 * 4  # two blocks, D + 1 rows of 2 * 3 * 64 features
    assert "target at most 1.30x" in page
    assert main(["bench", "rmt", "--quick", "-o", str(folder)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def ratio_of(memory: str, tokens: int, segment: int, count: int) -> float:
    shape = ModelShape(
        hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_key_value_heads=1, vocab_size=4
    )
    config = RMTConfig(memory=memory, segment_length=segment, num_memory_tokens=count)
    return arithmetic_ratio(RMTSettings(shape, tokens=tokens), config)


def test_the_arithmetic_counts_every_frame() -> None:
    per_column, head = 4 * 64 + 3 * 64, 8 * 4

    def whole(frames: list[int]) -> int:
        return sum(frame * per_column + 16 * frame * (frame + 1) // 2 for frame in frames) + 10 * head

    plain = whole([10])
    assert ratio_of("tokens", 10, 4, 3) == pytest.approx(whole([10, 10, 5]) / plain)
    assert ratio_of("associative", 10, 4, 3) == pytest.approx(whole([7, 7, 2]) / plain)


def test_the_ratio_is_that_of_the_fastest_rounds() -> None:
    assert RMTRow("tokens", 1, [2.0, 4.0], [6.0, 3.0], 1.0, 0).ratio == 1.5


def test_mistakes_are_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "rmt"
    for words, message in ((["--dtype", "int8"], "unknown dtype"), (["--batch-sizes", "x"], "--batch-sizes")):
        assert main(["bench", "rmt", *words, "-o", str(folder)]) == 2
        assert message in capsys.readouterr().err
    assert not folder.exists()


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"settings": {}}))
    with pytest.raises(DataError, match="expected the results of `mnemon bench rmt`"):
        read_results(tmp_path)


def test_the_script_writes_the_page(repository: Path, tmp_path: Path) -> None:
    settings = RMTSettings(ModelShape(64, 128, 2, 4, 4, 256))
    write(tmp_path, RMTRun(settings, "mnemon bench rmt", {"processor": "Z80"}, []))
    script = runpy.run_path(str(repository / "scripts" / "update_benchmarks.py"))
    assert script["main"](["--rmt", str(tmp_path), "--root", str(tmp_path)]) == 0
    assert "Z80" in (tmp_path / "docs" / "results" / "bench-rmt.md").read_text()
    assert script["main"](["--rmt", str(tmp_path / "nowhere"), "--root", str(tmp_path)]) == 2
