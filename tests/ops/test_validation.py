"""What a caller can get wrong, and the one line that says so."""

from typing import Any

import pytest
import torch

from mnemon.errors import ConfigError, MnemonError, ShapeError, StateError
from mnemon.ops import get_rule

RULE = get_rule("gated_delta_net")
CALL = RULE.random_inputs(1, 6, 2, 4, 3)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in CALL.items() if key != name}


MISTAKES: dict[str, tuple[dict[str, Any], type[MnemonError], str]] = {
    "three dimensions": (CALL | {"q": CALL["q"][0]}, ShapeError, r"expected q and k \[B, T, H, K\]"),
    "lengths differ": (CALL | {"v": CALL["v"][:, :5]}, ShapeError, r"v \[1, 5, 2, 3\]"),
    "dtypes differ": (CALL | {"v": CALL["v"].bfloat16()}, ShapeError, "one floating dtype"),
    "integers": (CALL | {name: CALL[name].int() for name in "qkv"}, ShapeError, "one floating dtype"),
    "a missing gate": (without("beta"), ShapeError, "needs the tensor beta, got NoneType; pass beta="),
    "a number as gate": (CALL | {"beta": 0.5}, ShapeError, "needs the tensor beta, got float"),
    "an unknown gate": (CALL | {"gamma": CALL["g"]}, ConfigError, "unknown keyword 'gamma'; it takes g, beta"),
    "a gate per channel": (CALL | {"g": CALL["g"][..., None]}, ShapeError, r"g must have the shape \[1, 6, 2\]"),
    "a gate in bfloat16": (CALL | {"g": CALL["g"].bfloat16()}, ShapeError, "g must be torch.float32"),
    "a decay above 0": (CALL | {"g": -CALL["g"]}, ShapeError, r"g must lie in \[-inf, 0\], got values from"),
    "a NaN": (CALL | {"beta": CALL["beta"] * float("nan")}, ShapeError, r"beta must lie in \[0, 1\]"),
    "packed rows": (
        RULE.random_inputs(2, 6, 2, 4, 3) | {"cu_seqlens": torch.tensor([0, 6])},
        ShapeError,
        "cu_seqlens needs a batch of 1, got 2",
    ),
    "boundaries end early": (CALL | {"cu_seqlens": torch.tensor([0, 5])}, ShapeError, r"rise from 0 to T = 6, got"),
    "boundaries start late": (CALL | {"cu_seqlens": torch.tensor([1, 6])}, ShapeError, "rise from 0 to T = 6"),
    "boundaries fall": (CALL | {"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ShapeError, "rise from 0 to T = 6"),
    "boundaries as fractions": (CALL | {"cu_seqlens": torch.tensor([0.0, 6.0])}, ShapeError, "must be integers"),
    "a float mask": (CALL | {"mask": torch.ones(1, 6)}, ShapeError, "mask must be torch.bool"),
    "mask and boundaries": (
        CALL | {"mask": torch.ones(1, 6, dtype=torch.bool), "cu_seqlens": torch.tensor([0, 6])},
        ShapeError,
        "exclude each other",
    ),
    "a state of another batch": (CALL | {"state": torch.zeros(2, 2, 4, 3)}, StateError, r"got torch.float32 \[2,"),
    "a state per sequence": (
        CALL | {"state": torch.zeros(1, 2, 4, 3), "cu_seqlens": torch.tensor([0, 2, 6])},
        StateError,
        r"must be torch.float32 \[2, 2, 4, 3\]",
    ),
    "a state in bfloat16": (CALL | {"state": torch.zeros(1, 2, 4, 3).bfloat16()}, StateError, "torch.bfloat16"),
    "a tuple as state": (CALL | {"state": (torch.zeros(1, 2, 4, 3),)}, StateError, "must be a Tensor, got a tuple"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_a_mistake_is_named_in_one_line(mistake: str, form: str) -> None:
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message) as caught:
        RULE(**call, form=form)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, True])
def test_a_chunk_needs_a_token(chunk_size: Any) -> None:
    with pytest.raises(ConfigError, match="chunk_size must be an integer of at least 1"):
        RULE.chunkwise(**CALL, chunk_size=chunk_size)


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_no_tokens_change_nothing(form: str) -> None:
    state = torch.randn(1, 2, 4, 3)
    empty = {name: tensor[:, :0] for name, tensor in CALL.items()}
    output, after = RULE(**empty, state=state, form=form)
    assert output.shape == (1, 0, 2, 3)
    assert torch.equal(after, state)


def test_inputs_and_state_of_the_caller_stay_as_they_were() -> None:
    state = torch.randn(1, 2, 4, 3)
    before = {name: tensor.clone() for name, tensor in (CALL | {"state": state}).items()}
    for form in ("recurrent", "chunkwise"):
        RULE(**CALL, state=state, form=form)
    assert all(torch.equal(before[name], tensor) for name, tensor in (CALL | {"state": state}).items())
