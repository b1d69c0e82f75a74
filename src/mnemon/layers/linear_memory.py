"""One memory of one update rule as a layer: from hidden states to hidden states, with the state as a value.

    q, k, v = activation(convolution(x W_q, x W_k, x W_v));   gates from x;   o = rule(q, k, v, gates)
    y = (norm(o) * gate(x)) W_o

Source: the layers published with the rules (docs/linear-memory-layer.md names them and every departure).
"""

from torch import Tensor

from mnemon.errors import ShapeError, StateError
from mnemon.layers.memory_layer import LinearMemoryState, MemoryLayer
from mnemon.ops.masking import take, valid_first

__all__ = ["LinearMemory", "LinearMemoryState"]


class LinearMemory(MemoryLayer):
    """A memory of one update rule.

    Args:
        hidden_size: model width D.
        rule: name of a registered rule (`mnemon.ops.list_rules`).
        num_heads: heads H.
        head_dim: key width K per head.
        value_dim: value width V per head; None = `head_dim`.
        layer_index: number of this layer, from 0; Lightning's decay and HGRN2's bound depend on the depth.
        num_layers: layers of the model.
        conv_size: tokens the short convolution sees, 0 = no convolution.
        num_slots: slots J of a rule with slots; None = `head_dim`.
        form: form of the rule that runs, "auto" for the fastest.
        norm_eps: what the norm of the output adds to the mean square before its root, above 0.
        output_gate: False leaves out the output gate of a layer that is published with one.
        settings: hyper-parameters of the rule.

    Raises:
        ConfigError: if a size is impossible, or the rule, the form or a setting is unknown.
    """

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        state: LinearMemoryState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, LinearMemoryState]:
        """Read tokens into the memory and the memory for every token.

        Args:
            x: hidden states, [B, T, D].
            mask: True where a token counts, [B, T], in any pattern; None = everywhere. Other tokens leave the state
                exactly as it was, and the output there means nothing.
            state: state after the tokens before; None = there were none.
            cu_seqlens: boundaries of packed sequences, [N + 1] integers from 0 to T; needs B = 1, the state has N rows.

        Returns:
            The output [B, T, D] in the dtype of x, and the state after the last token.

        Raises:
            ShapeError: if x, mask or cu_seqlens have the wrong shape.
            StateError: if the state is another layer's or another batch's.
        """
        sequences = self._check_inputs(x, mask, cu_seqlens)
        if state is None:
            state = self.initial_state(sequences, x)
        else:
            self._check_state(state, sequences, x)
        if mask is None:
            o, state = self.remember(self.project(x), state, None, cu_seqlens)
            return self.output(o, x), state
        # Tokens that count move to the front of their row: then neither the convolution nor a position sees the others.
        order, back = valid_first(mask)
        x = take(x, order)
        o, state = self.remember(self.project(x), state, take(mask, order))
        return take(self.output(o, x), back), state

    def _check_inputs(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> int:
        """Check the inputs and return the number of sequences."""
        self.check_hidden_states(x, mask)
        if cu_seqlens is None:
            return x.shape[0]
        if mask is not None:
            raise ShapeError("mask and cu_seqlens exclude each other; pack only the tokens that count")
        if x.shape[0] != 1 or cu_seqlens.ndim != 1:
            raise ShapeError(f"cu_seqlens [N + 1] needs a batch of 1, got {list(cu_seqlens.shape)} and {x.shape[0]}")
        return len(cu_seqlens) - 1

    def _check_state(self, state: LinearMemoryState, sequences: int, x: Tensor) -> None:
        """Check what is the layer's own; the rule checks its part."""
        if not isinstance(state, LinearMemoryState):
            raise StateError(f"the state must be a LinearMemoryState, got a {type(state).__name__}")
        tail = (sequences, self.tail_length, sum(self.widths))
        if state.tail.shape != tail or state.tail.dtype != x.dtype:
            raise StateError(
                f"the state's tail must be {x.dtype} {list(tail)} for these inputs, got {state.tail.dtype} "
                f"{list(state.tail.shape)}; it belongs to another layer, batch or precision"
            )
