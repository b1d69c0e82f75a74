"""A training run from recipe to finished folder: build, train or resume, validate, write the results.

The folder holds, when the run is done: the model (or its memory alone, where the base was frozen; see
`mnemon.models.adapter`) and the tokenizer if the data is text, both as Hugging Face writes them, `recipe.yaml`
(resolved), `training_log.jsonl`, `summary.json`, `README.md` (model card), `checkpoints/` and `tensorboard/`. With
several processes (`mnemon.training.distributed`) every one builds and trains the same model; the first alone writes.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import mnemon
from mnemon.errors import ConfigError
from mnemon.files import atomic_write_json, atomic_write_text, prepare_output_folder
from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.training import checkpoints
from mnemon.training.batch_makers import batch_maker
from mnemon.training.batches import BatchStream
from mnemon.training.build import (
    base_fingerprint,
    build_model,
    build_tokenizer,
    count_parameters,
    vocabulary_size,
)
from mnemon.training.curriculum import Curriculum
from mnemon.training.distributed import (
    Processes,
    check_sharding,
    check_shared_folder,
    explain_lost_peer,
    joined_processes,
)
from mnemon.training.model_card import model_card
from mnemon.training.recipe import Recipe
from mnemon.training.recipe_io import load_recipe, save_recipe
from mnemon.training.telemetry import Telemetry, TrainingLog
from mnemon.training.trainer import AnswerTrainer, Progress, wants_cuda
from mnemon.training.validation import validate

RECIPE_FILE, LOG_FILE, SUMMARY_FILE, CARD_FILE = "recipe.yaml", "training_log.jsonl", "summary.json", "README.md"
_SIGNAL_GRACE_SECONDS = 20.0
_MAY_CHANGE = (
    "optimisation.max_tokens",
    "optimisation.max_minutes",
    "optimisation.threads",
    "data.workers",
    "evaluation",
    "output",
)
"""Keys a resumed run may change: they decide when and where it ends, not what it learns on the way."""


def train(
    recipe: Recipe,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train a model as a recipe says.

    Args:
        recipe: checked recipe.
        output: folder of the run; None takes the recipe's, else `runs/<name>`.
        overwrite: replace an earlier run in that folder.
        resume: go on from the newest whole checkpoint in that folder.
        show_progress: draw a progress bar on stderr.

    Returns:
        The summary that is also written to `summary.json`; its `stop_reason` is `interrupted` after Ctrl-C. With
        several processes all but the first return it without the held-out accuracy.

    Raises:
        ConfigError: the recipe does not fit the folder, or a value is refused by the model.
        BackendUnavailable: the recipe asks for an engine that cannot be had here.
        RunError: the loss became non-finite or the disk is full; the last checkpoint is intact.
        PeerError: another process of the run failed, which raises one of the above.
    """
    with joined_processes() as processes:
        return _train_together(recipe, output_folder(recipe, output), overwrite, resume, show_progress, processes)


def _train_together(
    recipe: Recipe, folder: Path, overwrite: bool, resume: bool, show_progress: bool, processes: Processes
) -> dict[str, Any]:
    with processes.together():
        check_sharding(recipe, wants_cuda(recipe.optimisation), processes)
    if resume or not overwrite:
        processes.from_main(lambda: prepare_output_folder(folder, overwrite=overwrite, resume=resume))
    set_threads(recipe.optimisation.threads)
    with _quiet_library():
        checkpoint = processes.from_main(lambda: _checkpoint_to_resume(recipe, folder)) if resume else None
        with processes.together():
            tokenizer, model = _build(recipe, folder if resume else None)
            if checkpoint is not None:
                _check_base(checkpoint, model)
        if overwrite:  # only now that the recipe has proved to be usable may the earlier run go
            processes.from_main(lambda: prepare_output_folder(folder, overwrite=True))
        check_shared_folder(folder, processes)
        processes.from_main(lambda: _write_inputs(recipe, folder, None if resume else tokenizer))
        trainer = _train(recipe, folder, model, tokenizer, checkpoint, show_progress, processes)
        return _finish(recipe, folder, trainer, tokenizer)


