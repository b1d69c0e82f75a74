import itertools
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mnemon.data import babi
from mnemon.data.babi import GENERATED_TASKS, Question, Statement, Story
from mnemon.data.babi.names import ALL_PERSONS, ALL_PLACES
from mnemon.data.babilong import LENGTHS, Sample, generate, parse_length, split_of
from mnemon.data.background import load_background
from mnemon.errors import ConfigError, DataError


def count(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def make_books(
    folder: Path, text: str = "It was a dark and stormy night, and the rain fell in torrents on the roofs. "
) -> Path:
    for number in range(6):
        (folder / f"book{number}.txt").write_text(text * 20)
    return folder


@given(
    task=st.sampled_from(GENERATED_TASKS),
    length=st.integers(300, 2500),
    reserve=st.integers(0, 100),
    seed=st.integers(0, 2**32),
    split=st.sampled_from(["train", "test"]),
)
def test_the_text_has_exactly_the_asked_number_of_tokens(
    tokenizer: PreTrainedTokenizerFast, task: str, length: int, reserve: int, seed: int, split: str
) -> None:
    (sample,) = generate(task, length, 1, tokenizer, split=split, seed=seed, reserve_tokens=reserve)  # type: ignore[arg-type]
    assert count(tokenizer, sample.input) == length - reserve
    assert list(sample.input_ids) == tokenizer(sample.input, add_special_tokens=False)["input_ids"]
    assert sample.input == sample.input.strip()
    assert sample.length == length


@given(task=st.sampled_from(GENERATED_TASKS), seed=st.integers(0, 2**32), share_names=st.booleans())
def test_the_facts_stand_in_order_and_settle_the_question(
    tokenizer: PreTrainedTokenizerFast, task: str, seed: int, share_names: bool
) -> None:
    (sample,) = generate(task, "1k", 1, tokenizer, seed=seed, num_questions=4, share_names=share_names)
    found = 0
    for fact in sample.facts:
        found = sample.input.index(fact, found) + len(fact)
    story = Story(task, tuple(Statement(line, fact) for line, fact in enumerate(sample.facts, start=1)))
    for question, answer in ((sample.question, sample.target), *sample.questions):
        assert babi.solve(story, Question(len(sample.facts) + 1, question, "")) == answer
    assert sample.question not in dict(sample.questions)
    assert len(sample.questions) <= 3


def test_supporting_facts_are_numbered_within_the_sample(tokenizer: PreTrainedTokenizerFast) -> None:
    for sample in generate("qa1", "1k", 20, tokenizer):
        (index,) = sample.supporting
        assert sample.facts[index].endswith(f"the {sample.target}.")


def test_background_sentences_are_whole_and_in_natural_order(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = load_background("stdlib", "test").documents
    known = {sentence: (number, place) for number, document in enumerate(documents)
             for place, sentence in enumerate(document.sentences)}  # fmt: skip
    for sample in generate("qa1", "2k", 5, tokenizer):
        text = sample.input
        for fact in sample.facts:
            text = text.replace(fact, "\n", 1)
        places = sorted((text.index(sentence), known[sentence]) for sentence in known if sentence in text)
        covered = sum(len(documents[number].sentences[place]) for _, (number, place) in places)
        assert covered > 0.8 * len(text)
        following = sum(a[1][0] == b[1][0] and a[1][1] < b[1][1] for a, b in itertools.pairwise(places))
        assert following > 0.8 * (len(places) - 1)


def test_facts_are_spread_evenly_over_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = list(generate("qa1", "1k", 300, tokenizer))
    places = [sample.input.index(fact) / len(sample.input) for sample in samples for fact in sample.facts]
    assert abs(sum(places) / len(places) - 0.5) < 0.03
    assert sum(place < 0.1 for place in places) > 0.05 * len(places)
    assert sum(place > 0.9 for place in places) > 0.05 * len(places)


def test_at_zero_length_there_are_the_facts_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    for sample in generate("qa3", "0k", 20, tokenizer):
        assert sample.input == " ".join(sample.facts)


def test_stories_of_more_than_a_fact_per_eight_tokens_are_not_used(tokenizer: PreTrainedTokenizerFast) -> None:
    assert max(len(sample.facts) for sample in generate("qa3", "0k", 100, tokenizer)) > 50
    assert max(len(sample.facts) for sample in generate("qa3", 400, 100, tokenizer)) <= 50


@pytest.mark.parametrize("share_names", [False, True])
def test_train_and_test_share_no_story_under_any_seed(tokenizer: PreTrainedTokenizerFast, share_names: bool) -> None:
    for task in ("qa1", "qa4", "qa6"):
        stories = {
            split: {
                sample.facts
                for seed in range(3)
                for sample in generate(task, 0, 400, tokenizer, split=split, seed=seed, share_names=share)
            }
            for split, share in (("train", share_names), ("test", False))
        }
        assert len(stories["test"]) > 150
        assert not stories["train"] & stories["test"]


def test_train_and_test_share_no_background(tokenizer: PreTrainedTokenizerFast) -> None:
    test_sentences = {s for document in load_background("stdlib", "test").documents for s in document.sentences}
    for sample in generate("qa1", "2k", 10, tokenizer, split="train"):
        assert not any(sentence in sample.input for sentence in test_sentences if len(sentence) > 60)


def test_a_fifth_of_the_stories_is_for_testing() -> None:
    stories = babi.generate("qa2", 2000, 0)
    share = sum(split_of(story, story.questions[0]) == "test" for story in stories) / len(stories)
    assert 0.17 < share < 0.23


def test_sample_number_i_depends_on_the_seed_and_i_only(tokenizer: PreTrainedTokenizerFast) -> None:
    ten = list(generate("qa5", "1k", 10, tokenizer, seed=3))
    assert list(generate("qa5", "1k", 4, tokenizer, seed=3, start=6)) == ten[6:]
    assert list(generate("qa5", "1k", 10, tokenizer, seed=4)) != ten
    assert len({sample.input for sample in ten}) == 10


@pytest.mark.parametrize("task", GENERATED_TASKS)
def test_with_shared_names_every_task_tells_of_everyone_and_everywhere(
    tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    samples = list(generate(task, 0, 300, tokenizer, share_names=True, num_questions=3))
    told = set(" ".join(sample.input for sample in samples).replace(".", "").split())
    people, places = set(ALL_PERSONS), set(ALL_PLACES)
    assert told >= (places if task == "qa4" else people | places)
    asked = {(question, answer) for sample in samples for question, answer in sample.questions}
    answers = {answer for _, answer in asked} | {sample.target for sample in samples}
    if task in ("qa1", "qa4"):
        assert answers == places
    if task == "qa6":  # the place that is asked for does not give the answer away
        for place in places:
            assert {answer for question, answer in asked if question.endswith(f" the {place}?")} == {"yes", "no"}


def test_given_stories_are_hidden_instead_of_generated_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    stories = babi.generate("qa2", 4, 9)
    samples = list(generate("qa2", "1k", 1000, tokenizer, stories=stories))
    asked = [(story.questions[i].text, story.questions[i].answer) for story in stories for i in range(5)]
    assert sorted((sample.question, sample.target) for sample in samples) == sorted(asked)
    assert all(count(tokenizer, sample.input) == 1000 for sample in samples)
    assert len(list(generate("qa2", "1k", 7, tokenizer, stories=stories))) == 7


def test_real_stories_hide_in_real_books(tokenizer: PreTrainedTokenizerFast, real_data: Path) -> None:
    (path,) = (real_data / "babi" / "en-10k").glob("qa6_*_test.txt.gz")
    stories = babi.read(path)
    for sample in generate("qa6", "4k", 20, tokenizer, background=real_data / "background", stories=stories):
        assert count(tokenizer, sample.input) == 4000
        assert sample.target in ("yes", "no")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("0k", 0), ("4k", 4000), ("512k", 512_000), ("1M", 1_000_000), ("10M", 10_000_000), (77, 77), ("0.5k", 500)],
)
def test_lengths_are_decimal_thousands(text: str | int, tokens: int) -> None:
    assert parse_length(text) == tokens
    assert LENGTHS.get(str(text), tokens) == tokens


@pytest.mark.parametrize("text", ["", "k", "4x", "-1", "four", "1.5", "4 k tokens", -3])
def test_what_is_no_length_is_refused(text: str | int) -> None:
    with pytest.raises(ConfigError, match="expected a length such as 0k, 1k"):
        parse_length(text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "qa99"}, "did you mean"),
        ({"task": "qa15"}, "can be generated"),
        ({"length": "4q"}, "'4q'"),
        ({"num_samples": -1}, "num_samples"),
        ({"num_questions": 0}, "num_questions"),
        ({"reserve_tokens": -1}, "reserve_tokens"),
        ({"reserve_tokens": 4000}, "reserve_tokens below"),
        ({"split": "dev"}, "'dev'"),
        ({"background": "stdlb"}, "stdlb"),
        ({"start": -1}, "start"),
    ],
)
def test_options_out_of_range_are_refused_at_once(
    tokenizer: PreTrainedTokenizerFast, options: dict[str, object], says: str
) -> None:
    arguments: dict[str, object] = {"task": "qa1", "length": "4k", "num_samples": 1, **options}
    with pytest.raises(ConfigError, match=says):
        generate(tokenizer=tokenizer, **arguments)  # type: ignore[arg-type]


