from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from mnemon.errors import ConfigError, DataError
from mnemon.evaluation.generation import Answers, BatchLimits, batch_limits, generate_answers, plan_batches

PROMPTS = [
    "Where is Mary?",
    "Mary went to the office. John went to the garden. Where is John?",
    "Mary went to the kitchen. " * 6 + "Where is Mary?",
    "Is John in the garden?",
]


@given(
    st.lists(st.integers(1, 50), max_size=40),
    st.none() | st.integers(1, 8),
    st.integers(1, 200),
    st.none() | st.integers(1, 60),
)
def test_batches_hold_every_prompt_once_and_keep_to_the_limits(
    lengths: list[int], batch_size: int | None, tokens: int, call_length: int | None
) -> None:
    limits = BatchLimits(tokens, tokens // 2, call_length)
    batches = plan_batches(lengths, batch_size=batch_size, limits=limits)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch_size is None or len(batch) <= batch_size
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= tokens
        assert len(batch) == 1 or len(batch) * min(longest, call_length or longest) <= tokens // 2


@pytest.mark.parametrize("name", ["plain", "lm2", "window"])
def test_the_batch_size_does_not_change_an_answer(name: str, request: Any, tokenizer: Any) -> None:
    model = request.getfixturevalue(name)
    alone = generate_answers(model, tokenizer, PROMPTS, batch_size=1, max_new_tokens=6)
    together = generate_answers(model, tokenizer, PROMPTS, batch_size=4, max_new_tokens=6)
    assert alone.texts == together.texts
    assert len(set(alone.texts)) > 1
    assert (alone.prompt_tokens, alone.new_tokens) == (together.prompt_tokens, together.new_tokens)


def test_answers_come_in_the_order_of_the_prompts(plain: Any, tokenizer: Any) -> None:
    forwards = generate_answers(plain, tokenizer, PROMPTS, max_new_tokens=6).texts
    backwards = generate_answers(plain, tokenizer, PROMPTS[::-1], max_new_tokens=6).texts
    assert forwards == backwards[::-1]


def test_an_answer_is_what_the_model_itself_generates(plain: Any, tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer(PROMPTS[1])["input_ids"]])
    direct = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    text = tokenizer.decode(direct[0, ids.shape[1] :], skip_special_tokens=True)
    assert generate_answers(plain, tokenizer, [PROMPTS[1]], max_new_tokens=6).texts == [text]


def test_an_answer_ends_at_the_end_token(plain: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = generate_answers(plain, tokenizer, PROMPTS[:1], max_new_tokens=6).texts[0]
    third = tokenizer(text)["input_ids"][2]
    monkeypatch.setattr(plain.generation_config, "eos_token_id", [2, third])
    cut = generate_answers(plain, tokenizer, PROMPTS[:1], max_new_tokens=6)
    assert cut.new_tokens < 6
    assert text.startswith(cut.texts[0])


def test_sampling_defaults_of_a_checkpoint_do_not_leak_in(
    plain: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = generate_answers(plain, tokenizer, PROMPTS, max_new_tokens=6).texts
    for name, value in {"do_sample": True, "temperature": 5.0, "num_beams": 3, "repetition_penalty": 3.0}.items():
        monkeypatch.setattr(plain.generation_config, name, value)
    assert generate_answers(plain, tokenizer, PROMPTS, max_new_tokens=6).texts == greedy


def test_extra_arguments_reach_the_model(lm2: Any, tokenizer: Any) -> None:
    long = [PROMPTS[2]]
    with_bank = generate_answers(lm2, tokenizer, long, max_new_tokens=8).texts
    without = generate_answers(lm2, tokenizer, long, max_new_tokens=8, generate_kwargs={"knock_out_memory": True}).texts
    assert with_bank != without


def test_the_mode_of_the_model_is_restored(plain: Any, tokenizer: Any) -> None:
    plain.train()
    try:
        generate_answers(plain, tokenizer, PROMPTS[:1], max_new_tokens=1)
        assert plain.training
    finally:
        plain.eval()


def test_prompts_beyond_a_table_of_positions_are_a_config_error(tokenizer: Any) -> None:
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=8, eos_token_id=2)
    with pytest.raises(ConfigError, match="cannot read prompts"):
        generate_answers(GPT2LMHeadModel(config), tokenizer, PROMPTS[2:3], max_new_tokens=1)


def test_a_model_of_bounded_state_reads_as_many_rows_of_long_texts_as_of_short_ones(plain: Any, lm2: Any) -> None:
    assert not batch_limits(plain).hold(2, 10**5)
    assert batch_limits(lm2).hold(40, 10**3)
    assert batch_limits(lm2).hold(40, 10**5)
    assert not batch_limits(lm2, max_batch_tokens=10**5).hold(40, 10**5)


def test_what_a_batch_cost_is_split_by_tokens() -> None:
    whole = Answers(["a", "b", "c"], 6.0, [10, 20, 30], [0, 0, 0])
    assert whole.part(1, 3) == Answers(["b", "c"], 5.0, [20, 30], [0, 0])


def test_bad_arguments_are_refused(plain: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no token"):
        generate_answers(plain, tokenizer, ["Where?", ""], max_new_tokens=1)
    with pytest.raises(ConfigError, match="batch_size"):
        generate_answers(plain, tokenizer, PROMPTS, batch_size=0)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        generate_answers(plain, tokenizer, PROMPTS, max_new_tokens=0)
    assert generate_answers(plain, tokenizer, []).texts == []
