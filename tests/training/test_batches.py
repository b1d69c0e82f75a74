from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mnemon.data.encoding import IGNORED
from mnemon.errors import DataError
from mnemon.training.babilong_batches import BabilongBatches
from mnemon.training.batches import Batch, BatchStream, share_rows
from mnemon.training.build import build_tokenizer
from mnemon.training.curriculum import Curriculum
from mnemon.training.data_sections import BabilongData
from mnemon.training.recipe_io import check_recipe


@pytest.fixture
def maker(tiny: dict[str, Any]) -> BabilongBatches:
    recipe = check_recipe(tiny)
    return BabilongBatches(recipe.data, build_tokenizer(recipe), seed=1, batch_tokens=1024)


@pytest.fixture
def curriculum(maker: BabilongBatches) -> Curriculum:
    return Curriculum(maker.data.stages, list(maker.data.tasks), maker.data.curriculum)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a)


def test_a_batch_depends_on_index_stage_and_seed_only(maker: BabilongBatches) -> None:
    again = BabilongBatches(maker.data, maker.tokenizer, seed=1, batch_tokens=1024)
    again.make(0, 0)
    assert same(maker.make(5, 1), again.make(5, 1))
    other_seed = BabilongBatches(maker.data, maker.tokenizer, seed=2, batch_tokens=1024)
    for other in (maker.make(6, 1), maker.make(5, 2), other_seed.make(5, 1)):
        assert not torch.equal(maker.make(5, 1)["input_ids"][:, -20:], other["input_ids"][:, -20:])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_rows_end_with_an_answer_and_stay_within_the_budget(maker: BabilongBatches, stage: int) -> None:
    batch = maker.make(3, stage)
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert ids.numel() <= 1024
    assert batch["tokens"] == mask.sum()
    assert (mask.diff(dim=1) >= 0).all(), "padding must be on the left"
    assert (ids[:, -1] == maker.tokenizer.eos_token_id).all()
    assert (labels[labels != IGNORED] == ids[labels != IGNORED]).all()
    before = ids.shape[1] - batch["keep"] + 1
    assert (labels[:, :before] == IGNORED).all()
    assert (labels[:, before] != IGNORED).any()


def test_questions_are_numbered_as_they_are_read(maker: BabilongBatches) -> None:
    batch = maker.make(1, 1)
    numbers = batch["question_ids"]
    assert len(numbers) == (batch["labels"] != IGNORED).sum()
    assert numbers.diff().min() >= 0
    assert int(numbers[-1]) + 1 == len(batch["tasks"]) > len(batch["input_ids"])
    assert set(batch["tasks"]) <= {"qa1", "qa6"}


def test_with_jitter_questions_stand_anywhere_in_a_segment(maker: BabilongBatches) -> None:
    def widths(**options: Any) -> set[int]:
        data = BabilongData(tasks=["qa1"], lengths=[64], questions_per_story=1, **options)
        batches = BabilongBatches(data, maker.tokenizer, seed=0, batch_tokens=256)
        batches.check()
        made = [batches.make(index, 0) for index in range(60)]
        assert {batch["length"] for batch in made} == {64}
        return {int(mask.sum()) for batch in made for mask in batch["attention_mask"]}

    exact, varied = widths(), widths(length_jitter=0.25)
    assert max(exact) - min(exact) < 4  # questions differ by a word
    assert {width % 8 for width in varied} == set(range(8))
    assert min(exact) - 16 <= min(varied) < max(varied) <= max(exact)


def test_a_task_that_is_asked_once_has_one_question_per_context(maker: BabilongBatches) -> None:
    def questions(**options: Any) -> dict[str, float]:
        data = BabilongData(tasks=["qa1", "qa5"], lengths=[0], questions_per_story=5, **options)
        batches = BabilongBatches(data, maker.tokenizer, seed=0, batch_tokens=1024)
        made = [batches.make(index, 0) for index in range(8)]
        asked = Counter(task for batch in made for task in batch["tasks"])
        rows = sum(len(batch["input_ids"]) for batch in made)
        return {task: count / rows for task, count in asked.items()}

    often, once = questions(), questions(ask_once=["qa5"])
    assert often["qa5"] > 1.5
    assert once["qa5"] < 0.8  # every second row is of qa5
    assert once["qa1"] > 1


