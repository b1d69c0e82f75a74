"""The prompt layout of BABILong.

Source: "BABILong", arXiv 2406.10149; the wording is our own.
"""

from __future__ import annotations


def build_prompt(
    task: str, context: str, question: str, *, instruction: bool = True, examples: bool = True, post_prompt: bool = True
) -> str:
    """Return the prompt for one sample: instruction, examples, answer form, text and question.

    Args:
        task: `"qa1"` ... `"qa20"`.
        context: the text with the hidden facts.
        question: the question.
        instruction: whether to begin with the task's instruction.
        examples: whether to show solved examples.
        post_prompt: whether to say in which form to answer.
    """
    parts = [f"<context>\n{context}\n</context>", f"Question: {question}"]
    return "\n\n".join(parts).strip()
