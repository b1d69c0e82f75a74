"""Published implementations of the same recurrences in PyTorch, for comparison: those of transformers.

Each is called in its own conventions on the same numbers, and its output is compared with ours before it is timed.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

Inputs = dict[str, Any]
Compute = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True)
class Peer:
    """An implementation of a rule elsewhere.

    Attributes:
        module: where it is.
        function: its name there.
        arguments: (our inputs) -> its inputs, made before the clock starts.
        options: further keywords.
    """

    module: str
    function: str
    arguments: Callable[[Inputs], Inputs]
    options: Mapping[str, Any]

    def load(self) -> Compute | None:
        """Import the function in PyTorch, never the kernel that transformers may put in its place; None = not there."""
        try:
            function = getattr(importlib.import_module(self.module), self.function)
        except (ImportError, AttributeError):
            return None
        return partial(inspect.unwrap(function), **self.options)


def _delta_rule(inputs: Inputs) -> Inputs:
    """Undo its scaling of the queries by K^-1/2."""
    return {
        "query": inputs["q"] * inputs["q"].shape[-1] ** 0.5,
        "key": inputs["k"],
        "value": inputs["v"],
        "g": inputs["g"],
        "beta": inputs["beta"],
    }


def _mamba2(inputs: Inputs) -> Inputs:
    """Write the decay as dt = -g with A = -1; it multiplies the values by dt itself."""
    step = -inputs["g"]
    return {
        "hidden_states": inputs["v"] / step[..., None].to(inputs["v"].dtype),
        "dt": step,
        "A": step.new_full((step.shape[2],), -1.0),
        "B": inputs["k"],
        "C": inputs["q"],
    }


PEERS: Mapping[str, Peer] = {
    "gated_delta_net": Peer(
        "transformers.models.qwen3_next.modeling_qwen3_next",
        "torch_chunk_gated_delta_rule",
        _delta_rule,
        {"output_final_state": True},
    ),
    "kda": Peer(
        "transformers.models.kimi_linear.modeling_kimi_linear",
        "chunk_kimi_delta_attention",
        _delta_rule,
        {"output_final_state": True},
    ),
    "mamba2": Peer(
        "transformers.models.mamba2.modeling_mamba2",
        "mamba2_chunk_scan",
        _mamba2,
        {"chunk_size": 256, "return_final_states": True},
    ),
}
"""By rule; the chunk sizes are those of the models."""
