"""`mnemon bench ops` measures what it says: fresh inputs, everybody in turn, equals compared, the broken refused."""

import dataclasses
import json
import runpy
import sys
import types
from typing import Any

import pytest
import torch

from mnemon.bench.ops import measure
from mnemon.bench.ops.competitors import KERNEL, Competitor, Run, competitors, draw
from mnemon.bench.ops.measure import broken_contract, compare, measure_passes, measure_step, run_ops_benchmark
from mnemon.bench.ops.plots import all_charts
from mnemon.bench.ops.report import markdown
from mnemon.bench.ops.results import Agreement, OpsRun, PassRow, read_results, write_results
from mnemon.bench.ops.settings import PARTS, OpsSettings
from mnemon.bench.ops.targets import all_ratios
from mnemon.cli.app import main
from mnemon.errors import DataError
from mnemon.ops import get_rule, list_rules


@pytest.fixture
def settings() -> OpsSettings:
    return OpsSettings(
        parts=PARTS,
        rules=("gated_delta_net",),
        lengths=(12, 40),
        repeats=2,
        num_heads=2,
        head_dim=4,
        num_slots=3,
        step_bytes=2**14,
        all_variants=False,
    )


@pytest.fixture(autouse=True)
def fast_rounds(monkeypatch) -> None:
    """Collect no garbage between runs: in a test process it takes longer than the runs."""
    monkeypatch.setattr("mnemon.bench.timing.gc.collect", lambda: 0)


def silent(_: str) -> None:
    """Take a report and do nothing."""


def entrants_by_name(name: str, settings: OpsSettings) -> dict[str, Competitor]:
    return {entrant.name: entrant for entrant in competitors(get_rule(name), settings)}


@pytest.mark.parametrize("name", list_rules())
def test_every_form_of_every_rule_runs_forward_and_backward_on_inputs_of_its_own(name, settings):
    entrants = entrants_by_name(name, settings)
    results = {}
    for who in ("recurrent", "chunkwise"):
        run = Run(entrants[who], 12, backward=True)
        run.prepare()
        first = dict(run.inputs)
        results[who] = run()
        run.prepare()
        storages = [value.untyped_storage().data_ptr() for value in (*first.values(), *run.inputs.values())]
        assert len(set(storages)) == len(storages)
        assert all(torch.equal(first[key], value) for key, value in run.inputs.items())
    assert len(results["recurrent"]) == 1 + len(first)  # the output, and a gradient for every input
    for key, expected in results["recurrent"].items():
        torch.testing.assert_close(results["chunkwise"][key], expected, rtol=2e-3, atol=2e-4)


def test_a_forward_pass_keeps_no_graph(settings):
    run = Run(entrants_by_name("gla", settings)["chunkwise"], 12, backward=False)
    run.prepare()
    assert not run()["output"].requires_grad
    run.release()
    assert run.inputs == {}


@pytest.mark.parametrize("name", ["gated_delta_net", "kda", "mamba2"])
def test_published_code_is_given_the_same_problem(name, settings):
    rows = compare(get_rule(name), competitors(get_rule(name), settings), settings)
    assert [(row.name, row.what, row.length) for row in rows] == [("transformers", "output", 12)]
    assert rows[0].distance < 1e-5


