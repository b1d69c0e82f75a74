"""The router and what carries its choices out, against loops over tokens written from the definitions."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemon.layers.routing import (
    Router,
    Routing,
    RoutingStatistics,
    Share,
    balance_loss,
    has_room,
    load,
    mix,
    pack,
    shares,
    step,
    zero_statistics,
)

D, E, TOP_K = 6, 4, 2
EXAMPLES = settings(max_examples=60)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def choose(batch: int, tokens: int, seed: int = 0, memories: int = E, top_k: int = TOP_K, **more) -> Routing:
    """Choices by the definition, from random probabilities."""
    probabilities = random(batch, tokens, memories, seed=seed).softmax(dim=-1)
    chosen, numbers = probabilities.topk(top_k, dim=-1)
    return Routing(probabilities, numbers, chosen / chosen.sum(dim=-1, keepdim=True), **more)


def random_mask(batch: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < 0.7


@st.composite
def routings(draw: st.DrawFn, tokens: int | None = None) -> Routing:
    """Any batch, length, number of memories, mask, and any choices without room."""
    batch, seed, memories = draw(st.integers(1, 3)), draw(st.integers(0, 9999)), draw(st.integers(1, 4))
    length = draw(st.integers(1, 9)) if tokens is None else tokens
    routing = choose(batch, length, seed, memories, draw(st.integers(1, memories)))
    if draw(st.booleans()):
        counted = random_mask(batch, length, seed)
        routing = routing._replace(counted=counted if draw(st.booleans()) else torch.zeros_like(counted))
    if draw(st.booleans()):
        kept = torch.rand(routing.memories.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.6
        routing = routing._replace(kept=kept)
    return routing


def members(routing: Routing, shared: bool) -> list[list[list[tuple[int, float]]]]:
    """For every memory and row of the batch the tokens it takes, by number, with their weights; by a loop."""
    batch, length, memories = routing.probabilities.shape
    found: list[list[list[tuple[int, float]]]] = [[[] for _ in range(batch)] for _ in range(memories + int(shared))]
    for row, time in itertools.product(range(batch), range(length)):
        if routing.counted is not None and not routing.counted[row, time]:
            continue
        number = row * length + time
        for rank, memory in enumerate(routing.memories[row, time].tolist()):
            if routing.kept is None or routing.kept[row, time, rank]:
                found[memory][row].append((number, routing.weights[row, time, rank].item()))
        if shared:
            found[memories][row].append((number, 1.0))
    return found


def test_the_router_takes_the_top_of_a_softmax_over_all_and_divides_by_its_sum() -> None:
    torch.manual_seed(0)
    router, x = Router(D, E, TOP_K).double(), random(2, 7, D)
    routing = router(x, None, torch.zeros(2, E, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    for row, time in itertools.product(range(2), range(7)):
        exponentials = [math.exp((x[row, time] @ router.logits.weight[memory]).item()) for memory in range(E)]
        probabilities = [value / sum(exponentials) for value in exponentials]
        ranked = sorted(range(E), key=lambda memory: -probabilities[memory])[:TOP_K]
        total = sum(probabilities[memory] for memory in ranked)
        assert routing.memories[row, time].tolist() == ranked
        assert routing.probabilities[row, time].tolist() == pytest.approx(probabilities, rel=1e-12)
        weights = [probabilities[memory] / total for memory in ranked]
        assert routing.weights[row, time].tolist() == pytest.approx(weights, rel=1e-12)
    assert routing.taken is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_are_computed_in_float32_whatever_the_model_runs_in(dtype: torch.dtype) -> None:
    router = Router(D, E, TOP_K).to(dtype)
    routing = router(random(1, 5, D).to(dtype), None, torch.zeros(1, E).long(), torch.zeros(1).long())
    assert routing.probabilities.dtype == routing.weights.dtype == torch.float32
    assert torch.allclose(routing.weights.sum(dim=-1), torch.ones(1, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("gap", [30.0, 2000.0])
def test_a_choice_whose_weight_rounds_to_zero_counts_like_any_other(dtype: torch.dtype, gap: float) -> None:
    router = Router(D, E, TOP_K).to(dtype)
    with torch.no_grad():
        router.logits.weight.copy_(torch.outer(torch.arange(E) * gap, torch.ones(D)) / D)
    x = torch.ones(2, 5, D, dtype=dtype)
    routing = router(x, None, torch.zeros(2, E, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    assert torch.equal(routing.memories, torch.tensor([3, 2]).expand(2, 5, 2))
    if dtype != torch.float64:
        assert routing.weights.to(torch.float16)[..., 1].count_nonzero() == 0
    assert pack(routing, shared=False).cu_seqlens.tolist() == [0, 0, 0, 0, 0, 5, 10, 15, 20]
    assert [share.tokens.numel() for share in shares(routing, shared=False)] == [0, 0, 10, 10]
    assert routing.statistics().choices.tolist() == [[0, 0, 5, 5]] * 2
    one = router(x[:, :1], None, torch.zeros(2, E, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    assert step(one, shared=False).states.tolist() == [4, 5, 6, 7]


@EXAMPLES
@given(routing=routings(), shared=st.booleans())
def test_packing_lays_the_tokens_of_each_memory_and_row_end_to_end_in_order(routing: Routing, shared: bool) -> None:
    packing, expected = pack(routing, shared), members(routing, shared)
    sequences = [tokens for memory in expected for tokens in memory]
    assert packing.tokens.tolist() == [number for tokens in sequences for number, _ in tokens]
    assert packing.cu_seqlens.tolist() == [0, *itertools.accumulate(len(tokens) for tokens in sequences)]
    counts = [sum(len(tokens) for tokens in memory) for memory in expected]
    assert packing.groups.counts == counts
    assert packing.groups.memory.tolist() == [number for number, count in enumerate(counts) for _ in range(count)]
    # An answer that says which token and which memory it is for comes back to that token, with its weight.
    found: list[list[tuple[int, float]]] = [[] for _ in range(routing.probabilities[..., 0].numel())]
    for token, places in enumerate(packing.places.tolist()):
        for place, weight in zip(places, packing.weights[token].tolist(), strict=True):
            if weight:
                assert packing.tokens[place] == token
                found[token].append((int(packing.groups.memory[place]), weight))
    for memory, rows in enumerate(expected):
        for number, weight in itertools.chain(*rows):
            found[number].remove((memory, weight))
    assert not any(found)


def laid_out(share: Share, batch: int) -> list[list[tuple[int, float]]]:
    """The tokens of a share with their weights, row by row, whichever of its three layouts it has."""
    if share.cu_seqlens is not None:
        assert share.mask is None
        rows = [share.tokens[0, start:stop] for start, stop in itertools.pairwise(share.cu_seqlens.tolist())]
        split = [len(row) for row in rows]
        weights = [None] * batch if share.weights is None else share.weights[0].split(split)
    else:
        mask = torch.ones_like(share.tokens, dtype=torch.bool) if share.mask is None else share.mask
        assert not (mask.diff(dim=1) & mask[:, 1:]).any()  # False only behind the end of a row
        rows = [share.tokens[row, mask[row]] for row in range(batch)]
        weights = [None if share.weights is None else share.weights[row, mask[row]] for row in range(batch)]
        if share.weights is not None:
            assert share.weights[~mask].count_nonzero() == 0
    return [
        list(zip(row.tolist(), [1.0] * len(row) if weight is None else weight.tolist(), strict=True))
        for row, weight in zip(rows, weights, strict=True)
    ]


@EXAMPLES
@given(routing=routings(), shared=st.booleans())
def test_shares_hold_the_tokens_of_each_memory_row_by_row_in_order(routing: Routing, shared: bool) -> None:
    batch, length = routing.probabilities.shape[:2]
    found = shares(routing, shared)
    assert [laid_out(share, batch) for share in found] == members(routing, shared)
    for share in found:
        everything = share.mask is None and share.tokens.flatten().tolist() == list(range(batch * length))
        assert share.is_everything(batch * length) == everything


def test_shares_choose_their_layout_by_how_much_would_be_filling() -> None:
    lengths = {"even": [4, 4], "nearly even": [4, 3], "very uneven": [4, 1]}
    layouts = {}
    for name, (one, other) in lengths.items():
        counted = torch.arange(4) < torch.tensor([[one], [other]])
        share = shares(choose(2, 4, memories=1, top_k=1, counted=counted), shared=False)[0]
        layouts[name] = ("rows" if share.cu_seqlens is None else "end to end", share.mask is None)
    assert layouts == {"even": ("rows", True), "nearly even": ("rows", False), "very uneven": ("end to end", True)}


@EXAMPLES
@given(routing=routings(tokens=1), shared=st.booleans())
def test_a_step_has_a_row_for_every_choice_whether_taken_or_not(routing: Routing, shared: bool) -> None:
    layout, expected = step(routing, shared), members(routing, shared)
    batch, _, memories = routing.probabilities.shape
    every = members(routing._replace(counted=None, kept=None), shared)
    states = [memory * batch + row for memory in range(len(every)) for row in range(batch) if every[memory][row]]
    assert layout.states.tolist() == states
    assert layout.rows.tolist() == [state % batch for state in states]
    assert layout.groups.memory.tolist() == [state // batch for state in states]
    assert layout.groups.counts == [sum(map(len, memory)) for memory in every]
    taken = [bool(expected[state // batch][state % batch]) for state in states]
    assert (layout.taken is None and all(taken)) or layout.taken.tolist() == taken
    for row, places in enumerate(layout.places.tolist()):
        assert {states[place] % batch for place in places} == {row}
        for place, weight in zip(places, layout.weights[row].tolist(), strict=True):
            memory = states[place] // batch
            assert weight == dict(expected[memory][row]).get(row, 0.0)
    assert len(every) == memories + int(shared)


@EXAMPLES
@given(routing=routings(tokens=1), shared=st.booleans())
def test_packing_shares_and_steps_mix_the_same_answers(routing: Routing, shared: bool) -> None:
    batch, _, memories = routing.probabilities.shape
    answers = random(memories + 1, batch, 2, 3)  # of every memory to every row's one token, [M, B, H, V]
    packing, layout = pack(routing, shared), step(routing, shared)
    expected = torch.zeros(batch, 2, 3, dtype=torch.float64)
    for memory, rows in enumerate(members(routing, shared)):
        for number, weight in itertools.chain(*rows):
            expected[number] += weight * answers[memory, number]
    packed = mix(answers[packing.groups.memory, packing.tokens], packing.places, packing.weights)
    stepped = mix(answers[layout.groups.memory, layout.rows], layout.places, layout.weights)
    shared_out = torch.zeros_like(expected)
    for memory, share in enumerate(shares(routing, shared)):
        for number, weight in itertools.chain(*laid_out(share, batch)):
            shared_out[number] += weight * answers[memory, number]
    for found in (packed, stepped, shared_out):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def room_by_the_definition(routing: Routing, capacity: float, loads: list[int], tokens: int, row: int) -> list:
    """Let one row's tokens in, one after the other: the n-th finds no room after ceil(capacity n) others."""
    kept = []
    for time, choices in enumerate(routing.memories[row].tolist()):
        if routing.counted is not None and not routing.counted[row, time]:
            kept.append([False] * len(choices))
            continue
        tokens += 1
        limit = math.ceil(capacity * tokens - 1e-9)
        kept.append([loads[memory] < limit for memory in choices])
        for memory in choices:
            loads[memory] += loads[memory] < limit
    return kept


