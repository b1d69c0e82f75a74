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
from mnemon.studies.execution import differences, is_trained, read_json
from mnemon.studies.study import Json, PlannedRun, Study
from mnemon.training.build import build_model, build_tokenizer, vocabulary_size
from mnemon.training.data_sections import BabilongData, MqarData
from mnemon.training.recipe import Recipe
from mnemon.training.recipe_io import load_recipe
from mnemon.training.run import RECIPE_FILE, SUMMARY_FILE, set_threads
from mnemon.training.trainer import wants_cuda

_MOST_TOKENS = 8192
"""Tokens of a batch that is timed on a CPU: enough for the matrices to count, little enough for a second or two."""

_FACTS_ALONE = 128
"""Tokens of a BABILong sample without unrelated text, about."""

_REPEATS = 3
_LONG_CALL = 2.0
"""Seconds after which a call is timed well enough: large models are not run four times for an estimate."""
_SAME_SPEED = ("name", "seed", "output", "optimisation.learning_rate")
"""What two runs may differ in and take the same time."""

_FLOP_PER_WEIGHT = 6
"""Of forward and backward pass, per parameter and token; attention over long contexts comes on top."""


def run_seconds(study: Study, run: PlannedRun, root: Path) -> Json:
    """Estimate how long a run and its measurement take on this machine, alone on a core or a GPU.

    Args:
        study: what measures it.
        run: not necessarily begun.
        root: folder of the study; finished runs of the same recipe but for seed and learning rate in it are the measure
            of its training.

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
    """Return tokens per second of a training step without the optimiser, and of reading, where the run would train.

    The fastest of three calls counts, or one that takes two seconds or more.
    On a CPU processor time counts, shared out among the threads: what else the machine does now is not in it.

    Raises:
        RunError: the recipe asks for a GPU and there is none.
    """
    options = recipe.optimisation
    set_threads(options.threads)
    device = torch.device("cuda" if wants_cuda(options) else "cpu")
    model = build_model(recipe, vocabulary_size(recipe, None)).train()
    torch.nn.Module.to(model, device)  # transformers' own `to` hides its types
    length = recipe.data.stages[-1].length or _FACTS_ALONE
    rows = max(options.min_rows, options.batch_tokens // length, 1)
    most = max(1, _MOST_TOKENS // length, rows if device.type == "cuda" else 1)
    trained, read = (_random_ids(recipe, count, length).to(device) for count in (min(rows, most), most))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16")

    def step() -> None:
        with autocast:
            loss = model(input_ids=trained, labels=trained).loss
        loss.backward()

    def answer() -> None:
        with torch.inference_mode():
            model(input_ids=read, logits_to_keep=1)

    return trained.numel() / _fastest(step, device), read.numel() / _fastest(answer, device)


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
    """Return the tokens per second of finished runs that differ in nothing that costs time; None = there is none."""
    speeds = []
    recipe = run.recipe.model_dump(mode="json")
    for folder in (root / "runs" / run.variant.name).glob("*/*"):
        if is_trained(folder) and (folder / RECIPE_FILE).is_file():
            earlier = load_recipe(folder / RECIPE_FILE).model_dump(mode="json")
            if all(key.startswith(_SAME_SPEED) for key, _, _ in differences(earlier, recipe)):
                speeds.append(float(read_json(folder / SUMMARY_FILE)["tokens_per_second"]))
    return max(speeds, default=None)


def _fastest(work: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of the fastest of a few calls; a first one warms up, and counts only if it is long."""
    seconds = _timed(work, device)
    if seconds < _LONG_CALL:
        seconds = min(_timed(work, device) for _ in range(_REPEATS))
    return max(seconds, 1e-9)


def _timed(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.process_time()
        work()
        return (time.process_time() - started) / torch.get_num_threads()
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started
