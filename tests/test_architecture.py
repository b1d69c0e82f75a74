"""The agreements about structure, as tests: imports run one way, and importing is light."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "mnemon"
HEAVY = {"torch", "transformers", "tensorflow", "datasets", "matplotlib", "scipy", "lm_eval"}

# Part -> parts it may import. Whatever is not listed here may not be imported by it.
FOUNDATION = {"errors", "files", "typed_files", ""}
ALLOWED = {
    "": {"data", "evaluation", "models", "ops", "training"},  # the package itself: names resolved on first use
    "errors": set(),
    "files": {"errors"},
    "typed_files": {"errors", "files", ""},
    "ops": FOUNDATION,
    "layers": FOUNDATION | {"ops"},
    "data": FOUNDATION,
    "models": FOUNDATION | {"layers", "ops"},
    "metrics": FOUNDATION | {"data"},  # takes any model as an argument
    "training": FOUNDATION | {"data", "layers", "metrics", "models", "ops"},
    "evaluation": FOUNDATION | {"data", "layers", "metrics", "models", "ops"},
    "studies": FOUNDATION | {"data", "layers", "metrics", "models", "ops", "training", "evaluation"},
    "inspection": FOUNDATION | {"data", "layers", "models", "ops", "evaluation"},
    "bench": FOUNDATION | {"data", "layers", "models", "ops", "evaluation"},
    "demo": FOUNDATION | {"data", "layers", "metrics", "models", "ops", "training", "evaluation"},
    "cli": FOUNDATION
    | {
        "data",
        "layers",
        "metrics",
        "models",
        "ops",
        "training",
        "evaluation",
        "demo",
        "bench",
        "studies",
        "inspection",
    },
    "__main__": {"cli"},
}


def part_of(path: Path) -> str:
    """Return the part of the package a file belongs to; '' is the package's own `__init__`."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_modules(path: Path) -> set[str]:
    """Return the full names of all modules a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_parts(path: Path) -> set[str]:
    """Return the parts of the package that a file imports."""
    parts = set()
    for name in imported_modules(path):
        words = name.split(".")
        if words[0] == "mnemon":
            known = len(words) > 1 and words[1] in ALLOWED
            parts.add(words[1] if known else "")
    return parts


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"the part {part!r} is new: say in ALLOWED what it may import"
    against_the_flow = imported_parts(path) - ALLOWED[part] - {part}
    assert not against_the_flow, f"{path.relative_to(PACKAGE)} imports {sorted(against_the_flow)}"


def test_the_check_sees_an_arrow_against_the_flow(tmp_path: Path) -> None:
    source = tmp_path / "layer.py"
    source.write_text("def f():\n    from mnemon.training import trainer\n    import mnemon.cli.app\n")
    assert imported_parts(source) == {"training", "cli"}


@pytest.mark.parametrize("part", ["data", "errors", "files"])
def test_data_and_foundation_never_import_torch(part: str) -> None:
    for path in SOURCES:
        if part_of(path) == part:
            roots = {name.split(".")[0] for name in imported_modules(path)}
            assert "torch" not in roots, f"{path.relative_to(PACKAGE)} imports torch"


def test_ops_and_layers_never_import_transformers() -> None:
    for path in SOURCES:
        if part_of(path) in ("ops", "layers"):
            roots = {name.split(".")[0] for name in imported_modules(path)}
            assert "transformers" not in roots, f"{path.relative_to(PACKAGE)} imports transformers"


def test_no_source_file_is_longer_than_500_lines() -> None:
    long = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not {name: count for name, count in long.items() if count > 500}


def modules_after(statement: str) -> set[str]:
    """Run a statement in a fresh interpreter and return the top-level modules it loaded."""
    code = f"import sys\ntry:\n    {statement}\nexcept SystemExit: pass\nprint('\\nMODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.rsplit("MODULES", 1)[1].split()}


@pytest.mark.parametrize(
    "statement",
    [
        "import mnemon; dir(mnemon); mnemon.__version__",
        "from mnemon.cli.app import main; main(['--help'])",
        "from mnemon.cli.app import main; main(['train', '--help'])",
        "from mnemon.cli.app import main; main(['eval', '--help'])",
        "from mnemon.cli.app import main; main(['data', 'babilong', '--help'])",
        "from mnemon.cli.app import main; main(['data', 'mqar', '--help'])",
        "from mnemon.cli.app import main; main(['bench', 'lm2', '--help'])",
        "from mnemon.cli.app import main; main(['bench', 'ops', '--help'])",
        "from mnemon.cli.app import main; main(['convert', '--help'])",
        "from mnemon.cli.app import main; main(['inspect', '--help'])",
        "from mnemon.cli.app import main; main(['reproduce', '--help'])",
        "from mnemon.cli.app import main; main(['compare', '--help'])",
        "from mnemon.cli.app import main; main(['memorize', '--help'])",
        "from mnemon.cli.app import main; main(['chat', '--help'])",
    ],
)
def test_importing_and_asking_for_help_are_light(statement: str) -> None:
    assert not modules_after(statement) & HEAVY


def test_help_answers_quickly() -> None:
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mnemon", "--help"], capture_output=True, check=True)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 2, f"mnemon --help took {min(durations):.2f} s"
