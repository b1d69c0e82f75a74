"""What a study will take: time, measured shortly or from earlier runs; arithmetic; and whether its data opens."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mnemon.data import babilong
from mnemon.data.background import load_background
from mnemon.data.mqar import generate
from mnemon.data.text import encode_background
from mnemon.studies.execution import is_trained, read_json
from mnemon.studies.study import Json, PlannedRun, Study
from mnemon.training.build import build_model, build_tokenizer, vocabulary_size
from mnemon.training.data_sections import BabilongData, MqarData
from mnemon.training.recipe import Recipe
from mnemon.training.run import SUMMARY_FILE, set_threads

_MOST_TOKENS = 8192
"""Tokens of a batch that is timed: enough for the matrices to count, little enough for a second or two."""

_FACTS_ALONE = 128
"""Tokens of a BABILong sample without unrelated text, about."""

_REPEATS = 3
_FLOP_PER_WEIGHT = 6
"""Of forward and backward pass, per parameter and token; attention over long contexts comes on top."""


def run_seconds(study: Study, run: PlannedRun, root: Path) -> Json:
    """Estimate how long a run and its measurement take on this machine, alone on a core or a GPU.

    Args:
        study: what measures it.
        run: not necessarily begun.
        root: folder of the study; finished runs of the same variant in it are taken as the measure of its training.

    Returns:
        `seconds`, and `from`: "earlier run" or "measured" (a few steps on random tokens of the
        longest training length).
    """
    training, reading = measured_speed(run.recipe)
    earlier = _earlier_speed(run, root)
    assert run.recipe.optimisation.max_tokens is not None  # checked by the planning
    seconds = run.recipe.optimisation.max_tokens / (earlier or training) + study.tokens_read(run) / reading
    return {"seconds": seconds, "from": "earlier run" if earlier else "measured"}


def measured_speed(recipe: Recipe) -> tuple[float, float]:
    """Return tokens per second of a training step without the optimiser, and of reading; the best of three.

    On a CPU processor time counts, shared out among the threads: what else the machine does now is not in it.
    """
    set_threads(recipe.optimisation.threads)
    model = build_model(recipe, vocabulary_size(recipe, None)).train()
    length = recipe.data.stages[-1].length or _FACTS_ALONE
    most = max(1, _MOST_TOKENS // length)
    rows = max(recipe.optimisation.min_rows, recipe.optimisation.batch_tokens // length, 1)
    trained, read = (_random_ids(recipe, count, length) for count in (min(rows, most), most))

    def step() -> None:
        model(input_ids=trained, labels=trained).loss.backward()

    def answer() -> None:
        with torch.inference_mode():
            model(input_ids=read, logits_to_keep=1)

    return trained.numel() / _fastest(step), read.numel() / _fastest(answer)


def training_flop(parameters: int, tokens: int) -> float:
    """Return the floating-point operations of a training run, 6 N D."""
    return float(_FLOP_PER_WEIGHT * parameters * tokens)


def open_data(recipe: Recipe) -> dict[str, int]:
    """Make one training sample per task, so that a launch does not fail for want of data; return its tokens.

    Raises:
        DataError: the background cannot be read, or is too short.
        ConfigError: the tokenizer cannot be read.
    """
    data = recipe.data
    if isinstance(data, MqarData):
        slices = {part.name: generate(data.settings(part), 1, seed=recipe.seed) for part in data.slices}
        return {name: int(samples.input_ids.shape[1]) for name, samples in slices.items()}
    tokenizer: Any = build_tokenizer(recipe)
    if isinstance(data, BabilongData):
        length = min((length for length in data.lengths if length), default=0)
        found = {}
        for task in data.tasks:
            options: Json = {"background": data.background, "split": "train", "seed": recipe.seed}
            sample = next(iter(babilong.generate(task, length, 1, tokenizer, **options)))
            found[task] = len(tokenizer(sample.input)["input_ids"])
        return found
    stream = encode_background(load_background(data.background, "train"), tokenizer)
    return {"text": int(stream.windows(data.length, 1).ids.size)}


def launch_lines(run: PlannedRun, root: Path) -> tuple[str, str]:
    """Return the command lines that train a run on one machine with eight GPUs, and on two of them."""
    changes = " ".join(f"--set {shlex.quote(change)}" for change in run.changes)
    train = f"-m mnemon train {run.source} {changes} --output {shlex.quote(str(run.folder(root)))}"
    several = "torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
    return f"torchrun --standalone --nproc_per_node=8 {train}", f"{several} {train}"


def _random_ids(recipe: Recipe, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary_size(recipe, None), (rows, length), generator=generator)


def _earlier_speed(run: PlannedRun, root: Path) -> float | None:
    """Return the tokens per second of a finished run of the same variant and length."""
    speeds = []
    for folder in (root / "runs" / run.variant.name).glob("*/*"):
        if is_trained(folder):
            summary = read_json(folder / SUMMARY_FILE)
            speeds.append(float(summary["tokens_per_second"]))
    return max(speeds, default=None)


def _fastest(work: Callable[[], None]) -> float:
    """Return the seconds of the fastest of a few calls, a first one not counted."""
    work()
    return max(min(_timed(work) for _ in range(_REPEATS)), 1e-9)


def _timed(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return (time.process_time() - started) / torch.get_num_threads()