def _write_inputs(recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Write what the run begins with: the tokenizer of a new run that has one, and the resolved recipe."""
    if tokenizer is not None:
        _write_aside(folder, tokenizer.save_pretrained)
    save_recipe(recipe, folder / RECIPE_FILE)


def output_folder(recipe: Recipe, output: str | Path | None = None) -> Path:
    """Return the folder of a run: the one asked for, else the recipe's, else `runs/<name>`."""
    return Path(output or recipe.output.folder or Path("runs") / recipe.name)


def _build(recipe: Recipe, resumed: Path | None) -> tuple[PreTrainedTokenizerFast | None, PreTrainedModel]:
    """Return tokenizer and model of a new run, or of a resumed one, whose weights its checkpoint brings."""
    if resumed is None or recipe.tokenizer is None:
        tokenizer = build_tokenizer(recipe)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(resumed)
    size = vocabulary_size(recipe, tokenizer)
    if resumed is not None:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"init_from": None})})
    model = build_model(recipe, size, tokenizer)
    batch_maker(recipe, tokenizer).check()
    return tokenizer, model


def _check_base(checkpoint: Path, model: PreTrainedModel) -> None:
    """Refuse to go on when the frozen base is not the one the run began with."""
    before, now = checkpoints.read_run_state(checkpoint).get("base_fingerprint"), base_fingerprint(model)
    if before != now:
        raise ConfigError(
            f"model.from_base is another model than when the run began (fingerprint {str(now)[:16]}, then "
            f"{str(before)[:16]}); put it back, or start again with --overwrite"
        )


def _finish(
    recipe: Recipe, folder: Path, trainer: AnswerTrainer, tokenizer: PreTrainedTokenizerFast | None
) -> dict[str, Any]:
    """Write the results, then measure on held-out samples and write that too (it may take long, or be interrupted)."""
    summary = summarise(recipe, trainer)
    processes = trainer.processes
    weights = trainer.whole_weights()
    processes.from_main(lambda: _save_result(recipe, folder, trainer.network, weights))
    processes.from_main(lambda: write_summary(folder, recipe, summary))
    # The pieces of a sharded network are gathered by all processes; a whole one answers alone.
    takes_part = processes.is_main or trainer.engine == "fsdp"
    if summary["stop_reason"] != "interrupted" and recipe.evaluation.samples and takes_part:
        summary["validation"] = validate(trainer.network, tokenizer, recipe)
        if processes.is_main:
            write_summary(folder, recipe, summary)
    return summary


def _save_result(recipe: Recipe, folder: Path, model: PreTrainedModel, weights: dict[str, torch.Tensor] | None) -> None:
    """Write the model (its weights gathered in `weights` where they are in pieces), or a memory trained alone."""
    if isinstance(model, LM2ForCausalLM) and recipe.model.freeze_base:
        model.save_adapter(folder)
    else:
        _write_aside(folder, lambda aside: model.save_pretrained(aside, state_dict=weights))


def set_threads(threads: int | None) -> None:
    """Set torch's CPU threads; None leaves its default."""
    if threads is not None:
        torch.set_num_threads(threads)


