import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemon.errors import CheckpointError
from mnemon.training.curriculum import Curriculum
from mnemon.training.data_sections import CurriculumSection, Stage

STAGES = [Stage(0, None), Stage(64, None), Stage(128, None)]
RIGHT, WRONG = [("a", True), ("b", True)], [("a", True), ("b", False)]


def curriculum(**options: Any) -> Curriculum:
    return Curriculum(STAGES, ["a", "b"], CurriculumSection(**{"window": 4, **options}))


def feed(subject: Curriculum, answers: list[tuple[str, bool]], times: int, stage: int | None = None) -> None:
    for _ in range(times):
        subject.observe(subject.stage if stage is None else stage, answers, 100)


def test_a_stage_advances_when_the_window_is_full_and_the_threshold_reached() -> None:
    subject = curriculum()
    feed(subject, RIGHT, 3)
    assert subject.stage == 0
    feed(subject, RIGHT, 1)
    assert (subject.stage, subject.length, subject.stage_tokens) == (1, 64, 0)
    assert subject.history[0].reason == "learned"
    assert subject.accuracy == {}


def test_old_mistakes_leave_the_window() -> None:
    subject = curriculum(threshold=1.0)
    feed(subject, WRONG, 50)
    assert subject.stage == 0
    feed(subject, RIGHT, 4)
    assert subject.stage == 1


def test_answers_to_shorter_contexts_do_not_count() -> None:
    subject = curriculum()
    feed(subject, RIGHT, 4)
    feed(subject, RIGHT, 20, stage=0)
    assert subject.stage == 1


@pytest.mark.parametrize(("aggregate", "stage"), [("mean", 1), ("min", 0)])
def test_min_waits_for_every_task_and_mean_does_not(aggregate: str, stage: int) -> None:
    subject = curriculum(aggregate=aggregate, threshold=0.5)
    feed(subject, WRONG, 4)
    assert subject.stage == stage


def test_a_task_that_was_not_asked_yet_holds_the_stage() -> None:
    subject = curriculum()
    feed(subject, [("a", True)], 50)
    assert subject.stage == 0


def test_a_stage_can_be_left_unlearned_after_its_tokens_and_says_so() -> None:
    subject = curriculum(max_stage_tokens=1000)
    feed(subject, WRONG, 10)
    assert subject.stage == 1
    assert subject.history[0].reason == "max_stage_tokens"
    assert subject.history[0].accuracy == {"a": 1.0, "b": 0.0}


def test_stages_can_have_most_tokens_of_their_own_the_last_for_all_later_ones() -> None:
    subject = curriculum(max_stage_tokens=[1000, 300])
    feed(subject, WRONG, 9)
    assert subject.stage == 0
    feed(subject, WRONG, 1 + 3)
    assert subject.stage == 2
    assert curriculum(max_stage_tokens=[1000, None]).options.most_tokens(5) is None
    assert curriculum(max_stage_tokens=1e3).options.most_tokens(0) == 1000


def test_a_stage_lasts_its_least_tokens() -> None:
    subject = curriculum(min_stage_tokens=1000)
    feed(subject, RIGHT, 9)
    assert subject.stage == 0
    feed(subject, RIGHT, 1)
    assert subject.stage == 1


def test_the_last_stage_goes_on_and_is_recorded_once() -> None:
    subject = curriculum(start_stage=2)
    feed(subject, RIGHT, 50)
    assert subject.stage == 2
    assert subject.learned_all
    assert [record.reason for record in subject.history] == ["learned"]


batches = st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.lists(st.booleans(), min_size=2, max_size=2)), max_size=60)


@given(batches, st.integers(0, 60))
def test_a_restored_curriculum_continues_as_if_nothing_had_happened(seen: list[Any], cut: int) -> None:
    whole, resumed = curriculum(threshold=0.6), curriculum(threshold=0.6)
    for number, (stage, answers) in enumerate(seen):
        if number == cut:
            state = json.loads(json.dumps(resumed.state()))
            resumed = curriculum(threshold=0.6)
            resumed.restore(state)
        named = list(zip("ab", answers, strict=True))
        assert whole.observe(stage, named, 10) == resumed.observe(stage, named, 10)
    assert whole.state() == resumed.state()


def test_a_stage_with_tasks_of_its_own_waits_for_those_only() -> None:
    stages = [Stage(0, 2, ("a",)), Stage(0)]
    subject = Curriculum(stages, ["a", "b"], CurriculumSection(window=4))
    feed(subject, [("a", True)], 4)
    assert subject.stage == 1
    feed(subject, [("a", True)], 9)
    assert not subject.learned_all


def test_a_state_of_other_stages_is_refused() -> None:
    state = {**curriculum().state(), "stages": [[0, None], [1, None]]}
    with pytest.raises(CheckpointError, match="other stages"):
        curriculum().restore(state)
