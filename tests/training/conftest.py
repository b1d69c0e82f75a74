"""A recipe that trains in about a second: a tiny model, a tiny tokenizer, two made-up books as background."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest

from mnemon.data import babi
from mnemon.data.tokenizer import train_tokenizer

WORDS = "old ship sea captain storm house letter garden morning friend silent winter road music window stone".split()
STARTS = ("A", "The", "Old", "My", "On", "In", "I", "An")


def _book(seed: int, sentences: int = 300) -> str:
    rng = random.Random(seed)
    lines = [f"{rng.choice(STARTS)} {' '.join(rng.choices(WORDS, k=12))} was there." for _ in range(sentences)]
    return "\n\n".join(lines)


@pytest.fixture(scope="session")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    for number in range(3):
        (folder / f"book{number}.txt").write_text(_book(number), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    stories = [" ".join(line.text for line in story.lines) for story in babi.generate("qa1", 60, 0)]
    train_tokenizer([*stories, _book(0, 50), "Question: Answer: <context>"], 420).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_base: dict[str, Any]) -> dict[str, Any]:
    """Return a raw recipe to change; about twelve steps of 512 tokens."""
    return copy.deepcopy(tiny_base)


@pytest.fixture(scope="session")
def tiny_base(books: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """Return the raw recipe that all tests here start from; do not change it in place."""
    return {
        "name": "tiny",
        "seed": 3,
        "model": {
            "kind": "plain",
            "base": {
                "model_type": "lfm2",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "layer_types": ["conv", "full_attention"],
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "intermediate_size": 48,
                "block_auto_adjust_ff_dim": False,
            },
        },
        "tokenizer": {"path": str(tokenizer_folder)},
        "data": {
            "tasks": {"qa1": 2.0, "qa6": 1.0},
            "background": str(books),
            "lengths": [0, 64, 96],
            "curriculum": {"threshold": 0.0, "window": 12, "share_shorter": 0.4},
        },
        "optimisation": {"warmup_steps": 3, "batch_tokens": 512, "max_tokens": 4500, "device": "cpu", "threads": 1},
        "evaluation": {"samples": 4},
        "output": {"log_every_steps": 2, "save_every_steps": 4, "tensorboard": False},
    }
