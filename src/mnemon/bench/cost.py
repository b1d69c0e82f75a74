"""Multiply-adds of a Llama and of the memory beside it, counted exactly: what a measured ratio is compared with.

Only matrix products are counted (projections, MLP, attention scores and values, language-model head); norms, rotary
positions, gates and softmaxes are a small remainder that no matrix unit runs. A backward pass costs twice the forward
pass in both models, so the ratio of a training step is the ratio of the forward passes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the Llama that everything is measured on.

    Attributes:
        hidden_size: model width D.
        intermediate_size: width of the gated MLP.
        num_layers: decoder blocks.
        num_heads: attention heads; D is divisible by it.
        num_key_value_heads: heads of keys and values (grouped-query attention); divides `num_heads`.
        vocab_size: rows of the language-model head.
    """

    hidden_size: int = 256
    intermediate_size: int = 688
    num_layers: int = 8
    num_heads: int = 8
    num_key_value_heads: int = 8
    vocab_size: int = 2048


@dataclass(frozen=True)
class MemoryShape:
    """Sizes of a memory.

    Attributes:
        name: what tables call it.
        num_slots: slots J.
        slot_dim: slot width W.
        segment_length: tokens C per segment.
        num_heads: memory heads; divides W.
        attention_span: tokens that attention sees; None = every earlier one.
        flow: "depth" (one bank runs through all blocks) or "layer" (every block keeps its own).
    """

    name: str
    num_slots: int
    slot_dim: int
    segment_length: int
    num_heads: int = 4
    attention_span: int | None = None
    flow: str = "depth"


def plain_multiply_adds(shape: ModelShape, tokens: int, span: int | None = None) -> int:
    """Count the forward pass of a Llama over one sequence.

    Args:
        shape: the decoder.
        tokens: tokens T; all logits are computed.
        span: tokens that attention sees; None = every earlier one. A causal kernel is assumed: hidden scores are free.
    """
    width = shape.hidden_size
    key_width = width // shape.num_heads * shape.num_key_value_heads
    projections = 2 * width * width + 2 * width * key_width
    mlp = 3 * width * shape.intermediate_size
    attention = 2 * width * visible_pairs(tokens, span)
    return shape.num_layers * (tokens * (projections + mlp) + attention) + tokens * width * shape.vocab_size


def memory_multiply_adds(shape: ModelShape, memory: MemoryShape, tokens: int) -> int:
    """Count what a memory in every block adds to the forward pass over one sequence.

        T (4DW + W^2 + 4JW) + 3JW^2 (segments begun + segments completed)   per block

    For whole segments that is 4DW + W^2 + 4JW + 6JW^2/C per token and block.
    """
    slots, slot_width = memory.num_slots, memory.slot_dim
    per_token = 4 * shape.hidden_size * slot_width + slot_width**2 + 4 * slots * slot_width
    completed, rest = divmod(tokens, memory.segment_length)
    begun = completed + (rest > 0)
    return shape.num_layers * (tokens * per_token + 3 * slots * slot_width**2 * (begun + completed))


def arithmetic_ratio(shape: ModelShape, memory: MemoryShape, tokens: int) -> float:
    """Divide the multiply-adds of LM2 by those of the plain model."""
    with_memory = plain_multiply_adds(shape, tokens, memory.attention_span) + memory_multiply_adds(
        shape, memory, tokens
    )
    return with_memory / plain_multiply_adds(shape, tokens)


def visible_pairs(tokens: int, span: int | None = None) -> int:
    """Count the (query, key) pairs of causal attention over `tokens`, each query seeing at most `span` keys."""
    reach = tokens if span is None else min(span, tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach
