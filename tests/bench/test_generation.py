"""The benchmark of generation: equal models, honest peaks, cells that are left out, and the page."""

import json
import runpy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mnemon.bench.cost import ModelShape
from mnemon.bench.generation import measure, worker
from mnemon.bench.generation.measure import Cell, GenerationRun, read_results, run_generation_benchmark, write_results
from mnemon.bench.generation.report import findings, markdown
from mnemon.bench.generation.settings import (
    FAMILIES,
    GROWING,
    GenerationSettings,
    build,
    feed_forward_width,
    model_names,
)
from mnemon.bench.generation.worker import Session, Size, Work, Worker
from mnemon.cli.app import main
from mnemon.errors import ConfigError, DataError, RunError
from mnemon.models.parameters import active_parameters
from mnemon.ops import list_rules

SETTINGS = GenerationSettings(
    models=("plain", "lm2"),
    shape=ModelShape(32, 128, 1, 2, 2, 64),
    prefixes=(32, 64),
    new_tokens=4,
    segment_length=16,
    attention_span=32,
    num_slots=8,
    num_memory_tokens=2,
)
MIB = 2**20


@pytest.mark.parametrize("name", [*FAMILIES, *list_rules()])
def test_every_model_meets_as_many_parameters_per_token_as_the_plain_one(name: str) -> None:
    plain, model = (build(known, SETTINGS, feed_forward_width(known, SETTINGS)) for known in ("plain", name))
    assert active_parameters(model) == pytest.approx(active_parameters(plain), rel=0.02)
    assert model.num_parameters() >= active_parameters(model)


def test_a_model_that_cannot_be_that_small_is_refused() -> None:
    narrow = replace(SETTINGS, shape=replace(SETTINGS.shape, intermediate_size=4))
    with pytest.raises(ConfigError, match=r"mom cannot have as few parameters .* greater --feed-forward"):
        feed_forward_width("mom", narrow)


def test_rules_stands_for_every_rule_and_a_wrong_name_is_refused() -> None:
    assert model_names(["plain", "rules", "gla"]) == ("plain", *list_rules())
    with pytest.raises(ConfigError, match=r"unknown 'lm3'; expected some of plain, lm2"):
        model_names(["lm3"])


@pytest.mark.parametrize("name", ["plain", "lm2", "lm2-full-attention", "rmt", "armt", "mom", "gla"])
def test_a_session_generates_what_one_long_reading_says(name: str) -> None:
    session = Session(name, SETTINGS, 128)
    states = []
    for prefix in SETTINGS.prefixes:
        states.append(session.read(prefix).state_bytes)
        place = session.place
        assert place is not None
        with torch.inference_mode():
            expected = session.reader.model(session.ids[:, :prefix]).logits[:, -1:].argmax(-1)
        assert torch.equal(place.next_token, expected)
        for _ in range(2):
            work = session.generate(3)
            assert work.seconds > 0
            assert work.state_bytes == states[-1]
    assert (states[0] < states[1]) == (name in GROWING)


def test_a_growing_state_is_not_kept_twice_while_it_grows() -> None:
    session = Session("plain", SETTINGS, 128)
    session.read(64)
    session.generate(2)
    assert session.place is None


def test_a_process_answers_and_its_death_is_one_line() -> None:
    process = Worker("rmt", SETTINGS, 128)
    try:
        assert process.size().intermediate_size == 128
        assert process.read(32).state_bytes == process.generate(2).state_bytes > 0
        process._process.kill()
        with pytest.raises(RunError, match="the process of rmt ended: killed by signal 9, for want of memory perhaps"):
            process.read(64)
    finally:
        process.close()


class FakeWorker:
    """Reads 1,000 tokens in a second (the plain model: tokens squared), and generates a token in a millisecond."""

    def __init__(self, name: str, settings: GenerationSettings, intermediate_size: int) -> None:
        self.name, self.prefix, self.asked = name, 0, 0

    def size(self) -> Size:
        return Size(128, 1000, 900, 4000)

    def read(self, tokens: int) -> Work:
        self.prefix = tokens
        seconds = (tokens / 1000) ** 2 if self.name == "plain" else tokens / 1000
        return Work(seconds, MIB, tokens if self.name == "plain" else 7)

    def generate(self, tokens: int) -> Work:
        if self.name == "gla":
            raise RunError("the process of gla ended: out of memory")
        return Work(tokens / 1000, 2 * MIB, self.prefix if self.name == "plain" else 7)

    def close(self) -> None:
        pass


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> GenerationRun:
    monkeypatch.setattr(measure, "Worker", FakeWorker)
    settings = replace(
        SETTINGS,
        models=("plain", "lm2", "gla"),
        prefixes=(1000, 2000, 8000, 80_000),
        new_tokens=1000,
        repeats=3,
        time_limit=70.0,
    )
    return run_generation_benchmark(settings, "mnemon bench generation", lambda text: None)


