"""`mnemon inspect` writes a page from a model or a trace, and refuses nonsense in one line before it reads anything."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
from saved_models import save_models, tiny_llama, tiny_tokenizer
from trace_cases import lm2_trace
from transformers import LlamaForCausalLM

import mnemon
from mnemon.cli.app import main
from mnemon.inspection.page import page
from mnemon.inspection.trace import load_trace, save_trace


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    return save_trace(tmp_path / "a.trace.safetensors", lm2_trace(first=()))


def test_a_trace_becomes_the_same_page_as_in_python(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "report.html"
    assert main(["inspect", "--trace", str(trace_file), "-o", str(output)]) == 0
    assert output.read_bytes() == page(load_trace(trace_file))
    captured = capsys.readouterr()
    assert captured.out.strip() == f"{output}: babilong-tiny-lm2, 384 tokens in 12 segments"


def test_json_says_what_was_written(trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.html"
    assert main(["inspect", "--trace", str(trace_file), "-o", str(output), "--json"]) == 0
    captured = capsys.readouterr()
    about = json.loads(captured.out)
    assert captured.err == ""
    assert (about["page"], about["tokens"], about["segments"]) == (str(output), 384, 12)
    assert (about["source"], about["explanations"]) == ("qa2:4k:0", 2)


def test_a_page_that_exists_is_replaced_only_when_asked(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.html"
    output.write_text("precious")
    words = ["inspect", "--trace", str(trace_file), "-o", str(output)]
    assert main(words) == 2
    assert "report.html: exists already; use --overwrite or another name" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert main([*words, "--overwrite"]) == 0
    assert output.read_bytes().startswith(b"<!doctype html>")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "expected one of --text, --babilong, --memory and --trace, got none"),
        (["m", "--text", "a.txt", "--babilong", "qa1:1k:0"], "got --text and --babilong"),
        (["--text", "a.txt"], "--text needs a MODEL that reads; name one"),
        (["m", "--trace", "a"], "--trace needs no MODEL; leave it out"),
        (["m", "--memory", "a"], "--memory needs a --prompt"),
        (["m", "--text", "a.txt", "--prompt", "Where?"], "--prompt goes with --memory"),
        (["--trace", "a", "--explain", "3"], "leave out --explain and --save-trace"),
        (["m", "--text", "a.txt", "--explainer", "built-in"], "add --explain N"),
        (["m", "--text", "a.txt", "--explain", "1", "--explainer-model", "x"], "add --explainer http://..."),
        (["--trace", "missing.trace.safetensors"], "missing.trace.safetensors: no such file"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(
    words: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.html"
    assert main(["inspect", *words, "-o", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert not output.exists()


def test_an_altered_trace_is_refused(trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(trace_file.read_bytes())
    data[-1] ^= 1
    trace_file.write_bytes(data)
    assert main(["inspect", "--trace", str(trace_file), "-o", str(tmp_path / "report.html")]) == 2
    assert "was altered after it was written" in capsys.readouterr().err


def test_a_shipped_model_is_recorded_explained_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, saved = tmp_path / "report.html", tmp_path / "a.trace.safetensors"
    words = ["inspect", "babilong-tiny-lm2", "--babilong", "qa1:0k:3", "-o", str(output), "--save-trace", str(saved)]
    assert main([*words, "--explain", "2", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    trace = load_trace(saved)
    assert output.read_bytes() == page(trace)
    assert (trace.model, trace.family, trace.source.name) == ("babilong-tiny-lm2", "lm2", "qa1:0k:3")
    assert about["tokens"] == trace.text.num_tokens
    assert len(trace.explanations) == about["explanations"] == 2
    assert trace.knock_outs is not None
    for block in trace.bank:
        np.testing.assert_allclose(block.read.astype(np.float64).sum(axis=1), 1, atol=0.01)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Save a random MoM, a random RMT and a random Llama without a memory; return their folders."""
    tokenizer = tiny_tokenizer()
    base = tiny_llama(tokenizer)
    mixture = mnemon.MoMConfig(base_config=base, num_memories=3, top_k=2, num_heads=2, head_dim=8, initial_output=1)
    recurrent = mnemon.RMTConfig(base_config=base, num_memory_tokens=3, segment_length=8)
    built = {
        "mom": lambda: mnemon.MoMForCausalLM(mixture),
        "rmt": lambda: mnemon.RMTForCausalLM(recurrent),
        "plain": lambda: LlamaForCausalLM(base),
    }
    return save_models(tmp_path_factory.mktemp("models"), tokenizer, built)


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("Mary went to the garden. John took the milk to the office. Mary took the milk to the garden.\n")
    return path


