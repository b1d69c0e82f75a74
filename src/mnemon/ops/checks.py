"""The contract of an update rule as checks that need nothing but its declaration.

The project's tests run them on every rule, and `mnemon rules NAME --check` on any installed one, so that a new rule,
here or in another package, is covered without a test of its own. Everything is compared in float64 with the recurrent
form, unless a check says otherwise.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mnemon.errors import ConfigError
from mnemon.ops.declaration import Dimensions
from mnemon.ops.rule import UpdateRule
from mnemon.ops.state import combine, leaves, rebuild

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 100, 257)
TOLERANCE = 1e-9
"""Largest difference in float64, relative to the largest number compared (or to 1 if that is smaller)."""
FLOAT32_TOLERANCE = 2e-4
BFLOAT16_TOLERANCE = 1e-2

Form = Callable[..., tuple[Tensor, Any]]


def variants(rule: UpdateRule) -> list[dict[str, Any]]:
    """Return the settings to check a rule with: its defaults, every other choice, and every smallest number."""
    found: list[dict[str, Any]] = [{}]
    for setting in rule.hyper_parameters:
        if setting.choices is not None:
            found += [{setting.name: choice} for choice in setting.choices if choice != setting.default]
        elif setting.minimum is not None and setting.minimum != setting.default:
            found.append({setting.name: type(setting.default)(setting.minimum)})
    return found


def check_forms_agree(rule: UpdateRule, options: dict[str, Any], lengths: tuple[int, ...] = LENGTHS) -> None:
    """Outputs, last state and all gradients of the chunkwise form are those of the recurrent form at every length."""
    for tokens in lengths:
        for extreme in (False, True):
            call = _inputs(rule, options, tokens, extreme=extreme)
            start = _start(rule, options, call)
            expected = _with_gradients(rule.recurrent, call, start)
            for form in _forms(rule):
                _compare(rule, f"{tokens} tokens", expected, _with_gradients(form, call, start))


def check_chunk_size_changes_nothing(rule: UpdateRule, options: dict[str, Any]) -> None:
    """Every chunk size, a power of two or not, gives the same answer and gradients."""
    call = _inputs(rule, options, 70)
    start = _start(rule, options, call)
    expected = _with_gradients(rule.recurrent, call, start)
    for chunk_size in (1, 5, 16, 24, 128) if rule.chunkwise_form else ():
        got = _with_gradients(rule.chunkwise, call, start, chunk_size=chunk_size)
        _compare(rule, f"chunk_size {chunk_size}", expected, got)


def check_state_resumes_after_any_cut(rule: UpdateRule, options: dict[str, Any]) -> None:
    """Two calls with the state between them give what one call gives, in every form and mix of forms."""
    call = _inputs(rule, options, 70)
    expected = _flat(rule.recurrent(**call))
    for cut in (1, 13, 16, 33, 64, 69):
        head, tail = _tokens(rule, call, slice(0, cut)), _tokens(rule, call, slice(cut, None))
        for first, second in itertools.product(_forms(rule), repeat=2):
            begun, state = first(**head)
            ended, state = second(**tail, state=state)
            _compare(rule, f"cut after {cut} tokens", expected, _flat((torch.cat([begun, ended], dim=1), state)))


def check_packed_is_separate(rule: UpdateRule, options: dict[str, Any]) -> None:
    """Packed sequences, empty ones too, give what each gives alone, and so do their gradients."""
    lengths = (3, 40, 0, 17, 1, 20)
    bounds = [0, *itertools.accumulate(lengths)]
    call = _inputs(rule, options, bounds[-1], batch=1)
    start = _start(rule, options, call, sequences=len(lengths))
    expected = _with_gradients(_one_by_one(rule.recurrent, rule, bounds), call, start)
    for form in _forms(rule):
        _compare(rule, "packed", expected, _with_gradients(form, call, start, cu_seqlens=torch.tensor(bounds)))


def check_masked_step_changes_nothing(rule: UpdateRule, options: dict[str, Any]) -> None:
    """Masked tokens leave the state exactly as it was, wherever they stand, and the others as if they were alone."""
    call = _inputs(rule, options, 40)
    start = _start(rule, options, call)
    batch, tokens = call["v"].shape[:2]
    nothing = torch.zeros(batch, tokens, dtype=torch.bool)
    q, k, v, keywords = rule.masked(call["q"], call["k"], call["v"], nothing, **_without_qkv(call))
    for form in _forms(rule):
        for state in (form(**call, state=start, mask=nothing)[1], form(q, k, v, state=start, **keywords)[1]):
            if not all(torch.equal(a, b) for a, b in zip(leaves(state), leaves(start), strict=True)):
                raise ConfigError(f"{rule.name}: tokens that are all masked changed the state")
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1)) < 0.5
    for form in _forms(rule):
        output, state = form(**call, state=start, mask=mask)
        for row in range(batch):
            alone = _tokens(rule, {**call, **_row(rule, call, row)}, mask[row])
            expected = rule.recurrent(**alone, state=_rows(start, row))
            _compare(rule, "masked", _flat(expected), _flat((output[row : row + 1, mask[row]], _rows(state, row))))


def check_causality(rule: UpdateRule, options: dict[str, Any]) -> None:
    """A later token never changes an earlier output, not even in the last bit."""
    call = _inputs(rule, options, 70)
    other = _inputs(rule, options, 70, seed=1)
    for cut, form in itertools.product((1, 16, 37, 64), _forms(rule)):
        mixed = {
            name: torch.cat([tensor[:, :cut], other[name][:, cut:]], dim=1) if _is_per_token(rule, name) else tensor
            for name, tensor in call.items()
        }
        if not torch.equal(form(**call)[0][:, :cut], form(**mixed)[0][:, :cut]):
            raise ConfigError(f"{rule.name}: tokens after {cut} changed an output before them")


def check_rows_are_independent(rule: UpdateRule, options: dict[str, Any]) -> None:
    """A sequence's output and state do not depend on what else is in the batch, not even in the last bit."""
    call = _inputs(rule, options, 40)
    other = _inputs(rule, options, 40, seed=1)
    for form in _forms(rule):
        mixed = {
            name: torch.cat([tensor[:1], other[name][1:]]) if _is_per_token(rule, name) else tensor
            for name, tensor in call.items()
        }
        (output, state), (changed_output, changed_state) = form(**call), form(**mixed)
        pairs = zip((output, *leaves(state)), (changed_output, *leaves(changed_state)), strict=True)
        if not all(torch.equal(a[0], b[0]) for a, b in pairs):
            raise ConfigError(f"{rule.name}: one row of a batch changed the result of another")


