import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mnemon.data.babi import GENERATED_TASKS
from mnemon.data.babilong import Sample, build_prompt, generate
from mnemon.data.encoding import IGNORED, evaluation_prompt, fact_columns, training_example
from mnemon.errors import ConfigError

SAMPLE = Sample("qa1", 0, "Mary went to the garden.", "Where is Mary?", "garden", (("Where is John?", "office"),))


def written_out(sample: Sample, questions: int) -> str:
    more = [
        f"\n\nQuestion: {question}\nAnswer: {answer}<eos>" for question, answer in sample.questions[: questions - 1]
    ]
    first = f"<context>\n{sample.input}\n</context>\n\nQuestion: {sample.question}\nAnswer: {sample.target}<eos>"
    return first + "".join(more)


def test_the_short_layout_is_this_text_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, _ = training_example(SAMPLE, tokenizer, max_questions=2)
    assert tokenizer.decode(ids) == (
        "<context>\nMary went to the garden.\n</context>\n\nQuestion: Where is Mary?\nAnswer: garden<eos>"
        "\n\nQuestion: Where is John?\nAnswer: office<eos>"
    )


@given(
    task=st.sampled_from(GENERATED_TASKS),
    length=st.sampled_from([0, 500, 1500]),
    seed=st.integers(0, 2**32),
    questions=st.integers(1, 4),
)
def test_the_fast_way_gives_the_tokens_of_the_written_text(
    tokenizer: PreTrainedTokenizerFast, task: str, length: int, seed: int, questions: int
) -> None:
    (sample,) = generate(task, length, 1, tokenizer, seed=seed, num_questions=4)
    ids, labels = training_example(sample, tokenizer, max_questions=questions)
    assert ids == tokenizer(written_out(sample, questions), add_special_tokens=False)["input_ids"]
    assert len(labels) == len(ids)


@given(task=st.sampled_from(GENERATED_TASKS), length=st.sampled_from([0, 500, 1500]), seed=st.integers(0, 2**32))
def test_the_marked_tokens_are_the_facts_in_order(
    tokenizer: PreTrainedTokenizerFast, task: str, length: int, seed: int
) -> None:
    (sample,) = generate(task, length, 1, tokenizer, seed=seed)
    ids, _ = training_example(sample, tokenizer)
    marks = fact_columns(sample, tokenizer, ids)
    assert len(marks) == len(ids)
    told = tokenizer.decode([token for token, marked in zip(ids, marks, strict=True) if marked])
    assert told.split() == " ".join(sample.facts).split()


def test_facts_whose_tokens_run_into_each_other_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    (sample,) = generate("qa1", 0, 1, tokenizer, seed=0)
    with pytest.raises(ConfigError, match="use loss_on 'answers' or 'all'"):
        fact_columns(sample, tokenizer, [tokenizer.eos_token_id])


def test_labels_stand_on_the_answers_and_their_end_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = training_example(SAMPLE, tokenizer, max_questions=2)
    kept = [label for label in labels if label != IGNORED]
    assert tokenizer.decode(kept) == " garden<eos> office<eos>"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_labels_can_stand_on_everything(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = training_example(SAMPLE, tokenizer, max_questions=2, loss_on="all")
    assert labels == ids


def test_a_training_example_continues_the_evaluation_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = training_example(SAMPLE, tokenizer)
    prompt = tokenizer(evaluation_prompt(SAMPLE), add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert IGNORED not in labels[len(prompt) :]


def test_the_official_layout_is_the_benchmark_s_prompt() -> None:
    assert evaluation_prompt(SAMPLE, "official") == build_prompt("qa1", SAMPLE.input, SAMPLE.question)


def test_a_tokenizer_that_joins_full_stops_and_line_ends_is_encoded_from_the_text() -> None:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\w+| ?[^\s\w]+\n*|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    inner.train_from_iterator([written_out(SAMPLE, 2).replace("<eos>", "")] * 50, trainer)
    joining = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    assert joining.tokenize("garden.\n</context>")[-2:] != ["."]
    (sample,) = generate("qa1", 600, 1, joining, num_questions=3)
    ids, _ = training_example(sample, joining, max_questions=3)
    assert ids == joining(written_out(sample, 3), add_special_tokens=False)["input_ids"]


def test_options_out_of_range_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="max_questions"):
        training_example(SAMPLE, tokenizer, max_questions=0)
    with pytest.raises(ConfigError, match="'some'"):
        training_example(SAMPLE, tokenizer, loss_on="some")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'long'"):
        evaluation_prompt(SAMPLE, "long")  # type: ignore[arg-type]
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="end-of-text"):
        training_example(SAMPLE, endless)
