"""The script that writes result pages and the README's table."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from mnemon.errors import DataError
from mnemon.evaluation.comparison import Comparison
from mnemon.evaluation.results import BabilongResult
from mnemon.evaluation.run import EvaluationRun, write_run


@pytest.fixture(scope="module")
def script(repository: Path) -> ModuleType:
    path = repository / "scripts" / "update_results.py"
    spec = importlib.util.spec_from_file_location("update_results", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path: Path, four_models: Comparison) -> Path:
    (tmp_path / "README.md").write_text("# Us\n<!-- results:begin -->\nstale\n<!-- results:end -->\nMore.\n")
    real = [replace(r, settings=replace(r.settings, stories="bAbI")) for r in four_models.results]
    for name, results in (("generated", four_models.results), ("real", tuple(real))):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, EvaluationRun(results, f"mnemon eval {name}", {"processor": "Z80"}))
    return tmp_path


def test_pages_and_readme_are_written_from_results(script: ModuleType, root: Path) -> None:
    page = f"tiny={root / 'generated'},{root / 'real'}"
    assert script.main([page, "--readme", "tiny", "--root", str(root)]) == 0
    text = (root / "docs" / "results" / "tiny.md").read_text()
    for word in ("Side by side", "stories bAbI", "mnemon eval real", "Z80", "+0.0 [", "tiny-2.svg", "40 samples"):
        assert word in text
    assert (root / "docs" / "results" / "tiny-1.svg").stat().st_size > 1000
    readme = (root / "README.md").read_text()
    assert readme.startswith("# Us\n<!-- results:begin -->\n")
    assert readme.endswith("<!-- results:end -->\nMore.\n")
    assert "stale" not in readme
    assert "| LM2 | 100,000 |" in readme
    assert script.main([page, "--readme", "tiny", "--root", str(root)]) == 0
    assert (root / "README.md").read_text() == readme


def test_folders_of_training_seeds_are_one_evaluation(
    script: ModuleType, root: Path, two_seeds: tuple[BabilongResult, ...]
) -> None:
    for seed in (0, 1):
        (root / f"seed-{seed}").mkdir()
        results = tuple(result for result in two_seeds if result.model.training["seed"] == seed)
        write_run(root / f"seed-{seed}", EvaluationRun(results, f"mnemon eval seed-{seed}"))
    page = f"tiny={root / 'generated'},{root / 'seed-0'}+{root / 'seed-1'}"
    assert script.main([page, "--root", str(root)]) == 0
    text = (root / "docs" / "results" / "tiny.md").read_text()
    assert "2 training seeds of each" in text
    assert "mnemon eval seed-0; mnemon eval seed-1" in text
    assert script.main([f"tiny={root / 'seed-0'}+{root / 'seed-0'}", "--root", str(root)]) == 2


@pytest.mark.parametrize("page", ["tiny", "tiny=", "a/b=x", "tiny=nowhere"])
def test_a_bad_page_changes_nothing(
    script: ModuleType, root: Path, capsys: pytest.CaptureFixture[str], page: str
) -> None:
    assert script.main([page, "--root", str(root)]) == 2
    assert capsys.readouterr().err.startswith("update_results: error:")
    assert not (root / "docs").exists()


@pytest.mark.parametrize("change", [lambda text: text.replace("end", "stop"), lambda text: text + text])
def test_a_readme_without_its_markers_is_refused(script: ModuleType, change: Callable[[str], str]) -> None:
    with pytest.raises(DataError, match="results:begin"):
        script.fill_block(change("<!-- results:begin --><!-- results:end -->"), "", "README.md")