@pytest.mark.parametrize("name", ["mom", "rmt"])
def test_every_family_of_memories_is_recorded(models: dict[str, str], story: Path, tmp_path: Path, name: str) -> None:
    output, saved = tmp_path / "report.html", tmp_path / "a.trace.safetensors"
    words = ["inspect", models[name], "--text", str(story), "-o", str(output), "--save-trace", str(saved)]
    assert main(words) == 0
    trace = load_trace(saved)
    assert (trace.family, trace.source.name) == (name, "story.txt")
    assert "".join(trace.text.pieces).strip() == story.read_text().strip()
    assert (len(trace.mixture), trace.token_memory is not None) == ((2, False) if name == "mom" else (0, True))
    assert output.read_bytes() == page(trace)


def test_what_a_memory_file_holds_is_asked(
    models: dict[str, str], story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, saved = tmp_path / "story.memory.safetensors", tmp_path / "a.trace.safetensors"
    assert main(["memorize", models["rmt"], str(story), "-o", str(memory)]) == 0
    words = ["--memory", str(memory), "--prompt", "Mary took", "-o", str(tmp_path / "report.html")]
    assert main(["inspect", models["rmt"], *words, "--save-trace", str(saved)]) == 0
    trace = load_trace(saved)
    assert (trace.source.kind, trace.source.name, trace.source.question) == ("memory", memory.name, "Mary took")
    assert trace.token_memory is not None
    capsys.readouterr()
    assert main(["inspect", models["mom"], *words, "--overwrite"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "story.memory.safetensors" in line


def test_an_explainer_that_does_not_answer_costs_its_words_only(
    models: dict[str, str], story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai", reason="needs the extra mnemon[explain]")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: whoever connects is refused
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        output, saved = tmp_path / "report.html", tmp_path / "a.trace.safetensors"
        words = ["inspect", models["mom"], "--text", str(story), "-o", str(output), "--save-trace", str(saved)]
        assert main([*words, "--explain", "1", "--explainer", endpoint, "--explainer-model", "any"]) == 0
    (explanation,) = load_trace(saved).explanations
    assert explanation.text is None
    assert explanation.note
    assert f"note: 1 of 1 units were not explained: {explanation.note}" in capsys.readouterr().err.splitlines()
    assert output.exists()


def test_a_memory_without_units_is_not_explained(
    models: dict[str, str], story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", models["rmt"], "--text", str(story), "-o", str(tmp_path / "report.html"), "--explain", "1"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no units to explain" in line


def test_a_model_without_a_memory_is_refused(
    models: dict[str, str], story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", models["plain"], "--text", str(story), "-o", str(tmp_path / "report.html")]) == 2
    assert "has no memory; choose an LM2, MoM or RMT model" in capsys.readouterr().err


def test_a_text_file_is_read_in_its_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "story.txt"
    text.write_bytes("Mary went to the café. Where is Mary?".encode("latin-1"))
    words = ["inspect", "babilong-tiny-lm2", "--text", str(text), "-o", str(tmp_path / "report.html")]
    assert main(words) == 2
    assert "story.txt, line 1" in capsys.readouterr().err
    saved = tmp_path / "a.trace.safetensors"
    assert main([*words, "--encoding", "latin-1", "--save-trace", str(saved)]) == 0
    assert "café" in "".join(load_trace(saved).text.pieces)
