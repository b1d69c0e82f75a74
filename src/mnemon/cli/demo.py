"""`mnemon demo`: the tour; trains a small LM2, compares the shipped checkpoints, says what to look at."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli.display import command_line, print_comparison, question_bar, silence_libraries
from mnemon.cli.options import JsonOption, OverwriteOption
from mnemon.files import atomic_write_json, prepare_output_folder

if TYPE_CHECKING:
    from mnemon.demo import Lesson
    from mnemon.evaluation.controls import ModelSpec
    from mnemon.evaluation.run import EvaluationRun
    from mnemon.evaluation.suite import SuiteOptions

_TRAINING_SHARE = 0.5  # of all minutes, at most; the recipe asks for less
_EVALUATION_SHARE = 0.8  # of what is left then: measuring the speed and drawing take time too, and estimates err


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything it writes.")] = Path(
        "runs/demo"
    ),
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Minutes for everything; decides how many samples the long texts get.")
    ] = 9.0,
    samples: Annotated[
        int, typer.Option(min=1, help="Most samples per task and length; long texts get fewer, as time allows.")
    ] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights, the training texts and the questions.")] = 0,
    skip_training: Annotated[
        bool, typer.Option("--skip-training", help="Only evaluate the checkpoints that ship with mnemon.")
    ] = False,
    overwrite: OverwriteOption = False,
    json_output: JsonOption = False,
) -> None:
    """Take the tour, offline and within ten minutes on two cores: train, evaluate, compare.

    Trains a small LM2 from scratch for a few minutes and asks it with and
    without its memory. Then evaluates the tiny trained models that ship with
    mnemon (LM2, LM2 with its memory knocked out, the plain model, and the plain
    model with LM2's attention window) on fresh BABILong questions about facts
    hidden in texts of up to 16,000 tokens.

    Writes train/ (the new model), report.html, figures, table.md, results.json,
    predictions.jsonl (every answer) and demo.json.
    """
    started = time.monotonic()
    silence_libraries()
    from mnemon.demo import find_checkpoints, load_checkpoints, own_threads

    checkpoints = find_checkpoints()
    specs = load_checkpoints(checkpoints)
    folder = prepare_output_folder(output, overwrite, resumable=False)
    show = not json_output
    try:
        with own_threads():
            lesson = None if skip_training else _train(folder / "train", seed, minutes, show)
            left = 60 * minutes - (time.monotonic() - started)
            options = _plan(specs, next(iter(checkpoints.values())), samples, seed, _EVALUATION_SHARE * left, show)
            run = _evaluate(specs, options, folder, show)
    except KeyboardInterrupt:
        print(f"{folder}: what was finished is kept; start again with --overwrite", file=sys.stderr)
        raise
    facts = {
        "training": None if lesson is None else lesson.as_dict(),
        "samples": _counts(options),
        "minutes": round((time.monotonic() - started) / 60, 2),
    }
    atomic_write_json(folder / "demo.json", facts)
    _print_end(folder, run, facts, lesson, json_output)


def _train(folder: Path, seed: int, minutes: float, show: bool) -> "Lesson":
    from mnemon.demo import train_and_ask, training_recipe

    recipe = training_recipe(seed, _TRAINING_SHARE * minutes)
    limit = recipe.optimisation.max_minutes
    _say(show, f"Training a small LM2 from scratch, for {limit:g} minutes at most (recipe {recipe.name})", bold=True)
    lesson = train_and_ask(recipe, folder, show_progress=show)
    for sentence in lesson.sentences():
        _say(show, f"   {sentence}")
    return lesson


def _plan(specs: "list[ModelSpec]", first: Path, samples: int, seed: int, seconds: float, show: bool) -> "SuiteOptions":
    from rich.console import Console

    from mnemon.demo import plan_evaluation

    names = ", ".join(spec.label for spec in specs)
    _say(show, f"Evaluating the models that ship with mnemon ({names}) on fresh BABILong questions", bold=True)
    with Console(stderr=True, quiet=not show).status("measuring how fast this machine reads"):
        options = plan_evaluation(specs, first, most=samples, seconds=seconds, seed=seed)
    counts = "  ".join(f"{length}: {count}" for length, count in _counts(options).items())
    _say(show, f"   Samples per task that the time allows on this machine: {counts}")
    return options


def _counts(options: "SuiteOptions") -> dict[str, int]:
    return {length: options.samples_at.get(length, options.num_samples) for length in options.lengths}


def _evaluate(specs: "list[ModelSpec]", options: "SuiteOptions", folder: Path, show: bool) -> "EvaluationRun":
    from mnemon.evaluation.run import write_run
    from mnemon.evaluation.suite import evaluate_models, number_of_questions

    with question_bar(show, number_of_questions(specs, options)) as progress:
        run = evaluate_models(specs, options, command=command_line(sys.argv), progress=progress)
    write_run(folder, run)
    return run


def _print_end(
    folder: Path, run: "EvaluationRun", facts: dict[str, Any], lesson: "Lesson | None", as_json: bool
) -> None:
    from mnemon.evaluation.run import summary

    if as_json:
        value = {"output": str(folder), **facts, **summary(run, run.comparison)}
        print(json.dumps(value, ensure_ascii=False))
        return
    print_comparison(run.comparison)
    _say(True, f"Done in {facts['minutes']:.1f} minutes. What to look at:", bold=True)
    places = {
        folder / "report.html": "everything on one page: open it in a browser",
        folder / "accuracy_over_length.png": "who still finds the facts when the text grows",
        folder / "capabilities.png": "the same by kind of question",
        folder / "predictions.jsonl": "every answer of every model",
    }
    if lesson is not None:
        places[folder / "train" / "README.md"] = "the model trained just now, beside its log and weights"
    width = max(len(str(place)) for place in places)
    for place, what in places.items():
        _say(True, f"   {place!s:{width}}  {what}")


def _say(show: bool, text: str, *, bold: bool = False) -> None:
    if show:
        from rich.console import Console

        Console().print(text, style="bold" if bold else None, markup=False, highlight=False, soft_wrap=True)
