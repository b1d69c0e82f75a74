"""Differences of two variants of a study on the same samples, as results keep them, and p values read together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from mnemon.evaluation.statistics import holm
from mnemon.metrics.intervals import crossed_bootstrap, within
from mnemon.studies.study import Json


def paired_difference(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], bounds: tuple[float, float] | None = None
) -> Json:
    """Return the mean difference of two variants trained with the same seeds and measured on the same samples.

    Args:
        ours: a value per seed and sample, [S, N].
        theirs: likewise.
        bounds: what no difference can go beyond; None = nothing is known.

    Returns:
        `difference` with its 95 % interval over seeds and samples, `by_seed`, and `p_value` of no difference.
    """
    values = ours - theirs
    interval, p_value = crossed_bootstrap(values)
    if bounds is not None:
        interval = within(interval, *bounds)
    return {"difference": asdict(interval), "by_seed": values.mean(axis=1).tolist(), "p_value": p_value}


def add_corrected(tests: Sequence[Json]) -> None:
    """Add `corrected_p` to tests that are read together (Holm)."""
    for test, corrected in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
        test["corrected_p"] = corrected
