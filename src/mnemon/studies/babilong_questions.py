"""How the runs of the BABILong studies are asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mnemon.evaluation.retrieval import Retriever
from mnemon.evaluation.suite import SuiteOptions
from mnemon.studies.study import PlannedRun
from mnemon.training.data_sections import BabilongData


def suite_options(
    run: PlannedRun,
    lengths: tuple[str, ...],
    samples_at: Mapping[str, int],
    controls: bool = False,
    retriever: Retriever | None = None,
) -> SuiteOptions:
    """Return how a run is asked: in the layout and on the kind of text it was trained on.

    Args:
        run: what was trained.
        lengths: of the texts.
        samples_at: samples per task at lengths with others than `run.samples`.
        controls: whether a model with a memory is asked a second time with its memory knocked out.
        retriever: what picks sentences of the text for the model to read; None = it reads all.
    """
    data = run.recipe.data
    assert isinstance(data, BabilongData)
    return SuiteOptions(
        tasks=tuple(data.tasks),
        lengths=lengths,
        num_samples=run.samples,
        samples_at=dict(samples_at),
        background=data.background,
        background_name=Path(data.background).name,
        layout="short",
        controls=controls,
        retriever=retriever,
    )
