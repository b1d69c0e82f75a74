"""The training loop: Hugging Face's Trainer with answer loss, exact resume and a stop at the first non-finite number.

The Trainer owns optimiser, accumulation, precision and devices. What differs: batches come from a `BatchStream` as they
are, logits are computed only from the first answer on, the learning rate follows the tokens seen, the curriculum is fed
with every batch, and checkpoints are sealed (see `mnemon.training.checkpoints`).
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mnemon.data.encoding import IGNORED
from mnemon.errors import ConfigError, RunError
from mnemon.files import atomic_write_json
from mnemon.training import checkpoints
from mnemon.training.batches import Batch, BatchStream
from mnemon.training.build import base_fingerprint
from mnemon.training.curriculum import Curriculum
from mnemon.training.recipe import OptimisationSection, Recipe

_ENDLESS = 10**9
_TRAPEZOID_TOP = 0.7


@dataclass
class Progress:
    """What a run has done so far, kept exact across resumes.

    Attributes:
        tokens: real tokens trained on.
        seconds: wall-clock time spent training, earlier sessions included.
        stop_reason: why the run ended, empty while it goes on.
    """

    budget: OptimisationSection
    tokens: int = 0
    seconds: float = 0.0
    stop_reason: str = ""
    _since: float | None = field(default=None, repr=False)

    def start_clock(self) -> None:
        """Begin (or go on) counting wall-clock time."""
        self._since = time.monotonic()

    def elapsed(self) -> float:
        """Return the seconds trained so far, this session included."""
        return self.seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    def fraction(self) -> float:
        """Return the share of the budget used that the learning rate follows: tokens if bounded, else time."""
        if self.budget.max_tokens is not None:
            return min(1.0, self.tokens / self.budget.max_tokens)
        assert self.budget.max_minutes is not None
        return min(1.0, self.elapsed() / (60 * self.budget.max_minutes))

    def exhausted(self) -> str:
        """Return which budget is used up, empty if none."""
        if self.budget.max_tokens is not None and self.tokens >= self.budget.max_tokens:
            return "max_tokens"
        if self.budget.max_minutes is not None and self.elapsed() >= 60 * self.budget.max_minutes:
            return "max_minutes"
        return ""


def learning_rate_factor(options: OptimisationSection, step: int, fraction: float) -> float:
    """Return the factor on the peak learning rate.

    Args:
        options: warm-up, schedule and floor.
        step: optimisation steps done.
        fraction: share of the budget used, 0 to 1.

    Returns:
        A factor in [0, 1]: linear warm-up, then the schedule.
    """
    warm = min(1.0, (step + 1) / options.warmup_steps) if options.warmup_steps else 1.0
    fall = {
        "constant": 0.0,
        "linear": fraction,
        "cosine": (1 - math.cos(math.pi * fraction)) / 2,
        "trapezoid": max(0.0, (fraction - _TRAPEZOID_TOP) / (1 - _TRAPEZOID_TOP)),
    }[options.schedule]
    return warm * (1 - (1 - options.floor) * fall)


@dataclass
class Window:
    """Sums since the last log line: loss, tokens, and right answers by (task, length)."""

    loss: float = 0.0
    batches: int = 0
    tokens: int = 0
    answers: dict[tuple[str, int], list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    def add(self, loss: float, batch: Batch, right: list[bool]) -> None:
        """Take in one batch."""
        self.loss += loss
        self.batches += 1
        self.tokens += batch["tokens"]
        for task, correct in zip(batch["tasks"], right, strict=True):
            counts = self.answers[task, batch["length"]]
            counts[0] += int(correct)
            counts[1] += 1


class AnswerTrainer(Trainer):
    """Hugging Face's Trainer for streams of questions, with the changes the module names.

    Args:
        model: any causal language model whose forward takes `logits_to_keep`.
        recipe: of the run.
        folder: output folder of the run.
        stream: batches, positioned at the step the run begins with.
        curriculum: fed with every batch; the stream follows it.
        progress: counters, restored when the run resumes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        folder: Path,
        stream: BatchStream,
        curriculum: Curriculum,
        progress: Progress,
    ) -> None:
        super().__init__(model=model, args=training_arguments(recipe, folder), train_dataset=_Endless())
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.network, self.recipe, self.folder = model, recipe, folder
        self.stream, self.curriculum, self.progress = stream, curriculum, progress
        self.window = Window()
        self.last_grad_norm = 0.0
        # `compute_loss` divides by the answers of the whole accumulated batch, which the Trainer then counts for us.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._right: list[bool] = []

    def get_train_dataloader(self) -> Any:
        """Return the stream itself: accelerate's loader would fetch a batch early and miss a change of stage."""
        return self.stream

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the learning rate follow the tokens seen instead of a number of steps."""
        options = self.recipe.optimisation
        optimizer = self.optimizer if optimizer is None else optimizer
        assert optimizer is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(options, step, self.progress.fraction()),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the cross entropy of the answers (float32), and note which questions were answered rightly."""
        everything = self.recipe.data.loss_on == "all"
        width = inputs["input_ids"].shape[1]
        keep = width if everything else min(width, inputs["keep"])
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=keep,
            use_cache=False,
        ).logits[:, -keep:-1]
        targets = inputs["labels"][:, 1 - keep :]
        asked = targets != IGNORED
        scores = logits[asked].float()
        losses: torch.Tensor = F.cross_entropy(scores, targets[asked], reduction="sum")
        self._right = questions_right(scores.argmax(-1) == targets[asked], inputs["question_ids"])
        loss: torch.Tensor = losses / num_items_in_batch
        return loss + self._context_loss(logits, inputs, asked) if everything else loss

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one micro-batch; stop the run if its loss is not finite; tell the curriculum what it showed."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = float(loss) * self.args.gradient_accumulation_steps
        if not math.isfinite(value):
            raise self._diverged("loss", value)
        self.window.add(value, inputs, self._right)
        self.progress.tokens += inputs["tokens"]
        answers = zip(inputs["tasks"], self._right, strict=True)
        self.curriculum.observe(inputs["stage"], answers, inputs["tokens"])
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip as the Trainer does, and stop before the optimiser can spread a non-finite gradient."""
        norm = super()._clip_grad_norm(model)
        self.last_grad_norm = float(norm)
        if not math.isfinite(self.last_grad_norm):
            raise self._diverged("gradient norm", self.last_grad_norm)
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        """Count nothing: the Trainer's estimate walks over all parameters at every step and nobody reads it."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self.folder / "checkpoints"
        with checkpoints.staged(folder, self.state.global_step) as stage:
            self._stage = stage
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._stage = None
            atomic_write_json(stage / f"checkpoint-{self.state.global_step}" / checkpoints.RUN_STATE, self.run_state())
        checkpoints.remove_old(folder, self.recipe.output.keep_checkpoints)

    _stage: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage) if self._stage is not None else super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the weights only: the Trainer would add its arguments as a pickle, which nobody may load."""
        self.network.save_pretrained(output_dir or str(self.folder), state_dict=state_dict)

    def run_state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the Trainer's own files."""
        return {
            "step": self.state.global_step,
            "tokens": self.progress.tokens,
            "seconds": self.progress.elapsed(),
            "curriculum": self.curriculum.state(),
            "base_fingerprint": base_fingerprint(self.network),
        }

    def _context_loss(self, logits: torch.Tensor, inputs: Batch, asked: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean loss of the tokens that are no answers."""
        other = inputs["attention_mask"][:, 1:].bool() & inputs["attention_mask"][:, :-1].bool() & ~asked
        mean = F.cross_entropy(logits[other].float(), inputs["input_ids"][:, 1:][other])
        return self.recipe.data.context_loss_weight * mean / self.args.gradient_accumulation_steps

    def _diverged(self, what: str, value: float) -> RunError:
        return RunError(
            f"the {what} became {value} at step {self.state.global_step + 1}; the last checkpoint is intact: lower "
            "optimisation.learning_rate or max_grad_norm and start again, or resume from it"
        )


def questions_right(right_tokens: torch.Tensor, question_ids: torch.Tensor) -> list[bool]:
    """Return for every question whether all its answer tokens are right.

    Args:
        right_tokens: bool [N], one per answer token.
        question_ids: int [N], the question of each, numbered from 0 without gaps.
    """
    wrong = torch.zeros(int(question_ids[-1]) + 1, dtype=torch.long, device=right_tokens.device)
    wrong.index_add_(0, question_ids, (~right_tokens).long())
    return [count == 0 for count in wrong.tolist()]


def training_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """Return the Trainer's arguments for a recipe; steps are unbounded because tokens and minutes end the run.

    Raises:
        ConfigError: several processes were started.
    """
    options = recipe.optimisation
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("mnemon train runs in one process so far; start it without torchrun")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=_ENDLESS,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        max_grad_norm=options.max_grad_norm,
        gradient_accumulation_steps=options.gradient_accumulation,
        bf16=options.dtype == "bfloat16",
        use_cpu=not wants_cuda(options),
        optim="adamw_torch_fused",
        seed=recipe.seed,
        ignore_data_skip=True,
        logging_strategy="no",
        save_strategy="no",
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # with several GPUs the Trainer would split our batches over them
    return arguments


def wants_cuda(options: OptimisationSection) -> bool:
    """Say whether the run goes to a GPU.

    Raises:
        RunError: a GPU was asked for and there is none.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RunError("optimisation.device is cuda, but torch finds no CUDA GPU; set it to auto or cpu")
    return options.device != "cpu" and torch.cuda.is_available()


class _Endless(torch.utils.data.IterableDataset[Batch]):
    """Stands in for the data set the Trainer insists on; the stream is what is read."""

    def __iter__(self) -> Any:
        return iter(())
