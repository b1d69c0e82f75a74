"""What the README claims about the shipped models, on a few fresh questions."""

from mnemon.evaluation.babilong import evaluate_babilong
from mnemon.models.loading import load_model


def right_answers(model, tokenizer, **generate_kwargs) -> int:
    result = evaluate_babilong(
        model,
        tokenizer,
        tasks=("qa1",),
        lengths=("1k",),
        num_samples=16,
        seed=77,
        background="stdlib",
        layout="short",
        generate_kwargs=generate_kwargs,
        label="model",
    )
    return sum(result.cells[0].marks("exact"))


def test_the_shipped_lm2_answers_from_its_memory_and_not_without_it():
    model, tokenizer = load_model("babilong-tiny-lm2")
    assert right_answers(model, tokenizer) >= 14
    assert right_answers(model, tokenizer, knock_out_memory=True) <= 10
