"""Which tokens go to which memories: the router, how its choices become packed sequences, and whether they balance.

    p_t = softmax(x_t W_g);   (s_t, I_t) = top-k of p_t;   g_t = s_t / sum(s_t)

Source: MoM: Linear Sequence Modeling with Mixture-of-Memories, arXiv:2502.13685, section 3.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mnemon.layers.projection import Groups, InitialValues, Projection
from mnemon.ops.state import state_dtype

_FULL_ENOUGH = 0.65  # least share of tokens that count among those that are computed


class Routing(NamedTuple):
    """The memories of every token.

    Attributes:
        probabilities: share of each memory, [B, T, E], float32 (float64 in float64 models), from the softmax over all.
        memories: the top-k memories of every token, most probable first, [B, T, k].
        weights: their probabilities, adding up to 1, [B, T, k].
        counted: True where a token counts, [B, T]; None = everywhere.
        kept: False where a memory had no room for a token, [B, T, k]; None = everywhere room.
    """

    probabilities: Tensor
    memories: Tensor
    weights: Tensor
    counted: Tensor | None = None
    kept: Tensor | None = None

    @property
    def taken(self) -> Tensor | None:
        """True where a memory takes a token: it counts and there is room, [B, T, k]; None = everywhere."""
        if self.counted is None:
            return self.kept
        counted = self.counted[..., None].expand_as(self.memories)
        return counted if self.kept is None else counted & self.kept

    def statistics(self) -> "RoutingStatistics":
        """Return the sums over the tokens of every sequence."""
        batch, tokens, num_memories = self.probabilities.shape
        counted = self.probabilities.new_ones(batch, tokens)
        if self.counted is not None:
            counted = self.counted.to(counted.dtype)
        empty = self.probabilities.new_zeros(batch, num_memories)
        memories = self.memories.flatten(1)
        return RoutingStatistics(
            choices=empty.scatter_add(1, memories, counted[..., None].expand_as(self.memories).flatten(1)),
            probabilities=torch.einsum("bte,bt->be", self.probabilities, counted),
            weights=empty.scatter_add(1, memories, (self.weights * counted[..., None]).flatten(1)),
            tokens=counted.sum(dim=1),
        )


class RoutingStatistics(NamedTuple):
    """Sums over the tokens of every sequence; those of two stretches of tokens add up to those of both.

    Attributes:
        choices: how often each memory was among the top k, [B, E]; capacity does not matter here.
        probabilities: sums of the probabilities, [B, E].
        weights: sums of the weights, [B, E].
        tokens: tokens that count, [B].
    """

    choices: Tensor
    probabilities: Tensor
    weights: Tensor
    tokens: Tensor

    def plus(self, other: "RoutingStatistics") -> "RoutingStatistics":
        """Return the sums over the tokens of both."""
        return RoutingStatistics(*(one + two for one, two in zip(self, other, strict=True)))


class Router(nn.Module):
    """Choose memories for tokens.

    Args:
        hidden_size: model width D.
        num_memories: memories E.
        top_k: memories k per token.
        capacity: largest share of a sequence's tokens that a memory takes; None = all that come. See `has_room`.
    """

    def __init__(self, hidden_size: int, num_memories: int, top_k: int, capacity: float | None = None) -> None:
        super().__init__()
        self.top_k = top_k
        self.capacity = capacity
        self.logits = Projection(hidden_size, num_memories, bias=False)

    def initial_values(self) -> InitialValues:
        """Return every parameter with its initial value."""
        return self.logits.initial_values()

    def forward(self, x: Tensor, mask: Tensor | None, loads: Tensor, tokens: Tensor) -> Routing:
        """Choose the memories of tokens.

        Args:
            x: hidden states, [B, T, D].
            mask: True where a token counts, [B, T]; None = everywhere.
            loads: tokens each memory has taken before, [B, E].
            tokens: tokens read before, [B].
        """
        probabilities = self.logits.wide(x).softmax(dim=-1)
        chosen, memories = probabilities.topk(self.top_k, dim=-1)
        routing = Routing(probabilities, memories, chosen / chosen.sum(dim=-1, keepdim=True), mask)
        if self.capacity is None or self.capacity >= 1:
            return routing
        return routing._replace(kept=has_room(routing, self.capacity, loads, tokens))


def has_room(routing: Routing, capacity: float, loads: Tensor, tokens: Tensor) -> Tensor:
    """Say which tokens a memory still takes when it may hold no more than a share of the tokens read so far.

    The n-th token of a sequence is refused by a memory that has taken ceil(capacity * n) tokens already. So what
    happens to a token depends on earlier tokens alone, and on nothing about how a text was cut into calls. (The
    released code drops the oldest tokens of a training sequence once later ones have filled a memory.)

    With r_t = 1 for tokens that come to a memory, the number taken is n_t = min(n_{t-1} + r_t, c_t), hence
    n_t = R_t + min(n_0, min_{s <= t} (c_s - R_s)) with R_t the sum of r up to t: no loop over tokens.

    Args:
        routing: choices.
        capacity: the share, above 0.
        loads: tokens each memory has taken before, [B, E].
        tokens: tokens read before, [B].

    Returns:
        True where there is room, [B, T, k].
    """
    batch, length, num_memories = routing.probabilities.shape
    counted = torch.ones(batch, length, dtype=torch.int64, device=tokens.device)
    if routing.counted is not None:
        counted = routing.counted.to(torch.int64)
    number = tokens[:, None] + counted.cumsum(dim=1)
    limit = (capacity * number.double() - 1e-9).ceil().to(torch.int64)[..., None]
    came = torch.zeros(batch, length, num_memories, dtype=torch.int64, device=tokens.device)
    came = came.scatter(2, routing.memories, counted[..., None].expand_as(routing.memories)).cumsum(dim=1)
    before = (limit - came).cummin(dim=1).values.minimum(loads[:, None])
    taken = came + before
    grown = taken.diff(dim=1, prepend=loads[:, None]) > 0
    return grown.gather(2, routing.memories)


class Packing(NamedTuple):
    """Tokens laid end to end as one sequence per (memory, row of the batch), memory by memory.

    A token with k memories stands k times; the shared memory, if any, is the last memory and gets every token.

    Attributes:
        tokens: number of every packed token among the B T tokens of the batch, [N].
        groups: the memories of the packed tokens.
        cu_seqlens: boundaries of the sequences, [M B + 1], sequence m B + b being memory m of row b; empty ones occur.
        places: where the answers to a token stand in the packed stream, [B T, k (+ 1)]; of those that were not taken,
            anywhere.
        weights: what the answers are multiplied by, [B T, k (+ 1)]; 0 where a token was not taken.
        taken: False where a token was not taken, [B T, k (+ 1)]; None = nowhere.
    """

    tokens: Tensor
    groups: Groups
    cu_seqlens: Tensor
    places: Tensor
    weights: Tensor
    taken: Tensor | None


def pack(routing: Routing, shared: bool) -> Packing:
    """Sort tokens by memory and row, keeping their order in time.

    Args:
        routing: choices.
        shared: whether there is a memory after the routed ones that takes every token.
    """
    batch, _, num_memories = routing.probabilities.shape
    memories, weights, taken = _with_shared(routing, shared)
    copies = memories.shape[-1]
    device = memories.device
    total = num_memories + int(shared)
    row = torch.arange(batch, device=device)[:, None, None]
    sequence = (memories * batch + row).flatten()
    if taken is not None:
        sequence = torch.where(taken.flatten(), sequence, total * batch)  # to the end, and then cut off
        weights = torch.where(taken, weights, 0.0)
    order = torch.argsort(sequence, stable=True)
    places = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=device))
    lengths = torch.zeros(total * batch + 1, dtype=torch.int64, device=device)
    lengths = lengths.scatter_add(0, sequence, torch.ones_like(sequence))[:-1]
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    if taken is not None:
        count = int(cu_seqlens[-1])
        order, places = order[:count], places.clamp(max=max(count - 1, 0))
        taken = taken.flatten(0, 1)
    memory = sequence[order] // batch
    on_host = device.type == "cpu"
    counts = lengths.view(total, batch).sum(dim=1).tolist() if on_host else None
    groups = Groups(memory, counts)
    return Packing(order // copies, groups, cu_seqlens, places.view(-1, copies), weights.view(-1, copies), taken)


class Share(NamedTuple):
    """The tokens of one memory, as rows or laid end to end.

    Attributes:
        tokens: their numbers among the B T tokens of the batch, [B, L], each row of the batch in its own, rising; or
            [1, N] laid end to end, where rows of very different lengths would mostly be filling.
        mask: False behind the end of a row, [B, L]; None = everything counts.
        cu_seqlens: where the rows of the batch begin and end, [B + 1], if they are laid end to end.
        weights: what the memory's answers are multiplied by, in the shape of `tokens`; None = 1.
    """

    tokens: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    weights: Tensor | None

    def is_everything(self, tokens: int) -> bool:
        """Say whether these are all of so many tokens of the batch, as they stand there."""
        return self.mask is None and self.tokens.numel() == tokens


def shares(routing: Routing, shared: bool) -> list[Share]:
    """Return the tokens of every memory; on a CPU, where looking at lengths costs nothing.

    Args:
        routing: choices.
        shared: whether there is a memory after the routed ones that takes every token.
    """
    batch, length, num_memories = routing.probabilities.shape
    taken = routing.taken
    weights = torch.where(taken, routing.weights, 0.0) if taken is not None else routing.weights
    weight_of = torch.zeros_like(routing.probabilities).scatter(2, routing.memories, weights)
    chosen = torch.zeros_like(routing.probabilities, dtype=torch.bool)
    chosen = chosen.scatter(2, routing.memories, True if taken is None else taken)
    result = [_share(chosen[..., memory], weight_of[..., memory]) for memory in range(num_memories)]
    if shared:
        counted = routing.counted
        every = torch.ones(batch, length, dtype=torch.bool, device=weights.device) if counted is None else counted
        result.append(_share(every, None))
    return result


def _share(chosen: Tensor, weight: Tensor | None) -> Share:
    """Return the tokens [B, T] that are chosen, with their weights."""
    batch = len(chosen)
    tokens = chosen.flatten().nonzero()[:, 0]
    lengths = chosen.sum(dim=1)
    longest = int(lengths.max())
    cu_seqlens = None
    mask = None
    if batch * longest == len(tokens):
        tokens = tokens.view(batch, longest)
    elif len(tokens) < _FULL_ENOUGH * batch * longest:
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        tokens = tokens[None]
    else:
        mask = torch.arange(longest, device=chosen.device) < lengths[:, None]
        # What is behind the end of a row repeats its last token: even its infinities stay with the row.
        last = torch.arange(1, batch + 1, device=chosen.device)[:, None] * chosen.shape[1] - 1
        ends = tokens[(lengths.cumsum(0) - 1).clamp(min=0)][:, None]
        tokens = torch.where(lengths[:, None] > 0, ends, last).expand_as(mask).masked_scatter(mask, tokens)
    if weight is not None:
        weight = weight.flatten().index_select(0, tokens.flatten()).view_as(tokens)
        weight = weight if mask is None else torch.where(mask, weight, 0.0)
    elif mask is not None:
        weight = mask.to(torch.float32)
    return Share(tokens, mask, cu_seqlens, weight)


class Step(NamedTuple):
    """One token per row of the batch as rows of a larger batch, one per (memory, row of the batch) that is concerned.

    Attributes:
        rows: which of the B rows stands where, [N].
        states: which of the M B states is concerned, [N], m B + b.
        groups: the memories of the rows.
        places: where the answers to a token stand among the rows, [B, k (+ 1)].
        weights: what the answers are multiplied by, [B, k (+ 1)].
        taken: False for rows whose memory stays as it is, [N]; None = none.
    """

    rows: Tensor
    states: Tensor
    groups: Groups
    places: Tensor
    weights: Tensor
    taken: Tensor | None


def step(routing: Routing, shared: bool) -> Step:
    """Lay out one token per row; its size is known beforehand, so the host never waits for a device.

    Args:
        routing: choices for T = 1.
        shared: whether there is a memory after the routed ones that takes every token.
    """
    memories, weights, taken = _with_shared(routing, shared)
    batch, _, copies = memories.shape
    states = (memories * batch + torch.arange(batch, device=memories.device)[:, None, None]).flatten()
    order = torch.argsort(states)
    states = states[order]
    memory = states // batch
    counts = None
    if memories.device.type == "cpu":
        total = routing.probabilities.shape[-1] + int(shared)
        counts = torch.bincount(memory, minlength=total).tolist()
    places = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    if taken is not None:
        weights = torch.where(taken, weights, 0.0)
        taken = taken.flatten()[order]
    return Step(
        order // copies, states, Groups(memory, counts), places.view(batch, copies), weights.view(batch, copies), taken
    )


def _with_shared(routing: Routing, shared: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return memories, weights [B, T, k (+ 1)] and what is taken, with the shared memory as one more choice."""
    memories, weights, taken = routing.memories, routing.weights, routing.taken
    if not shared:
        return memories, weights, taken
    last = routing.probabilities.shape[-1]
    memories = torch.cat([memories, memories.new_full((*memories.shape[:-1], 1), last)], dim=-1)
    weights = torch.cat([weights, weights.new_ones(*weights.shape[:-1], 1)], dim=-1)
    if taken is not None:
        counted = taken.new_ones(taken.shape[:-1]) if routing.counted is None else routing.counted
        taken = torch.cat([taken, counted[..., None]], dim=-1)
    return memories, weights, taken


