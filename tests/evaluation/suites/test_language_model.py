"""Scores and answers must not depend on what else is in a batch, and must be those of the harness's own wrapper."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from mnemon.errors import ConfigError, DataError
from mnemon.evaluation.clock import forward_clock
from mnemon.evaluation.controls import ModelSpec
from mnemon.evaluation.harness.language_model import HarnessModel, longest_input
from mnemon.evaluation.harness.likelihood import continuation_scores

TOLERANCE = 1e-5  # rotary angles, norms and softmax are computed in float32 even for float64 models
WORDS = "Mary moved to the garden . John went kitchen Where is football hallway Sandra back".split()


def texts(count: int, longest: int = 40) -> list[str]:
    rng = random.Random(5)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def mixed_requests() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Contexts and continuations of many lengths, some sharing their contexts."""
    rng = random.Random(1)
    pairs = []
    for length in (1, 2, 7, 16, 17, 33):
        context = tuple(rng.randrange(3, 300) for _ in range(length))
        continuation = tuple(rng.randrange(3, 300) for _ in range(rng.choice([1, 1, 3, 9])))
        pairs += [(context, continuation), (context, (*continuation[:-1], rng.randrange(3, 300)))]
    return pairs


def test_scores_do_not_depend_on_the_batch_and_are_those_of_a_plain_forward(spec: ModelSpec) -> None:
    pairs = mixed_requests()
    alone = continuation_scores(spec.model, pairs, batch_size=1)
    together = continuation_scores(spec.model, pairs, batch_size=100, max_batch_tokens=10**6)
    for (context, continuation), one, many in zip(pairs, alone, together, strict=True):
        with torch.no_grad():
            logits = spec.model(input_ids=torch.tensor([[*context, *continuation[:-1]]])).logits[0]
        log_p = logits.log_softmax(-1)[len(context) - 1 :]
        direct = log_p[range(len(continuation)), list(continuation)].sum().item()
        assert one[0] == pytest.approx(direct, abs=TOLERANCE)
        assert many[0] == pytest.approx(direct, abs=TOLERANCE)
        assert one[1] == many[1] == (log_p.argmax(-1).tolist() == list(continuation))


