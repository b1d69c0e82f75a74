"""Traces: what was recorded comes back from the file, and columns never reach over the end of a segment."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemon.errors import DataError, ShapeError
from mnemon.inspection.trace import (
    Contribution,
    Excerpt,
    Explanation,
    KnockOut,
    KnockOuts,
    MixtureLayer,
    Predictions,
    ReadText,
    Source,
    SpecialWord,
    TokenMemory,
    Trace,
    column_means,
    group_columns,
    load_trace,
    save_trace,
)


def full_trace() -> Trace:
    numbers = np.random.default_rng(0)
    starts, segments = group_columns([4, 4, 2], 5)
    columns = len(starts) - 1
    text = ReadText(tuple(f"piece {index}" for index in range(columns)), starts, segments, complete=False)
    half = numbers.random(columns).astype(np.float16)
    return Trace(
        model="tiny",
        family="mom",
        fingerprint="f" * 64,
        source=Source("babilong", "qa1:0k:0", "Where is Mary?", "kitchen"),
        text=text,
        predictions=Predictions(half, half, ("a",) * columns, ("b",) * columns),
        mixture=(
            MixtureLayer(
                0, "gla", True, numbers.random((columns, 2)), half, np.array([0.5, 0.5]), numbers.random((3, 3)),
                ((SpecialWord("the", 3, 2.0),), ()), (Contribution(9, 2, half, 0.1),),
            ),
        ),
        token_memory=TokenMemory(("memory token 0",), numbers.random((3, 1)), numbers.random((3, 1)), half[:, None]),
        knock_outs=KnockOuts("kitchen", -0.1, (KnockOut("memory", "memory 0 of block 0", 0, 0, -2.0),)),
        explanations=(
            Explanation("block 0, memory 1", 0, 1, "tokens", "places", None, 40, (Excerpt(("the",), half[:1]),), "few"),
        ),
        notes=("2 tokens per column",),
    )  # fmt: skip


def test_a_trace_comes_back_from_its_file(tmp_path: Path) -> None:
    trace = full_trace()
    back = load_trace(save_trace(tmp_path / "a.trace.safetensors", trace))
    assert (back.source, back.knock_outs, back.notes) == (trace.source, trace.knock_outs, trace.notes)
    assert back.text.num_tokens == 10
    assert back.text.num_segments == 3
    assert back.mixture[0].special_words == trace.mixture[0].special_words
    np.testing.assert_array_equal(back.mixture[0].contributions[0].shares, trace.mixture[0].contributions[0].shares)
    assert back.explanations[0].score is None
    assert back.explanations[0].note == "few"


def test_a_trace_without_the_optional_parts_comes_back(tmp_path: Path) -> None:
    trace = replace(full_trace(), predictions=None, mixture=(), token_memory=None, knock_outs=None, explanations=())
    assert load_trace(save_trace(tmp_path / "a.trace.safetensors", trace)).predictions is None


def test_another_kind_of_file_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("no trace at all, but longer than eight bytes")
    with pytest.raises(DataError, match=r"text\.txt: is no mnemon trace file"):
        load_trace(path)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 60))
def test_columns_hold_every_token_once_and_respect_segments(lengths: list[int], most: int) -> None:
    starts, segments = group_columns(lengths, most)
    assert starts[0] == 0
    assert starts[-1] == sum(lengths)
    assert (np.diff(starts) > 0).all()
    np.testing.assert_array_equal(starts[segments], np.cumsum([0, *lengths]))
    assert len(starts) - 1 <= max(most, len(lengths))
    if most >= sum(lengths):
        assert len(starts) - 1 == sum(lengths)


def test_column_means_are_the_means_of_their_tokens() -> None:
    starts, _ = group_columns([3, 2], 3)
    np.testing.assert_allclose(column_means(np.arange(10.0).reshape(5, 2), starts), [[1, 2], [4, 5], [7, 8]])


def test_a_text_without_a_token_has_no_columns() -> None:
    with pytest.raises(ShapeError, match="at least one token"):
        group_columns([], 4)