def test_a_cell_that_does_not_fit_into_the_time_is_left_out_and_says_so(faked: GenerationRun) -> None:
    by_place = {(cell.model, cell.prefix): cell for cell in faked.cells}
    assert [cell.prefix for cell in faked.of("plain")] == [1000, 2000]
    assert [cell.prefix for cell in faked.of("lm2")] == [1000, 2000, 8000]
    # plain: 1 + 3 and 4 + 3 seconds so far; 4 * 16 + 4 more are expected
    assert by_place["plain", 8000].left_out == "it is expected to take 68 s, 59 s of this model's 70 s are left"
    assert by_place["lm2", 80_000].left_out.startswith("it is expected to take 73 s, 53 s")
    assert all(cell.seconds == (1.0, 1.0, 1.0) for cell in faked.of("lm2"))


def test_a_process_that_dies_stops_its_own_model_only(faked: GenerationRun) -> None:
    dead = [cell for cell in faked.cells if cell.model == "gla"]
    assert [cell.left_out for cell in dead] == ["the process of gla ended: out of memory"] * 4
    assert len(faked.of("lm2")) == 3


def test_a_process_that_fails_says_its_last_words() -> None:
    process = Worker("no_such_rule", SETTINGS, 128)
    try:
        with pytest.raises(RunError, match=r"the process of no_such_rule ended: .*no update rule is called"):
            process.size()
    finally:
        process.close()


def test_a_slow_round_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Worker", FakeWorker)
    settings = replace(SETTINGS, models=("lm2",), new_tokens=1000, time_limit=19.0)
    run = run_generation_benchmark(settings, "", lambda text: None)
    assert [len(cell.seconds) for cell in run.cells] == [1, 1]


def test_the_sentences_say_how_time_and_memory_change() -> None:
    cells = (
        Cell("plain", 32, 1.0, (2.0, 2.0), 10, 10 * MIB),
        Cell("plain", 64, 2.0, (5.0,), 20, 30 * MIB),
        Cell("lm2", 32, 1.0, (2.0,), 7, MIB),
        Cell("lm2", 64, 1.0, (2.2,), 7, 3 * MIB),
    )
    first, second = findings(GenerationRun(SETTINGS, "", {}, cells=cells))
    assert first == "From 32 to 64 tokens the time to generate of plain grows 2.5 times and its peak memory 3.0 times."
    assert "between 1.10 (lm2) and 1.10 times (lm2)" in second
    assert "peak memory grows by 2.0 MiB at most (lm2), counted from" in second
    assert "the state has the same size after every prefix" in second


def test_short_prefixes_do_not_count_as_growing_memory() -> None:
    peaks = ((1024, 1), (8192, 4), (32_768, 5))
    cells = tuple(Cell("lm2", prefix, 1.0, (2.0,), 7, peak * MIB) for prefix, peak in peaks)
    assert "grows by 1.0 MiB at most" in findings(GenerationRun(SETTINGS, "", {}, cells=cells))[0]


def test_the_page_shows_what_was_left_out(faked: GenerationRun) -> None:
    page = markdown(faked, "title", "figure.png")
    assert "| plain | 1 | 1 | – | – |" in page
    assert "- plain after 80,000 tokens: it is expected to take" in page
    assert "- gla after 1,000 tokens: the process of gla ended: out of memory." in page


def test_results_are_read_back_as_they_were(faked: GenerationRun, tmp_path: Path) -> None:
    write_results(tmp_path, faked)
    assert read_results(tmp_path) == faked


def test_a_quick_run_writes_results_page_and_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], repository: Path
) -> None:
    folder = tmp_path / "generation"
    options = ["--quick", "--models", "plain,lm2", "--time-limit", "600"]  # however busy the machine is
    assert main(["bench", "generation", *options, "-o", str(folder)]) == 0
    page = (folder / "table.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    assert (folder / "generation.png").read_bytes().startswith(b"\x89PNG")
    run = read_results(folder)
    assert [(cell.model, cell.prefix, len(cell.seconds)) for cell in run.cells] == [
        ("plain", 64, 2), ("lm2", 64, 2), ("plain", 256, 2), ("lm2", 256, 2)
    ]  # fmt: skip
    assert all(cell.peak_bytes >= cell.state_bytes > 0 for cell in run.cells)
    script = runpy.run_path(str(repository / "scripts" / "update_benchmarks.py"))
    assert script["main"](["--generation", str(folder), "--root", str(tmp_path)]) == 0
    copied = (tmp_path / "docs" / "results" / "bench-generation.md").read_text()
    assert copied == page.replace("generation.png", "bench-generation.png")


def test_mistakes_are_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "generation"
    for words, message in (
        (["--models", "lm3"], "unknown 'lm3'"),
        (["--rule", "glaa"], "did you mean 'gla'"),
        (["--top-k", "9"], "top_k=9 exceeds num_memories=4"),
        (["--prefixes", "x"], "--prefixes takes numbers"),
        (["--heads", "3"], "--width 64 with --heads 3"),
        (["--span", "8"], "--span 8 is below the segment length 256"),
        (["--dtype", "int8"], "unknown dtype"),
    ):
        assert main(["bench", "generation", *words, "-o", str(folder)]) == 2
        assert message in capsys.readouterr().err
    assert not folder.exists()


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"settings": {}}))
    with pytest.raises(DataError, match="expected the results of `mnemon bench generation`"):
        read_results(tmp_path)


def test_settings_survive_the_way_to_the_process() -> None:
    assert GenerationSettings.from_json(json.loads(json.dumps(asdict(SETTINGS)))) == SETTINGS
    assert worker.__name__ == worker._MODULE