@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 9999), capacity=st.sampled_from([0.01, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.99]))
def test_room_is_given_token_by_token_whatever_the_cut(data, seed: int, capacity: float) -> None:
    length = data.draw(st.integers(1, 24))
    counted = random_mask(2, length, seed) if data.draw(st.booleans()) else None
    routing = choose(2, length, seed, counted=counted)
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=4)))
    loads, tokens = torch.zeros(2, E, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        piece = Routing(*(tensor if tensor is None else tensor[:, start:end] for tensor in routing))
        piece = piece._replace(kept=has_room(piece, capacity, loads, tokens))
        pieces.append(piece.kept)
        loads = loads + torch.zeros(2, E, dtype=torch.int64).scatter_add(
            1, piece.memories.flatten(1), piece.kept.flatten(1).long()
        )
        tokens = tokens + (end - start if piece.counted is None else piece.counted.sum(dim=1))
    for row in range(2):
        expected = room_by_the_definition(routing, capacity, [0] * E, 0, row)
        assert torch.cat(pieces, dim=1)[row].tolist() == expected


@pytest.mark.parametrize("capacity", [1.0, 1, 3.5, None])
def test_a_capacity_of_one_or_more_drops_nothing(capacity: float | None) -> None:
    router = Router(D, E, 1, capacity)
    with torch.no_grad():
        router.logits.weight.zero_()  # all tokens go to one memory
    loads = torch.zeros(1, E, dtype=torch.int64)
    routing = router(torch.ones(1, 20, D), None, loads, torch.zeros(1, dtype=torch.int64))
    assert routing.memories.unique().numel() == 1
    assert routing.kept is None
    if capacity is not None:
        assert has_room(routing, capacity, loads, torch.zeros(1, dtype=torch.int64)).all()


def test_a_full_memory_takes_its_share_of_the_tokens_and_no_more() -> None:
    router = Router(D, E, 1, 0.25)
    with torch.no_grad():
        router.logits.weight.zero_()
    loads, read = torch.zeros(1, E, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    taken = router(torch.ones(1, 12, D), None, loads, read).taken
    assert taken[0, :, 0].tolist() == [True, False, False, False] * 3


def test_statistics_are_sums_over_the_tokens_that_count() -> None:
    counted = random_mask(2, 9, 3)
    routing = choose(2, 9, counted=counted, kept=torch.zeros(2, 9, TOP_K, dtype=torch.bool))
    found = routing.statistics()
    for row in range(2):
        choices, weights, probabilities = [0.0] * E, [0.0] * E, [0.0] * E
        for time in counted[row].nonzero()[:, 0].tolist():
            for rank, memory in enumerate(routing.memories[row, time].tolist()):
                choices[memory] += 1  # what a router wanted counts, not what there was room for
                weights[memory] += routing.weights[row, time, rank].item()
            for memory in range(E):
                probabilities[memory] += routing.probabilities[row, time, memory].item()
        assert found.choices[row].tolist() == choices
        assert found.weights[row].tolist() == pytest.approx(weights)
        assert found.probabilities[row].tolist() == pytest.approx(probabilities)
        assert found.tokens[row] == counted[row].sum()


def test_the_statistics_of_two_stretches_add_up_to_those_of_both() -> None:
    whole = choose(2, 9, counted=random_mask(2, 9, 3))
    parts = [Routing(*(x if x is None else x[:, cut] for x in whole)) for cut in (slice(4), slice(4, None))]
    added = parts[0].statistics().plus(parts[1].statistics())
    for one, other in zip(added, whole.statistics(), strict=True):
        torch.testing.assert_close(one, other)
    nothing = zero_statistics(2, E, whole.probabilities)
    for one, other in zip(nothing.plus(added), added, strict=True):
        assert torch.equal(one, other)


def some_layers(seed: int = 0) -> tuple[list[Routing], list[RoutingStatistics]]:
    """Three layers over three rows, the last of which holds padding alone."""
    counted = random_mask(3, 8, seed)
    counted[2] = False
    layers = [choose(3, 8, seed + layer, counted=counted) for layer in range(3)]
    return layers, [layer.statistics() for layer in layers]


def test_the_global_balance_loss_is_the_one_of_switch_transformers_over_all_layers() -> None:
    layers, statistics = some_layers()
    rows = [
        (layer.memories[b, t].tolist(), layer.probabilities[b, t].tolist())
        for layer in layers
        for b, t in layer.counted.nonzero().tolist()
    ]
    expected = 0.0
    for rank, memory in itertools.product(range(TOP_K), range(E)):
        fraction = sum(chosen[rank] == memory for chosen, _ in rows) / len(rows)
        expected += E * fraction * sum(probabilities[memory] for _, probabilities in rows) / len(rows)
    assert balance_loss(statistics, "global").item() == pytest.approx(expected, rel=1e-12)


def test_the_layer_wise_balance_loss_is_the_mean_over_layers_and_sequences() -> None:
    layers, statistics = some_layers()
    losses = []
    for layer, row in itertools.product(layers, range(2)):  # the third row has no tokens
        times = layer.counted[row].nonzero()[:, 0].tolist()
        loss = 0.0
        for memory in range(E):
            chosen = sum(memory in layer.memories[row, time] for time in times) / len(times)
            weight = sum(layer.weights[row, time][layer.memories[row, time] == memory].sum().item() for time in times)
            loss += E**2 * chosen * (weight / len(times)) / E
        losses.append(loss)
    assert balance_loss(statistics, "layer").item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def always(memories: list[int], tokens: int = 6) -> RoutingStatistics:
    """A layer whose tokens all go to the same memories, with equal probabilities for these and none for others."""
    probabilities = torch.zeros(1, tokens, E, dtype=torch.float64)
    probabilities[..., memories] = 1 / len(memories)
    numbers = torch.tensor(memories).expand(1, tokens, -1)
    return Routing(probabilities, numbers, torch.full(numbers.shape, 1 / len(memories)).double()).statistics()


@pytest.mark.parametrize("kind", ["global", "layer"])
def test_balanced_memories_cost_top_k_and_a_collapse_costs_the_number_of_memories(kind: str) -> None:
    even = Routing(
        torch.full((1, E, E), 1 / E).double(),
        torch.tensor([[[0, 1], [2, 3], [1, 0], [3, 2]]]),
        torch.full((1, E, TOP_K), 1 / TOP_K).double(),
    )
    assert balance_loss([even.statistics()], kind).item() == pytest.approx(TOP_K)
    assert balance_loss([always([0, 1])], kind).item() == pytest.approx(E)


def test_another_layer_makes_up_for_a_collapse_globally_and_never_layer_by_layer() -> None:
    opposite = [always([0, 1]), always([2, 3])]
    assert balance_loss(opposite, "global").item() == pytest.approx(TOP_K)
    assert balance_loss(opposite, "layer").item() == pytest.approx(E)


def test_another_sequence_makes_up_for_a_collapse_globally_and_never_layer_by_layer() -> None:
    both = RoutingStatistics(*map(torch.cat, zip(always([0, 1]), always([2, 3]), strict=True)))
    assert balance_loss([both], "global").item() == pytest.approx(TOP_K)
    assert balance_loss([both], "layer").item() == pytest.approx(E)


@pytest.mark.parametrize("kind", ["global", "layer"])
def test_padding_takes_no_part_in_the_balance_loss(kind: str) -> None:
    counted = random_mask(2, 9, 3)
    one, other = (choose(2, 9, seed, counted=counted) for seed in (0, 1))
    mixed = Routing(*(torch.where(counted[..., None], a, b) for a, b in zip(one[:3], other[:3], strict=True)), counted)
    assert not torch.equal(mixed.memories, one.memories)
    assert torch.equal(balance_loss([mixed.statistics()], kind), balance_loss([one.statistics()], kind))


@pytest.mark.parametrize("kind", ["global", "layer"])
def test_descending_the_balance_loss_evens_out_the_choices(kind: str) -> None:
    torch.manual_seed(0)
    router, x = Router(D, E, TOP_K).double(), random(4, 64, D)
    x[..., 0] = 2.0
    with torch.no_grad():
        router.logits.weight[:2, 0] = 0.3  # two memories begin with most tokens
        router.logits.weight[2:, 0] = -0.3
    nothing = torch.zeros(4, E, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    found = []
    for _ in range(60):
        statistics = router(x, None, *nothing).statistics()
        found.append((balance_loss([statistics], kind), load(statistics).max()))
        (slope,) = torch.autograd.grad(found[-1][0], router.logits.weight)
        with torch.no_grad():
            router.logits.weight -= 0.5 * slope
    assert found[0][0] > TOP_K + 0.3
    assert found[-1][0] < TOP_K + 0.1
    assert found[-1][1] < 0.3 < 0.36 < found[0][1]


def test_only_the_global_balance_loss_has_a_slope_where_all_tokens_go_to_the_same_memories() -> None:
    router, x = Router(D, E, TOP_K).double(), random(2, 9, D)
    x[..., 0] = 1.0
    with torch.no_grad():
        router.logits.weight[:TOP_K, 0] = 6.0
    nothing = torch.zeros(2, E, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    slopes = {}
    for kind in ("global", "layer"):
        statistics = router(x, None, *nothing).statistics()
        assert statistics.choices.tolist() == [[9, 9, 0, 0]] * 2
        loss = balance_loss([statistics], kind)
        slopes[kind] = torch.autograd.grad(loss, router.logits.weight)[0].abs().max()
    # The weights of the chosen memories add up to 1 whatever they are: layer by layer, a full collapse is a plateau.
    assert slopes["layer"] < 1e-12
    assert slopes["global"] > 1e-3


def test_loads_are_shares_of_the_choices() -> None:
    _, statistics = some_layers()
    for layer in statistics:
        assert load(layer).tolist() == pytest.approx((layer.choices.sum(dim=0) / layer.choices.sum()).tolist())
        assert load(layer).sum().item() == pytest.approx(1)
    assert load(zero_statistics(2, E, torch.zeros(1))).tolist() == [0] * E
    assert balance_loss([zero_statistics(2, E, torch.zeros(1))], "layer") == 0
