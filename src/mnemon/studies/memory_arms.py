"""The arms of a comparison of memories: one, a mixture, one as large as the mixture; and changes of the mixture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mnemon.ops import get_rule
from mnemon.studies.study import Variant
from mnemon.training.recipe import MoMOptions

ATTENTION = "attention"
ARMS = {"single": "one memory", "mom": "mixture", "enlarged": "one memory as large as the mixture"}
_ONE = ("model.mom.num_memories=1", "model.mom.top_k=1", "model.mom.shared_memory=false")
_LARGEST = 64
"""Times the width at which the search for an enlarged memory ends."""


def attention() -> Variant:
    """Return the base decoder with its softmax attention."""
    return Variant(ATTENTION, ATTENTION, ATTENTION, ("model.kind=plain", "model.mom=null"))


def attention_after_convolution(base: Mapping[str, Any]) -> Variant:
    """Return a block with a short convolution and one with attention, of the base decoder's width.

    Memories have a short convolution of their own, so that a token knows the one before it. Two blocks of attention
    have to learn that first, and learn no recall within the tokens of the study.

    Args:
        base: the decoder's section of the recipe.
    """
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    decoder = {
        "model_type": "lfm2",
        **{name: base[name] for name in sizes},
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.02,
    }
    changes = ("model.kind=plain", "model.mom=null", f"model.base={json.dumps(decoder)}")
    return Variant(ATTENTION, ATTENTION, ATTENTION, changes)


def single(rule: str) -> Variant:
    """Return one memory per layer."""
    return Variant(f"{rule}.single", rule, "single", (f"model.mom.rule={rule}", *_ONE))


def mixture(rule: str) -> Variant:
    """Return the mixture that the base recipe describes."""
    return Variant(f"{rule}.mom", rule, "mom", (f"model.mom.rule={rule}",))


def enlarged(rule: str, options: MoMOptions) -> Variant:
    """Return one memory per layer whose state is as large as all states of the mixture together.

    Its values are wider, or its heads where the rule wants keys and values of one width; the nearest size is taken.

    Args:
        rule: name of the rule.
        options: the mixture.
    """
    return Variant(f"{rule}.enlarged", rule, "enlarged", (f"model.mom.rule={rule}", *_ONE, *_wider(rule, options)))


def ablations(rule: str, options: MoMOptions) -> Iterator[Variant]:
    """Go through mixtures that differ from the base recipe's in one respect.

    Args:
        rule: name of the rule.
        options: the mixture that they differ from.
    """
    for count in (2, 4, 8):
        if count != options.num_memories and count >= options.top_k:
            yield _changed(rule, f"memories-{count}", f"model.mom.num_memories={count}")
    for count in (1, 2, 4):
        if count != options.top_k and count <= options.num_memories:
            yield _changed(rule, f"top-{count}", f"model.mom.top_k={count}")
    other = "off" if options.shared_memory else "on"
    yield _changed(rule, f"shared-{other}", f"model.mom.shared_memory={str(not options.shared_memory).lower()}")
    yield _changed(rule, "single-kv-proj", "model.mom.single_kv_proj=true")


def _changed(rule: str, arm: str, change: str) -> Variant:
    return Variant(f"{rule}.{arm}", rule, arm, (f"model.mom.rule={rule}", change))


def _wider(rule: str, options: MoMOptions) -> tuple[str, ...]:
    """Return the changes of the width that bring one memory's state nearest to the mixture's."""
    does, width, slots = get_rule(rule), options.head_dim, options.num_slots or options.head_dim
    values = options.value_dim or width

    def size(key_dim: int, value_dim: int) -> int:
        return does.size(does.state_size, key_dim=key_dim, value_dim=value_dim, slots=slots)

    wanted = (options.num_memories + int(options.shared_memory)) * size(width, values)
    if does.equal_widths:
        best = min(range(width, _LARGEST * width, 2), key=lambda w: abs(size(w, w) - wanted))
        return (f"model.mom.head_dim={best}",)
    best = min(range(values, _LARGEST * values), key=lambda v: abs(size(width, v) - wanted))
    return (f"model.mom.value_dim={best}", f"model.mom.num_slots={slots}")
