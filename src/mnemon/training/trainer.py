"""The training loop: Hugging Face's Trainer with answer loss, exact resume and a stop at the first non-finite number.

The Trainer owns optimiser, accumulation, precision and devices. What differs: batches come from a `BatchStream` as they
are, logits are computed only from the first answer on, the learning rate follows the tokens seen, the curriculum is fed
with every batch, and checkpoints are sealed (see `mnemon.training.checkpoints`). With several processes the loss is
that of the whole batch, and whatever decides how training goes on is the same on all of them.
"""

from __future__ import annotations

import inspect
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mnemon.data.encoding import IGNORED
from mnemon.errors import ConfigError, RunError
from mnemon.files import atomic_write_json
from mnemon.training import checkpoints
from mnemon.training.batches import Batch, BatchStream
from mnemon.training.build import base_fingerprint
from mnemon.training.curriculum import Curriculum
from mnemon.training.distributed import Processes, check_engine, decoder_layer_classes, engine_in_use
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
        stop_requested: whether the user asked this process to stop.
        stop_agreed: whether some process of the run was asked to stop, as all of them know it.
        clock: the time on which several processes agreed at the last step, None = read this process's own.
    """

    budget: OptimisationSection
    tokens: int = 0
    seconds: float = 0.0
    stop_reason: str = ""
    stop_requested: bool = False
    stop_agreed: bool = False
    clock: float | None = None
    _since: float | None = field(default=None, repr=False)

    def start_clock(self) -> None:
        """Begin (or go on) counting wall-clock time."""
        self._since = time.monotonic()

    def elapsed(self) -> float:
        """Return the seconds trained so far, this session included; the same on every process."""
        return self.own_clock() if self.clock is None else self.clock

    def own_clock(self) -> float:
        """Return the seconds trained so far by this process's own clock."""
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
    """Since the last log line: sums of loss, tokens, right answers by (task, length); the model's diagnostics."""

    loss: float = 0.0
    batches: int = 0
    tokens: int = 0
    answers: dict[tuple[str, int], list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    diagnostics: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))

    def add(self, loss: float, batch: Batch, right: list[bool]) -> None:
        """Take in one batch."""
        self.loss += loss
        self.batches += 1
        self.tokens += batch["tokens"]
        for task, correct in zip(batch["tasks"], right, strict=True):
            counts = self.answers[task, batch["length"]]
            counts[0] += int(correct)
            counts[1] += 1

    def note(self, diagnostics: Mapping[str, torch.Tensor]) -> None:
        """Take in the scalars that the model returned beside its logits."""
        for name, value in diagnostics.items():
            self.diagnostics[name].append(value.detach())


