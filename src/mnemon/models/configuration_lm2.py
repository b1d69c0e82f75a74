"""Configuration of LM2: a Hugging Face decoder configuration plus the memory beside it."""

from typing import Any

from huggingface_hub.dataclasses import strict

from mnemon.errors import ConfigError
from mnemon.models.composite_config import CompositeConfig

FLOWS = ("depth", "layer")
WRITE_QUERIES = ("both", "bank", "key")


@strict
class LM2Config(CompositeConfig):
    """Describe an LM2 model.

    Args:
        base_config: configuration of the decoder the memory is grafted on (an object, or a dict with `model_type`).
        num_slots: slots J of the bank. More slots hold more facts and cost 4JW multiply-adds per token and block.
        slot_dim: slot width W; None = a quarter of the model width. W = model width is the paper's.
        num_memory_heads: heads of the memory's attentions; divides `slot_dim`.
        segment_length: tokens C per segment. Tokens read the bank that stood when their segment began.
        flow: "depth" (the paper: one bank runs through the blocks) or "layer" (every block keeps its own bank).
        memory_layers: indices of the blocks with a memory; None = all blocks with attention; [] = no memory at all,
            the plain decoder (restricted to `attention_span` if one is given).
        attention_span: a token sees itself and the `attention_span - 1` tokens before it; None = every earlier token.
            At least `segment_length`, otherwise tokens would be in neither attention nor bank.
        attention_sinks: first tokens that stay visible beyond the span; a pretrained decoder collapses once its first
            tokens are gone. Their keys are moved along, so that no distance exceeds the span plus the sinks.
        read_top_k: slots a token may read per head; None = all.
        retention: share of the bank that one complete pass over all blocks keeps at initialisation, in (0, 1).
        gate_stretch: how far the input and forget gates are stretched beyond (0, 1) before they are cut off there, so
            that they can close and open completely; 0 = the paper's sigmoid.
        skip_gate: whether every slot has one more gate that closes its input gate and opens its forget gate at once, so
            that a segment without news can leave it as it is; not in the paper.
        write_cost: what the mean rate of writing (the skip gates, before they are stretched) is multiplied by before it
            joins the training loss: above 0, slots learn to pass by segments that bring nothing. Needs `skip_gate`.
        coupled_gates: whether the input gate is 1 - forget gate (a gated recurrent unit), so that a slot takes in as
            much as it forgets; the paper's two gates are independent.
        write_query: what a slot asks the tokens of a segment for: "both" what it holds and its fixed key, "bank" what
            it holds alone (the paper), "key" its key alone.
        write_conv: tokens that a causal convolution over the written keys and values sees; it starts anew with every
            segment, and begins as none. 0 = no convolution (the paper).
        initial_output: what the initial weights of the memory's output projections are multiplied by: 1 = a fresh
            memory adds about ten times what an embedding of a usual size has, 0 = nothing, as `from_base` has it in
            any case; None = the decoder's `initializer_range`, about as much as an embedding has.
        bptt_segments: segments that gradients flow through; None = all.
        blocks_path: where the decoder's blocks are, as a dotted path such as `model.layers`; None = found by structure.
        attention_name: name of the attention inside a block, such as `self_attn`; None = found by structure.
    Raises:
        ConfigError: for an unknown key (the nearest known one is named) or a value out of range.
    """

    model_type = "lm2"

    num_slots: int = 64
    slot_dim: int | None = None
    num_memory_heads: int = 4
    segment_length: int = 256
    flow: str = "depth"
    memory_layers: list[int] | tuple[int, ...] | None = None
    attention_span: int | None = None
    attention_sinks: int = 0
    read_top_k: int | None = None
    retention: float = 0.9
    gate_stretch: float = 0.0
    skip_gate: bool = False
    write_cost: float = 0.0
    coupled_gates: bool = False
    write_query: str = "both"
    write_conv: int = 0
    initial_output: float | int | None = None
    bptt_segments: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.slot_dim is None:
            self.slot_dim = max(self.num_memory_heads, self.hidden_size // 4)
        if self.memory_layers is not None:
            self.memory_layers = sorted(self.memory_layers)
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in ("num_slots", "slot_dim", "num_memory_heads", "segment_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("attention_span", "read_top_k", "bptt_segments"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1 or null, got {getattr(self, name)}")
        assert self.slot_dim is not None  # set by __post_init__
        if self.slot_dim % self.num_memory_heads:
            raise ConfigError(
                f"slot_dim={self.slot_dim} is not divisible by num_memory_heads={self.num_memory_heads}; "
                "choose a slot_dim that is a multiple of the heads"
            )
        if self.num_slots > self.slot_dim == 1:
            raise ConfigError(f"num_slots={self.num_slots} needs slot_dim of at least 2 to tell the slots apart, got 1")
        if self.read_top_k is not None and self.read_top_k > self.num_slots:
            raise ConfigError(f"read_top_k={self.read_top_k} exceeds num_slots={self.num_slots}; lower read_top_k")
        if self.flow not in FLOWS:
            raise ConfigError(f"flow must be one of {', '.join(FLOWS)}, got {self.flow!r}")
        if self.write_cost < 0 or (self.write_cost and not self.skip_gate):
            raise ConfigError(f"write_cost must be 0, or above 0 together with skip_gate, got {self.write_cost}")
        if self.write_query not in WRITE_QUERIES:
            raise ConfigError(f"write_query must be one of {', '.join(WRITE_QUERIES)}, got {self.write_query!r}")
        if self.write_conv < 0 or self.write_conv == 1:
            raise ConfigError(f"write_conv must be 0 (no convolution) or at least 2 tokens, got {self.write_conv}")
        if self.initial_output is not None and self.initial_output < 0:
            raise ConfigError(f"initial_output must be at least 0, or null, got {self.initial_output}")
        if not 0.0 < self.retention < 1.0:
            raise ConfigError(f"retention must lie strictly between 0 and 1, got {self.retention}")
        if not 0.0 <= self.gate_stretch < 1.0:
            raise ConfigError(f"gate_stretch must be at least 0 and below 1, got {self.gate_stretch}")
        if self.attention_span is not None and self.attention_span < self.segment_length:
            raise ConfigError(
                f"attention_span={self.attention_span} is below segment_length={self.segment_length}; some tokens "
                "would be in neither attention nor bank: raise the span or shorten the segments"
            )
        if self.attention_sinks < 0:
            raise ConfigError(f"attention_sinks must be at least 0, got {self.attention_sinks}")
        if self.attention_sinks and self.attention_span is None:
            raise ConfigError(
                f"attention_sinks={self.attention_sinks} needs an attention_span; without one every token stays visible"
            )
        layers = self.memory_layers or ()
        for index in layers:
            if not 0 <= index < self.num_hidden_layers:
                raise ConfigError(
                    f"memory_layers names block {index}, but the base has blocks 0 to {self.num_hidden_layers - 1}"
                )
        if len(set(layers)) != len(layers):
            raise ConfigError(f"memory_layers names a block twice: {list(layers)}")