def check_float32_and_bfloat16(rule: UpdateRule, options: dict[str, Any]) -> None:
    """Float32 and bfloat16 inputs, also with extreme gates, come within a stated distance of float64."""
    for extreme, (dtype, tolerance) in itertools.product(
        (False, True), ((torch.float32, FLOAT32_TOLERANCE), (torch.bfloat16, BFLOAT16_TOLERANCE))
    ):
        call = _inputs(rule, options, 150, extreme=extreme, dtype=dtype)
        exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in call.items()}
        expected, _ = rule.recurrent(**exact)
        for form in _forms(rule):
            output, state = form(**call)
            if output.dtype != dtype or any(leaf.dtype in (torch.bfloat16, torch.float64) for leaf in leaves(state)):
                raise ConfigError(f"{rule.name}: for {dtype} the output must be {dtype} and the state float32")
            _compare(rule, f"{dtype}", [expected], [output.double()], tolerance)


def check_gradients(rule: UpdateRule, options: dict[str, Any]) -> None:
    """Gradients are those of finite differences."""
    call = _inputs(rule, options, 5, batch=1, heads=1, width=2)
    start = _start(rule, options, call)
    tensors = {name: x.requires_grad_() for name, x in call.items() if isinstance(x, Tensor)}
    for form in _forms(rule):

        def function(*values: Tensor, form: Form = form) -> list[Tensor]:
            named = call | dict(zip(tensors, values, strict=False))
            return [x for x in _flat(form(**named, state=start)) if x.is_floating_point()]

        if not torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True, raise_exception=False):
            raise ConfigError(f"{rule.name}: gradients differ from finite differences")


