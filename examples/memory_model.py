"""Give a small Llama a memory and look at what that promises: causality, streaming and exact cached generation.

The model is untrained, so what it writes means nothing; how it behaves is the same as for a trained one.
Run: python examples/memory_model.py   (a few seconds, no network)
"""

import torch
from transformers import LlamaConfig, set_seed

import mnemon


def build_model() -> "mnemon.LM2ForCausalLM":
    """Return a random two-block Llama with 16 memory slots, read and written every 32 tokens."""
    base = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    set_seed(0)  # Hugging Face initialises weights from the global generators
    return mnemon.LM2ForCausalLM(
        mnemon.LM2Config(base_config=base, num_slots=16, slot_dim=16, segment_length=32)
    ).eval()


@torch.inference_mode()
def main() -> None:
    """Print one line per property."""
    model = build_model()
    memory = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("memory."))
    print(f"{model.num_parameters():,} parameters, {memory:,} of them the memory's")

    tokens = torch.randint(256, (1, 100), generator=torch.Generator().manual_seed(1))
    logits = model(tokens).logits

    changed = tokens.clone()
    changed[0, 70] = (changed[0, 70] + 1) % 256
    earlier = (model(changed).logits[:, :70] - logits[:, :70]).abs().max().item()
    later = (model(changed).logits[:, 96:] - logits[:, 96:]).abs().max().item()
    print(f"token 70 changed: earlier logits moved by {earlier:.1e}, logits two segments on by {later:.1e}")

    first = model(tokens[:, :45], use_cache=True)
    second = model(tokens[:, 45:], past_key_values=first.past_key_values, use_cache=True)
    streamed = torch.cat([first.logits, second.logits], dim=1)
    print(f"read in two calls instead of one: largest difference {(streamed - logits).abs().max().item():.1e}")

    cached = model.generate(tokens, max_new_tokens=20, do_sample=False)
    uncached = tokens
    for _ in range(20):
        uncached = torch.cat([uncached, model(uncached).logits[:, -1:].argmax(-1)], dim=1)
    print(
        f"generated with a cache and without: {'the same' if torch.equal(cached, uncached) else 'DIFFERENT'} 20 tokens"
    )


if __name__ == "__main__":
    main()
