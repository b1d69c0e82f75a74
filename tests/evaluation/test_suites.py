"""`mnemon eval --suite mqar` and `--suite perplexity` as a user meets them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mnemon.cli.app import main
from mnemon.training import train
from mnemon.training.recipe_io import check_recipe

BASE = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
LM2 = {"num_slots": 4, "slot_dim": 8, "num_memory_heads": 2, "segment_length": 8, "attention_span": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with finished runs: recall with and without memory, and text."""
    folder = tmp_path_factory.mktemp("runs")
    books = folder / "books"
    books.mkdir()
    for number in range(3):
        (books / f"{number}.txt").write_text("The old ship sailed over the calm sea every morning. " * 60)
    mqar = {"kind": "mqar", "vocab_size": 40, "slices": [{"length": 16, "num_pairs": 2}], "random_non_queries": False}
    text = {"kind": "text", "background": str(books), "length": 16}
    recipes: dict[str, dict[str, Any]] = {
        "recall": {"data": mqar, "model": {"kind": "plain", "base": BASE}},
        "recall-lm2": {"data": mqar, "model": {"kind": "lm2", "base": BASE, "lm2": LM2}},
        "text": {"data": text, "model": {"kind": "plain", "base": BASE}, "tokenizer": {"vocab_size": 300}},
    }
    for name, raw in recipes.items():
        raw |= {"name": name, "seed": 5, "evaluation": {"samples": 0}, "output": {"tensorboard": False}}
        raw["optimisation"] = {"max_tokens": 600, "batch_tokens": 200, "device": "cpu", "threads": 1}
        train(check_recipe(raw), folder / name, show_progress=False)
    return folder


