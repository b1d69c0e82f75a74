"""Read a book once, keep what is remembered as a file, and ask later without reading again.

The book is made on the spot: 64,000 tokens of Python's own documentation in which somebody has hidden where some people
went. The model ships with mnemon; its attention sees 32 tokens, everything else is in its memory.
Run: python examples/remember_a_book.py   (about a quarter of a minute, no network)
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers.utils.logging import disable_progress_bar

import mnemon
from mnemon.data import babilong
from mnemon.errors import MnemonError
from mnemon.models.loading import load_model

MODEL, LENGTH = "babilong-tiny-lm2", "64k"


def ask(model, tokenizer, memory: mnemon.MemoryState | None, question: str) -> str:
    """Return the model's answer to a question about what is in the memory; the memory stays as it is."""
    prompt = encode(tokenizer, f"\n</context>\n\nQuestion: {question}\nAnswer:")
    answer = model.generate(prompt, memory=memory, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def encode(tokenizer, text: str) -> torch.Tensor:
    """Return the token ids of a text, [1, T]."""
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def main() -> None:
    """Read, save, load, ask, read on."""
    torch.set_num_threads(1)
    disable_progress_bar()  # of the library, for every weight it loads
    model, tokenizer = load_model(MODEL)
    book = next(babilong.generate("qa1", LENGTH, 1, tokenizer, seed=6, num_questions=4))
    pages = encode(tokenizer, f"<context>\n{book.input}")
    print(f"The book has {pages.shape[1]:,} tokens; {len(book.facts)} of its sentences say where somebody went.")

    with TemporaryDirectory() as folder:
        path = Path(folder) / "book.memory.safetensors"
        model.memorize(pages).save(path, tokenizer=tokenizer)
        print(f"What the model remembers of it takes {path.stat().st_size / 1024:.0f} KiB.\n")

        memory = mnemon.MemoryState.load(path)
        for question, expected in ((book.question, book.target), *book.questions):
            said = ask(model, tokenizer, memory, question)
            blank = ask(model, tokenizer, None, question)
            print(f"{question} {said} (right: {expected}; without the memory: {blank})")

        other, _ = load_model("babilong-tiny-window")
        try:
            ask(other, tokenizer, memory, book.question)
        except MnemonError as error:
            print(f"\nAnother model refuses the file: {error}")

    person = book.question.split()[-1].rstrip("?")
    place = "garden" if book.target != "garden" else "kitchen"
    later = model.memorize(encode(tokenizer, f" {person} went to the {place}."), state=memory)
    print(f"\nThe next page says that {person} went to the {place}.")
    print(f"{book.question} {ask(model, tokenizer, later, book.question)}")
    print(f"The memory of the first pages still says: {ask(model, tokenizer, memory, book.question)}")


if __name__ == "__main__":
    main()