def test_published_code_that_is_not_installed_is_no_competitor(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3_next.modeling_qwen3_next", None)
    assert set(entrants_by_name("gated_delta_net", settings)) == {"recurrent", "chunkwise"}


def test_all_lengths_and_competitors_take_turns(settings, monkeypatch):
    order: list[list[str]] = []

    def interleave(runs: Any, repeats: int, device: str, warm_ups: int, before: Any) -> dict[str, list[float]]:
        order.append(list(runs))
        return {name: [0.001] * repeats for name in runs}

    monkeypatch.setattr(measure, "interleave", interleave)
    rule = get_rule("gated_delta_net")
    measure_passes(rule, "forward", competitors(rule, settings), settings, silent)
    names = [f"{name} {length}" for length in (12, 40) for name in ("recurrent", "chunkwise", "transformers")]
    assert order == [*([name] for name in names), names]


def test_what_would_take_too_long_is_left_out_and_said_so(settings):
    strict = dataclasses.replace(settings, time_limit=0.0)
    rule = get_rule("gla")
    rows = measure_passes(rule, "forward", competitors(rule, strict), strict, silent)
    assert [(row.length, row.name, len(row.seconds)) for row in rows] == [
        (12, "recurrent", 2), (12, "chunkwise", 2), (40, "recurrent", 0), (40, "chunkwise", 0),
    ]  # fmt: skip
    assert "a run would take about" in rows[-1].skipped
    long = dataclasses.replace(settings, lengths=(12, 5000))
    rows = measure_passes(rule, "forward", competitors(rule, long), long, silent)
    assert {row.name: row.skipped for row in rows if row.length == 5000} == {
        "recurrent": "measured up to 4,096 tokens only",
        "chunkwise": "",
    }


@pytest.mark.parametrize("name", list_rules())
def test_a_step_changes_a_state_of_the_size_asked_for(name, settings):
    row = measure_step(get_rule(name), settings)
    one = row.state_bytes / row.sequences
    assert settings.step_bytes <= row.state_bytes < settings.step_bytes + one
    assert len(row.step_seconds) == len(row.clone_seconds) == 2


def broken_rule() -> Any:
    """Return gated linear attention with an output that is twice what it should be in one form."""
    rule = get_rule("gla")

    def chunkwise(*args: Any, **keywords: Any) -> Any:
        output, state = rule.chunkwise_form(*args, **keywords)
        return 2 * output, state

    return dataclasses.replace(rule, chunkwise_form=chunkwise)


def raising_rule() -> Any:
    def step(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("not a number")

    return dataclasses.replace(get_rule("gla"), step=step)


def test_a_broken_contract_is_named_with_its_check():
    assert broken_contract(get_rule("linear_attention"), all_variants=False) == ""
    assert broken_contract(broken_rule(), all_variants=False).startswith("check_forms_agree: gla: result 0 differs")
    assert broken_contract(raising_rule(), all_variants=True) == "check_forms_agree: not a number"


def test_a_rule_that_breaks_the_contract_is_refused_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    rules = {"gla": broken_rule(), "linear_attention": get_rule("linear_attention")}
    monkeypatch.setattr(measure, "get_rule", rules.get)
    folder = tmp_path / "out"
    words = ["bench", "ops", "--rules", ",".join(rules), "--quick", "--repeats", "1", "--what", "step"]
    assert main([*words, "-o", str(folder)]) == 2
    shown = capsys.readouterr()
    assert "mnemon: error: gla breaks the contract (check_forms_agree" in shown.err
    assert "- gla breaks the contract (check_forms_agree" in shown.out
    run = read_results(folder)
    assert [row.rule for row in run.steps] == ["linear_attention"]


def made_up(settings: OpsSettings) -> OpsRun:
    """Return a run with times that are known."""
    times = {
        ("recurrent", 2048): 4.0, ("chunkwise", 512): 0.1, ("chunkwise", 2048): 0.5, ("chunkwise", 4096): 1.0,
        ("chunkwise", 65536): 20.0, ("transformers", 512): 0.2, ("transformers", 2048): 1.0, ("fla", 2048): 1.03,
        (KERNEL, 2048): 1.0, ("fla", 8192): 1.01, (KERNEL, 8192): 1.0,
    }  # fmt: skip
    passes = [
        PassRow("gated_delta_net", "backward", name, length, length, [seconds] * 3)
        for (name, length), seconds in times.items()
    ]
    lengths = tuple(sorted({length for _, length in times}))
    return OpsRun(dataclasses.replace(settings, lengths=lengths), "mnemon bench ops", {}, passes, [], [], {})


def test_ratios_are_judged_by_their_targets(settings):
    found = {ratio.label: (round(ratio.quartiles[1], 3), ratio.passed) for ratio in all_ratios(made_up(settings))}
    assert found == {
        "chunkwise: tokens/s at 65,536 over 4,096 tokens": (0.8, False),
        "chunkwise over recurrent at 2,048 tokens": (8.0, False),
        "chunkwise over transformers at 512 tokens": (2.0, True),
        "chunkwise over transformers at 2,048 tokens": (2.0, False),
        "time of fla over its kernel alone at 2,048 tokens": (1.03, False),
        "time of fla over its kernel alone at 8,192 tokens": (1.01, True),
    }


def test_forward_alone_has_no_target_of_speed_over_the_recurrent_form(settings):
    run = made_up(settings)
    run = dataclasses.replace(run, passes=[dataclasses.replace(row, what="forward") for row in run.passes])
    (ratio,) = [ratio for ratio in all_ratios(run) if "over recurrent" in ratio.label]
    assert (ratio.quartiles[1], ratio.target, ratio.passed) == (8.0, None, None)


def test_the_page_has_ratios_times_and_verdicts(settings):
    page = markdown(made_up(settings))
    assert "2 of 6 targets are reached." in page
    assert "| chunkwise: tokens/s at 65,536 over 4,096 tokens | 0.80 [0.80–0.80] | 0.80 | ≥ 0.85 | FAIL |" in page
    assert "| gated_delta_net | chunkwise | 4,096 | 1000 (1000; 1000–1000) | 4,096 |" in page
    assert "## Forward\n" not in page


def test_a_gpu_run_has_no_targets_of_a_cpu(settings):
    run = made_up(dataclasses.replace(settings, device="cuda"))
    peers = [ratio for ratio in all_ratios(run) if "transformers" in ratio.label]
    assert len(peers) == 2
    assert all(ratio.passed is None for ratio in peers)


def test_a_distance_that_is_not_a_number_is_a_fault(settings):
    wrong = Agreement("gla", "fla", "output", 2048, float("nan"), 5e-3)
    run = dataclasses.replace(made_up(settings), agreements=[wrong, dataclasses.replace(wrong, distance=1e-3)])
    assert run.faults() == ["gla, fla at 2048 tokens: output differs from chunkwise by nan, at most 5e-03"]
    assert "| DIFFERENT |" in markdown(run)


def draw_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let settings name a GPU that is not there."""
    monkeypatch.setattr(
        "mnemon.bench.ops.competitors.draw",
        lambda rule, settings, *sizes: draw(rule, dataclasses.replace(settings, device="cpu"), *sizes),
    )
    monkeypatch.setattr("mnemon.bench.timing.synchronise", lambda device: None)


@pytest.fixture
def fake_gpu(monkeypatch) -> None:
    """Pretend that flash-linear-attention runs on this CPU, with a kernel of the gated delta rule."""

    def chunk_gated_delta_rule(q: Any, k: Any, v: Any, **given: Any) -> Any:
        assert (given["scale"], given["output_final_state"], given["cu_seqlens"]) == (1.0, True, None)
        rule = get_rule("gated_delta_net")
        return rule.chunkwise(q, k, v, state=given["initial_state"], g=given["g"], beta=given["beta"])

    module = types.ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule  # type: ignore[attr-defined]
    for name, value in (
        ("fla", types.ModuleType("fla")),
        ("fla.ops", types.ModuleType("fla.ops")),
        (module.__name__, module),
    ):
        monkeypatch.setitem(sys.modules, name, value)
    monkeypatch.setattr("mnemon.ops.forms._refusal", lambda rule, form, q: None)
    draw_on_the_cpu(monkeypatch)


@pytest.mark.usefixtures("fake_gpu")
def test_on_a_gpu_the_fla_form_is_compared_and_timed_beside_its_kernel(settings):
    there = dataclasses.replace(settings, device="cuda")
    rule = get_rule("gated_delta_net")
    entrants = competitors(rule, there)
    assert [entrant.name for entrant in entrants] == ["recurrent", "chunkwise", "fla", KERNEL, "transformers"]
    rows = [row for row in compare(rule, entrants, there) if row.name == "fla"]
    kinds = {"output", "state 0", *(f"gradient of {name}" for name in ("q", "k", "v", "g", "beta"))}
    assert {(row.what, row.length) for row in rows} == {(kind, length) for kind in kinds for length in (12, 40)}
    assert all(row.holds for row in rows)
    timed = measure_passes(rule, "backward", entrants, there, silent)
    assert {(row.name, row.length) for row in timed if row.seconds} >= {("fla", 40), (KERNEL, 40)}
    kernel = Run(next(entrant for entrant in entrants if entrant.name == KERNEL), 12, backward=True)
    kernel.prepare()
    form = Run(next(entrant for entrant in entrants if entrant.name == "fla"), 12, backward=True)
    form.prepare()
    got, expected = kernel(), form()
    assert set(got) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value)


@pytest.mark.usefixtures("fake_gpu")
def test_a_kernel_that_is_wrong_is_a_fault(settings, monkeypatch):
    module = sys.modules["fla.ops.gated_delta_rule"]
    right = module.chunk_gated_delta_rule
    monkeypatch.setattr(module, "chunk_gated_delta_rule", lambda *args, **given: (right(*args, **given)[0] * 1.1, None))
    there = dataclasses.replace(settings, device="cuda")
    rule = get_rule("gated_delta_net")
    monkeypatch.setattr(measure, "_results", outputs_only(measure._results))
    rows = [row for row in compare(rule, competitors(rule, there), there) if row.name == "fla"]
    assert rows
    assert not any(row.holds for row in rows)


def outputs_only(results: Any) -> Any:
    """Return the function without gradients and states."""
    return lambda entrant, length, gradients: results(entrant, length, gradients=False)


def test_on_a_gpu_without_the_package_the_rows_say_so(settings, monkeypatch):
    draw_on_the_cpu(monkeypatch)
    there = dataclasses.replace(settings, device="cuda")
    rule = get_rule("gla")
    rows = measure_passes(rule, "forward", competitors(rule, there), there, silent)
    assert all("form='fla' cannot run" in row.skipped for row in rows if row.name == "fla")
    assert "Left out at 12 and 40: gla, fla: gla: form='fla' cannot run" in markdown(
        OpsRun(there, "mnemon bench ops", {}, rows, [], [], {})
    )


def test_results_survive_the_file_and_become_a_page_with_figures(settings, tmp_path, repository, capsys):
    threads = torch.get_num_threads()
    run = run_ops_benchmark(settings, "mnemon bench ops", silent)
    assert torch.get_num_threads() == threads
    assert {(row.what, row.name) for row in run.passes} == {
        (what, name) for what in ("forward", "backward") for name in ("recurrent", "chunkwise", "transformers")
    }
    write_results(tmp_path, run)
    assert read_results(tmp_path) == run
    assert [(chart.name, chart.png[:4]) for chart in all_charts(run)] == [
        (f"{name}.png", b"\x89PNG") for name in ("forward", "backward", "step")
    ]
    script = runpy.run_path(str(repository / "scripts" / "update_benchmarks.py"))
    assert script["main"](["--ops", str(tmp_path), "--root", str(tmp_path)]) == 0
    results = tmp_path / "docs" / "results"
    assert "![One step beside a copy of the state](bench-ops-step.png)" in (results / "bench-ops.md").read_text()
    assert (results / "bench-ops-forward.png").is_file()
    assert capsys.readouterr().out.strip() == str(results / "bench-ops.md")


def test_results_of_another_kind_are_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"accuracy": 1}))
    with pytest.raises(DataError, match="expected the results of `mnemon bench ops`"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rules", "gated_deltanet"], "did you mean 'gated_delta_net'?"),
        (["--what", "forward,fly"], "--what: unknown 'fly'"),
        (["--lengths", "512,-1"], "--lengths takes numbers of at least 1"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, tmp_path, capsys):
    assert main(["bench", "ops", "-o", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_quick_benchmark_prints_json_and_writes_its_folder(tmp_path, capsys):
    folder = tmp_path / "out"
    words = ["bench", "ops", "--rules", "linear_attention", "--quick", "--repeats", "1", "--json", "-o", str(folder)]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["output"] == str(folder)
    assert printed["settings"]["lengths"] == [64, 256]
    assert {path.name for path in folder.iterdir()} >= {"results.json", "table.md", "forward.png", "step.png"}
    assert main(words) == 2
    assert "already holds a run" in capsys.readouterr().err
