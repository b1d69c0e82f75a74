"""Where the memory sits and how large it is (Figure 5 of the paper): every choice in a recipe changes the model."""

import pytest
import torch
from lm2_cases import SEGMENT, tokens

from mnemon.models.modeling_lm2 import LM2ForCausalLM
from mnemon.training.build import build_model, count_parameters
from mnemon.training.recipe_io import check_recipe

BLOCKS = 12
PLACES = {"first block": 1, "first third": 4, "first three quarters": 9, "all": 12}
LM2 = {"num_slots": 6, "slot_dim": 8, "num_memory_heads": 2, "segment_length": SEGMENT, "flow": "depth"}


def build(**options) -> LM2ForCausalLM:
    """Build the model of a recipe with these memory options, its gates and convolution not at their neutral start."""
    base = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": BLOCKS, "num_attention_heads": 2,
            "num_key_value_heads": 2, "intermediate_size": 24}  # fmt: skip
    recipe = check_recipe(
        {
            "name": "placement",
            "model": {"kind": "lm2", "base": base, "lm2": LM2 | options},
            "data": {"tasks": ["qa1"], "lengths": [0]},
            "optimisation": {"max_tokens": 1},
        }
    )
    model = build_model(recipe, 50)
    assert isinstance(model, LM2ForCausalLM)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for bank in model.banks:
            moved = [bank.output_gate, bank.input_gate, bank.forget_gate, bank.write_conv]
            for module in (module for module in moved if module is not None):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    return model.eval()


def last_logits(model: LM2ForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(1, 4 * SEGMENT + 2)).logits[0, -1]


@pytest.mark.parametrize("flow", ["depth", "layer"])
def test_memory_in_more_blocks_is_more_memory_and_another_model(flow):
    models = {name: build(memory_layers=list(range(count)), flow=flow) for name, count in PLACES.items()}
    sizes = [count_parameters(model)["memory"] for model in models.values()]
    assert [size / sizes[0] for size in sizes] == list(PLACES.values())
    assert [len(model.banks) for model in models.values()] == list(PLACES.values())
    logits = [last_logits(model) for model in models.values()]
    for one in range(len(logits)):
        for other in range(one):
            assert not torch.allclose(logits[one], logits[other], atol=1e-6)
    everywhere = build(memory_layers=None, flow=flow)
    assert torch.equal(last_logits(everywhere), logits[-1])


def test_memory_need_not_start_at_the_first_block():
    assert not torch.allclose(last_logits(build(memory_layers=[0])), last_logits(build(memory_layers=[11])), atol=1e-6)


@pytest.mark.parametrize("flow", ["depth", "layer"])
def test_the_state_holds_one_bank_per_flow_and_place(flow):
    model = build(memory_layers=[2, 5, 7], flow=flow)
    assert model.initial_state(2).bank.shape == (2, 1 if flow == "depth" else 3, 6, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"num_slots": 7}, {"slot_dim": 10}, {"num_memory_heads": 4}, {"segment_length": SEGMENT + 1}, {"flow": "layer"},
        {"retention": 0.99}, {"gate_stretch": 0.2}, {"skip_gate": True}, {"read_top_k": 2}, {"attention_span": 9},
        {"attention_span": 9, "attention_sinks": 2}, {"coupled_gates": True}, {"write_query": "bank"},
        {"write_query": "key"}, {"write_conv": 3},
    ],
    ids=lambda change: " and ".join(change),
)  # fmt: skip
def test_every_memory_field_of_a_recipe_changes_what_the_model_says(change):
    assert not torch.allclose(last_logits(build()), last_logits(build(**change)), atol=1e-6)
