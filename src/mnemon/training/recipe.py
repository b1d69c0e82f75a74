"""The typed recipe of a training run: model, tokenizer, data, optimisation, evaluation and output.

A recipe is everything that decides a run's result; it is read from YAML by `mnemon.training.recipe_io` and written,
resolved, beside the result. This module only says which keys exist, their units, defaults and bounds. Keys of the
Hugging Face base configuration (`model.base`) are checked when the model is built (`mnemon.training.build`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mnemon.training.data_sections import BabilongData, DataSection, MqarData, MqarSlice, TextData, kind_of
from mnemon.training.section import Length, Positive, Section, Share, check_tasks


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
    skip_gate: bool = False
    write_cost: Annotated[float, Field(ge=0)] = 0.0
    coupled_gates: bool = False
    write_query: Literal["both", "bank", "key"] = "both"
    write_conv: Annotated[int, Field(ge=0)] = 0
    initial_output: Annotated[float, Field(ge=0)] | None = None
    bptt_segments: Positive | None = None
    blocks_path: str | None = None
    attention_name: str | None = None


class MoMOptions(Section):
    """Options of linear memories, handed to `MoMConfig` unchanged; the same names and meanings."""

    rule: str = "gated_delta_net"
    num_memories: Positive = 4
    top_k: Positive = 2
    shared_memory: bool = True
    num_heads: Positive = 4
    head_dim: Positive = 64
    value_dim: Positive | None = None
    layer_types: list[str] | None = None
    sliding_window: Positive | None = None
    conv_size: Annotated[int, Field(ge=0)] = 4
    num_slots: Positive | None = None
    single_kv_proj: bool = False
    capacity: Annotated[float, Field(gt=0)] | None = None
    balance_loss: Literal["global", "layer"] = "global"
    balance_weight: Annotated[float, Field(ge=0)] = 0.01
    rule_options: dict[str, int | float | str] | None = None
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    output_gate: bool = True
    initial_output: Annotated[float, Field(ge=0)] | None = None
    form: str = "auto"
    dispatch: str = "auto"
    blocks_path: str | None = None
    attention_name: str | None = None


class RMTOptions(Section):
    """Options of a memory that segments hand on, handed to `RMTConfig` unchanged; the same names and meanings."""

    memory: Literal["tokens", "associative"] = "tokens"
    num_memory_tokens: Positive = 16
    segment_length: Positive = 512
    key_dim: Positive | None = None
    feature_order: Positive | None = None
    gate_stretch: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bptt_segments: Positive | None = None
    blocks_path: str | None = None
    attention_name: str | None = None


class ModelSection(Section):
    """The network: `base` builds a new decoder, `from_base` takes a pretrained one.

    Attributes:
        kind: `lm2` grafts memories onto the base, `mom` puts linear memories in the place of its attention, `rmt` reads
            segment by segment with memory tokens, `plain` is the base alone.
        base: `model_type` (a Hugging Face name such as `lfm2` or `llama`) and keys of that configuration; vocabulary
            size and special token ids come from the tokenizer.
        from_base: folder, shipped checkpoint or hub name of a pretrained decoder; the tokenizer is its own unless
            `tokenizer.path` names another.
        freeze_base: train the memory alone; the result is saved as an adapter. Only with `kind: lm2` and `from_base`.
        lm2: memory options, only with `kind: lm2`.
        mom: options of linear memories, with `kind: mom`; with `kind: lm2` the bank is grafted on such a decoder. Only
            with `base`.
        rmt: options of the memory tokens, only with `kind: rmt`.
        init_from: folder of a checkpoint of the same shape whose weights and tokenizer the run starts from; not
            together with `from_base`.
    """

    kind: Literal["lm2", "mom", "rmt", "plain"]
    base: dict[str, Any] | None = None
    from_base: Annotated[str, Field(min_length=1)] | None = None
    freeze_base: bool = False
    lm2: LM2Options | None = None
    mom: MoMOptions | None = None
    rmt: RMTOptions | None = None
    init_from: str | None = None

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        if (self.base is None) == (self.from_base is None):
            raise ValueError("give either base (a new decoder) or from_base (a pretrained one)")
        if self.base is not None and not isinstance(self.base.get("model_type"), str):
            raise ValueError("base needs a model_type, for example model_type: lfm2")
        if self.kind != "lm2" and self.lm2 is not None:
            raise ValueError(f"kind: {self.kind} takes no lm2 options; remove them or set kind: lm2")
        if self.kind in ("plain", "rmt") and self.mom is not None:
            raise ValueError(f"kind: {self.kind} takes no mom options; remove them or set kind: mom")
        if self.kind != "rmt" and self.rmt is not None:
            raise ValueError(f"kind: {self.kind} takes no rmt options; remove them or set kind: rmt")
        if self.kind == "lm2" and self.lm2 is None:
            raise ValueError("kind: lm2 needs an lm2 section with the memory options")
        if self.kind == "mom" and self.mom is None:
            raise ValueError("kind: mom needs a mom section with the options of the memories; {} takes the defaults")
        if self.kind == "rmt" and self.rmt is None:
            raise ValueError("kind: rmt needs an rmt section with the memory options; {} takes the defaults")
        if self.mom is not None and self.base is None:
            raise ValueError("mom options build new memories and need base; a MoM checkpoint is continued by init_from")
        if self.from_base is not None and self.init_from is not None:
            raise ValueError("from_base and init_from both say which weights to start from; give one of them")
        if self.freeze_base:
            self._check_frozen()
        return self

    def _check_frozen(self) -> None:
        if self.from_base is None:
            raise ValueError("freeze_base needs from_base: a new decoder that never trains knows nothing")
        if self.rmt is not None:
            raise ValueError("freeze_base saves the memory alone, which kind: lm2 alone can; set it to false")
        if self.lm2 is None or self.lm2.memory_layers == []:
            raise ValueError("freeze_base leaves nothing to train without a memory; set kind: lm2 with memory layers")


class TokenizerSection(Section):
    """The tokenizer: loaded from `path`, else the model's own, else a byte-level BPE of `vocab_size` tokens.

    It is the model's own where `model.init_from` or `model.from_base` names one; a new one is trained on the training
    text. Data without text (`data.kind: mqar`) has no tokenizer.
    """

    vocab_size: Annotated[int, Field(ge=300)] = 2048
    path: str | None = None
    seed: int = 0


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
    """What is measured at the end on held-out samples; `samples: 0` = nothing.

    Attributes:
        lengths: context lengths; empty = the trained ones, for text the trained one times 1, 2, 4 and 8. All lengths
            of a text are measured on the same tokens, so each must divide the longest.
        tasks: BABILong tasks; empty = the trained ones.
        slices: MQAR lengths and pairs; empty = the trained ones.
        samples: samples per cell; for text, windows of the longest length.
        layout: prompt of BABILong questions.
    """

    lengths: list[Length] = Field(default_factory=list)
    tasks: list[str] = Field(default_factory=list)
    slices: list[MqarSlice] = Field(default_factory=list)
    samples: Annotated[int, Field(ge=0)] = 50
    layout: Literal["short"] = "short"

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        check_tasks(tasks)
        return tasks

    def check(self, data: BabilongData | MqarData | TextData) -> None:
        """Refuse keys that say nothing about this kind of data, and values that do not fit it.

        Raises:
            ValueError: naming the key.
        """
        used = {"babilong": ("lengths", "tasks"), "mqar": ("slices",), "text": ("lengths",)}[data.kind]
        for key in ("lengths", "tasks", "slices"):
            if getattr(self, key) and key not in used:
                raise ValueError(f"evaluation.{key} says nothing about data.kind: {data.kind}; remove it")
        if isinstance(data, MqarData):
            for part in self.slices:
                data.settings(part)
        if isinstance(data, TextData):
            for length in self.lengths:
                if length < 2 or max(self.lengths) % length:
                    raise ValueError(
                        f"evaluation.lengths of text must be at least 2 and divide the longest, got {self.lengths}"
                    )


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
    tokenizer: TokenizerSection | None = None
    data: DataSection
    optimisation: OptimisationSection
    evaluation: EvaluationSection = EvaluationSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="before")
    @classmethod
    def _default_tokenizer(cls, raw: Any) -> Any:
        """Fill in the default tokenizer of everything that is text."""
        if isinstance(raw, dict) and "tokenizer" not in raw and kind_of(raw.get("data")) != "mqar":
            return raw | {"tokenizer": {}}
        return raw

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if isinstance(self.data, MqarData):
            if self.tokenizer is not None:
                raise ValueError("data.kind: mqar takes no tokenizer, its vocabulary is data.vocab_size; remove it")
            if self.model.from_base is not None:
                raise ValueError("data.kind: mqar has no text for a pretrained decoder; use model.base, not from_base")
        elif self.tokenizer is None:
            raise ValueError(f"data.kind: {self.data.kind} needs a tokenizer; remove tokenizer: null")
        self.evaluation.check(self.data)
        return self

    @property
    def segment_length(self) -> int | None:
        """Return the tokens per segment of the model; None where it has no segments."""
        options = self.model.lm2 or self.model.rmt
        return None if options is None else options.segment_length

    @property
    def tokenizer_source(self) -> str | None:
        """Return where the tokenizer is loaded from; None = one is trained for the run, or there is none."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.path or self.model.init_from or self.model.from_base
