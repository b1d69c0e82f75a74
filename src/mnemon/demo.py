"""The tour behind `mnemon demo`: train a small LM2, then compare the shipped checkpoints within a given time.

Everything here composes training and evaluation; neither knows of it. What is printed is the command line's business.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mnemon.data.encoding import evaluation_prompt
from mnemon.errors import CheckpointError
from mnemon.evaluation.checkpoints import load_spec, trained_layout, trained_tasks
from mnemon.evaluation.controls import ModelSpec, with_controls
from mnemon.evaluation.generation import generate_answers
from mnemon.evaluation.samples import parse_length
from mnemon.evaluation.suite import SuiteOptions, evaluate_models, generated_samples
from mnemon.metrics.intervals import Interval
from mnemon.models.loading import shipped_checkpoints
from mnemon.training.data_sections import BabilongData
from mnemon.training.recipe import Recipe
from mnemon.training.recipe_io import load_recipe
from mnemon.training.run import train

RECIPE = "demo-lm2"
COMPARED = {"LM2": "babilong-tiny-lm2", "plain": "babilong-tiny-plain", "window": "babilong-tiny-window"}
"""Label in the tables -> checkpoint; LM2 first, since its tokenizer cuts the samples to their length."""
LENGTHS = ("0k", "1k", "2k", "4k", "8k", "16k")

_TASKS = ("qa1", "qa6", "qa9", "qa10")
_THREADS = 2
_QUESTIONS_AFTER_TRAINING = 100
_MAX_NEW_TOKENS = 10
_PROBE_LENGTH, _PROBE_SAMPLES = 8000, 3
_SHORTEST = 250  # tokens: a question about bare facts costs about as much as this


@dataclass(frozen=True)
class Lesson:
    """What the freshly trained model learned, on new questions.

    Attributes:
        learned: whether the curriculum found any length learned.
        length: context length of the questions in tokens: the longest one learned, else the first.
        attention_span: tokens that the attention sees; None for all.
        with_memory, knocked_out: share of right answers, 0..1, with the memory bank and with it silenced.
        guessing: share of right answers of always giving the most frequent one; None if not known.
        minutes, tokens: what the training took.
    """

    tasks: tuple[str, ...]
    learned: bool
    length: int
    attention_span: int | None
    questions: int
    with_memory: Interval
    knocked_out: Interval
    guessing: float | None
    minutes: float
    tokens: int

    def sentences(self) -> tuple[str, str]:
        """Say it in two lines."""
        sight = "" if self.attention_span is None else f", of which the attention sees {self.attention_span}"
        place = f"{self.length} tokens{sight}" if self.length else "the bare facts"
        guess = "" if self.guessing is None else f"; always the most frequent answer: {100 * self.guessing:.0f} %"
        first = f"Learned in {self.minutes:.1f} minutes: {', '.join(self.tasks)} over {place}."
        if not self.learned:
            first = f"Not learned within {self.minutes:.1f} minutes: {', '.join(self.tasks)} over {place}. It takes "
            first += f"longer here: `mnemon train {RECIPE} --set optimisation.max_minutes=10`"
        return (
            first,
            f"{self.questions} new questions: {_percent(self.with_memory)} right with the memory, "
            f"{_percent(self.knocked_out)} with the memory knocked out{guess}.",
        )

    def as_dict(self) -> dict[str, Any]:
        """Give it as a JSON value."""
        return asdict(self)


def find_checkpoints() -> dict[str, Path]:
    """Give the folders of the shipped checkpoints that the tour compares, by label.

    Raises:
        CheckpointError: if one of them did not come with this installation.
    """
    shipped = shipped_checkpoints()
    missing = [name for name in COMPARED.values() if name not in shipped]
    if missing:
        raise CheckpointError(
            f"this installation of mnemon lacks the checkpoints {', '.join(missing)}; install it again, or make them "
            f"with `mnemon train {missing[0]}` and compare with `mnemon eval`"
        )
    return {label: shipped[name] for label, name in COMPARED.items()}


def load_checkpoints(folders: Mapping[str, Path]) -> list[ModelSpec]:
    """Load checkpoints as rows of a comparison.

    Raises:
        CheckpointError: if files are missing or damaged.
    """
    return [load_spec(label, str(folder), source=folder.name) for label, folder in folders.items()]


def training_recipe(seed: int, max_minutes: float) -> Recipe:
    """Give the recipe of the tour's training, ended after `max_minutes` at the latest."""
    recipe = load_recipe(RECIPE, [f"seed={seed}"])
    limit = min(max_minutes, recipe.optimisation.max_minutes or max_minutes)
    return recipe.model_copy(
        update={"optimisation": recipe.optimisation.model_copy(update={"max_minutes": round(limit, 2)})}
    )