def test_training_stories_share_their_names_where_the_recipe_says_so(maker: BabilongBatches) -> None:
    def told(stage: int, **options: Any) -> str:
        data = BabilongData(tasks=["qa1"], lengths=[0], fact_limits=[4], questions_per_story=1, **options)
        batches = BabilongBatches(data, maker.tokenizer, seed=0, batch_tokens=1024)
        rows = [row for index in range(9) for row in batches.make(index, stage)["input_ids"]]
        return "".join(maker.tokenizer.decode(row) for row in rows)

    assert "Julie" not in told(1)
    assert "Julie" in told(1, share_names=True)
    assert "Julie" not in told(0, share_names=True)  # where stories have few facts, few names are learned sooner


def test_shorter_lengths_stay_mixed_in(maker: BabilongBatches) -> None:
    lengths = [maker.make(index, 2)["length"] for index in range(40)]
    assert {0, 64, 96} == set(lengths)
    assert lengths.count(96) > 15


def test_an_unlucky_draw_of_background_is_replaced_and_a_hopeless_one_reported(
    maker: BabilongBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, calls = BabilongBatches._samples, iter(range(10**6))

    def unlucky(self: BabilongBatches, *arguments: Any) -> Iterator[Any]:
        if next(calls) % 2 == 0:
            raise DataError("cannot reach exactly 64 tokens")
        yield from usual(self, *arguments)

    monkeypatch.setattr(BabilongBatches, "_samples", unlucky)
    assert len(maker.make(0, 1)["input_ids"]) > 1

    def hopeless(self: BabilongBatches, *arguments: Any) -> Iterator[Any]:
        raise DataError("cannot reach exactly 64 tokens")
        yield

    monkeypatch.setattr(BabilongBatches, "_samples", hopeless)
    with pytest.raises(DataError, match="cannot reach exactly"):
        maker.make(0, 1)


def test_a_change_of_stage_takes_effect_at_the_next_batch(maker: BabilongBatches, curriculum: Curriculum) -> None:
    stream = BatchStream(maker, curriculum, start=4)
    batches: Iterator[Batch] = iter(stream)
    assert same(next(batches), maker.make(4, 0))
    curriculum.stage = 2
    assert same(next(batches), maker.make(5, 2))
    assert same(next(batches), maker.make(6, 2))
    stream.close()


def test_worker_processes_make_the_same_batches(maker: BabilongBatches, curriculum: Curriculum) -> None:
    stream = BatchStream(maker, curriculum, workers=1)
    batches = iter(stream)
    for index in range(3):
        assert same(next(batches), maker.make(index, 0))
    stream.close()


def test_stages_with_few_facts_come_first_and_hold_few_facts(maker: BabilongBatches) -> None:
    data = BabilongData(tasks=["qa1"], lengths=[0, 64], fact_limits=[2, 4], questions_per_story=1)
    assert [stage[:2] for stage in data.stages] == [(0, 2), (0, 4), (0, None), (64, None)]
    few = BabilongBatches(data, maker.tokenizer, seed=0, batch_tokens=2048)
    texts = [few.tokenizer.batch_decode(few.make(0, stage)["input_ids"]) for stage in range(3)]
    most = [max(text.count(".") for text in stage) for stage in texts]
    assert most[:2] == [2, 4]
    assert most[2] > 4


def test_the_first_tasks_have_the_stages_with_few_facts_to_themselves(maker: BabilongBatches) -> None:
    options = {"lengths": [0, 64], "fact_limits": [2], "first_tasks": ["qa1"]}
    both = BabilongBatches(BabilongData(tasks=["qa1", "qa6"], **options), maker.tokenizer, seed=0, batch_tokens=2048)
    assert set(both.make(0, 0)["tasks"]) == {"qa1"}
    assert set(both.make(1, 1)["tasks"]) == {"qa1", "qa6"}


def test_long_contexts_still_come_in_batches_of_the_least_rows(maker: BabilongBatches) -> None:
    data = BabilongData(tasks=["qa1"], lengths=[128])
    assert len(BabilongBatches(data, maker.tokenizer, 0, 256).make(0, 0)["input_ids"]) == 1
    assert len(BabilongBatches(data, maker.tokenizer, 0, 256, min_rows=6).make(0, 0)["input_ids"]) == 6


@pytest.mark.parametrize("count", [2, 3, 50])
@pytest.mark.parametrize("segment_length", [None, 8])
def test_processes_share_every_row_and_question_of_a_batch_once(
    maker: BabilongBatches, count: int, segment_length: int | None
) -> None:
    batch = maker.make(0, 1)
    shares = [share_rows(batch, rank, count, segment_length) for rank in range(count)]
    rows = [
        tuple(ids.tolist())
        for share in shares
        for ids, labels in zip(share["input_ids"], share["labels"], strict=True)
        if (labels != IGNORED).any()
    ]
    assert sorted(rows) == sorted(tuple(ids.tolist()) for ids in batch["input_ids"])
    assert sorted(question for share in shares for question in share["questions"]) == batch["questions"]
    for share in shares:
        asked = share["labels"] != IGNORED
        assert len(share["question_ids"]) == asked.sum()
        assert not share["context"][~asked.any(dim=1)].any()
        for key in ("tasks", "keep", "tokens", "answer_tokens", "context_tokens", "length"):
            assert share[key] == batch[key]
    answers = {
        (question, tuple(share["labels"][share["labels"] != IGNORED][share["question_ids"] == number].tolist()))
        for share in shares
        for number, question in enumerate(share["questions"])
    }
    of_batch = batch["labels"][batch["labels"] != IGNORED]
    assert answers == {(n, tuple(of_batch[batch["question_ids"] == n].tolist())) for n in batch["questions"]}


def test_every_process_has_as_many_segments_and_without_segments_as_many_rows(maker: BabilongBatches) -> None:
    seen_filler = False
    for index in range(20):
        batch = maker.make(index, 1)
        for segment_length in (None, 2, 8):
            shares = [share_rows(batch, rank, 2, segment_length) for rank in range(2)]
            longest = [int(share["attention_mask"].sum(dim=1).max()) for share in shares]
            if segment_length is None:
                assert len({len(share["input_ids"]) for share in shares}) == 1
            else:
                assert len({-(-length // segment_length) for length in longest}) == 1
            seen_filler |= any(not (share["labels"] != IGNORED).any(dim=1).all() for share in shares)
    assert seen_filler, "without a filler row this test says nothing"


def test_one_process_keeps_the_batch_as_it_is(maker: BabilongBatches) -> None:
    batch = maker.make(2, 1)
    assert share_rows(batch, 0, 1, 8) is batch
    mask, labels = batch["attention_mask"], batch["labels"]
    others = mask[:, 1:].bool() & mask[:, :-1].bool() & (labels[:, 1:] == IGNORED)
    assert (batch["answer_tokens"], batch["context_tokens"]) == ((labels != IGNORED).sum(), others.sum())


def test_the_loss_on_the_text_is_about_every_other_token_or_the_facts_alone(tiny: dict[str, Any]) -> None:
    recipe = check_recipe(tiny)
    batches = {
        loss_on: BabilongBatches(
            recipe.data.model_copy(update={"loss_on": loss_on}), build_tokenizer(recipe), seed=1, batch_tokens=1024
        ).make(2, 1)
        for loss_on in ("all", "facts")
    }
    everything, facts = batches["all"], batches["facts"]
    mask, labels = everything["attention_mask"].bool(), everything["labels"]
    followers = torch.zeros_like(mask)
    followers[:, 1:] = mask[:, 1:] & mask[:, :-1]
    assert torch.equal(everything["context"], followers & (labels == IGNORED))
    assert everything["context_tokens"] == everything["context"].sum() > facts["context_tokens"] > 0
    assert facts["context_tokens"] == facts["context"].sum()
    assert (everything["context"] | ~facts["context"]).all()
    text = build_tokenizer(recipe).decode(facts["input_ids"][facts["context"]])
    assert {"Mary", "John", "Daniel", "Sandra"} & set(text.split())
    shares = [share_rows(facts, rank, 2) for rank in range(2)]
    assert sum(int(share["context"].sum()) for share in shares) == facts["context_tokens"]
