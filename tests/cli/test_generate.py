"""`mnemon generate` continues texts, repeats with a seed, and refuses nonsense in one line."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saved_models import save_models, tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM

import mnemon
from mnemon.cli.app import main

Run = Callable[..., str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Save a random LM2, a random Llama with a tiny tokenizer, and a memory alone for it; return their folders."""
    tokenizer = tiny_tokenizer()
    base, memory = tiny_llama(tokenizer), {"num_slots": 4, "slot_dim": 8, "num_memory_heads": 2, "segment_length": 8}
    built = {
        "lm2": lambda: mnemon.LM2ForCausalLM(mnemon.LM2Config(base_config=base, **memory)),
        "plain": lambda: LlamaForCausalLM(base),
    }
    folders = save_models(tmp_path_factory.mktemp("models"), tokenizer, built)
    adapted = mnemon.LM2ForCausalLM.from_base(folders["plain"], freeze_base=True, **memory)
    folders["adapter"] = str(adapted.save_adapter(tmp_path_factory.mktemp("models") / "adapter"))
    return folders


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `mnemon generate`, expects success and returns the output."""

    def run_generate(model: str, *options: str) -> str:
        code = main(["generate", model, *options])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        assert captured.err == ""
        return captured.out

    return run_generate


@pytest.mark.parametrize("name", ["lm2", "plain", "adapter"])
def test_the_printed_text_is_the_text_of_the_json(models: dict[str, str], run: Run, name: str) -> None:
    words = (models[name], "--prompt", "Mary went to the", "--max-new-tokens", "12")
    report = json.loads(run(*words, "--json"))
    assert report["new_tokens"] <= 12
    assert report["prompt"] == "Mary went to the"
    assert run(*words).rstrip("\n") == report["text"].rstrip("\n")


def test_the_prompt_may_come_from_a_file_or_standard_input(
    models: dict[str, str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(models["lm2"], "--prompt", "John took", "--max-new-tokens", "5", "--json")
    file = tmp_path / "prompt.txt"
    file.write_text("John took\n")
    assert run(models["lm2"], "--prompt-file", str(file), "--max-new-tokens", "5", "--json") == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"John took\n")))
    assert run(models["lm2"], "--max-new-tokens", "5", "--json") == expected


def test_samples_repeat_with_the_seed_and_leave_the_global_generator_alone(models: dict[str, str], run: Run) -> None:
    state = torch.get_rng_state()
    words = (models["lm2"], "--prompt", "Mary", "--sample", "--max-new-tokens", "16", "--json")
    first, again, other = (json.loads(run(*words, "--seed", seed))["text"] for seed in ("1", "1", "2"))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)


def test_temperature_and_top_p_change_the_sample(models: dict[str, str], run: Run) -> None:
    words = (models["plain"], "--prompt", "Mary", "--sample", "--max-new-tokens", "16", "--json")
    usual = json.loads(run(*words))["text"]
    greedy = json.loads(run(models["plain"], "--prompt", "Mary", "--max-new-tokens", "16", "--json"))["text"]
    assert json.loads(run(*words, "--temperature", "0.001"))["text"] == greedy != usual
    assert json.loads(run(*words, "--top-p", "0.000001"))["text"] == greedy


def test_a_beam_search_answers(models: dict[str, str], run: Run) -> None:
    report = json.loads(run(models["lm2"], "--prompt", "Mary", "--beams", "3", "--max-new-tokens", "6", "--json"))
    assert report["settings"]["num_beams"] == 3
    assert run(models["lm2"], "--prompt", "Mary", "--beams", "3", "--max-new-tokens", "6").strip("\n") == report[
        "text"
    ].strip("\n")


def test_a_knocked_out_memory_is_reported_and_refused_where_there_is_none(
    models: dict[str, str], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(run(models["lm2"], "--prompt", "Mary", "--knock-out-memory", "--json"))
    assert report["settings"]["knock_out_memory"] is True
    assert main(["generate", models["plain"], "--prompt", "Mary", "--knock-out-memory"]) == 2
    assert "has no memory to knock out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", " \n"], "the prompt is empty"),
        (["--prompt", "a", "--prompt-file", "b"], "exclude each other"),
        (["--prompt-file", "missing.txt"], "no such file"),
        (["--prompt", "a", "--temperature", "0.5"], "add --sample"),
        (["--prompt", "a", "--top-p", "0.5"], "add --sample"),
        (["--prompt", "a", "--seed", "5"], "add --sample"),
        (["--prompt", "a", "--sample", "--temperature", "0"], "--temperature must be a number above 0"),
        (["--prompt", "a", "--sample", "--temperature", "nan"], "--temperature must be a number above 0"),
        (["--prompt", "a", "--sample", "--top-p", "1.5"], "--top-p must be above 0 and at most 1"),
        (["--prompt", "a", "--sample", "--beams", "2"], "exclude each other"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "a", "--beams", "0"], "--beams"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    models: dict[str, str], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["generate", models["lm2"], *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "no-such-model", "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert "no-such-model" in error
    assert error.count("\n") == 1


def test_standard_input_that_is_not_utf8_is_refused(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert main(["generate", models["lm2"]]) == 2
    assert "byte 2 is not UTF-8" in capsys.readouterr().err