def train_and_ask(recipe: Recipe, folder: Path, *, show_progress: bool = True) -> Lesson:
    """Train from scratch, then ask new questions with the memory and with the memory knocked out.

    Args:
        recipe: recipe of an LM2 model on BABILong.
        folder: where the run goes; new or empty.
        show_progress: draw a progress bar on stderr.

    Returns:
        What was learned, at the longest length that the curriculum found learned.

    Raises:
        KeyboardInterrupt: after Ctrl-C; the run is saved and can go on with `mnemon train --resume`.
        RunError: if the loss became non-finite or the disk is full.
    """
    summary = train(recipe, folder, show_progress=show_progress)
    if summary["stop_reason"] == "interrupted":
        raise KeyboardInterrupt
    learned = [
        stage["length"] for stage in summary["stages"] if stage["reason"] == "learned" and not stage["max_facts"]
    ]
    data = recipe.data
    assert isinstance(data, BabilongData)  # the tour asks BABILong questions
    length = max(learned, default=data.lengths[0])
    spec = load_spec(recipe.name, str(folder))
    options = SuiteOptions(
        tasks=tuple(data.tasks),
        lengths=(str(length),),
        num_samples=_QUESTIONS_AFTER_TRAINING,
        seed=recipe.seed,
        background=data.background,
        max_new_tokens=_MAX_NEW_TOKENS,
    )
    comparison = evaluate_models([spec], options).comparison
    with_memory, knocked_out = (comparison.accuracy(label, str(length)) for label in comparison.labels)
    return Lesson(
        tasks=options.tasks,
        learned=bool(learned),
        length=length,
        attention_span=spec.model.config.attention_span,
        questions=comparison.num_samples_evaluated,
        with_memory=with_memory,
        knocked_out=knocked_out,
        guessing=comparison.majority_level(),
        minutes=summary["minutes"],
        tokens=summary["tokens"],
    )


def plan_evaluation(specs: Sequence[ModelSpec], folder: Path, *, most: int, seconds: float, seed: int) -> SuiteOptions:
    """Decide what the comparison measures, so that it takes about the given time on this machine.

    Sets torch's number of threads to what reads faster here; see `own_threads`.

    Args:
        specs: the models, LM2 first.
        folder: folder of the first model, whose recipe names its tasks and prompt layout.
        most: most samples per task and length.
        seconds: time for the whole comparison; measuring the speed comes on top.
        seed: seed of the samples.
    """
    options = SuiteOptions(
        tasks=tuple(trained_tasks(folder) or _TASKS),
        lengths=LENGTHS,
        num_samples=most,
        seed=seed,
        layout=trained_layout(folder),
        max_new_tokens=_MAX_NEW_TOKENS,
    )
    prompts = probe_prompts(specs[0].tokenizer, options)
    torch.set_num_threads(faster_threads(specs, options, prompts))
    counts = plan_samples(seconds_per_sample(specs, options, prompts), most, seconds)
    usual = max(counts.values())
    fewer = {length: count for length, count in counts.items() if count != usual}
    return replace(options, num_samples=usual, samples_at=fewer)


def plan_samples(costs: Mapping[str, float], most: int, seconds: float) -> dict[str, int]:
    """Choose the samples per length that make the mean over the lengths most certain within the time.

    The number falls with the square root of the cost: then the same second buys as much certainty at every length.

    Args:
        costs: length name -> seconds that one more sample of every task costs, all models together.
        most: largest number.
        seconds: time for all.

    Returns:
        Length name -> number, at least 1 even if the time is too short for that.
    """

    def counts(scale: float) -> dict[str, int]:
        return {name: max(1, min(most, int(scale / math.sqrt(cost)))) for name, cost in costs.items()}

    low, high = 0.0, 1.01 * most * math.sqrt(max(costs.values()))
    for _ in range(40):
        middle = (low + high) / 2
        fits = sum(costs[name] * count for name, count in counts(middle).items()) <= seconds
        low, high = (middle, high) if fits else (low, middle)
    return counts(low)