def test_a_length_no_story_fits_into_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="no story of qa3 fits into 20 tokens"):
        next(generate("qa3", 20, 1, tokenizer))
    with pytest.raises(ConfigError, match=r"qa3 has hardly a story with at most 2 facts; .*data\.fact_limits"):
        next(generate("qa3", 0, 1, tokenizer, max_facts=2))
    with pytest.raises(ConfigError, match="none of the 1 stories fits into 5 tokens"):
        next(generate("qa1", 5, 1, tokenizer, stories=babi.generate("qa1", 1, 0)))


def test_a_background_of_short_sentences_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 10 tokens, found none"):
        next(generate("qa1", "1k", 1, tokenizer, background=make_books(tmp_path, "He came. She went. ")))


def test_text_beyond_ascii_is_cut_to_the_exact_count(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    books = make_books(tmp_path, "Él comió «piñas» y bebió café — ¿no es así? 日本語のとても長い文です、はい。 ")
    for length in range(300, 330):
        (sample,) = generate("qa1", length, 1, tokenizer, background=books, seed=length)
        assert count(tokenizer, sample.input) == length


def test_a_tokenizer_that_joins_words_across_sentences_still_gets_the_exact_count(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, trainers

    whole = Tokenizer(models.BPE())  # no splitting into words: tokens reach across spaces and full stops
    text = make_books(tmp_path) / "book0.txt"
    whole.train([str(text)], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole)
    for seed in range(5):
        (sample,) = generate("qa1", 700, 1, tokenizer, background=tmp_path, seed=seed)
        assert count(tokenizer, sample.input) == 700


def test_a_batch_of_four_thousand_token_samples_is_made_quickly(tokenizer: PreTrainedTokenizerFast) -> None:
    next(generate("qa2", "4k", 1, tokenizer))  # the background is read and tokenised once
    start = time.process_time()
    made = list(generate("qa2", "4k", 50, tokenizer, seed=1))
    assert len(made) / (time.process_time() - start) > 50


@pytest.mark.slow
def test_a_sample_of_a_million_tokens_is_exact_and_made_within_seconds(tokenizer: PreTrainedTokenizerFast) -> None:
    start = time.process_time()
    (sample,) = generate("qa3", "1M", 1, tokenizer)
    assert time.process_time() - start < 15
    assert count(tokenizer, sample.input) == 1_000_000


def test_samples_compare_by_content() -> None:
    assert Sample("qa1", 0, "a", "b", "c", input_ids=(1,)) == Sample("qa1", 0, "a", "b", "c")


def test_the_global_random_state_is_left_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    before = random.getstate()
    list(generate("qa2", "1k", 2, tokenizer, num_questions=3))
    assert random.getstate() == before
