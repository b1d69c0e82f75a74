import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mnemon.data.babi import GENERATED_TASKS, Question, generate
from mnemon.data.tokenizer import train_tokenizer
from mnemon.errors import ConfigError


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_unchanged(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_special_tokens_have_their_places_and_none_is_added(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert not {0, 1, 2} & set(tokenizer("Where is Mary?")["input_ids"])
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) == 2048


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]


def test_every_word_of_the_tasks_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    words = {"none", "one", "two", "three", "nothing", "yes", "no", "maybe"}
    for task in GENERATED_TASKS:
        for story in generate(task, 100, 1):
            for line in story.lines:
                words.update(re.findall(r"\w+", line.text))
                if isinstance(line, Question):
                    words.update(line.answer.split(","))
    assert {word for word in words if len(tokenizer.tokenize(f" {word}")) != 1} == set()
    assert tokenizer.tokenize("Question") == ["Question"]
    assert tokenizer.tokenize("Answer") == ["Answer"]


def test_training_again_in_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mnemon.data.tokenizer import default_training_texts, train_tokenizer\n"
        "train_tokenizer(default_training_texts(0, 20), 1000).save_pretrained(sys.argv[1])"
    )
    for name in ("first", "second"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, capture_output=True)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "tokenizer.json" in files
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_saved_tokenizer_loads_as_it_was(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<context>\nMary went to the garden 42 times.\n</context>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.padding_side, loaded.pad_token_id, loaded.eos_token_id) == ("left", 0, 2)


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 259 tokens, got 100"):
        train_tokenizer(["text"], 100)
