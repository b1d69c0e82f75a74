"""Train a small mixture of memories on stories, and look which words its router sends to which memory.

Run: python examples/inspect_routing.py   (about half a minute, no network)
"""

import torch
from transformers import AutoTokenizer, LlamaConfig, set_seed

import mnemon
from mnemon.data import babi
from mnemon.inspection.record import record
from mnemon.inspection.trace import MixtureLayer, Source
from mnemon.models.names import resolve

STEPS, ROWS, TOKENS = 140, 8, 128


def stories(tokenizer, seed: int) -> torch.Tensor:
    """Return the token ids of stories about people who move, take and drop things, one after another."""
    told = [babi.generate(task, 40, seed=seed) for task in ("qa1", "qa2", "qa5", "qa7")]
    lines = [line.text for group in zip(*told, strict=True) for story in group for line in story.lines]
    return torch.tensor(tokenizer(" ".join(lines), add_special_tokens=False)["input_ids"])


def build_model(tokenizer) -> mnemon.MoMForCausalLM:
    """Return a Llama of two blocks whose attention is four memories; a token goes to one of them and a shared one."""
    base = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    set_seed(0)
    return mnemon.MoMForCausalLM(
        mnemon.MoMConfig(base_config=base, rule="gated_delta_net", num_memories=4, top_k=1, num_heads=2, head_dim=32)
    )


def train(model: mnemon.MoMForCausalLM, ids: torch.Tensor) -> None:
    """Teach the model to tell the next token; the balance loss, which keeps every memory in use, is added inside."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for number in range(STEPS):
        starts = torch.randint(len(ids) - TOKENS, (ROWS,), generator=generator)
        batch = torch.stack([ids[start : start + TOKENS] for start in starts.tolist()])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if (number + 1) % (STEPS // 2) == 0:
            print(f"step {number + 1}: loss {loss.item():.2f}")
    model.eval()


def show(layer: MixtureLayer) -> None:
    """Print how the tokens of a text are spread over the memories of a layer, and each memory's own words."""
    print(f"\nblock {layer.layer}: mean entropy of the router {layer.entropy.mean():.2f} nats")
    for memory, words in enumerate(layer.special_words):
        named = ", ".join(f"{word.word.strip()} {word.lift:.1f}" for word in words[:6])
        print(f"  memory {memory}: {layer.load[memory]:4.0%} of the tokens; {named}")


def main() -> None:
    """Train, read a new text, look."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(resolve("babilong-tiny-lm2"))
    model = build_model(tokenizer)
    train(model, stories(tokenizer, seed=0))
    unseen = stories(tokenizer, seed=1)[:3000]
    trace = record(model, tokenizer, unseen.tolist(), Source("text", "new stories"))
    print(f"\n{trace.text.num_tokens:,} tokens of new stories. Beside a word: its share of the memory's tokens over")
    print("its share of all tokens.")
    for layer in trace.mixture:
        show(layer)


if __name__ == "__main__":
    main()
