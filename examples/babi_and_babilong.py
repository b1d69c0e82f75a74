"""Make stories with questions, hide them in background text, and answer from the facts alone.

Run: python examples/babi_and_babilong.py   (some seconds, no network)
"""

from mnemon.data import babi, babilong
from mnemon.data.background import load_background
from mnemon.data.tokenizer import train_tokenizer


def show_a_story(task: str = "qa2") -> None:
    """Print one generated story with the oracle's answers and the lines that support them."""
    story = babi.generate(task, 1, seed=0)[0]
    for line in story.lines:
        if isinstance(line, babi.Question):
            answer = babi.solve(story, line)
            print(f"{line.line:3} {line.text}  {answer}  (supported by lines {line.supporting})")
        else:
            print(f"{line.line:3} {line.text}")


def check_the_oracle(stories_per_task: int = 50) -> None:
    """Compare the generator's answers with those of the oracle, which never looks at them."""
    for task in babi.GENERATED_TASKS:
        stories = babi.generate(task, stories_per_task, seed=1)
        pairs = [(babi.solve(story, asked), asked.answer) for story in stories for asked in story.questions]
        right = sum(solved == answer for solved, answer in pairs)
        print(f"{task}: {right} of {len(pairs)} questions answered from the facts alone")


def hide_a_story(task: str = "qa1", length: str = "1k") -> None:
    """Print a prompt whose facts are hidden in Python's own documentation, at an exact length in tokens."""
    documents = load_background("stdlib", "train").documents[:40]
    tokenizer = train_tokenizer((" ".join(document.sentences) for document in documents), vocab_size=1000)
    sample = next(babilong.generate(task, babilong.parse_length(length), 1, tokenizer, seed=0))
    tokens = len(tokenizer(sample.input, add_special_tokens=False)["input_ids"])
    prompt = babilong.build_prompt(task, sample.input, sample.question)
    print(f"\n{tokens} tokens of context; the prompt ends with:\n...{prompt[-300:]}\nexpected: {sample.target}")


if __name__ == "__main__":
    show_a_story()
    check_the_oracle()
    hide_a_story()
