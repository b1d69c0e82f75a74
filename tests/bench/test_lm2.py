"""The benchmark measures what it says: rounds are interleaved, continuations are right, memory is really held."""

import dataclasses
import json
import runpy

import pytest
import torch
from transformers import DynamicCache

from mnemon.bench import inference
from mnemon.bench.cost import MemoryShape, ModelShape
from mnemon.bench.inference import Reader, measure_inference
from mnemon.bench.models import build_model, random_tokens
from mnemon.bench.peak import Peak, Probe, measure_peak
from mnemon.bench.plots import all_charts
from mnemon.bench.report import markdown
from mnemon.bench.run import BenchRun, read_results, write_results
from mnemon.bench.timing import interleave, paired_ratios, quartiles
from mnemon.bench.train_step import TrainRow, measure_training
from mnemon.errors import DataError, RunError
from mnemon.models.modeling_lm2 import LM2ForCausalLM


@pytest.fixture
def fake_peaks(monkeypatch):
    """Peaks without a process for each."""
    for module in ("train_step", "inference"):
        monkeypatch.setattr(f"mnemon.bench.{module}.measure_peak", lambda probe: Peak(1000 + bool(probe.memory), 1))


def test_rounds_are_interleaved_and_warm_ups_do_not_count():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "AB"}
    seconds = interleave(runs, repeats=2, device="cpu", warm_ups=1)
    assert order == list("ABABAB")
    assert {name: len(values) for name, values in seconds.items()} == {"A": 2, "B": 2}


def test_ratios_are_taken_round_by_round():
    assert paired_ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("kind", ["plain", "lm2"])
def test_forward_and_generate_continue_alike_and_leave_the_place_as_it_is(kind, monkeypatch, settings):
    monkeypatch.setattr(inference, "PIECE", 10)  # also cuts the reading where no segment ends
    memory = settings.readers[0] if kind == "lm2" else None
    model = build_model(settings.shape, memory, "cpu", "float32").eval()
    assert isinstance(model, LM2ForCausalLM) == (kind == "lm2")
    reader = Reader(model)
    ids = random_tokens(settings.shape, 1, 27, "cpu")
    place = reader.prefill(ids)
    size = place.num_bytes()
    first = reader.decode(place, 6)
    expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, 27:]
    assert torch.equal(first, expected)
    assert torch.equal(reader.generate(place, 5), expected[:, 1:])
    assert torch.equal(reader.decode(place, 6), first)
    assert place.num_bytes() == size
    if kind == "plain":
        assert isinstance(place.carried, DynamicCache)
        assert place.carried.get_seq_length() == 27


def test_a_reading_expected_to_take_too_long_is_left_out_and_said_so(fake_peaks, settings):
    rows = measure_inference(dataclasses.replace(settings, time_limit=1e-9), lambda _: None)
    assert [(row.context, row.model, bool(row.skipped)) for row in rows] == [
        (24, "plain", False), (24, "compact", False), (48, "plain", True), (48, "compact", True),
    ]  # fmt: skip
    assert "limit" in rows[-1].skipped


def test_results_survive_the_file_and_become_a_page_with_figures(fake_peaks, settings, tmp_path):
    run = BenchRun(
        settings,
        "mnemon bench lm2",
        {"processor": "this one"},
        measure_training(settings, lambda _: None),
        measure_inference(settings, lambda _: None),
    )
    assert [(row.batch_size, len(row.lm2_seconds)) for row in run.train] == [(1, 2), (2, 2)]
    write_results(tmp_path, run)
    assert read_results(tmp_path) == run
    page = markdown(run, [("times", "train.png")])
    assert all(text in page for text in ("compact, batch 2: added peak memory 1.00x", "| 48 | compact |", "this one"))
    assert [chart.png[:4] for chart in all_charts(run)] == [b"\x89PNG"] * 2


def test_results_of_another_kind_are_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"accuracy": 1}))
    with pytest.raises(DataError, match="mnemon bench lm2"):
        read_results(tmp_path)


def test_a_target_is_judged_only_at_its_segment_length():
    memory = MemoryShape("compact", 64, 64, 256)
    row = TrainRow(memory, 1024, 1, [1.0, 1.0], [1.2, 1.2], 1.1, 100, 140, True)
    assert [sentence.rsplit(" ", 1)[1] for sentence in row.verdicts()] == ["pass", "FAIL"]
    assert dataclasses.replace(row, is_default=False).verdicts() == []


@pytest.mark.slow
def test_a_training_step_of_more_tokens_needs_about_proportionally_more_memory():
    shape = ModelShape(64, 128, 2, 4, 4, 4096)
    small, large = (
        measure_peak(Probe("train", shape, None, tokens, 1, "cpu", "float32", 1)).peak_bytes for tokens in (512, 2048)
    )
    logits = 4 * 4096 * (2048 - 512)  # bytes of one float32 tensor of logits more; the loss holds at least two
    assert large - small > 2 * logits


def test_a_probe_that_fails_is_one_line(settings):
    probe = Probe("train", settings.shape, None, 8, 1, "cpu", "float999", 1)
    with pytest.raises(RunError, match="float999"):
        measure_peak(probe)


@pytest.mark.parametrize(("flow", "page"), [("depth", "bench-lm2"), ("layer", "bench-lm2-layer")])
def test_the_script_writes_the_page_and_its_figures(flow, page, fake_peaks, settings, repository, tmp_path, capsys):
    memories = tuple(dataclasses.replace(memory, flow=flow) for memory in settings.memories)
    settings = dataclasses.replace(settings, memories=memories)
    run = BenchRun(settings, "mnemon bench lm2", {"processor": "Z80"}, measure_training(settings, lambda _: None))
    write_results(tmp_path, run)
    script = runpy.run_path(str(repository / "scripts" / "update_benchmarks.py"))
    assert script["main"]([str(tmp_path), "--root", str(tmp_path)]) == 0
    results = tmp_path / "docs" / "results"
    assert "Z80" in (results / f"{page}.md").read_text()
    assert {path.name for path in results.iterdir()} == {f"{page}.md", f"{page}-train.png"}
    assert script["main"]([str(tmp_path / "nowhere"), "--root", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err