def check_declared_size(rule: UpdateRule, options: dict[str, Any]) -> None:
    """The state has as many numbers as the declaration says, and the formulas of the costs can be evaluated."""
    sizes = {"H": 1, "K": 6, "V": 6 if rule.equal_widths else 7, "J": 5}
    widths = {"key_dim": sizes["K"], "value_dim": sizes["V"], "slots": sizes["J"]}
    parameters = {x.name: torch.ones([sizes[axis] for axis in x.axes]) for x in rule.parameters}
    settings = {name: value for name, value in options.items() if not isinstance(value, str)}
    keywords: dict[str, Any] = rule.defaults() | parameters | options
    state = rule.init_state(Dimensions(1, *sizes.values()), torch.float32, "cpu", **keywords)
    counted = sum(leaf.numel() for leaf in leaves(state) if leaf.is_floating_point())
    declared = rule.size(rule.state_size, **widths, **settings)
    if settings == options and counted != declared:
        raise ConfigError(f"{rule.name}: its state has {counted} numbers per head, and state_size says {declared}")
    for formula in filter(None, (rule.recurrent_flops, rule.chunkwise_flops)):
        if rule.size(formula, **widths, C=64) <= 0:
            raise ConfigError(f"{rule.name}: the cost {formula!r} is not positive")


def check_declared_linearity(rule: UpdateRule, options: dict[str, Any]) -> None:
    """Where the declaration says so, output and state are linear in values and in the tensors that hold them."""
    tensors = rule.linear_in_values(**options)
    distance = nonlinearity(rule, options, tensors) if tensors else 0.0
    if not distance <= TOLERANCE:
        raise ConfigError(
            f"{rule.name}: is declared linear in values (linear_tensors={tensors}), but a mixture of two inputs misses "
            f"the mixture of their results by {distance:.1e}"
        )


CHECKS: tuple[Callable[[UpdateRule, dict[str, Any]], None], ...] = (
    check_forms_agree,
    check_chunk_size_changes_nothing,
    check_state_resumes_after_any_cut,
    check_packed_is_separate,
    check_masked_step_changes_nothing,
    check_causality,
    check_rows_are_independent,
    check_float32_and_bfloat16,
    check_gradients,
    check_declared_size,
    check_declared_linearity,
)


def nonlinearity(rule: UpdateRule, options: dict[str, Any], tensors: tuple[int, ...]) -> float:
    """Return how far a rule is from linear in its values and some tensors of its state.

    Args:
        rule: the rule.
        options: settings.
        tensors: numbers of these tensors; queries, keys, gates and the other tensors are held.

    Returns:
        The largest distance of the results (output and these tensors) of 2 a - 3 b from 2 times those of a minus 3
        times those of b, relative to the largest number compared (or to 1 if that is smaller).
    """
    call, other = (_inputs(rule, options, 40, seed=seed) for seed in (0, 1))
    start = _start(rule, options, call)
    pairs = list(zip(leaves(start), leaves(rule.recurrent(**other)[1]), strict=True))

    def results(one: float, two: float) -> list[Tensor]:
        state = [one * a + two * b if number in tensors else a for number, (a, b) in enumerate(pairs)]
        values = one * call["v"] + two * other["v"]
        output, after = rule.recurrent(**(call | {"v": values}), state=rebuild(start, state))
        return [output, *(leaves(after)[number] for number in tensors)]

    mixed, first, second = results(2.0, -3.0), results(1.0, 0.0), results(0.0, 1.0)
    return max(
        ((x - (2.0 * a - 3.0 * b)).abs().max() / x.abs().max().clamp(min=1.0)).item()
        for x, a, b in zip(mixed, first, second, strict=True)
        if x.numel()
    )


