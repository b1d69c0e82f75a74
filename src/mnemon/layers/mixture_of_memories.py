"""Several memories of one update rule, of which a router picks a few for every token.

    o_t = sum over m in I_t of g_t^m (q_t^m M_t^m)  (+ q_t M_t^shared);   y_t = (norm(o_t) * gate(x_t)) W_o

A memory that a token does not go to is neither written nor decayed by it: its clock, its convolution and its rotation
count only its own tokens. Keys, values and gates are projected by each memory's own weights; queries, the convolution's
weights and what sets the speed of forgetting are common to all.

Source: MoM: Linear Sequence Modeling with Mixture-of-Memories, arXiv:2502.13685 (docs/mom.md names every departure).
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mnemon.errors import ConfigError, StateError
from mnemon.layers.memory_layer import NORM_EPS, LinearMemoryState, MemoryInputs, MemoryLayer
from mnemon.layers.projection import GroupedProjection, Groups, InitialValues, Matrices, one_group
from mnemon.layers.routing import Router, Routing, Share, mix, pack, shares, step
from mnemon.ops.masking import take, valid_first

DISPATCHES = ("auto", "packed", "in_turn", "dense")


class MixtureState(NamedTuple):
    """What a layer knows of the tokens so far; a value, never changed in place.

    Attributes:
        memories: tails, states and tokens taken of all memories, the shared one last: every tensor is [B, M, ...].
        tokens: tokens read so far, [B] int64.
    """

    memories: LinearMemoryState
    tokens: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in order."""
        return (*self.memories.tensors, self.tokens)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "MixtureState":
        """Return a state of the same kind made of other tensors, in the order of `tensors`."""
        *memories, tokens = tensors
        return MixtureState(self.memories.with_tensors(memories), tokens)


