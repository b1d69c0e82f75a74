"""The contract of every update rule; a new rule file is covered without a line here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mnemon.ops import blocks, get_rule, list_rules
from mnemon.ops.checks import CHECKS, TOLERANCE, check_forms_agree, check_packed_is_separate, nonlinearity, variants
from mnemon.ops.declaration import Dimensions
from mnemon.ops.state import leaves

CASES = [
    pytest.param(name, options, id="-".join([name, *(f"{key}={value}" for key, value in options.items())]))
    for name in list_rules()
    for options in variants(get_rule(name))
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize(("name", "options"), CASES)
def test_rule_keeps_the_contract(name: str, options: dict[str, Any], check: Callable[..., None]) -> None:
    check(get_rule(name), options)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_rule_that_does_not_declare_itself_linear_in_values_is_not(name: str, options: dict[str, Any]) -> None:
    rule = get_rule(name)
    declared = rule.linear_in_values(**options)
    weights = {spec.name: torch.ones([4 for _ in spec.axes]) for spec in rule.parameters}
    state = rule.initial_state(Dimensions(1, 4, 4, 4, 4), torch.float32, **options, **weights)
    numbers = tuple(number for number, leaf in enumerate(leaves(state)) if leaf.is_floating_point())
    distance = nonlinearity(rule, options, declared or numbers)
    assert distance <= TOLERANCE if declared else distance > 1e-3


@pytest.mark.parametrize(("name", "options"), CASES)
def test_cutting_a_sequence_into_blocks_changes_nothing(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        blocks, "_BLOCK_NUMBERS", 1
    )  # a block is one chunk, and most are computed again in the backward
    check_forms_agree(get_rule(name), options, (17, 150))
    check_packed_is_separate(get_rule(name), options)