def probe_prompts(tokenizer: Any, options: SuiteOptions) -> dict[int, list[str]]:
    """Make a few prompts to measure speed with: tokens -> prompts, of one or two lengths, the longer last.

    The longer one is the longest that is quick to read, the other at most a quarter of it.
    """
    quick = [length for length in options.lengths if parse_length(length) <= _PROBE_LENGTH] or [options.lengths[0]]
    longest = max(quick, key=parse_length)
    shorter = [length for length in quick if _SHORTEST < parse_length(length) <= parse_length(longest) / 4]
    source = generated_samples(tokenizer, replace(options, num_samples=_PROBE_SAMPLES, samples_at={}))
    return {
        _tokens(length): [evaluation_prompt(sample, options.layout) for sample in source.cell(options.tasks[0], length)]
        for length in [*sorted(shorter, key=parse_length)[:1], longest]
    }


def faster_threads(specs: Sequence[ModelSpec], options: SuiteOptions, prompts: Mapping[int, list[str]]) -> int:
    """Measure whether one thread or two read faster; on a busy machine two wait for each other most of the time.

    OMP_NUM_THREADS, where it is set, or a single core decides without measuring.
    """
    if "OMP_NUM_THREADS" in os.environ or (os.cpu_count() or 1) == 1:
        return torch.get_num_threads()
    shortest = next(iter(prompts.values()))
    seconds = {}
    for threads in (1, 1, _THREADS):  # the first round only warms up
        torch.set_num_threads(threads)
        seconds[threads] = sum(_seconds(spec, options, shortest) for spec in specs)
    return min(seconds, key=lambda threads: seconds[threads])


def seconds_per_sample(
    specs: Sequence[ModelSpec], options: SuiteOptions, prompts: Mapping[int, list[str]]
) -> dict[str, float]:
    """Measure on a few prompts what one more sample of every task costs at each length.

    Returns:
        Length name -> seconds, all models and controls together.
    """
    total: dict[str, float] = dict.fromkeys(options.lengths, 0.0)
    measured: dict[int, list[tuple[int, float]]] = {}
    for row in with_controls(specs):
        key = id(row.model)
        if key not in measured:  # the knocked-out control reads as fast as the model itself
            measured[key] = [(tokens, _seconds(row, options, texts)) for tokens, texts in prompts.items()]
        for length in options.lengths:
            total[length] += len(options.tasks) * predict_seconds(measured[key], _tokens(length))
    return total


def predict_seconds(points: Sequence[tuple[int, float]], tokens: int) -> float:
    """Predict the seconds for a prompt from measured ones: a part per token and a part per pair of tokens.

    Args:
        points: one or two (tokens, seconds), the longer prompt last.
        tokens: length of the prompt, at least 1.
    """
    size, per_token = points[-1][0], points[-1][1] / points[-1][0]
    growth = 0.0
    if len(points) > 1:
        shorter, seconds = points[0]
        growth = max(0.0, (per_token - seconds / shorter) / (size - shorter))
    return tokens * (max(0.0, per_token - growth * size) + growth * tokens)


@contextlib.contextmanager
def own_threads() -> Iterator[None]:
    """Begin with one thread of torch, or as many as OMP_NUM_THREADS says, and put the number back afterwards.

    One thread is never slow with small models; `plan_evaluation` measures whether two are faster.
    """
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(row: ModelSpec, options: SuiteOptions, prompts: Sequence[str]) -> float:
    """Measure the seconds per prompt."""
    answers = generate_answers(
        row.model, row.tokenizer, prompts, max_new_tokens=options.max_new_tokens, generate_kwargs=row.generate_kwargs
    )
    return answers.seconds / len(prompts)


def _tokens(length: str) -> int:
    return max(_SHORTEST, parse_length(length))


def _percent(share: Interval) -> str:
    return f"{100 * share.mean:.0f} % [{100 * share.low:.0f}–{100 * share.high:.0f}]"
