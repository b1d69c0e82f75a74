"""The benchmark of mixtures: its page, its ratios, and what it refuses."""

import json
from pathlib import Path

import pytest

from mnemon.bench.mom import LayerRow, MoMSettings, layer_ratio, read_results
from mnemon.cli.app import main
from mnemon.errors import DataError


def test_a_quick_run_writes_results_page_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mom"
    assert main(["bench", "mom", "--rules", "gla", "--quick", "-o", str(folder)]) == 0
    page = (folder / "table.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    assert (folder / "decode.png").read_bytes().startswith(b"\x89PNG")
    run = read_results(folder)
    assert [(row.rule, row.batch_size) for row in run.layers] == [("gla", 1), ("gla", 2)]
    assert [row.context for row in run.decoding if row.model == "mixture"] == [64, 256]
    assert len({row.state_bytes for row in run.decoding if row.model == "mixture"}) == 1
    assert "| gla | 256 |" in page


def test_a_ratio_of_one_means_as_many_single_memories_as_a_token_has() -> None:
    row = LayerRow("gla", 1, single=[1.0, 2.0], together=[2.0, 4.0], mixture=[3.0, 6.0])
    settings = MoMSettings(("layer",), ("gla",), top_k=2, shared_memory=True)
    assert settings.active == 3
    assert layer_ratio(row, 3, "sum") == (1.0, 1.0, 1.0)
    assert layer_ratio(row, 3, "together") == (1.5, 1.5, 1.5)


def test_impossible_settings_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mom"
    for words, message in (
        (["--top-k", "9"], "top_k=9 exceeds num_memories=4"),
        (["--rules", "glaa"], "did you mean 'gla'"),
        (["--what", "laier"], "unknown 'laier'"),
        (["--contexts", "x"], "--contexts takes numbers"),
    ):
        assert main(["bench", "mom", *words, "-o", str(folder)]) == 2
        assert message in capsys.readouterr().err
    assert not folder.exists()


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"settings": {}}))
    with pytest.raises(DataError, match="expected the results of `mnemon bench mom`"):
        read_results(tmp_path)