class AnswerTrainer(Trainer):
    """Hugging Face's Trainer for streams of questions, with the changes the module names.

    Args:
        model: any causal language model whose forward takes `logits_to_keep`.
        recipe: of the run.
        folder: output folder of the run.
        stream: batches, positioned at the step the run begins with.
        curriculum: fed with every batch; the stream follows it.
        progress: counters, restored when the run resumes.
        processes: the processes of the run.

    Raises:
        ConfigError: the model cannot recompute activations, and the recipe asks for it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        folder: Path,
        stream: BatchStream,
        curriculum: Curriculum,
        progress: Progress,
        processes: Processes = Processes(),  # noqa: B008 (a frozen value)
    ) -> None:
        arguments = training_arguments(recipe, folder, model)
        if recipe.optimisation.gradient_checkpointing:
            recompute_activations(model)
        if recipe.optimisation.compile and hasattr(model, "compile_for_training"):
            cast(Any, model).compile_for_training()
        super().__init__(model=model, args=arguments, train_dataset=_Endless())
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.network, self.recipe, self.folder = model, recipe, folder
        self.stream, self.curriculum, self.progress = stream, curriculum, progress
        self.processes = processes
        self.engine: str | None = None  # known once the first step has begun
        self.window = Window()
        self.last_grad_norm = 0.0
        self.loss_is_scaled_for_ga = True  # `compute_loss` divides by the answers of the whole accumulated batch
        self._right: list[bool] = []

    def get_train_dataloader(self) -> Any:
        """Return the stream itself: accelerate's loader would fetch a batch early and miss a change of stage."""
        return self.stream

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Batch], int]:
        """Return the batches of one step and the number of their answer tokens, those of other processes included."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        return batches, sum(batch["answer_tokens"] for batch in batches)

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
        """Return this process's part of the cross entropy (float32), and note which questions were answered rightly.

            loss = processes * sum of the own answers' losses / answer tokens of the whole batch

        The engine averages gradients over the processes, which the factor turns into the sum.
        """
        everything = self.recipe.data.context_weight is not None
        width = inputs["input_ids"].shape[1]
        keep = width if everything else min(width, inputs["keep"])
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=keep,
            use_cache=False,
            **self._extras_wanted(),
        )
        self.window.note(getattr(outputs, "diagnostics", None) or {})
        logits = outputs.logits[:, -keep:-1]
        targets = inputs["labels"][:, 1 - keep :]
        asked = targets != IGNORED
        scores = logits[asked].float()
        losses: torch.Tensor = F.cross_entropy(scores, targets[asked], reduction="sum")
        self._right = questions_right(scores.argmax(-1) == targets[asked], inputs["question_ids"])
        loss: torch.Tensor = losses / num_items_in_batch
        if everything:
            loss = loss + self._context_loss(logits, inputs)
        return (loss + self._balance_loss(outputs) + self._write_loss(outputs, inputs)) * self.processes.count

    def _extras_wanted(self) -> dict[str, bool]:
        """Ask a model that knows how for its routing, and in the steps that are logged for its diagnostics."""
        known = inspect.signature(type(self.network).forward).parameters
        logged = (self.state.global_step + 1) % self.recipe.output.log_every_steps == 0
        wanted = {
            "output_diagnostics": logged,
            "output_routing": self._balance_weight > 0,
            "output_write_rate": self._write_cost > 0,
        }
        return {name: True for name, want in wanted.items() if want and name in known}

    @property
    def _balance_weight(self) -> float:
        return float(getattr(self.network, "balance_weight", 0.0))

    @property
    def _write_cost(self) -> float:
        return float(getattr(self.network, "write_cost", 0.0))

    def _write_loss(self, outputs: Any, inputs: Batch) -> torch.Tensor | float:
        """Return this process's part of what writing adds to the loss, and note how much is written.

        Contexts of facts alone have nothing to pass by: there a cost would close the gates before anything is learned,
        and a gate that is closed completely has no gradient by which to open again.
        """
        rate = getattr(outputs, "write_rate", None)
        if rate is None:
            return 0.0
        self.window.note({"write_rate": rate})
        if self.recipe.data.stages[inputs["stage"]].length == 0:
            return 0.0
        shares = self.args.gradient_accumulation_steps * self.processes.count
        return cast(torch.Tensor, self._write_cost * rate / shares)

    def _balance_loss(self, outputs: Any) -> torch.Tensor | float:
        """Return this process's part of what unevenly used memories add to the loss, and note how they are used."""
        balance = getattr(outputs, "balance_loss", None)
        if balance is None:
            return 0.0
        self.window.note({"balance_loss": balance, "largest_load": outputs.loads.max()})
        shares = self.args.gradient_accumulation_steps * self.processes.count
        return cast(torch.Tensor, self._balance_weight * balance / shares)

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one micro-batch; stop the run if its loss is not finite; tell the curriculum what it showed."""
        if self.engine is None:
            self._check_engine(model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        share, right = self._agree(float(loss) / self.processes.count, inputs)
        value = share * self.args.gradient_accumulation_steps
        if not math.isfinite(value):
            raise self._diverged("loss", value)
        self.window.add(value, inputs, right)
        self.progress.tokens += inputs["tokens"]
        self.curriculum.observe(inputs["stage"], zip(inputs["tasks"], right, strict=True), inputs["tokens"])
        return loss

    def _check_engine(self, model: Any) -> None:
        """Find out what accelerate has made of the network, and refuse anything but what the recipe asks for."""
        engine = engine_in_use(self.accelerator.distributed_type.value, model)
        with self.processes.together():
            check_engine(self.recipe.optimisation, engine, self.processes)
        self.engine = engine

    def _agree(self, loss: float, inputs: Batch) -> tuple[float, list[bool]]:
        """Return the loss of the whole micro-batch and whether each of its questions was answered rightly.

        As a side effect the processes agree on the time and on whether somebody wants to stop: decisions that hang on
        either must be the same everywhere.
        """
        progress = self.progress
        flags = [0.0] * len(inputs["tasks"])
        for question, correct in zip(inputs["questions"], self._right, strict=True):
            flags[question] = float(correct)
        time_of_main = progress.own_clock() if self.processes.is_main else 0.0
        own = [loss, float(progress.stop_requested), time_of_main, *flags]
        loss, stop, clock, *flags = self.processes.sum(own)
        if self.processes.count > 1:
            progress.stop_agreed, progress.clock = stop > 0, clock
        return loss, [flag > 0 for flag in flags]

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip as the Trainer does, and stop before the optimiser can spread a non-finite gradient."""
        norm = super()._clip_grad_norm(model)
        self.last_grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(self.last_grad_norm):
            raise self._diverged("gradient norm", self.last_grad_norm)
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        """Count nothing: the Trainer's estimate walks over all parameters at every step and nobody reads it."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, step = self.folder / "checkpoints", self.state.global_step
        with checkpoints.staged(folder, step, self.processes) as stage:
            self._stage = stage
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._stage = None
            if self.processes.is_main:
                atomic_write_json(stage / f"checkpoint-{step}" / checkpoints.RUN_STATE, self.run_state())
        if self.processes.is_main:
            checkpoints.remove_old(folder, self.recipe.output.keep_checkpoints)

    _stage: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage) if self._stage is not None else super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the weights only: the Trainer would add its arguments as a pickle, which nobody may load."""
        if self.processes.is_main:
            self.network.save_pretrained(output_dir or str(self.folder), state_dict=state_dict)

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """Return the weights put together from all processes, None where each has them all; every process calls it."""
        if self.engine != "fsdp":
            return None
        weights: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model)
        return weights

    def restore_finished(self, checkpoint: Path, step: int) -> None:
        """Take over the weights of a checkpoint whose run has used up its budget; nothing is trained."""
        state = load_file(checkpoint / "model.safetensors")
        self.network.load_state_dict(state, strict=False)  # tied tensors are stored once
        self.state.global_step, self.progress.stop_reason = step, self.progress.exhausted()

    def run_state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the Trainer's own files."""
        return {
            "step": self.state.global_step,
            "processes": self.processes.count,
            "sharding": self.recipe.optimisation.sharding,
            "tokens": self.progress.tokens,
            "seconds": self.progress.elapsed(),
            "curriculum": self.curriculum.state(),
            "base_fingerprint": base_fingerprint(self.network),
        }

    def _context_loss(self, logits: torch.Tensor, inputs: Batch) -> torch.Tensor:
        """Return the weighted mean loss of the text, or of the facts in it: the own tokens' part of it."""
        text = inputs["context"][:, 1:]
        losses = F.cross_entropy(logits[text].float(), inputs["input_ids"][:, 1:][text], reduction="sum")
        mean = losses / inputs["context_tokens"]
        return (self.recipe.data.context_weight or 0.0) * mean / self.args.gradient_accumulation_steps

    def _diverged(self, what: str, value: float) -> Exception:
        error = RunError(
            f"the {what} became {value} at step {self.state.global_step + 1}; the last checkpoint is intact: lower "
            "optimisation.learning_rate or max_grad_norm and start again, or resume from it"
        )
        return self.processes.stop_all(error)