def summarise(recipe: Recipe, trainer: AnswerTrainer) -> dict[str, Any]:
    """Return what is worth knowing about a run as a JSON value."""
    progress, curriculum = trainer.progress, trainer.curriculum
    seconds = progress.elapsed()
    return {
        "name": recipe.name,
        "version": mnemon.__version__,
        "seed": recipe.seed,
        "kind": recipe.model.kind,
        "parameters": count_parameters(trainer.network),
        "engine": trainer.engine,
        "processes": trainer.processes.count,
        "steps": trainer.state.global_step,
        "tokens": progress.tokens,
        "minutes": round(seconds / 60, 2),
        "tokens_per_second": round(progress.tokens / max(seconds, 1e-9), 1),
        "stop_reason": progress.stop_reason,
        "trained_length": curriculum.length,
        "running_accuracy": curriculum.accuracy,
        "stages": [asdict(record) for record in curriculum.history],
        "validation": {},
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_summary(folder: Path, recipe: Recipe, summary: dict[str, Any]) -> None:
    """Write summary and model card; each file appears complete or not at all."""
    atomic_write_json(folder / SUMMARY_FILE, summary)
    atomic_write_text(folder / CARD_FILE, model_card(recipe, summary))


def _train(
    recipe: Recipe,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None,
    checkpoint: Path | None,
    show_progress: bool,
    processes: Processes,
) -> AnswerTrainer:
    curriculum = Curriculum(recipe.data.stages, recipe.data.task_names, recipe.data.curriculum)
    progress = Progress(recipe.optimisation)
    step = _restore(checkpoint, curriculum, progress)
    options = recipe.optimisation
    maker = batch_maker(recipe, tokenizer, share=(processes.rank, processes.count))
    stream = BatchStream(maker, curriculum, step * options.gradient_accumulation, recipe.data.workers)
    with processes.together():
        trainer = AnswerTrainer(model, recipe, folder, stream, curriculum, progress, processes)
    set_threads(options.threads)  # accelerate has just set its own number where there are several processes
    log = processes.from_main(lambda: TrainingLog(folder / LOG_FILE, step))
    telemetry = Telemetry(
        trainer,
        log if processes.is_main else None,
        folder / "tensorboard" if recipe.output.tensorboard and processes.is_main else None,
        show_progress and processes.is_main,
    )
    trainer.add_callback(telemetry)
    try:
        if checkpoint is not None and progress.exhausted():
            trainer.restore_finished(checkpoint, step)
        else:
            with _stop_on_signal(progress, processes), explain_lost_peer():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        telemetry.close()
        stream.close()
    return trainer


def _restore(checkpoint: Path | None, curriculum: Curriculum, progress: Progress) -> int:
    """Put curriculum and counters where the checkpoint left them; return the steps done."""
    if checkpoint is None:
        return 0
    state = checkpoints.read_run_state(checkpoint)
    curriculum.restore(state["curriculum"])
    progress.tokens, progress.seconds = state["tokens"], state["seconds"]
    return int(state["step"])


def _checkpoint_to_resume(recipe: Recipe, folder: Path) -> Path:
    """Return the checkpoint to go on from after making sure that it belongs to this recipe."""
    if not (folder / RECIPE_FILE).is_file():
        raise ConfigError(f"{folder} holds no {RECIPE_FILE}, so no run to resume; start again with --overwrite")
    earlier = load_recipe(folder / RECIPE_FILE)
    for key, now in _flat(recipe.model_dump(mode="json")).items():
        before = _flat(earlier.model_dump(mode="json")).get(key)
        if now != before and not key.startswith(_MAY_CHANGE):
            raise ConfigError(f"cannot resume with another {key}: the run has {before!r}, the recipe says {now!r}")
    return checkpoints.newest_whole(folder / "checkpoints")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested dictionary as dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    pairs: dict[str, Any] = {}
    for key, inner in value.items():
        pairs.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return pairs


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Silence Hugging Face's notes and bars (one bar per written file) while our own display runs."""
    library = transformers.utils.logging
    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()


def _write_aside(folder: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary folder, then move its files into place one by one."""
    aside = folder / ".writing"
    with checkpoints.explain_write_errors(folder):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            write(aside)
            for path in aside.iterdir():
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _stop_on_signal(progress: Progress, processes: Processes) -> Iterator[None]:
    """Turn the first Ctrl-C or termination into a clean stop at the end of the step; a second one acts at once.

    With several processes it acts only after a while: a launcher passes on the signal that they may have had already.
    """
    grace = _SIGNAL_GRACE_SECONDS if processes.count > 1 else 0.0
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        if progress.stop_requested and time.monotonic() - first >= grace:
            raise KeyboardInterrupt
        if not progress.stop_requested:
            first, progress.stop_requested = time.monotonic(), True

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return what a run would be without running it: resolved recipe and parameter counts.

    Args:
        recipe: checked recipe.

    Returns:
        `recipe` and `parameters`; the vocabulary is taken from the recipe, no tokenizer is trained.
    """
    tokenizer = build_tokenizer(recipe) if recipe.tokenizer_source else None
    size = vocabulary_size(recipe, tokenizer)
    # Without weights wherever the shape is all in the recipe: a model of the paper's size is counted in a second.
    section = recipe.model.model_copy(update={"init_from": None})
    device = "meta" if section.from_base is None else "cpu"
    with _quiet_library(), torch.device(device):
        model = build_model(recipe.model_copy(update={"model": section}), size, tokenizer)
    return {"recipe": recipe.model_dump(mode="json"), "parameters": count_parameters(model)}