def mix(answers: Tensor, places: Tensor, weights: Tensor, taken: Tensor | None = None) -> Tensor:
    """Add up the weighted answers to every token.

    Args:
        answers: answers of the memories in the packed order, [N, ...].
        places: where those to each token stand, [tokens, k].
        weights: their weights, [tokens, k].
        taken: False where there is no answer, [tokens, k]; then that of another text may stand there, and a weight of 0
            would not keep out its infinities.

    Returns:
        The sums, [tokens, ...], in the dtype of the answers.
    """
    if not len(answers):
        return answers.new_zeros(len(places), *answers.shape[1:])
    each = answers.index_select(0, places.flatten()).view(*places.shape, -1)
    if taken is not None:
        each = torch.where(taken[..., None], each, 0.0)
    mixed = torch.matmul(weights.to(each.dtype)[:, None], each)[:, 0]
    return mixed.view(len(places), *answers.shape[1:])


Balance = Literal["global", "layer"]


def balance_loss(layers: list[RoutingStatistics], kind: Balance) -> Tensor:
    """Return how unevenly memories are used; k if every memory gets the same, more otherwise.

    global: E sum_e F_e P_e with the share F_e of (token, layer) pairs that chose memory e, and the mean probability
        P_e over the same pairs. One layer's imbalance may make up for another's.
    layer: the mean over layers and sequences of E sum_e F_e P_e, with F_e and the mean weight P_e of that layer and
        sequence alone.

    Args:
        layers: sums over the tokens that count, one entry per layer.
        kind: which of the two.

    Source:
        MoM, arXiv:2502.13685, section 3; "global" is the form of Switch Transformers, arXiv:2101.03961, equation 4.
    """
    num_memories = layers[0].choices.shape[-1]
    if kind == "global":
        tokens = torch.stack([layer.tokens.sum() for layer in layers]).sum().clamp(min=1)
        chosen = torch.stack([layer.choices.sum(dim=0) for layer in layers]).sum(dim=0) / tokens
        probability = torch.stack([layer.probabilities.sum(dim=0) for layer in layers]).sum(dim=0) / tokens
        return num_memories * (chosen * probability).sum()
    losses, sequences = [], []
    for layer in layers:
        tokens = layer.tokens.clamp(min=1)[:, None]
        losses.append((layer.choices / tokens * (layer.weights / tokens)).sum())
        sequences.append((layer.tokens > 0).sum())
    return num_memories * torch.stack(losses).sum() / torch.stack(sequences).sum().clamp(min=1)


def load(statistics: RoutingStatistics) -> Tensor:
    """Return the share of the choices that fell on each memory, [E], adding up to 1; zeros where nothing was read."""
    choices = statistics.choices.sum(dim=0)
    return choices / choices.sum().clamp(min=1)


def zero_statistics(batch_size: int, num_memories: int, like: Tensor) -> RoutingStatistics:
    """Return the sums over no tokens, for a tensor of the device and dtype of the hidden states."""
    empty = torch.zeros(batch_size, num_memories, dtype=state_dtype(like.dtype), device=like.device)
    return RoutingStatistics(empty, empty, empty, empty[:, 0])
