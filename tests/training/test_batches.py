from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mnemon.data.encoding import IGNORED
from mnemon.errors import DataError
from mnemon.training.batches import Batch, BatchMaker, BatchStream
from mnemon.training.build import build_tokenizer
from mnemon.training.curriculum import Curriculum
from mnemon.training.recipe import DataSection
from mnemon.training.recipe_io import check_recipe


@pytest.fixture
def maker(tiny: dict[str, Any]) -> BatchMaker:
    recipe = check_recipe(tiny)
    return BatchMaker(recipe.data, build_tokenizer(recipe), seed=1, batch_tokens=1024)


@pytest.fixture
def curriculum(maker: BatchMaker) -> Curriculum:
    return Curriculum(maker.data.stages, list(maker.data.tasks), maker.data.curriculum)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a)


def test_a_batch_depends_on_index_stage_and_seed_only(maker: BatchMaker) -> None:
    again = BatchMaker(maker.data, maker.tokenizer, seed=1, batch_tokens=1024)
    again.make(0, 0)
    assert same(maker.make(5, 1), again.make(5, 1))
    other_seed = BatchMaker(maker.data, maker.tokenizer, seed=2, batch_tokens=1024)
    for other in (maker.make(6, 1), maker.make(5, 2), other_seed.make(5, 1)):
        assert not torch.equal(maker.make(5, 1)["input_ids"][:, -20:], other["input_ids"][:, -20:])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_rows_end_with_an_answer_and_stay_within_the_budget(maker: BatchMaker, stage: int) -> None:
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


def test_questions_are_numbered_as_they_are_read(maker: BatchMaker) -> None:
    batch = maker.make(1, 1)
    numbers = batch["question_ids"]
    assert len(numbers) == (batch["labels"] != IGNORED).sum()
    assert numbers.diff().min() >= 0
    assert int(numbers[-1]) + 1 == len(batch["tasks"]) > len(batch["input_ids"])
    assert set(batch["tasks"]) <= {"qa1", "qa6"}


def test_shorter_lengths_stay_mixed_in(maker: BatchMaker) -> None:
    lengths = [maker.make(index, 2)["length"] for index in range(40)]
    assert {0, 64, 96} == set(lengths)
    assert lengths.count(96) > 15


def test_an_unlucky_draw_of_background_is_replaced_and_a_hopeless_one_reported(
    maker: BatchMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, calls = BatchMaker._samples, iter(range(10**6))

    def unlucky(self: BatchMaker, *arguments: Any) -> Iterator[Any]:
        if next(calls) % 2 == 0:
            raise DataError("cannot reach exactly 64 tokens")
        yield from usual(self, *arguments)

    monkeypatch.setattr(BatchMaker, "_samples", unlucky)
    assert len(maker.make(0, 1)["input_ids"]) > 1

    def hopeless(self: BatchMaker, *arguments: Any) -> Iterator[Any]:
        raise DataError("cannot reach exactly 64 tokens")
        yield

    monkeypatch.setattr(BatchMaker, "_samples", hopeless)
    with pytest.raises(DataError, match="cannot reach exactly"):
        maker.make(0, 1)


def test_a_change_of_stage_takes_effect_at_the_next_batch(maker: BatchMaker, curriculum: Curriculum) -> None:
    stream = BatchStream(maker, curriculum, start=4)
    batches: Iterator[Batch] = iter(stream)
    assert same(next(batches), maker.make(4, 0))
    curriculum.stage = 2
    assert same(next(batches), maker.make(5, 2))
    assert same(next(batches), maker.make(6, 2))
    stream.close()


def test_worker_processes_make_the_same_batches(maker: BatchMaker, curriculum: Curriculum) -> None:
    stream = BatchStream(maker, curriculum, workers=1)
    batches = iter(stream)
    for index in range(3):
        assert same(next(batches), maker.make(index, 0))
    stream.close()


def test_stages_with_few_facts_come_first_and_hold_few_facts(maker: BatchMaker) -> None:
    data = DataSection(tasks=["qa1"], lengths=[0, 64], fact_limits=[2, 4], questions_per_story=1)
    assert [stage[:2] for stage in data.stages] == [(0, 2), (0, 4), (0, None), (64, None)]
    few = BatchMaker(data, maker.tokenizer, seed=0, batch_tokens=2048)
    texts = [few.tokenizer.batch_decode(few.make(0, stage)["input_ids"]) for stage in range(3)]
    most = [max(text.count(".") for text in stage) for stage in texts]
    assert most[:2] == [2, 4]
    assert most[2] > 4


def test_the_first_tasks_have_the_stages_with_few_facts_to_themselves(maker: BatchMaker) -> None:
    options = {"lengths": [0, 64], "fact_limits": [2], "first_tasks": ["qa1"]}
    both = BatchMaker(DataSection(tasks=["qa1", "qa6"], **options), maker.tokenizer, seed=0, batch_tokens=2048)
    assert set(both.make(0, 0)["tasks"]) == {"qa1"}
    assert set(both.make(1, 1)["tasks"]) == {"qa1", "qa6"}


def test_long_contexts_still_come_in_batches_of_the_least_rows(maker: BatchMaker) -> None:
    data = DataSection(tasks=["qa1"], lengths=[128])
    assert len(BatchMaker(data, maker.tokenizer, 0, 256).make(0, 0)["input_ids"]) == 1
    assert len(BatchMaker(data, maker.tokenizer, 0, 256, min_rows=6).make(0, 0)["input_ids"]) == 6
