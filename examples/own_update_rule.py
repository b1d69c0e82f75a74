"""Write an update rule outside the package, have it checked, and use it like a built-in one.

The rule is the delta rule with an implicit step: instead of one gradient step towards the new value, which overshoots
where a key is long, it goes to the best compromise between the old memory and the new value.
Run: python examples/own_update_rule.py   (some seconds, no network)
"""

import time

import torch
from torch import Tensor
from transformers import LlamaConfig, set_seed

import mnemon
from mnemon.ops import get_rule, list_rules, register_rule
from mnemon.ops.checks import CHECKS, variants
from mnemon.ops.delta import chunkwise as delta_chunkwise
from mnemon.ops.rule import GateSpec, Source, UpdateRule
from mnemon.ops.state import empty_matrix


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Find the S' that minimises |S' - S|^2 + beta |k S' - v|^2, then read it; S is [B, H, K, V], beta [B, H]."""
    share = beta / (1 + beta * k.square().sum(-1))
    error = v - torch.einsum("bhk,bhkv->bhv", k, state)
    state = state + k[..., :, None] * (share[..., None] * error)[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q, state), state


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, chunk_size: int, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the same with matrix products: it is a delta rule with a smaller write strength."""
    share = beta / (1 + beta * k.square().sum(-1))
    return delta_chunkwise(q, k, v, state, chunk_size=chunk_size, beta=share)


RULE = UpdateRule(
    name="implicit_delta",
    equation="S ← S + kᵀ β/(1 + β|k|²) (v − kS);  o = q S",
    source=Source("Longhorn: State Space Models are Amortized Online Learners", "2407.14207", "the exact solution"),
    gates=(
        GateSpec("beta", "head", "positive", identity=0.0, meaning="weight of the new value against the old memory"),
    ),
    init_state=empty_matrix,
    step=step,
    state_size="K*V",
    recurrent_flops="6*K*V + 2*K",
    chunkwise_form=chunkwise,
    chunkwise_flops="6*K*V + 2*C*(3*K + 2*V) + 2*K",
    chunk_size=32,
    light_backward=True,
    linear_tensors=(0,),
)


def check_the_contract() -> None:
    """Compare the two forms with each other, gradients included, and test the rest of what a rule promises."""
    for check in CHECKS:
        for options in variants(RULE):
            check(RULE, options)
        print(f"  {check.__name__.removeprefix('check_').replace('_', ' ')}")


@torch.no_grad()
def compare_with_the_delta_rule() -> None:
    """Write 256 values under keys of growing length and look how far the last ones are from what is recalled."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 256, 1, 64, generator=generator) for _ in range(2))
    keys = torch.nn.functional.normalize(keys, dim=-1)
    beta = torch.full((1, 256, 1), 0.9)
    for length in (1.0, 1.5, 2.0):
        errors = {}
        for name in ("delta_net", RULE.name):
            _, state = get_rule(name)(length * keys, length * keys, values, beta=beta)
            recalled = torch.einsum("bthk,bhkv->bthv", length * keys, state)
            errors[name] = (recalled - values)[:, -8:].square().mean().sqrt().item()
        print(f"  keys of length {length}: " + ", ".join(f"{name} {error:.2g}" for name, error in errors.items()))


@torch.no_grad()
def compare_the_speed_of_the_forms(tokens: int = 2048) -> None:
    """Time both forms on the same inputs; the shortest of three runs counts."""
    inputs = RULE.random_inputs(1, tokens, 4, 64, 64)
    seconds = {}
    for form in (RULE.recurrent, RULE.chunkwise):
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            form(**inputs)
            runs.append(time.perf_counter() - start)
        seconds[form.__name__] = min(runs)
    print(f"  {tokens} tokens: chunkwise {seconds['recurrent'] / seconds['chunkwise']:.0f} times as fast as recurrent")


@torch.no_grad()
def use_it_in_a_model() -> None:
    """Build a mixture of four memories of the rule; its projections and its gate come from the declaration."""
    base = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    set_seed(0)
    # A fresh memory adds little by default; here it is to be heard, so that the comparison below says something.
    config = mnemon.MoMConfig(base_config=base, rule=RULE.name, num_heads=2, head_dim=32, initial_output=1.0)
    model = mnemon.MoMForCausalLM(config).eval()
    tokens = torch.randint(64, (1, 100), generator=torch.Generator().manual_seed(1))
    first = model(tokens[:, :45], use_cache=True)
    second = model(tokens[:, 45:], past_key_values=first.past_key_values, use_cache=True)
    streamed = torch.cat([first.logits, second.logits], dim=1)
    print(f"  {model.num_parameters():,} parameters; read in two calls instead of one, the logits differ by at most "
          f"{(streamed - model(tokens).logits).abs().max().item():.0e}")  # fmt: skip


if __name__ == "__main__":
    register_rule(RULE)
    print(f"{RULE.name} is one of {len(list_rules())} rules. It passes:")
    check_the_contract()
    print("Error of what is recalled (the values have size 1):")
    compare_with_the_delta_rule()
    print("Speed:")
    compare_the_speed_of_the_forms()
    print("In a model:")
    use_it_in_a_model()
