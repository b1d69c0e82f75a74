"""Tiny models, an oracle that always knows the answer, and made-up results for everything that only displays them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mnemon.data import babilong
from mnemon.data.babi import generate as generate_stories
from mnemon.data.babilong import Sample
from mnemon.data.tokenizer import train_tokenizer
from mnemon.evaluation.comparison import Comparison
from mnemon.evaluation.results import BabilongResult, Cell, EvaluationSettings, ModelInfo, Prediction
from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.modeling_lm2 import LM2ForCausalLM


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    stories = [story for task in ("qa1", "qa6") for story in generate_stories(task, 30, seed=1)]
    texts = [" ".join(line.text for line in story.lines) for story in stories]
    return train_tokenizer([*texts, "yes no office <context>\n</context>\n\nQuestion: Answer:"], vocab_size=400)


def _llama(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.fixture(scope="session")
def plain(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(_llama(tokenizer)).eval()


@pytest.fixture(scope="session")
def lm2(tokenizer: PreTrainedTokenizerFast) -> LM2ForCausalLM:
    torch.manual_seed(1)
    config = LM2Config(base_config=_llama(tokenizer), num_slots=4, slot_dim=16, segment_length=16, attention_span=16)
    model = LM2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.startswith("memory."):  # loud enough that knocking the bank out changes answers
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="session")
def window(tokenizer: PreTrainedTokenizerFast) -> LM2ForCausalLM:
    torch.manual_seed(2)
    config = LM2Config(base_config=_llama(tokenizer), memory_layers=[], segment_length=16, attention_span=16)
    return LM2ForCausalLM(config).eval()


class FakeSource:
    """Gives the same few samples without any background, and counts how often it is asked."""

    def __init__(self, num_samples: int = 5) -> None:
        self.num_samples, self.asked = num_samples, 0

    def cell(self, task: str, length: str) -> Sequence[Sample]:
        self.asked += 1
        stories = generate_stories(task, self.num_samples, seed=babilong.parse_length(length))
        return [
            Sample(
                task=task,
                length=babilong.parse_length(length),
                input=" ".join(fact.text for fact in story.facts_before(story.questions[1])),
                question=story.questions[1].text,
                target=story.questions[1].answer,
            )
            for story in stories
        ]


@pytest.fixture
def fake_source() -> FakeSource:
    return FakeSource()


class Oracle(torch.nn.Module):
    """Stands in for a perfect model: knows the answer to every prompt it was told, and says nothing else."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answers: dict[str, str]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(model_type="oracle")
        self.device = torch.device("cpu")
        self.calls: list[dict[str, Any]] = []
        self._tokenizer, self._answers = tokenizer, answers

    def forward(self, input_ids: torch.Tensor) -> None:
        raise NotImplementedError

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any, **kwargs: Any
    ) -> torch.Tensor:
        self.calls.append({"batch": len(input_ids), **kwargs})
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self._tokenizer.decode(ids[mask.bool()])
            answer = self._tokenizer(f" {self._answers[prompt]}", add_special_tokens=False)["input_ids"]
            rows.append([*ids.tolist(), *answer, self._tokenizer.eos_token_id])
        width = max(map(len, rows))
        return torch.tensor([row + [self._tokenizer.pad_token_id] * (width - len(row)) for row in rows])


@pytest.fixture
def make_oracle(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Oracle]:
    from mnemon.data.encoding import evaluation_prompt

    def build(source: FakeSource, tasks: Sequence[str], lengths: Sequence[str]) -> Oracle:
        samples = [sample for task in tasks for length in lengths for sample in source.cell(task, length)]
        return Oracle(tokenizer, {evaluation_prompt(sample): sample.target for sample in samples})

    return build


def invented_result(
    label: str,
    skill: Callable[[int, str], float],
    *,
    role: str = "plain",
    tasks: Sequence[str] = ("qa1", "qa6"),
    lengths: Sequence[str] = ("0k", "1k", "4k"),
    num_samples: int = 40,
    parameters: int = 100_000,
) -> BabilongResult:
    rng = random.Random(label)
    settings = EvaluationSettings(
        tuple(tasks), tuple(lengths), num_samples, 0, "stdlib", "generated", "test", "short", 20
    )
    cells = []
    for step, length in enumerate(lengths):
        for task in tasks:
            right = [rng.random() < skill(step, task) for _ in range(num_samples)]
            predictions = tuple(
                Prediction(
                    f"{task}-{length}-{i:04d}", task, length, f"sample {task} {length} {i}", "prompt",
                    "Where is Mary?", "office", "office" if mark else "garden", mark, mark,
                )
                for i, mark in enumerate(right)
            )  # fmt: skip
            cells.append(Cell(task, length, predictions, 1.5, 1000, 60))
    info = ModelInfo(f"runs/{label}", "llama", role, parameters, 0, "abc", {"tokens": 1000, "trained_length": 2000})
    return BabilongResult(label, info, settings, {}, tuple(cells))


def seeded(result: BabilongResult, seed: int, label: str = "", recipe: str = "tiny") -> BabilongResult:
    """Give a result the training facts of a recipe and a seed."""
    training = {**result.model.training, "name": recipe, "seed": seed}
    return replace(result, label=label or result.label, model=replace(result.model, training=training))


@pytest.fixture
def give_seed() -> Callable[..., BabilongResult]:
    return seeded


@pytest.fixture
def invent() -> Callable[..., BabilongResult]:
    return invented_result


@pytest.fixture
def four_models() -> Comparison:
    return Comparison(
        [
            invented_result("LM2", lambda step, task: 0.95, role="lm2"),
            invented_result("LM2 (knocked out)", lambda step, task: 0.9 - 0.3 * step, role="knocked_out"),
            invented_result("plain", lambda step, task: 0.95 - 0.3 * step),
            invented_result("window", lambda step, task: 0.9 if step == 0 else 0.3, role="window"),
        ]
    )


@pytest.fixture
def two_seeds(four_models: Comparison) -> tuple[BabilongResult, ...]:
    """Return the four models, each with two training seeds whose recipes have names of their own."""
    return tuple(
        seeded(result, seed, recipe=f"{result.label}-seed{seed}") for result in four_models.results for seed in (0, 1)
    )