class WholeRowReader(torch.nn.Module):
    """Stands in for a memory that reads the whole row before it answers: only a mask keeps padding out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(300, 300, generator=torch.Generator().manual_seed(0)))
        self.config, self.device = SimpleNamespace(vocab_size=300), torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        read = (self.table[input_ids] * mask[..., None]).sum(1, keepdim=True)
        return SimpleNamespace(logits=read.expand(-1, input_ids.shape[1], -1))


def test_padding_is_masked() -> None:
    model = WholeRowReader()
    alone = continuation_scores(model, mixed_requests(), batch_size=1, max_batch_tokens=10**6)
    together = continuation_scores(model, mixed_requests(), max_batch_tokens=10**6)
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], rel=1e-4)


def test_requests_that_differ_in_their_last_token_are_read_once(spec: ModelSpec) -> None:
    context = (5, 6, 7)
    with forward_clock(spec.model) as clock:
        scores = continuation_scores(spec.model, [(context, (8,)), (context, (9,)), (context, (10,))], batch_size=1)
    assert clock.calls == 1
    assert len({score for score, _ in scores}) == 3


def test_rolling_texts_and_answers_do_not_depend_on_the_batch(spec: ModelSpec) -> None:
    stories = texts(7)
    alone, together = (
        HarnessModel(spec, context_length=24, batch_size=size, max_batch_tokens=10**6) for size in (1, 100)
    )
    rolling = requests("loglikelihood_rolling", *((story,) for story in stories))
    for one, many in zip(alone.loglikelihood_rolling(rolling), together.loglikelihood_rolling(rolling), strict=True):
        assert one == pytest.approx(many, abs=TOLERANCE)
    options = {"until": ["\n", "zz"], "max_gen_toks": 6}
    asked = requests("generate_until", *((story, options) for story in stories))
    assert alone.generate_until(asked) == together.generate_until(asked)
    assert alone.num_cut == together.num_cut > 0


def test_numbers_are_those_of_the_harness_own_wrapper(plain: Any, tokenizer: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=plain, tokenizer=tokenizer, device="cpu", batch_size=1, max_length=48)
    ours = HarnessModel(ModelSpec("plain", plain, tokenizer), context_length=48)
    stories = texts(5, longest=30)
    pairs = requests("loglikelihood", *((story, f" {word}") for story in ["", *stories] for word in WORDS[:2]))
    for mine, other in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs, disable_tqdm=True), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-3)
        assert mine[1] == other[1]
    rolling = requests("loglikelihood_rolling", *((story,) for story in texts(3, longest=90)))
    expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(expected, abs=1e-2)
    asked = requests("generate_until", *((story, {"until": ["\n"], "max_gen_toks": 5}) for story in stories))
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_an_answer_ends_before_its_stop_text(lm2: Any, tokenizer: Any) -> None:
    wrapped = HarnessModel(ModelSpec("lm2", lm2, tokenizer))
    prompt = "Mary moved to the garden."
    (whole,) = wrapped.generate_until(requests("generate_until", (prompt, {"until": [], "max_gen_toks": 12})))
    stop = whole[len(whole) // 2 :][:2]
    with forward_clock(lm2) as clock:
        (cut,) = wrapped.generate_until(requests("generate_until", (prompt, {"until": stop, "max_gen_toks": 12})))
    assert cut == whole[: whole.index(stop)]
    assert clock.calls < 12


def test_a_knocked_out_memory_gives_other_scores(lm2: Any, tokenizer: Any) -> None:
    pairs = requests("loglikelihood", (" ".join(texts(4)), " garden"))
    with_bank = HarnessModel(ModelSpec("lm2", lm2, tokenizer)).loglikelihood(pairs)
    without = HarnessModel(ModelSpec("x", lm2, tokenizer, {"knock_out_memory": True})).loglikelihood(pairs)
    assert with_bank[0][0] != without[0][0]


def test_a_context_is_cut_from_the_left_and_counted(plain: Any, tokenizer: Any) -> None:
    spec = ModelSpec("plain", plain, tokenizer)
    short = HarnessModel(spec, context_length=8)
    story = " ".join(texts(3))
    ids = tokenizer(story)["input_ids"]
    found = short.loglikelihood(requests("loglikelihood", (story, " garden")))
    target = tokenizer(f"{story} garden")["input_ids"][len(ids) :]
    expected = continuation_scores(plain, [(ids[-(9 - len(target)) :], target)])
    assert found[0][0] == pytest.approx(expected[0][0], abs=1e-4)
    assert short.num_cut == 1


def test_what_cannot_be_read_is_refused_in_one_line(plain: Any, lm2: Any, tokenizer: Any) -> None:
    limit = plain.config.max_position_embeddings
    assert longest_input(plain) == limit
    assert longest_input(lm2) is None
    with pytest.raises(ConfigError, match=f"plain reads at most {limit} tokens, got --context-length {limit + 1}"):
        HarnessModel(ModelSpec("plain", plain, tokenizer), context_length=limit + 1)
    with pytest.raises(ConfigError, match="bare has no tokenizer"):
        HarnessModel(ModelSpec("bare", plain, None))
    tight = HarnessModel(ModelSpec("lm2", lm2, tokenizer), context_length=4)
    with pytest.raises(ConfigError, match="no room for a prompt beside 4 new tokens"):
        tight.generate_until(requests("generate_until", ("Mary", {"until": [], "max_gen_toks": 4})))
    with pytest.raises(ConfigError, match="does not fit into a context of 4"):
        tight.loglikelihood(requests("loglikelihood", ("Mary", " moved" * 9)))
    with pytest.raises(ConfigError, match="samples its answers"):
        tight.generate_until(requests("generate_until", ("Mary", {"do_sample": True})))
    with pytest.raises(DataError, match="adds no token"):
        tight.loglikelihood(requests("loglikelihood", ("Mary", "")))
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        continuation_scores(plain, [((1,), (2,))], batch_size=0)