def _inputs(
    rule: UpdateRule,
    options: dict[str, Any],
    tokens: int,
    *,
    batch: int = 2,
    heads: int = 2,
    width: int = 4,
    seed: int = 0,
    extreme: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Draw the keywords of a call, the settings included."""
    value_dim = width if rule.equal_widths else width + 1
    drawn = rule.random_inputs(batch, tokens, heads, width, value_dim, slots=3, seed=seed, extreme=extreme, dtype=dtype)
    return {**drawn, **options}


def _start(rule: UpdateRule, options: dict[str, Any], call: dict[str, Any], sequences: int | None = None) -> Any:
    """Return a state in the middle of a sequence: what a rule has after some other tokens."""
    batch, _, heads, width = call["q"].shape
    earlier = _inputs(rule, options, 21, batch=sequences or batch, heads=heads, width=width, seed=7)
    return combine(lambda x: x.detach(), rule.recurrent(**earlier)[1])


def _forms(rule: UpdateRule) -> Iterator[Form]:
    """Yield the forms that run on any machine."""
    yield rule.recurrent
    if rule.chunkwise_form is not None:
        yield rule.chunkwise


def _is_per_token(rule: UpdateRule, name: str) -> bool:
    return name in ("q", "k", "v") or any(gate.name == name for gate in rule.gates)


def _tokens(rule: UpdateRule, call: dict[str, Any], which: Any) -> dict[str, Any]:
    """Take some of the tokens."""
    return {name: x[:, which] if _is_per_token(rule, name) else x for name, x in call.items()}


def _row(rule: UpdateRule, call: dict[str, Any], row: int) -> dict[str, Any]:
    return {name: x[row : row + 1] for name, x in call.items() if _is_per_token(rule, name)}


def _rows(state: Any, row: int) -> Any:
    return combine(lambda x: x[row : row + 1], state)


def _without_qkv(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in ("q", "k", "v")}


def _one_by_one(form: Form, rule: UpdateRule, bounds: list[int]) -> Form:
    """Return a form that runs packed sequences in calls of their own."""

    def run(*, state: Any, **call: Any) -> tuple[Tensor, Any]:
        spans = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        done = [form(**_tokens(rule, call, span), state=_rows(state, row)) for row, span in enumerate(spans)]
        outputs, states = zip(*done, strict=True)
        return torch.cat(outputs, dim=1), combine(lambda *rows: torch.cat(rows), *states)

    return run


def _flat(result: tuple[Tensor, Any]) -> list[Tensor]:
    return [result[0], *leaves(result[1])]


def _with_gradients(form: Form, call: dict[str, Any], start: Any, **more: Any) -> list[Tensor]:
    """Return output, state and the gradients of all inputs and of the first state, under fixed random cotangents."""
    call = {name: x.detach().requires_grad_() if isinstance(x, Tensor) else x for name, x in call.items()}
    start = combine(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x, start)
    results = _flat(form(**call, state=start, **more))
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for x in results:
        if x.is_floating_point():
            total = total + (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum()
    wanted = [x for x in (*call.values(), *leaves(start)) if isinstance(x, Tensor) and x.requires_grad]
    return [*results, *torch.autograd.grad(total, wanted, materialize_grads=True)]


def _compare(
    rule: UpdateRule, where: str, expected: list[Tensor], got: list[Tensor], tolerance: float = TOLERANCE
) -> None:
    for number, (a, b) in enumerate(zip(expected, got, strict=True)):
        if a.numel() == 0:
            continue
        distance = ((a - b).abs().max() / a.abs().max().clamp(min=1.0)).item()
        if not distance <= tolerance:
            raise ConfigError(
                f"{rule.name}: result {number} differs by {distance:.1e} at {where} (at most {tolerance:.0e}; results: "
                "output, state, gradients of the inputs in their order and of the first state)"
            )