def questions_right(right_tokens: torch.Tensor, question_ids: torch.Tensor) -> list[bool]:
    """Return for every question whether all its answer tokens are right.

    Args:
        right_tokens: bool [N], one per answer token.
        question_ids: int [N], the question of each, numbered from 0 without gaps.
    """
    if not len(question_ids):
        return []
    wrong = torch.zeros(int(question_ids[-1]) + 1, dtype=torch.long, device=right_tokens.device)
    wrong.index_add_(0, question_ids, (~right_tokens).long())
    return [count == 0 for count in wrong.tolist()]


def recompute_activations(model: PreTrainedModel) -> None:
    """Have a model recompute its activations in the backward pass instead of keeping them.

    Raises:
        ConfigError: the model does not support it.
    """
    # The library renames the method; older versions know the second name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable()
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"optimisation.gradient_checkpointing: {reason}; set it to false") from None


def training_arguments(recipe: Recipe, folder: Path, model: PreTrainedModel) -> TrainingArguments:
    """Return the Trainer's arguments for a recipe; steps are unbounded because tokens and minutes end the run."""
    options = recipe.optimisation
    sharded = options.sharding == "fsdp"
    layers = decoder_layer_classes(model)
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
        average_tokens_across_devices=False,  # `compute_loss` has the numbers of the whole batch
        # A memory's gates are not used by contexts shorter than a segment; one process gives them no gradient either.
        # Nor does a router give any to a memory that no token of a process goes to.
        ddp_find_unused_parameters=recipe.model.kind != "plain",
        ddp_broadcast_buffers=False,  # buffers are constants
        torch_compile=options.compile and not hasattr(model, "compile_for_training"),
        fsdp=cast(Any, sharded),  # declared as text for the sake of old command lines
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": layers} if sharded else None,
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