class MixtureOfMemories(MemoryLayer):
    """A router over several memories of one update rule.

    Args:
        hidden_size: model width D.
        rule: name of a registered rule (`mnemon.ops.list_rules`).
        num_heads: heads H.
        head_dim: key width K per head.
        num_memories: routed memories E.
        top_k: memories per token.
        shared_memory: whether one more memory gets every token; its answer is added with weight 1.
        single_kv_proj: one projection to keys, values and gates for all memories, instead of one for each.
        capacity: largest share of a sequence's tokens that a routed memory takes (`mnemon.layers.routing.has_room`);
            None = all that come.
        dispatch: "packed" (the tokens of all memories laid end to end and read at once), "in_turn" (one memory after
            the other, each with its own tokens), "dense" (every memory is given all tokens and leaves out those that
            are not its own: the definition), or "auto": in turn on a CPU, whose caches are small, else packed.
        value_dim: value width V per head; None = `head_dim`.
        layer_index: number of this layer, from 0.
        num_layers: layers of the model.
        conv_size: tokens the short convolution sees, 0 = no convolution.
        num_slots: slots J of a rule with slots; None = `head_dim`.
        form: form of the rule that runs, "auto" for the fastest.
        norm_eps: what the norm of the output adds to the mean square before its root, above 0.
        output_gate: False leaves out the output gate of a layer that is published with one.
        initial_output: what the output projection's initial weights are multiplied by; 0 = a fresh layer adds nothing
            to the residual stream.
        settings: hyper-parameters of the rule.

    Raises:
        ConfigError: if a size is impossible, or the rule, the form, the dispatch or a setting is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        rule: str,
        num_heads: int,
        head_dim: int,
        num_memories: int = 4,
        top_k: int = 2,
        shared_memory: bool = True,
        single_kv_proj: bool = False,
        capacity: float | None = None,
        dispatch: str = "auto",
        value_dim: int | None = None,
        layer_index: int = 0,
        num_layers: int = 1,
        conv_size: int = 4,
        num_slots: int | None = None,
        form: str = "auto",
        norm_eps: float = NORM_EPS,
        output_gate: bool = True,
        initial_output: float = 1.0,
        **settings: int | float | str,
    ) -> None:
        check_routing(num_memories, top_k, capacity, dispatch)
        total = num_memories + int(shared_memory)
        super().__init__(
            hidden_size,
            rule,
            num_heads,
            head_dim,
            value_dim,
            layer_index,
            num_layers,
            conv_size,
            num_slots,
            form,
            None if single_kv_proj else total,
            norm_eps,
            output_gate,
            initial_output,
            **settings,
        )
        self.num_memories, self.shared_memory, self.total = num_memories, shared_memory, total
        self.single_kv_proj = single_kv_proj
        self.dispatch = dispatch
        self.router = Router(hidden_size, num_memories, top_k, capacity)
        with torch.no_grad():
            for parameter, value in self.router.initial_values():
                parameter.copy_(value)

    def initial_values(self) -> InitialValues:
        """Return every parameter with its initial value; a model's `_init_weights` copies them in."""
        router = self.router.initial_values() if hasattr(self, "router") else []
        return [*super().initial_values(), *router]

    def num_idle_parameters(self) -> int:
        """Return how many parameters take no part in the computation for one token: those of memories not chosen."""
        idle = self.num_memories - self.router.top_k
        own = [module for module in self.modules() if isinstance(module, GroupedProjection)]
        return sum(idle * parameter[0].numel() for module in own for parameter in module.own_parameters())

    def initial_mixture(self, batch_size: int, like: Tensor) -> MixtureState:
        """Return the state before the first token.

        Args:
            batch_size: sequences B.
            like: a tensor of the device and dtype of the hidden states.
        """
        rows = self.initial_state(self.total * batch_size, like)
        return MixtureState(self._by_row(rows), torch.zeros(batch_size, dtype=torch.int64, device=like.device))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, state: MixtureState | None = None
    ) -> tuple[Tensor, MixtureState, Routing]:
        """Read tokens into their memories and these memories for every token.

        Args:
            x: hidden states, [B, T, D].
            mask: True where a token counts, [B, T], in any pattern; None = everywhere. Other tokens leave the state
                exactly as it was, and the output there means nothing.
            state: state after the tokens before; None = there were none.

        Returns:
            The output [B, T, D] in the dtype of x, the state after the last token, and what the router chose.

        Raises:
            ShapeError: if x or mask have the wrong shape.
            StateError: if the state is another layer's or another batch's.
        """
        self.check_hidden_states(x, mask)
        if state is None:
            state = self.initial_mixture(x.shape[0], x)
        else:
            self._check_state(state, x)
        routing = self.router(x, mask, state.memories.position[:, : self.num_memories], state.tokens)
        if self.dispatch == "dense":
            mixed, memories = self._dense(x, routing, state.memories)
        elif x.shape[1] == 1:
            mixed, memories = self._one_token(x, routing, state.memories)
        elif self.dispatch == "packed" or (self.dispatch == "auto" and x.device.type != "cpu"):
            mixed, memories = self._packed(x, routing, state.memories)
        else:
            mixed, memories = self._in_turn(x, routing, state.memories)
        read = x.shape[1] if mask is None else mask.sum(dim=1)
        return self.output(mixed, x), MixtureState(memories, state.tokens + read), routing

    def _dense(self, x: Tensor, routing: Routing, before: LinearMemoryState) -> tuple[Tensor, LinearMemoryState]:
        """Let every memory read the tokens that go to it, with the others masked: the definition."""
        batch, tokens = x.shape[:2]
        taken = torch.ones_like(routing.memories, dtype=torch.bool) if routing.taken is None else routing.taken
        every = torch.ones(batch, tokens, dtype=torch.bool, device=x.device)
        mixed: Tensor | None = None
        after = []
        for number in range(self.total):
            chosen = taken & (routing.memories == number)
            own = chosen.any(dim=-1)
            weight = (routing.weights * chosen).sum(dim=-1)
            if number == self.num_memories:
                own = every if routing.counted is None else routing.counted
                weight = torch.ones_like(weight)
            order, back = valid_first(own)
            inputs = self.project(take(x, order), one_group(number, self.total, batch * tokens, x.device))
            one = before.map(partial(torch.select, dim=1, index=number))
            o, one = self.remember(inputs, one, take(own, order))
            o = take(o, back)
            o = torch.where(own[..., None, None], o * weight.to(o.dtype)[..., None, None], 0.0)
            mixed = o if mixed is None else mixed + o
            after.append(one)
        assert mixed is not None
        return mixed, _side_by_side(after)

    def _packed(self, x: Tensor, routing: Routing, before: LinearMemoryState) -> tuple[Tensor, LinearMemoryState]:
        """Read all memories at once, their tokens laid end to end."""
        batch, tokens = x.shape[:2]
        packing = pack(routing, self.shared_memory)
        inputs = self._expand(x, packing.tokens, packing.groups).map(lambda tensor: tensor[None])
        o, after = self.remember(inputs, self._by_memory(before), cu_seqlens=packing.cu_seqlens)
        mixed = mix(o[0], packing.places, packing.weights, packing.taken)
        return mixed.unflatten(0, (batch, tokens)), self._by_row(after)

    def _in_turn(self, x: Tensor, routing: Routing, before: LinearMemoryState) -> tuple[Tensor, LinearMemoryState]:
        """Read one memory after the other, each with the tokens that go to it."""
        batch, tokens = x.shape[:2]
        rows = x.flatten(0, 1)
        queries = self.q_proj(rows)
        common = self.project(rows[None], None, queries[None]) if self.single_kv_proj else None
        mixed = rows.new_zeros(batch * tokens, self.num_heads, self.value_dim)
        after = []
        matrices: Matrices = {}
        for number, share in enumerate(shares(routing, self.shared_memory)):
            place = share.tokens.flatten()
            if common is not None:
                inputs = common.map(partial(_rows, share=share))
            else:
                own, asked = (_rows(z[None], share) for z in (rows, queries))
                inputs = self.project(own, one_group(number, self.total, len(place), x.device, matrices), asked)
            state = before.map(partial(torch.select, dim=1, index=number))
            o, state = self.remember(inputs, state, share.mask, share.cu_seqlens)
            after.append(state)
            if share.weights is not None:
                o = o * share.weights.to(o.dtype)[..., None, None]
            o = o.flatten(0, 1)
            mixed = mixed + o if share.is_everything(len(mixed)) else mixed.index_add_(0, place, o)
        return mixed.unflatten(0, (batch, tokens)), _side_by_side(after)

    def _one_token(self, x: Tensor, routing: Routing, before: LinearMemoryState) -> tuple[Tensor, LinearMemoryState]:
        """Read the memories of one token per row, and touch no other: a batch with a row per memory concerned."""
        layout = step(routing, self.shared_memory)
        inputs = self._expand(x, layout.rows, layout.groups).map(lambda tensor: tensor[:, None])
        table = self._by_memory(before)
        concerned = table.map(lambda tensor: tensor.index_select(0, layout.states))
        mask = None if layout.taken is None else layout.taken[:, None]
        o, after = self.remember(inputs, concerned, mask)
        mixed = mix(o[:, 0], layout.places, layout.weights)[:, None]
        pairs = zip(table.tensors, after.tensors, strict=True)
        return mixed, self._by_row(table.with_tensors([old.index_copy(0, layout.states, new) for old, new in pairs]))

    def _expand(self, x: Tensor, tokens: Tensor, groups: Groups) -> MemoryInputs:
        """Return what the layer makes of the packed tokens, [N, ...]; queries are projected once per token."""
        rows = x.flatten(0, 1)
        if self.single_kv_proj:
            return self.project(rows[None]).map(lambda tensor: tensor[0].index_select(0, tokens))
        queries = self.q_proj(rows).index_select(0, tokens)[None]
        return self.project(rows.index_select(0, tokens)[None], groups, queries).map(lambda tensor: tensor[0])

    def _by_memory(self, state: LinearMemoryState) -> LinearMemoryState:
        """Return states [B, M, ...] as [M B, ...]."""
        return state.map(lambda tensor: tensor.transpose(0, 1).flatten(0, 1))

    def _by_row(self, state: LinearMemoryState) -> LinearMemoryState:
        """Return states [M B, ...] as [B, M, ...]."""
        return state.map(lambda tensor: tensor.unflatten(0, (self.total, -1)).transpose(0, 1))

    def _check_state(self, state: MixtureState, x: Tensor) -> None:
        """Check what is the layer's own; the rule checks its part."""
        if not isinstance(state, MixtureState):
            raise StateError(f"the state must be a MixtureState, got a {type(state).__name__}")
        tail = (x.shape[0], self.total, self.tail_length, sum(self.widths))
        found = state.memories.tail
        if found.shape != tail or found.dtype != x.dtype:
            raise StateError(
                f"the state's tail must be {x.dtype} {list(tail)} for these inputs, got {found.dtype} "
                f"{list(found.shape)}; it belongs to another layer, batch or precision"
            )


