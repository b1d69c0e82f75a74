"""Recall and perplexity against brute force, and the intervals beside them."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mnemon.data.encoding import IGNORED
from mnemon.data.mqar import MqarSettings, generate
from mnemon.data.text import TokenStream
from mnemon.data.tokenizer import train_tokenizer
from mnemon.errors import ConfigError, DataError
from mnemon.metrics.intervals import bootstrap_mean, octaves, wilson_interval
from mnemon.metrics.mqar import held_out_samples, queries_right, recall_row
from mnemon.metrics.perplexity import held_out_windows, measure_perplexity, token_losses
from mnemon.models.configuration_lm2 import LM2Config
from mnemon.models.modeling_lm2 import LM2ForCausalLM

SETTINGS = MqarSettings(vocab_size=64, length=32, num_pairs=4)
BASE = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)


@pytest.fixture(scope="module", params=["plain", "lm2"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    if request.param == "plain":
        return LlamaForCausalLM(BASE).eval()
    config = LM2Config(base_config=BASE, num_slots=4, slot_dim=16, segment_length=8, attention_span=8)
    return LM2ForCausalLM(config).eval()


class Oracle:
    """Answers the queries of given samples whose gap is even in units of four, and nothing else."""

    def __init__(self, samples: Any) -> None:
        self.device, self.samples = torch.device("cpu"), samples

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int, use_cache: bool) -> Any:
        rows = [self.samples.input_ids.tolist().index(ids) for ids in input_ids.tolist()]
        wanted = np.where((self.samples.gaps % 4 == 0) & (self.samples.labels != IGNORED), self.samples.labels, 0)
        logits = torch.nn.functional.one_hot(torch.from_numpy(wanted[rows]), 64).float()
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_an_oracle_is_right_exactly_where_it_answers() -> None:
    samples = generate(SETTINGS, 50, seed=1)
    right = queries_right(Oracle(samples), samples, batch_tokens=100)
    gaps = samples.gaps[samples.labels != IGNORED].reshape(50, 4)
    assert (right == (gaps % 4 == 0)).all()
    row = recall_row(samples, right)
    assert (row["length"], row["num_pairs"], row["samples"], row["asked"]) == (32, 4, 50, 200)
    assert row["right"] == right.sum()
    assert row["accuracy"]["mean"] == pytest.approx(right.mean())
    assert sum(part["asked"] for part in row["by_gap"]) == 200
    for part in row["by_gap"]:
        at = (gaps >= part["first"]) & (gaps <= part["last"])
        assert (part["right"], part["asked"]) == (right[at].sum(), at.sum())


def test_recall_is_the_argmax_at_the_query_whatever_the_batches(model: Any) -> None:
    samples = generate(SETTINGS, 9, seed=2)
    with torch.no_grad():
        likeliest = model(input_ids=torch.from_numpy(samples.input_ids)).logits.argmax(-1).numpy()
    at = samples.labels != IGNORED
    expected = (likeliest == samples.labels)[at].reshape(9, 4)
    for batch_tokens in (1, 70, 10_000):
        assert (queries_right(model, samples, batch_tokens=batch_tokens) == expected).all()


def test_held_out_samples_depend_on_seed_and_slice() -> None:
    first = held_out_samples(SETTINGS, 10, seed=0)
    assert (held_out_samples(SETTINGS, 10, seed=0).input_ids == first.input_ids).all()
    assert (held_out_samples(SETTINGS, 10, seed=1).input_ids != first.input_ids).any()
    assert (generate(SETTINGS, 10, seed=0).input_ids != first.input_ids).any()


def test_losses_are_the_negative_log_probabilities_of_the_next_tokens(model: Any) -> None:
    ids = np.random.default_rng(0).integers(64, size=(5, 24))
    losses = token_losses(model, ids, batch_tokens=50)
    assert losses.shape == (5, 23)
    with torch.no_grad():
        log_probabilities = model(input_ids=torch.from_numpy(ids)).logits.double().log_softmax(-1).numpy()
    expected = [[-log_probabilities[row, t, ids[row, t + 1]] for t in range(23)] for row in range(5)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_shorter_blocks_of_the_same_windows_are_read_on_their_own(model: Any) -> None:
    rng = np.random.default_rng(1)
    windows = TokenStream(rng.integers(64, size=(4, 24)), rng.integers(1, 5, size=(4, 24)))
    row = measure_perplexity(model, windows, 8)
    losses = np.concatenate([token_losses(model, windows.ids[:, start : start + 8]) for start in (0, 8, 16)])
    assert (row["length"], row["samples"], row["tokens"]) == (8, 4, 4 * 3 * 7)
    assert row["loss"]["mean"] == pytest.approx(losses.mean(), rel=1e-6)
    assert row["perplexity"]["mean"] == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    predicted = np.delete(windows.num_bytes, [0, 8, 16], axis=1)
    assert row["bits_per_byte"] == pytest.approx(losses.sum() / math.log(2) / predicted.sum(), rel=1e-6)
    assert [(part["first"], part["last"]) for part in row["by_position"]] == [(1, 1), (2, 3), (4, 7)]
    assert row["by_position"][1]["loss"] == pytest.approx(losses[:, 1:3].mean(), rel=1e-6)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model = LlamaForCausalLM(BASE).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    windows = TokenStream(np.random.default_rng(0).integers(64, size=(3, 16)), np.ones((3, 16), dtype=int))
    row = measure_perplexity(model, windows, 16)
    assert row["perplexity"]["mean"] == pytest.approx(64, rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(6, rel=1e-6)


@pytest.mark.parametrize(
    ("lengths", "most", "error", "said"),
    [
        ([8, 12], 5, ConfigError, "divide the longest"),
        ([1, 8], 5, ConfigError, "at least 2"),
        ([8], 1, ConfigError, "at least 2 samples"),
        ([10**8], 5, DataError, "use more text or shorter lengths"),
    ],
)
def test_impossible_windows_are_refused(
    tmp_path: Path, lengths: list[int], most: int, error: type[Exception], said: str
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("The old ship sailed over the calm sea. " * 20)
    tokenizer = train_tokenizer(["The old ship"], 270)
    with pytest.raises(error, match=said):
        held_out_windows(str(tmp_path), tokenizer, lengths, most)


def test_the_bootstrap_agrees_with_the_normal_interval_on_many_values() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    with pytest.raises(ConfigError, match="at least two units, got 1"):
        bootstrap_mean(values[:1])


def test_a_sum_of_shares_may_stand_for_a_count_of_successes() -> None:
    between = wilson_interval(5.5, 10)
    assert wilson_interval(5, 10).low < between.low < wilson_interval(6, 10).low
    assert wilson_interval(1000.0, 1000).low > 0.99


def test_octaves_cover_every_number_once() -> None:
    ranges = list(octaves(20))
    assert ranges == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]
