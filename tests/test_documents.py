"""What the documents show is executed: every Python block of README and docs, and every example script.

A tutorial walks through an example: its Python blocks are parts of the script, and its one text block is what the
script prints, up to numbers.
"""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
TUTORIALS = sorted((REPOSITORY / "docs" / "tutorials").glob("*.md"))
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
PRINTED = re.compile(r"^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def run_script(script: Path, folder: Path) -> str:
    """Run a script in a folder of its own and return what it prints; its warnings are errors of the test."""
    search = os.pathsep.join(filter(None, [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{script.name} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


WITH_BLOCKS = [path for path in DOCUMENTS if path not in TUTORIALS and BLOCK.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("document", WITH_BLOCKS, ids=relative)
def test_the_python_of_a_document_runs(document: Path, tmp_path: Path) -> None:
    blocks = BLOCK.findall(document.read_text(encoding="utf-8"))
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    run_script(script, tmp_path)


def test_the_readme_shows_python() -> None:
    assert REPOSITORY / "README.md" in WITH_BLOCKS


PROMISES = {
    "memory_model.py": ("earlier logits moved by 0.0e+00", "the same 20 tokens"),
    "babi_and_babilong.py": ("qa10: 250 of 250 questions answered", "1000 tokens of context"),
    "add_a_memory.py": (
        "largest difference 0e+00 within a segment",
        "rounding: True",
        "the decoder is the same as before",
        "it answers alike",
    ),
    "compare_two_rules.py": ("linear_attention", "gated_delta_net", "corrected p"),
    "inspect_routing.py": ("block 1: mean entropy of the router", "memory 3:"),
    "own_update_rule.py": ("implicit_delta is one of", "forms agree", "state resumes after any cut"),
    "remember_a_book.py": ("The book has 64,004 tokens", "Another model refuses the file"),
}
DIFFERS = {"inspect_routing.py": r"(?<=of the tokens; ).*"}
"""What a training on another machine may end in."""


@pytest.mark.parametrize("example", EXAMPLES, ids=relative)
def test_an_example_runs_and_shows_what_it_promises(example: Path, tmp_path: Path) -> None:
    before = processor_seconds()
    output = run_script(example, tmp_path)
    assert processor_seconds() - before < 60, "an example has a minute"
    assert all(promise in output for promise in PROMISES[example.name]), output
    tutorial = REPOSITORY / "docs" / "tutorials" / f"{example.stem.replace('_', '-')}.md"
    if tutorial in TUTORIALS:
        (shown,) = PRINTED.findall(tutorial.read_text(encoding="utf-8"))
        differs = DIFFERS.get(example.name, "$^")
        shown, output = (re.sub(differs, "", text) for text in (shown, output))
        assert without_numbers(shown) == without_numbers(output), f"run scripts/update_tutorials.py {example.stem}"


def processor_seconds() -> float:
    """Return the time that finished child processes have computed; a busy machine does not lengthen it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def without_numbers(text: str) -> list[str]:
    """Return the lines of a text with every number as #, and one blank between words."""
    return [" ".join(re.sub(NUMBER, "#", line).split()) for line in text.strip().splitlines()]


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=relative)
def test_the_python_of_a_tutorial_is_that_of_its_example(tutorial: Path) -> None:
    script = (REPOSITORY / "examples" / f"{tutorial.stem.replace('-', '_')}.py").read_text(encoding="utf-8")
    blocks = BLOCK.findall(tutorial.read_text(encoding="utf-8"))
    assert blocks
    for block in blocks:
        assert block in script, f"{relative(tutorial)} shows what its script does not have:\n{block}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_the_links_of_a_document_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if not re.match(r"https?:|mailto:|#", target):
            assert (document.parent / target.partition("#")[0]).exists(), f"{relative(document)} links to {target}"


def test_every_command_of_the_documents_exists() -> None:
    from mnemon.cli.app import app

    commands = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    for document in DOCUMENTS:
        for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", document.read_text(encoding="utf-8"), re.M | re.S):
            for command in re.findall(r"^(?:\$ )?(?:\.venv/bin/)?mnemon ([a-z]+)", block, re.M):
                assert command in commands, f"{relative(document)} uses `mnemon {command}`"


def test_every_key_of_a_recipe_is_documented() -> None:
    from mnemon.training.recipe import Recipe, Section

    def keys(annotation: Any) -> set[str]:
        found: set[str] = set()
        if isinstance(annotation, type) and issubclass(annotation, Section):
            found = set(annotation.model_fields)
            found |= {key for field in annotation.model_fields.values() for key in keys(field.annotation)}
        return found | {key for inner in get_args(annotation) for key in keys(inner)}

    assert {"fact_limits", "num_pairs", "in_stages"} <= keys(Recipe), "sections of every kind of data must be looked at"
    text = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert not {key for key in keys(Recipe) if f"`{key}`" not in text}


COMMANDS = [
    "chat",
    "compare",
    "eval",
    "generate",
    "inspect",
    "memorize",
    "reproduce",
    "rules",
    "train",
    "data babi",
    "data babilong",
    "data mqar",
    "bench lm2",
    "bench ops",
    "bench generation",
    "bench rmt",
    "bench stream",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_documented(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mnemon.cli.app import main

    assert main([*command.split(), "--help"]) == 0
    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    text = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    assert not {option for option in options if option not in text}
