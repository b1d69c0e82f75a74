"""Which form runs and why, and how flash-linear-attention is called."""

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mnemon.errors import BackendUnavailable, ConfigError
from mnemon.ops import UpdateRule, choose_form, get_rule, list_rules
from mnemon.ops.kernels import fla
from mnemon.ops.state import leaves

RULE = get_rule("gated_delta_net")
CALL = RULE.random_inputs(1, 6, 2, 4, 3)


def test_auto_says_what_it_chose_and_why() -> None:
    assert choose_form(RULE, CALL["q"], CALL["v"]) == (
        "chunkwise",
        "fla cannot run: its kernels need a GPU and the tensors are on cpu",
    )
    assert choose_form(RULE, CALL["q"][:, :1], CALL["v"][:, :1]) == ("recurrent", "one token needs one step")
    slow = dataclasses.replace(RULE, chunkwise_form=None)
    assert choose_form(slow, CALL["q"], CALL["v"]).form == "recurrent"


def test_a_form_asked_for_is_obeyed_or_refused() -> None:
    assert choose_form(RULE, CALL["q"], CALL["v"], "recurrent").reason == "asked for"
    with pytest.raises(BackendUnavailable, match="form='fla' cannot run: its kernels need a GPU"):
        RULE(**CALL, form="fla")
    with pytest.raises(BackendUnavailable, match="need a GPU"):
        RULE.fla(**CALL)
    with pytest.raises(BackendUnavailable, match="the rule has no chunkwise form"):
        dataclasses.replace(RULE, chunkwise_form=None).chunkwise(**CALL)
    with pytest.raises(ConfigError, match="form must be one of auto, recurrent, chunkwise, fla, got 'triton'"):
        RULE(**CALL, form="triton")


@pytest.mark.parametrize("name", list_rules())
@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_autocast_changes_no_bit(name: str, form: str) -> None:
    rule = get_rule(name)
    call = rule.random_inputs(2, 40, 2, 8, 8, slots=3, dtype=torch.float32)
    expected = run_with_gradients(rule, call, form, autocast=False)
    got = run_with_gradients(rule, call, form, autocast=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def run_with_gradients(rule: UpdateRule, call: dict[str, Any], form: str, *, autocast: bool) -> list[torch.Tensor]:
    """Return the output, the state and the gradients of the inputs; the forward pass runs under autocast, or not."""
    call = {name: x.clone().requires_grad_() for name, x in call.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output, state = rule(**call, form=form)
    results = [output, *(leaf for leaf in leaves(state) if leaf.is_floating_point())]
    return [*results, *torch.autograd.grad(sum((x * x).sum() for x in results), list(call.values()))]


def on_gpu(**changes: Any) -> torch.Tensor:
    """Return something with the shape, dtype and device of queries on a GPU."""

    class Queries:
        device = torch.device("cuda")
        dtype = changes.get("dtype", torch.bfloat16)
        shape = changes.get("shape", (1, 6, 2, 64))

    return Queries()  # type: ignore[return-value]


def test_on_a_gpu_fla_is_chosen_when_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "why_unavailable", lambda: None)
    assert choose_form(RULE, on_gpu(), CALL["v"]).form == "fla"
    assert "at most 256 numbers, got 320" in choose_form(RULE, on_gpu(shape=(1, 6, 2, 320)), CALL["v"]).reason
    assert "float64" in choose_form(RULE, on_gpu(dtype=torch.float64), CALL["v"]).reason
    without = dataclasses.replace(RULE, fla_form=None)
    assert "no kernel of this rule" in choose_form(without, on_gpu(), CALL["v"]).reason
    monkeypatch.setattr(fla, "why_unavailable", lambda: "it is not installed")
    assert choose_form(RULE, on_gpu(), CALL["v"]).form == "chunkwise"


@pytest.fixture
def fake_fla(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Install a package `fla` whose kernels record how they are called and compute with our recurrent form."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def kernel(function: str, name: str) -> Any:
        def run(
            q: Any, k: Any, v: Any, *, scale: float, output_final_state: bool, initial_state: Any, **rest: Any
        ) -> Any:
            calls.append((function, {"scale": scale, "initial_state": initial_state, **rest}))
            assert output_final_state
            gates = {key: value for key, value in rest.items() if key in ("g", "beta")}
            return get_rule(name).recurrent(
                scale * q, k, v, state=initial_state, cu_seqlens=rest.get("cu_seqlens"), **gates
            )

        return run

    kernels = {
        "simple_gla": ("chunk_simple_gla", "mamba2"),
        "gla": ("chunk_gla", "gla"),
        "delta_rule": ("chunk_delta_rule", "delta_net"),
        "gated_delta_rule": ("chunk_gated_delta_rule", "gated_delta_net"),
        "kda": ("chunk_kda", "kda"),
    }
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    for module, (function, name) in kernels.items():
        fake = ModuleType(f"fla.ops.{module}")
        setattr(fake, function, kernel(function, name))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return calls


NAMES = ("retnet", "lightning", "mamba2", "gla", "delta_net", "gated_delta_net", "kda")


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_translates_a_call(name: str, fake_fla: list[tuple[str, dict[str, Any]]]) -> None:
    rule = get_rule(name)
    call = rule.random_inputs(1, 12, 2, 4, 3)
    state = torch.randn(3, 2, 4, 3)
    boundaries = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    q, k, v = (call.pop(key) for key in "qkv")
    assert rule.fla_form is not None
    output, after = rule.fla_form.call(q, k, v, state, boundaries, **call)
    expected, expected_after = rule.recurrent(q, k, v, state=state, cu_seqlens=boundaries, **call)
    torch.testing.assert_close((output, after), (expected, expected_after), rtol=0, atol=0)
    (_, seen), *_ = fake_fla
    assert seen["scale"] == 1.0
    assert seen["cu_seqlens"].tolist() == [0, 5, 12]
    assert seen["cu_seqlens"].dtype == torch.int64
    assert seen["initial_state"].shape[0] == 2


def test_linear_attention_uses_the_kernel_that_does_not_normalise(
    fake_fla: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor]:
        fake_fla.append(("chunk_simple_gla", keywords))
        return CALL["v"], torch.zeros(1, 2, 4, 3)

    monkeypatch.setattr(sys.modules["fla.ops.simple_gla"], "chunk_simple_gla", run)
    form = get_rule("linear_attention").fla_form
    assert form is not None
    form.call(CALL["q"], CALL["k"], CALL["v"], torch.zeros(1, 2, 4, 3), None)
    (_, seen) = fake_fla[-1]
    assert "normalize" not in seen
    assert seen["scale"] == 1.0


def test_a_package_without_the_kernel_is_named(fake_fla: list[tuple[str, dict[str, Any]]]) -> None:
    with pytest.raises(BackendUnavailable, match=r"fla\.ops\.gla\.chunk_other cannot be loaded \(AttributeError"):
        fla.call("gla", "chunk_other", CALL["q"], CALL["k"], CALL["v"], None, None)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "_PACKAGE", "no_such_package")
    reason = fla.why_unavailable()
    assert reason is not None
    assert "mnemon[cuda]" in reason


def test_a_package_that_does_not_import_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_kernels").mkdir()
    (tmp_path / "broken_kernels" / "__init__.py").touch()
    (tmp_path / "broken_kernels" / "ops.py").write_text("raise RuntimeError('0 active\\ndrivers')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fla, "_PACKAGE", "broken_kernels")
    assert fla.why_unavailable() == "flash-linear-attention cannot be imported (RuntimeError: 0 active drivers)"
