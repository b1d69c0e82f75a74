"""Give a decoder on your disk a memory, train the memory alone, and keep it in a file of its own.

The decoder is one that ships with mnemon; a folder with any Hugging Face decoder works the same way. Its attention is
cut to 32 tokens, so that what lies further back is gone unless the memory brings it.
Run: python examples/add_a_memory.py   (about half a minute, no network)
"""

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import mnemon
from mnemon.data import babi
from mnemon.data.background import load_background
from mnemon.data.encoding import IGNORED, training_example
from mnemon.data.sample import Sample
from mnemon.models.base_model import fingerprint, load_base
from mnemon.models.names import resolve

BASE = "babilong-tiny-plain"  # or a folder, or a name on the Hugging Face hub
STEPS, ROWS = 160, 12
MEMORY = {"num_slots": 16, "slot_dim": 32, "segment_length": 32}


def main() -> None:
    """Graft, train, compare, save."""
    torch.set_num_threads(1)
    disable_progress_bar()  # of the library, for every weight it loads
    tokenizer = AutoTokenizer.from_pretrained(resolve(BASE))
    show_that_nothing_changed()

    model = mnemon.LM2ForCausalLM.from_base(BASE, freeze_base=True, attention_span=32, **MEMORY)
    total, trainable = model.num_parameters(), model.num_parameters(only_trainable=True)
    print(f"{trainable:,} of {total:,} parameters train: the memory")
    before = fingerprint(model.base)

    questions = [questions_about(tokenizer, "test", ROWS, seed) for seed in range(8)]
    print(f"right answers before: {share_right(model, questions):.0%}")
    train(model, tokenizer)
    print(f"right answers after:  {share_right(model, questions):.0%}")
    print(f"memory knocked out:   {share_right(model, questions, knock_out_memory=True):.0%}")
    print(f"the decoder is {'the same' if fingerprint(model.base) == before else 'ANOTHER'} as before")

    with TemporaryDirectory() as folder:
        saved = model.save_adapter(Path(folder) / "my-memory")
        again = mnemon.LM2ForCausalLM.from_adapter(saved)
        bytes_of_it = (saved / "memory.safetensors").stat().st_size
        same = share_right(again, questions) == share_right(model, questions)
        print(
            f"saved without the decoder: {bytes_of_it / 1024:.0f} KiB; "
            f"loaded again, it answers {'alike' if same else 'OTHERWISE'}"
        )


@torch.inference_mode()
def show_that_nothing_changed() -> None:
    """Compare the logits of the decoder with those of the decoder with a fresh memory."""
    tokens = torch.randint(3, 2000, (1, 200), generator=torch.Generator().manual_seed(0))
    plain = load_base(BASE).eval()
    grafted = mnemon.LM2ForCausalLM.from_base(BASE, **MEMORY).eval()
    segment = tokens[:, : MEMORY["segment_length"]]
    difference = (plain(segment).logits - grafted(segment).logits).abs().max().item()
    print(f"a fresh memory changes no logit: largest difference {difference:.0e} within a segment")
    difference = (plain(tokens).logits - grafted(tokens).logits).abs().max().item()
    print(f"over several segments no more than rounding: {difference < 1e-4}")


def questions_about(tokenizer, split: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, labels and mask of texts with a question each: two facts, then prose of 40 tokens or more."""
    rng = random.Random(f"{split} {seed}")
    documents = load_background("stdlib", split).documents
    rows = []
    for story in babi.generate("qa1", count, seed=rng.getrandbits(32)):
        question = story.questions[0]
        prose: list[str] = []
        while len(tokenizer(" ".join(prose))["input_ids"]) < 40:
            prose.append(rng.choice(rng.choice(documents).sentences))
        text = " ".join([*(fact.text for fact in story.facts_before(question)), *prose])
        sample = Sample("qa1", 0, text, question.text, question.answer)
        rows.append(training_example(sample, tokenizer))
    width = max(len(ids) for ids, _ in rows)
    pairs = [(width - len(ids), ids, labels) for ids, labels in rows]
    ids = torch.tensor([[tokenizer.pad_token_id] * pad + row for pad, row, _ in pairs])
    labels = torch.tensor([[IGNORED] * pad + row for pad, _, row in pairs])
    mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row, _ in pairs])
    return ids, labels, mask


def train(model: mnemon.LM2ForCausalLM, tokenizer) -> None:
    """Train what can be trained on fresh stories."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=STEPS, pct_start=0.1)
    model.train()
    losses = []
    for number in range(STEPS):
        ids, labels, mask = questions_about(tokenizer, "train", ROWS, seed=number)
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if (number + 1) % (STEPS // 4) == 0:
            print(f"  step {number + 1}: loss {sum(losses[-20:]) / 20:.2f}")
    model.eval()


@torch.inference_mode()
def share_right(model: mnemon.LM2ForCausalLM, batches: list, **options: bool) -> float:
    """Return the share of answers whose every token is the likeliest one."""
    model.eval()
    right = asked = 0
    for ids, labels, mask in batches:
        likeliest = model(ids, attention_mask=mask, **options).logits.argmax(-1)[:, :-1]
        wrong = (likeliest != labels[:, 1:]) & (labels[:, 1:] != IGNORED)
        right += int((~wrong.any(dim=1)).sum())
        asked += len(ids)
    return right / asked


if __name__ == "__main__":
    main()
