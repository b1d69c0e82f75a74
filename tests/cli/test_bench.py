"""`mnemon bench`: mistakes are one line; what it writes can be read again."""

import json

import pytest

from mnemon.bench.peak import Peak
from mnemon.bench.run import read_results
from mnemon.cli.app import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--what", "train,fly"], "unknown 'fly'"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--contexts", "1k,zero"], "'zero'"),
        (["--batch-sizes", ","], "--batch-sizes is empty"),
        (["--memory", "64x63"], "multiple of 4"),
        (["--flow", "depth,layer"], "--flow: unknown 'depth,layer'; expected depth or layer"),
        (["--span", "100"], "--span 100 is below the segment length 256"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, tmp_path, capsys):
    assert main(["bench", "lm2", "-o", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_quick_benchmark_writes_results_table_and_figures(tmp_path, capsys, monkeypatch):
    for module in ("train_step", "inference"):
        monkeypatch.setattr(f"mnemon.bench.{module}.measure_peak", lambda probe: Peak(2**20, 1))
    folder = tmp_path / "out"
    assert main(["bench", "lm2", "--quick", "--repeats", "2", "--flow", "layer", "--json", "-o", str(folder)]) == 0
    printed = json.loads(capsys.readouterr().out)
    run = read_results(folder)
    assert printed["output"] == str(folder)
    assert {memory.flow for memory in (*run.settings.memories, *run.settings.readers)} == {"layer"}
    assert "every block keeps a bank of its own" in (folder / "table.md").read_text()
    assert [row.memory.name for row in run.train] == ["compact", "full"]
    assert {row.model for row in run.inference} == {"plain", "compact", "full"}
    assert {path.name for path in folder.iterdir()} >= {"results.json", "table.md", "train.png", "inference.png"}
    assert main(["bench", "lm2", "--quick", "-o", str(folder)]) == 2
    assert "already holds a run" in capsys.readouterr().err
