"""Where the answers of linear memories came from: the exact split of what was read over the tokens before.

The answer of most rules is linear in the values, once queries, keys and gates are what they were:

    o_r = sum over t <= r of A_rt v_t + A_r S_0;   share of token t = <A_rt v_t, o_r> / |o_r|^2

with all heads of a memory as one vector, before the memory's norm and gate and before the weight of the router. The
shares, and that of the state S_0 before the text, add up to 1; what is against the answer counts below 0. The value v_t
is what was written at token t, a mixture of the few tokens that the layer's short convolution sees.

One product of the cotangent o_r / |o_r|^2 with the Jacobian of the rule's chunkwise form yields all A_rt^T o_r: nothing
is computed once per token. A text is gone through from its end, stretch by stretch: the cotangent of the state before a
stretch is that of the state after the stretch that comes before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnemon.inspection.emptied import first_state, num_memories
from mnemon.inspection.trace import Contribution, Floats, Integers
from mnemon.layers.memory_layer import LinearMemoryState, MemoryLayer
from mnemon.layers.mixture_of_memories import MixtureOfMemories, MixtureState
from mnemon.layers.projection import one_group
from mnemon.layers.routing import Routing
from mnemon.ops.state import leaves, rebuild, state_dtype


class LayerCall(NamedTuple):
    """What one call of a memory layer was given, with one row.

    Attributes:
        x: hidden states, [1, T, D].
        before: the layer's state before them.
        taken: which memories each token went to, [T, M]; True for all tokens of a shared or single memory.
    """

    x: Tensor
    before: Any
    taken: Tensor

    @classmethod
    def of(cls, layer: MemoryLayer, args: tuple[Any, ...], output: tuple[Any, ...]) -> "LayerCall":
        """Return what a forward hook of a layer saw."""
        x, _, before = (*args, None, None)[:3]
        assert len(x) == 1, "a text is read in one row"
        before = first_state(layer, x) if before is None else before
        return cls(x, before, taken_by(layer, output[2] if len(output) > 2 else None, x.shape[1]))


def taken_by(layer: MemoryLayer, routing: Routing | None, tokens: int) -> Tensor:
    """Return which memories took each of the tokens of one row, [T, M]."""
    taken = torch.ones(tokens, num_memories(layer), dtype=torch.bool)
    if routing is None or not isinstance(layer, MixtureOfMemories):
        return taken
    kept = torch.ones_like(routing.memories[0], dtype=torch.bool) if routing.taken is None else routing.taken[0]
    chosen = torch.zeros_like(routing.probabilities[0], dtype=torch.bool).scatter(1, routing.memories[0], kept)
    taken[:, : layer.num_memories] = chosen.cpu()
    return taken


def joined(calls: Sequence[LayerCall]) -> LayerCall:
    """Return consecutive calls of a layer as one."""
    return LayerCall(
        torch.cat([call.x for call in calls], dim=1), calls[0].before, torch.cat([call.taken for call in calls])
    )


@dataclass
class _Split:
    """The answer of one memory to one reader, as far as it is split.

    Attributes:
        reader: the token that reads.
        memory: the memory that is read.
        shares: of the columns, [N].
        cotangent: of the linear tensors of the state before the tokens that were gone through.
    """

    reader: int
    memory: int
    shares: Floats
    cotangent: list[Tensor] = field(default_factory=list)


class LayerContributions:
    """Splits the answers that a few readers got from the memories of one layer.

    Args:
        layer: the layer; its rule is linear in values.
        readers: tokens that read.
        column_of: column of every token, [T].
    """

    def __init__(self, layer: MemoryLayer, readers: Sequence[int], column_of: Integers) -> None:
        self.layer = layer
        self.readers = sorted(readers)
        self.column_of = column_of
        self.tensors = layer.rule.linear_in_values(**layer.settings)
        self._splits: list[_Split] = []
        self._before: Any = None

    def go_back(self, call: LayerCall, first: int) -> None:
        """Go through a call; calls come from the last to the first.

        Args:
            call: the call.
            first: number of its first token in the text.
        """
        self._before = call.before
        for memory in range(num_memories(self.layer)):
            own = call.taken[:, memory].nonzero()[:, 0]
            tokens = own.numpy() + first
            begun = [split for split in self._splits if split.memory == memory]
            new = [_Split(r, memory, np.zeros(self.column_of[-1] + 1)) for r in self.readers if r in tokens]
            if len(own) and (begun or new):
                self._splits += self._go_back(memory, call, own, tokens, begun, new)

    def results(self) -> Iterator[Contribution]:
        """Yield the answers, split, once the first call has been gone through."""
        for split in sorted(self._splits, key=lambda split: (split.reader, split.memory)):
            state = leaves(_of_memory(self._before, split.memory).memory)
            pairs = zip(split.cotangent, (state[number][0] for number in self.tensors), strict=True)
            before = sum(float((cotangent * held).sum()) for cotangent, held in pairs)
            yield Contribution(split.reader, split.memory, split.shares.astype(np.float32), before)

    def _go_back(
        self, memory: int, call: LayerCall, own: Tensor, tokens: Integers, begun: list[_Split], new: list[_Split]
    ) -> list[_Split]:
        """Go through the tokens of one memory with a row per reader; return the new splits with an answer to split."""
        rule, rows = self.layer.rule, len(begun) + len(new)
        inputs, before = self._rule_inputs(memory, call, own), _of_memory(call.before, memory)
        per_token = {gate.name for gate in rule.gates}
        keywords: dict[str, Any] = {
            name: _rows(value, rows) if name in per_token else value for name, value in inputs.keywords.items()
        }
        q, k = _rows(inputs.q, rows), _rows(inputs.k, rows)
        held = [_rows(tensor, rows) for tensor in leaves(before.memory)]
        with torch.enable_grad():
            values = _rows(inputs.v, rows).requires_grad_()
            start = [held[number].requires_grad_() for number in self.tensors]
            run = rule.recurrent if rule.chunkwise_form is None else rule.chunkwise
            output, after = run(q, k, values, state=rebuild(before.memory, held), **keywords)
            results = [output, *(leaves(after)[number] for number in self.tensors)]
        cotangents = [torch.zeros_like(result) for result in results]
        for row, split in enumerate(begun):
            for cotangent, known in zip(cotangents[1:], split.cotangent, strict=True):
                cotangent[row] = known
        for row, split in enumerate(new, start=len(begun)):
            place = int(np.searchsorted(tokens, split.reader))
            answer = output[row, place].detach()
            cotangents[0][row, place] = answer / answer.square().sum()
        wanted = [(result, cotangent) for result, cotangent in zip(results, cotangents, strict=True) if result.numel()]
        of_values, *of_state = torch.autograd.grad(
            [result for result, _ in wanted],
            [values, *start],
            [cotangent for _, cotangent in wanted],
            materialize_grads=True,
        )
        shares = (of_values * values.detach()).sum(dim=(2, 3)).double().cpu().numpy()
        for row, split in enumerate([*begun, *new]):
            np.add.at(split.shares, self.column_of[tokens], shares[row])
            split.cotangent = [gradient[row] for gradient in of_state]
        return [split for split in new if np.isfinite(split.shares).all()]  # an answer of zero has no parts

    def _rule_inputs(self, memory: int, call: LayerCall, own: Tensor) -> Any:
        """Return what the layer hands its rule for the tokens of one memory, as precise as the state."""
        device = call.x.device
        groups = one_group(memory, num_memories(self.layer), len(own), device)
        projected = self.layer.project(call.x.index_select(1, own.to(device)), groups)
        inputs = self.layer.rule_inputs(projected, _of_memory(call.before, memory))
        dtype = state_dtype(inputs.v.dtype)
        return inputs._replace(q=inputs.q.to(dtype), k=inputs.k.to(dtype), v=inputs.v.to(dtype))


def _of_memory(state: Any, memory: int) -> LinearMemoryState:
    """Return the state of one memory of a layer."""
    if isinstance(state, MixtureState):
        return state.memories.map(lambda tensor: tensor[:, memory])
    assert isinstance(state, LinearMemoryState)
    return state


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """Return a tensor of one row with several equal rows, new in memory and without a history."""
    return tensor.detach().expand(rows, *tensor.shape[1:]).clone(memory_format=torch.contiguous_format)
