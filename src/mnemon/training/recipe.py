"""The typed recipe of a training run: model, tokenizer, data, optimisation, evaluation and output.

A recipe is everything that decides a run's result; it is read from YAML by `mnemon.training.recipe_io` and written,
resolved, beside the result. This module only says which keys exist, their units, defaults and bounds. Keys of the
Hugging Face base configuration (`model.base`) are checked when the model is built (`mnemon.training.build`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from mnemon.data.babi import GENERATED_TASKS
from mnemon.data.babilong import parse_length


def _to_tokens(value: Any) -> Any:
    """Return a context length in tokens from an integer or a name such as `4k`."""
    return parse_length(value) if isinstance(value, str) else value


def _check_tasks(tasks: Iterable[str]) -> None:
    for task in tasks:
        if task not in GENERATED_TASKS:
            raise ValueError(f"unknown task {task!r}; known: {', '.join(GENERATED_TASKS)}")


Length = Annotated[int, BeforeValidator(_to_tokens), Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all recipe sections: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class LM2Options(Section):
    """Memory options, handed to `LM2Config` unchanged; the same names and meanings."""

    num_slots: Positive = 64
    slot_dim: Positive | None = None
    num_memory_heads: Positive = 4
    segment_length: Positive = 256
    flow: Literal["depth", "layer"] = "depth"
    memory_layers: list[int] | None = None
    attention_span: Positive | None = None
    attention_sinks: Annotated[int, Field(ge=0)] = 0
    read_top_k: Positive | None = None
    retention: Annotated[float, Field(gt=0, lt=1)] = 0.9
    gate_stretch: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bptt_segments: Positive | None = None
    blocks_path: str | None = None
    attention_name: str | None = None


class ModelSection(Section):
    """The network: `base` builds a new decoder, `from_base` takes a pretrained one.

    Attributes:
        kind: `lm2` grafts memories onto the base, `plain` is the base alone.
        base: `model_type` (a Hugging Face name such as `lfm2` or `llama`) and keys of that configuration; vocabulary
            size and special token ids come from the tokenizer.
        from_base: folder, shipped checkpoint or hub name of a pretrained decoder; the tokenizer is its own unless
            `tokenizer.path` names another.
        freeze_base: train the memory alone; the result is saved as an adapter. Only with `kind: lm2` and `from_base`.
        lm2: memory options, only with `kind: lm2`.
        init_from: folder of a checkpoint of the same shape whose weights and tokenizer the run starts from; not
            together with `from_base`.
    """

    kind: Literal["lm2", "plain"]
    base: dict[str, Any] | None = None
    from_base: Annotated[str, Field(min_length=1)] | None = None
    freeze_base: bool = False
    lm2: LM2Options | None = None
    init_from: str | None = None

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        if (self.base is None) == (self.from_base is None):
            raise ValueError("give either base (a new decoder) or from_base (a pretrained one)")
        if self.base is not None and not isinstance(self.base.get("model_type"), str):
            raise ValueError("base needs a model_type, for example model_type: lfm2")
        if self.kind == "plain" and self.lm2 is not None:
            raise ValueError("kind: plain takes no lm2 options; remove them or set kind: lm2")
        if self.kind == "lm2" and self.lm2 is None:
            raise ValueError("kind: lm2 needs an lm2 section with the memory options")
        if self.from_base is not None and self.init_from is not None:
            raise ValueError("from_base and init_from both say which weights to start from; give one of them")
        if self.freeze_base:
            self._check_frozen()
        return self

    def _check_frozen(self) -> None:
        if self.from_base is None:
            raise ValueError("freeze_base needs from_base: a new decoder that never trains knows nothing")
        if self.lm2 is None or self.lm2.memory_layers == []:
            raise ValueError("freeze_base leaves nothing to train without a memory; set kind: lm2 with memory layers")


class TokenizerSection(Section):
    """The tokenizer: loaded from `path`, else the model's own, else a byte-level BPE of `vocab_size` tokens.

    It is the model's own where `model.init_from` or `model.from_base` names one; a new one is trained on the training
    text.
    """

    vocab_size: Annotated[int, Field(ge=300)] = 2048
    path: str | None = None
    seed: int = 0


class CurriculumSection(Section):
    """When the context grows.

    Attributes:
        threshold: share of right answers at which a length counts as learned.
        window: most recent questions per task over which that share is taken.
        aggregate: `mean` over the tasks, or `min`: every task must reach the threshold.
        share_shorter: share of batches drawn from lengths already passed.
        start_stage: index of the stage to begin with (earlier ones stay mixed in); `fact_limits` come first.
        min_stage_tokens: a stage lasts at least this many tokens.
        max_stage_tokens: advance after this many tokens even below the threshold (recorded); None = never.
        stop_when_learned: end the run when the last length is learned.
    """

    threshold: Share = 0.9
    window: Positive = 300
    aggregate: Literal["mean", "min"] = "mean"
    share_shorter: Annotated[float, Field(ge=0, lt=1)] = 0.3
    start_stage: Annotated[int, Field(ge=0)] = 0
    min_stage_tokens: Annotated[int, Field(ge=0)] = 0
    max_stage_tokens: Positive | None = None
    stop_when_learned: bool = False


class Stage(NamedTuple):
    """One stage of the curriculum: context length in tokens, most facts in it (None = any number), tasks (() = all)."""

    length: int
    max_facts: int | None = None
    tasks: tuple[str, ...] = ()


class DataSection(Section):
    """BABILong training samples, generated while the run goes.

    Attributes:
        tasks: task -> weight of its share of the samples (a list means equal weights).
        background: `stdlib`, a folder of text files, or `hf:NAME`.
        lengths: context lengths in tokens, growing; 0 = facts only. One stage of the curriculum each.
        fact_limits: stages before these, with the first length and at most so many facts, growing: a small model
            finds out which fact answers a question much sooner when there are two than when there are ten.
        first_tasks: tasks of the `fact_limits` stages; empty = all of them.
        questions_per_story: most questions asked at the end of one context.
        loss_on: `answers`, or `all` (adds the mean loss of every other token times `context_loss_weight`).
        workers: processes that make batches; 0 = one background thread, enough for models that run on a CPU. With
            processes, a script that calls `train` needs the usual `if __name__ == "__main__":` guard.
    """

    tasks: dict[str, Annotated[float, Field(gt=0)]]
    background: str = "stdlib"
    lengths: Annotated[list[Length], Field(min_length=1)]
    fact_limits: list[Positive] = []
    first_tasks: list[str] = []
    curriculum: CurriculumSection = CurriculumSection()
    questions_per_story: Positive = 4
    loss_on: Literal["answers", "all"] = "answers"
    context_loss_weight: Annotated[float, Field(ge=0)] = 0.1
    workers: Annotated[int, Field(ge=0)] = 0

    @field_validator("tasks", mode="before")
    @classmethod
    def _weigh(cls, tasks: Any) -> Any:
        return dict.fromkeys(tasks, 1.0) if isinstance(tasks, list) else tasks

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: dict[str, float]) -> dict[str, float]:
        _check_tasks(tasks)
        return tasks

    @property
    def stages(self) -> list[Stage]:
        """Return the stages of the curriculum in order."""
        few = [Stage(self.lengths[0], limit, tuple(self.first_tasks)) for limit in self.fact_limits]
        return few + [Stage(length) for length in self.lengths]

    @model_validator(mode="after")
    def _growing(self) -> DataSection:
        if any(later <= earlier for earlier, later in zip(self.lengths, self.lengths[1:], strict=False)):
            raise ValueError(f"lengths must grow from stage to stage, got {self.lengths}")
        if any(later <= earlier for earlier, later in zip(self.fact_limits, self.fact_limits[1:], strict=False)):
            raise ValueError(f"fact_limits must grow from stage to stage, got {self.fact_limits}")
        for task in self.first_tasks:
            if task not in self.tasks:
                raise ValueError(f"first_tasks names {task}, which is not among the tasks {', '.join(self.tasks)}")
        if self.curriculum.start_stage >= len(self.stages):
            raise ValueError(
                f"curriculum.start_stage must be below the number of stages ({len(self.stages)}), "
                f"got {self.curriculum.start_stage}"
            )
        return self


class OptimisationSection(Section):
    """AdamW and its budget.

    Attributes:
        schedule: shape of the learning rate after `warmup_steps`: it falls to `floor` times the peak at the end of
            `max_tokens` (of `max_minutes` where no token budget is given, which then depends on the machine's speed).
            `trapezoid` holds the peak for 70 % of the budget and falls linearly over the rest.
        batch_tokens: tokens of one optimisation step, padding included; rows = batch_tokens // length. Several
            processes share these rows, so that the recipe means the same for any number of them.
        min_rows: a batch of long contexts has at least this many rows, even beyond `batch_tokens`.
        max_tokens, max_minutes: the run ends at whichever comes first.
        gradient_accumulation: each step adds up the gradients of so many smaller batches, which needs less memory.
        dtype: arithmetic of the forward pass; weights and optimiser stay float32.
        sharding: `none` keeps the whole network in every process (DDP where there are several); `fsdp` spreads
            weights, gradients and optimiser over the GPUs of several processes (FSDP2).
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        compile: compile the network with torch.compile before training.
        threads: CPU threads of torch; results repeat bit for bit only for the same number. None = torch's default.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    schedule: Literal["constant", "cosine", "linear", "trapezoid"] = "cosine"
    floor: Share = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    batch_tokens: Positive = 8192
    min_rows: Positive = 1
    max_tokens: Positive | None = None
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    gradient_accumulation: Positive = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Positive | None = None
    sharding: Literal["none", "fsdp"] = "none"
    gradient_checkpointing: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def _bounded(self) -> OptimisationSection:
        if self.max_tokens is None and self.max_minutes is None:
            raise ValueError("give max_tokens, max_minutes or both, else the run has no end")
        return self


class EvaluationSection(Section):
    """Accuracy measured at the end on held-out samples; empty `lengths` = the trained lengths, `samples: 0` = none."""

    lengths: list[Length] = []
    tasks: list[str] = []
    samples: Annotated[int, Field(ge=0)] = 50
    layout: Literal["short"] = "short"

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        _check_tasks(tasks)
        return tasks


class OutputSection(Section):
    """Where the run is written (None = `runs/<name>`), how often it logs and saves, how many checkpoints it keeps."""

    folder: str | None = None
    log_every_steps: Positive = 25
    save_every_steps: Positive = 500
    keep_checkpoints: Positive = 2
    tensorboard: bool = True


class Recipe(Section):
    """A whole training run. Same recipe, machine and thread count: same weights, bit for bit."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    optimisation: OptimisationSection
    evaluation: EvaluationSection = EvaluationSection()
    output: OutputSection = OutputSection()

    @property
    def tokenizer_source(self) -> str | None:
        """Return where the tokenizer is loaded from; None = one is trained for the run."""
        return self.tokenizer.path or self.model.init_from or self.model.from_base