def test_recall_of_models_without_tokenizer_is_measured_on_the_trained_slices(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    words = ["eval", "--suite", "mqar", str(runs / "recall"), f"Memory={runs / 'recall-lm2'}", "--samples", "30"]
    assert main([*words, "-o", str(folder), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["settings"]["slices"][0]["random_non_queries"] is False
    assert [row["model"] for row in value["rows"]] == ["recall", "Memory", "Memory (knocked out)"]
    for row in value["rows"]:
        assert (row["length"], row["num_pairs"], row["samples"], row["asked"]) == (16, 2, 30, 60)
        assert (row["tokens_trained"], row["training_seed"], row["seed"]) == (768, 5, 0)
        assert row["parameters"] > 0
        assert row["accuracy"]["low"] <= row["accuracy"]["mean"] <= row["accuracy"]["high"]
    assert json.loads((folder / "results.json").read_text())["rows"] == value["rows"]
    table = (folder / "table.md").read_text()
    assert "16 × 2" in table
    assert "768" in table


def test_measured_runs_can_be_compared_sample_by_sample(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mqar, text = tmp_path / "mqar", tmp_path / "text"
    words = ["eval", "--suite", "mqar", str(runs / "recall"), f"Memory={runs / 'recall-lm2'}", "--samples", "20"]
    assert main([*words, "-o", str(mqar), "--json"]) == 0
    words = ["eval", str(runs / "text"), "--suite", "perplexity", "--lengths", "16,32", "--samples", "3"]
    assert main([*words, "-o", str(text), "--json"]) == 0
    measured = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main(["compare", str(mqar), str(text), "--json"]) == 0
    recall, perplexity = json.loads(capsys.readouterr().out)["sections"]
    for row, before in zip(recall["rows"], measured[0]["rows"], strict=True):
        assert row["value"]["mean"] == pytest.approx(100 * before["accuracy"]["mean"])
    for row, before in zip(perplexity["rows"], measured[1]["rows"], strict=True):
        assert row["value"]["mean"] == pytest.approx(before["perplexity"]["mean"])
    assert len(recall["tests"]) == 3  # of three rows on one slice
    assert [row["memory_blocks"] for row in measured[0]["rows"]] == [0, 1, 1]


def test_other_slices_can_be_asked_for_and_the_seed_decides_the_samples(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(runs / "recall"), "--suite", "mqar", "--slices", "16x1,32x4", "--samples", "200"]
    rows = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main([*words, "--seed", seed, "-o", str(tmp_path / name), "--json"]) == 0
        rows.append(json.loads(capsys.readouterr().out)["rows"])
    assert [(row["length"], row["num_pairs"]) for row in rows[0]] == [(16, 1), (32, 4)]
    assert rows[0] == rows[1]
    assert [row["by_gap"] for row in rows[0]] != [row["by_gap"] for row in rows[2]]


def test_perplexity_is_measured_at_multiples_of_the_trained_length(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    words = ["eval", str(runs / "text"), "--suite", "perplexity", "--samples", "3", "-o", str(folder)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "Perplexity of held-out text" in printed
    assert str(folder / "table.md") in printed.replace("\n", "")
    value = json.loads((folder / "results.json").read_text())
    assert value["settings"]["background"] == str(runs / "books")
    assert [row["length"] for row in value["rows"]] == [16, 32, 64, 128]
    for row in value["rows"]:
        assert row["samples"] == 3
        assert row["perplexity"]["low"] <= row["perplexity"]["mean"] <= row["perplexity"]["high"]
        assert 0 < row["bits_per_byte"] < 20
        assert row["tokens_trained"] == 768


def test_shipped_models_of_other_data_can_be_measured_on_text_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "babilong-tiny-lm2", "--suite", "perplexity", "--lengths", "64,128", "--samples", "2", "--json"]
    assert main([*words, "--no-controls", "-o", str(tmp_path / "out")]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["role"] for row in rows] == ["lm2", "lm2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recall", "--suite", "mqra"], "unknown suite 'mqra'; expected one of babilong, mqar, perplexity"),
        (["recall", "--suite", "mqar", "--tasks", "qa1"], "--tasks is for --suite babilong, not for mqar"),
        (["recall", "--suite", "mqar", "--lengths", "16"], "--lengths is for --suite babilong and perplexity"),
        (["text", "--suite", "perplexity", "--resume"], "--resume is for --suite babilong"),
        (["text", "--slices", "16x2"], "--slices is for --suite mqar, not for babilong"),
        (["recall", "--suite", "mqar", "--slices", "16"], "LENGTHxPAIRS"),
        (["recall", "--suite", "mqar", "--slices", ","], "LENGTHxPAIRS"),
        (["recall", "--suite", "mqar", "--slices", "16x5"], "use 20 or more"),
        (["recall", "text", "--suite", "mqar", "--samples", "2"], None),
        (["recall", "--suite", "perplexity"], "has no tokenizer, so it reads no text; use --suite mqar"),
        (["recall"], "was trained on mqar and has no tokenizer; use --suite mqar"),
        (["text", "--suite", "perplexity", "--lengths", "8,12"], "divide the longest"),
        (["text", "--suite", "perplexity", "--lengths", ","], "--lengths takes"),
        (["text", "--suite", "perplexity", "--lengths", "3x"], "3x"),
        (["text", "--suite", "perplexity", "--samples", "1"], "at least 2 samples"),
        (["text", "--suite", "perplexity", "--background", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str | None
) -> None:
    names = [str(runs / word) if word in ("recall", "text") else word for word in words]
    code = main(["eval", *names, "-o", str(tmp_path / "out")])
    error = capsys.readouterr().err.strip().splitlines()
    if message is None:  # a model of text knows more ids than the samples have, and is measured beside the other
        assert code == 0
        return
    assert code == 2
    assert error[-1].startswith("mnemon: error:")
    assert message in error[-1]


def test_a_model_with_too_few_ids_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(runs / "text"), str(runs / "recall"), "--suite", "mqar", "--slices", "16x2"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 2
    assert "recall knows 40 token ids, the samples have 300" in capsys.readouterr().err


def test_a_damaged_model_without_tokenizer_is_named(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((runs / "recall" / "config.json").read_text())
    assert main(["eval", str(broken), "--suite", "mqar", "-o", str(tmp_path / "out")]) == 2
    assert "no model.safetensors" in capsys.readouterr().err


def test_the_recipe_of_a_run_decides_the_law_of_the_samples(runs: Path) -> None:
    recipe = yaml.safe_load((runs / "recall" / "recipe.yaml").read_text())
    assert recipe["tokenizer"] is None
    assert recipe["data"]["vocab_size"] == 40
