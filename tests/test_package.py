"""What is installed is complete: wheel and sdist build without a network and work outside the source tree."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "mnemon"
MEBIBYTE = 2**20

pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    """Run a program and return its output; its error text is the test's when it fails."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{words} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and from it the wheel, as `make build` does; return their folder."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPOSITORY, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel as pip would, without its dependencies, which this environment has."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    expected = {
        f"mnemon/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected
    assert "mnemon/py.typed" in held
    assert any(name.startswith("mnemon/recipes/") and name.endswith(".yaml") for name in held)


def test_the_wheel_ships_the_checkpoints_within_their_limit(wheel: Path) -> None:
    sizes = {entry.filename: entry.file_size for entry in zipfile.ZipFile(wheel).infolist()}
    for name in ("babilong-tiny-lm2", "babilong-tiny-plain"):
        files = {path: size for path, size in sizes.items() if path.startswith(f"mnemon/checkpoints/{name}/")}
        assert {Path(path).name for path in files} >= {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "README.md",
        }
        assert sum(files.values()) <= 10 * MEBIBYTE


def test_the_sdist_holds_what_is_needed_to_build_and_test(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", "src/mnemon/__init__.py"}
    assert wanted | {"tests/conftest.py", "docs/index.md", "THIRD_PARTY_NOTICES.md"} <= names


def test_the_licence_travels_with_the_wheel(wheel: Path) -> None:
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" in name}
    assert {"LICENSE", "NOTICE", "THIRD_PARTY_NOTICES.md"} <= names


def test_the_installed_package_works_outside_the_source_tree(installed: Path, tmp_path: Path) -> None:
    where = run(sys.executable, "-c", "import mnemon; print(mnemon.__file__)", cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(where.strip()).is_relative_to(installed)
    help_text = run(sys.executable, "-m", "mnemon", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "demo" in help_text
    plan = run(
        sys.executable,
        "-m",
        "mnemon",
        "train",
        "babilong-tiny-lm2",
        "--dry-run",
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert "parameters" in plan


def test_an_installed_checkpoint_generates(installed: Path, tmp_path: Path) -> None:
    words = ["generate", "babilong-tiny-lm2", "--prompt", "Mary went to the garden.", "--max-new-tokens", "3", "--json"]
    text = run(sys.executable, "-m", "mnemon", *words, cwd=tmp_path, PYTHONPATH=str(installed))
    assert '"new_tokens"' in text
