"""HGRN2: gated linear attention whose keys are what its decay leaves free."""

import torch

from mnemon.ops import get_rule

RULE = get_rule("hgrn2")


def test_it_is_gated_linear_attention() -> None:
    call = RULE.random_inputs(2, 37, 2, 4, 5, dtype=torch.float64)
    for form in ("recurrent", "chunkwise"):
        output, state = getattr(RULE, form)(**call)
        expected, same = get_rule("gla").recurrent(**call)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, same, rtol=1e-12, atol=1e-12)


def test_with_its_keys_every_row_is_a_weighted_mean_of_values() -> None:
    call = RULE.random_inputs(2, 37, 2, 4, 5, dtype=torch.float64)
    call["k"] = 1 - call["g"].exp()
    _, memory = RULE.chunkwise(**call)
    lowest, highest = call["v"].amin(1)[:, :, None], call["v"].amax(1)[:, :, None]
    assert (memory >= lowest.clamp(max=0)).all()
    assert (memory <= highest.clamp(min=0)).all()