def _rows(tensor: Tensor, share: Share) -> Tensor:
    """Return what a tensor [1, N, ...] holds for a memory's tokens [B, L]; without a copy if these are all."""
    rows = tensor[0]
    chosen = rows if share.is_everything(len(rows)) else rows.index_select(0, share.tokens.flatten())
    return chosen.unflatten(0, share.tokens.shape)


def _side_by_side(states: list[LinearMemoryState]) -> LinearMemoryState:
    """Return the states [B, ...] of all memories as one [B, M, ...]."""
    return states[0].with_tensors(
        [torch.stack(each, dim=1) for each in zip(*(state.tensors for state in states), strict=True)]
    )


def check_routing(num_memories: int, top_k: int, capacity: float | None, dispatch: str = "auto") -> None:
    """Check the sizes of a router.

    Raises:
        ConfigError: naming the impossible one.
    """
    for name, size in (("num_memories", num_memories), ("top_k", top_k)):
        if size < 1:
            raise ConfigError(f"{name} must be at least 1, got {size}")
    if top_k > num_memories:
        raise ConfigError(f"top_k={top_k} exceeds num_memories={num_memories}; lower top_k or add memories")
    if capacity is not None and capacity <= 0:
        raise ConfigError(f"capacity must be above 0 (1 or null = no limit), got {capacity}")
    if dispatch not in DISPATCHES:
        raise ConfigError(f"dispatch must be one of {', '.join(DISPATCHES)}, got {dispatch!r}")
