"""`mnemon compare` as a user meets it: finished runs in, one document out, and every bad run named."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mnemon.cli.app import main
from mnemon.evaluation.run import EvaluationRun, write_run

Write = Callable[..., Path]


def compared(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    assert main(["compare", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["compare", *map(str, words)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mnemon: error:")
    return lines[0]


def test_runs_on_the_same_samples_are_tested_in_pairs(
    invent: Any, write_babilong: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_babilong("good", [invent("LM2", lambda *_: 0.95, num_samples=60)])
    bad = write_babilong("bad", [invent("plain", lambda *_: 0.3, num_samples=60)])
    value = compared(capsys, good, bad)
    (section,) = value["sections"]
    rows = {(row["model"], row["length"], row["task"]): row for row in section["rows"]}
    assert rows["LM2", None, None]["is_significant"]
    assert not rows["plain", None, None]["is_best"]
    overall = next(test for test in section["tests"] if test["length"] is None and test["task"] is None)
    assert overall["result"]["difference"]["low"] > 0.4
    per_length = next(test for test in section["tests"] if test["length"] == "0k" and test["task"] is None)
    assert per_length["result"]["only_first"] > per_length["result"]["only_second"]
    assert len(section["tests"]) == 4 + 2 * 4  # lengths and all together; the same for each of two tasks


def test_seeds_of_one_recipe_are_one_model_with_a_spread(
    invent: Any, write_babilong: Write, give_seed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for seed in range(3):
        names = {"LM2": (0.9, f"lm2-s{seed}", "lm2"), "plain": (0.5, f"plain-s{seed}", "plain")}
        results = [
            give_seed(invent(label, lambda *_, p=skill: p, role=role), seed, label, recipe)
            for recipe, (skill, label, role) in names.items()
        ]
        runs.append(write_babilong(f"seed{seed}", results))
    (section,) = compared(capsys, *runs)["sections"]
    row = next(row for row in section["rows"] if row["length"] is None and row["task"] is None)
    assert (row["model"], row["seeds"]) == ("LM2", 3)
    assert row["spread_over_seeds"] > 0
    assert row["accuracy"]["low"] < row["accuracy"]["mean"] < row["accuracy"]["high"]
    assert {row["model"] for row in section["rows"]} == {"LM2", "plain"}
    test = section["tests"][0]
    assert test["result"]["only_first"] is None
    assert test["corrected_p"] < 0.05
    apart = compared(capsys, *runs, "--separate-seeds")["sections"][0]
    assert len({row["model"] for row in apart["rows"]}) == 6

    assert main(["compare", *map(str, runs)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\d+±\d+★ \[\d+–\d+\]", printed)
    assert "3 training seeds of each" in " ".join(printed.split())


def test_runs_of_a_study_are_seeds_of_their_variant(write_training: Write, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        write_training(f"{arm}{seed}", seed=seed, recipe=f"{arm}-seed{seed}")
        for arm in ("lm2", "plain")
        for seed in (0, 1)
    ]
    alone, *_ = runs
    assert {row["model"] for row in compared(capsys, *runs)["sections"][0]["rows"]} == {"lm2", "plain"}
    assert [row["model"] for row in compared(capsys, alone)["sections"][0]["rows"]] == ["lm2-seed0"]


def test_seeds_of_one_evaluation_stay_one_model(
    two_seeds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, EvaluationRun(two_seeds, "mnemon reproduce lm2-table1"))
    (section,) = compared(capsys, tmp_path)["sections"]
    assert {(row["model"], row["seeds"]) for row in section["rows"]} >= {("LM2", 2), ("LM2 (knocked out)", 2)}


def test_rows_with_retrieval_are_grouped_by_their_retriever(
    invent: Any, write_babilong: Write, give_seed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for seed in range(2):
        rows = [give_seed(invent(f"p{seed}", lambda *_: 0.4), seed, f"p{seed}", "plain")]
        for top_k in (1, 5):
            row = give_seed(invent(f"p{seed} {top_k}", lambda *_: 0.8), seed, f"p{seed} {top_k}", "plain")
            retrieval = {"kind": "bm25", "top_k": top_k, "unit": "sentence"}
            rows.append(replace(row, model=replace(row.model, role="retrieval", retrieval=retrieval)))
        runs.append(write_babilong(f"seed{seed}", rows))
    (section,) = compared(capsys, *runs)["sections"]
    names = list(dict.fromkeys((row["model"], row["seeds"]) for row in section["rows"]))
    assert names == [("plain", 2), ("plain (bm25, 1 sentence)", 2), ("plain (bm25, 5 sentences)", 2)]


def test_the_same_label_in_two_runs_of_unlike_models_is_refused_and_can_be_named(
    invent: Any, write_babilong: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_babilong("one", [invent("LM2", lambda *_: 0.9)])
    two = write_babilong("two", [invent("LM2", lambda *_: 0.5)])
    message = refused(capsys, one, two)
    assert f"the label 'LM2' stands in {one} and {two}; name the runs: A={one} B={two}" in message
    named = compared(capsys, f"new={one}", f"old={two}")["sections"][0]
    assert [row["model"] for row in named["rows"][:5:3]] == ["new", "old"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 39}, "num_samples is 40 and 39"),
        ({"tasks": ("qa1",)}, "tasks is qa1, qa6 and qa1"),
        ({"lengths": ("0k", "1k")}, "lengths is 0k, 1k, 4k and 0k, 1k"),
    ],
)
def test_runs_over_other_samples_are_refused_and_the_difference_named(
    invent: Any, write_babilong: Write, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    one = write_babilong("one", [invent("a", lambda *_: 0.9)])
    two = write_babilong("two", [invent("b", lambda *_: 0.5, **change)])
    assert message in refused(capsys, one, two)


def test_another_seed_or_another_text_of_a_sample_is_named(
    invent: Any, write_babilong: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    result = invent("b", lambda *_: 0.5)
    one = write_babilong("one", [invent("a", lambda *_: 0.9)])
    seed = write_babilong("seed", [replace(result, settings=replace(result.settings, seed=1))])
    assert "seed is 0 and 1" in refused(capsys, one, seed)
    cell = result.cells[1]
    moved = (cell.predictions[0], replace(cell.predictions[1], sample_sha256="other"), *cell.predictions[2:])
    cells = (result.cells[0], replace(cell, predictions=moved), *result.cells[2:])
    text = write_babilong("text", [replace(result, cells=cells)])
    assert "samples differ (qa6 at 0k: qa6-0k-0001 is another text" in refused(capsys, one, text)


def test_shared_tasks_and_lengths_can_be_chosen(
    invent: Any, write_babilong: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_babilong("one", [invent("a", lambda *_: 0.9)])
    two = write_babilong("two", [invent("b", lambda *_: 0.5, tasks=("qa1",))])
    (section,) = compared(capsys, one, two, "--tasks", "qa1", "--lengths", "1k,4k")["sections"]
    assert section["settings"]["tasks"] == ["qa1"]
    assert {row["length"] for row in section["rows"]} == {"1k", "4k", None}
    assert "'b' was not measured at the task qa6; it has qa1" in refused(capsys, one, two, "--tasks", "qa6")


def test_a_baseline_and_a_correction_change_the_tests(
    invent: Any, write_babilong: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    skills = {"a": 0.9, "b": 0.7, "c": 0.6}
    run = write_babilong("run", [invent(label, lambda *_, p=p: p) for label, p in skills.items()])
    every, against = (compared(capsys, run, *words)["sections"][0] for words in ([], ["--baseline", "c"]))
    assert len(against["tests"]) * 3 == len(every["tests"]) * 2
    assert {(test["first"], test["second"]) for test in against["tests"]} == {("a", "c"), ("b", "c")}
    relaxed = compared(capsys, run, "--correction", "bh")["sections"][0]
    pairs = list(zip(every["tests"], relaxed["tests"], strict=True))
    assert all(bh["corrected_p"] <= holm["corrected_p"] + 1e-12 for holm, bh in pairs)
    assert any(bh["corrected_p"] < holm["corrected_p"] for holm, bh in pairs)
    assert "the baseline 'd' is not among 'a', 'b', 'c'" in refused(capsys, run, "--baseline", "d")


def test_published_rows_stand_beside_the_measured_ones(
    invent: Any, write_babilong: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_babilong("run", [invent("mine", lambda *_: 0.9)])
    assert main(["compare", str(run), "--published", "--form", "markdown"]) == 0
    page = capsys.readouterr().out
    assert "| 4k | LM2-1.7B (published) | 46 | 66 | 56 |" in page
    assert "| 4k | RMT-137M (published) | 100 | – | – |" in page
    assert "arXiv:2502.06049" in page


def test_every_form_is_written_with_its_figures(
    invent: Any, write_babilong: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_babilong("run", [invent("a|b", lambda *_: 0.9), invent("<c>", lambda *_: 0.2)])
    out = tmp_path / "out"
    assert main(["compare", str(run), "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "★: better than every other model" in printed.replace("\n", " ")
    assert {path.name for path in out.iterdir()} >= {
        "comparison.json", "table.md", "table.tex", "report.html", "accuracy_over_length.png", "capabilities.svg",
    }  # fmt: skip
    page = (out / "report.html").read_text()
    assert "&lt;c&gt;" in page
    assert "<c>" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "prefers-color-scheme: dark" in page
    assert "a\\|b" in (out / "table.md").read_text()
    assert "already holds a run; use --overwrite" in refused(capsys, run, "-o", out)


def test_a_suite_of_samples_is_read_whatever_it_measures(
    write_samples: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = [1.0] * 30, [0.0, 1.0, 0.0] * 10
    run = write_samples("run", {"LM2": {"fda": right, "swde": right}, "plain": {"fda": wrong, "swde": right}})
    (section,) = compared(capsys, run)["sections"]
    rows = {(row["model"], row["task"]): row for row in section["rows"]}
    assert rows["LM2", "fda"]["value"]["mean"] == 100
    assert rows["LM2", "fda"]["is_significant"]
    assert rows["plain", None]["value"]["mean"] == pytest.approx(200 / 3)
    test = next(test for test in section["tests"] if test["task"] == "fda")
    assert (test["result"]["only_first"], test["result"]["only_second"]) == (20, 0)
    assert not rows["plain", "swde"]["is_best"]


def test_many_tasks_stand_below_each_other_and_a_terminal_shows_their_mean(
    write_samples: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {model: {f"subject{n}": [1.0, 0.0, skill] for n in range(25)} for model, skill in (("a", 1.0), ("b", 0.0))}
    run = write_samples("run", scores, suite="mmlu")
    assert main(["compare", str(run)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"subject24 +66\.7 \[", printed)
    assert len(re.findall("a − b", printed)) == 1
    out = tmp_path / "out"
    assert len(compared(capsys, run, "-o", out)["sections"][0]["tests"]) == 26
    assert not (out / "suite_mmlu.png").exists()
    assert (out / "table.md").read_text().count("a − b") == 26
    assert "published numbers are those of BABILong" in refused(capsys, run, "--published")


def test_losses_are_shown_as_perplexities_and_lower_is_better(
    write_samples: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {"good": [-1.0 - n / 100 for n in range(20)], "bad": [-1.2 - n / 100 for n in range(20)]}
    run = write_samples("run", {m: {"256": v} for m, v in losses.items()}, suite="perplexity", metric="nats_per_token")
    (section,) = compared(capsys, run)["sections"]
    rows = {row["model"]: row for row in section["rows"]}
    assert rows["good"]["value"]["mean"] == pytest.approx(2.718281828**1.095)
    assert rows["good"]["value"]["low"] < rows["good"]["value"]["mean"] < rows["good"]["value"]["high"]
    assert rows["good"]["is_significant"]
    assert main(["compare", str(run)]) == 0
    assert "256 (perplexity)" in capsys.readouterr().out


def test_seeds_of_a_suite_are_grouped_by_the_facts_of_their_models(
    write_samples: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for seed in range(2):
        facts = {"m": {"recipe": "lm2", "training_seed": seed, "parameters": 9, "role": "lm2"}}
        runs.append(write_samples(f"s{seed}", {"m": {"a": [1.0, 0.0, 1.0, float(seed)]}}, facts=facts))
    (section,) = compared(capsys, *runs)["sections"]
    assert [(row["model"], row["seeds"]) for row in section["rows"]] == [("m", 2)]


def test_other_samples_of_a_suite_are_named(write_samples: Write, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_samples("one", {"a": {"fda": [1.0, 0.0]}})
    few = write_samples("few", {"b": {"fda": [1.0]}})
    assert "recall: 'a' and 'b' cannot be compared: fda has 2 and 1 samples" in refused(capsys, one, few)
    more = write_samples("more", {"b": {"fda": [1.0, 0.0], "swde": [1.0]}})
    assert "only one has the task swde" in refused(capsys, one, more)
    other = write_samples("other", {"b": {"fda": [1.0, 0.0]}}, asked="other")
    assert "their samples of fda differ (first fda-0: another seed" in refused(capsys, one, other)


def test_training_runs_are_curves_and_seeds_share_a_line(
    write_training: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_training(f"lm2-{seed}", seed=seed, blocks=4) for seed in range(2)]
    plain = write_training("plain", recipe="plain", blocks=0)
    out = tmp_path / "out"
    value = compared(capsys, *runs, plain, "-o", out)
    (section,) = value["sections"]
    assert [row["model"] for row in section["rows"]] == ["tiny", "tiny", "plain"]
    assert section["rows"][0]["final_loss"] == pytest.approx((6 / 28 + 6 / 29 + 6 / 30) / 3)
    assert (out / "training_loss.png").is_file()
    assert (out / "perplexity_by_blocks.svg").is_file()


def test_perplexity_is_drawn_over_the_blocks_with_memory(
    write_samples: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for blocks in (0, 2):
        run = write_samples(
            f"b{blocks}", {f"m{blocks}": {"64": [-1.0, -2.0]}}, suite="perplexity", metric="nats_per_token"
        )
        value = json.loads((run / "results.json").read_text())
        perplexity = {"mean": 4.5 - blocks, "low": 4.0 - blocks, "high": 5.0 - blocks}
        row = {"model": f"m{blocks}", "length": 64, "memory_blocks": blocks, "perplexity": perplexity}
        (run / "results.json").write_text(json.dumps({**value, "format": "mnemon-measures-1", "rows": [row]}))
        runs.append(run)
    compared(capsys, *runs, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "perplexity_over_blocks.png").is_file()


def test_kinds_may_be_mixed_and_a_folder_of_runs_gives_each(
    invent: Any, write_babilong: Write, write_samples: Write, write_training: Write, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_babilong("a", [invent("x", lambda *_: 0.9)])
    write_samples("b", {"x": {"fda": [1.0, 0.0]}})
    write_training("c")
    value = compared(capsys, tmp_path)
    assert [section["title"] for section in value["sections"]] == ["BABILong", "Suite recall", "Training"]
    assert len(value["runs"]) == 3


def test_an_unfinished_run_is_named(
    invent: Any, write_babilong: Write, write_training: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_babilong("run", [invent("x", lambda *_: 0.9)])
    (run / "results.json").unlink()
    assert f"{run}: the evaluation is not finished (no results.json)" in refused(capsys, run)
    training = write_training("training")
    summary = json.loads((training / "summary.json").read_text())
    (training / "summary.json").write_text(json.dumps({**summary, "stop_reason": "interrupted"}))
    assert f"{training}: the training was interrupted" in refused(capsys, training)
    (training / "summary.json").unlink()
    assert f"{training}: the training is not finished (no summary.json)" in refused(capsys, training)


@pytest.mark.parametrize("bad", ['"exact": NaN', '"exact": 1', '"exact": '])
def test_a_bad_line_of_predictions_is_named_with_its_file(
    invent: Any, write_babilong: Write, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    run = write_babilong("run", [invent("x", lambda *_: 1.0)])
    path = run / "predictions.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace('"exact": true', bad)
    path.write_text("\n".join(lines))
    assert f"{path}:3: " in refused(capsys, run)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('"score": NaN', "expected finite numbers, got NaN"),
        ('"score": "1"', "expected a finite number under 'score', got '1'"),
        ('"points": 1.0', "expected a finite number under 'score', got None"),
        ('"score": ', "not valid JSON"),
    ],
)
def test_a_bad_line_of_samples_is_named_with_its_file(
    write_samples: Write, capsys: pytest.CaptureFixture[str], bad: str, message: str
) -> None:
    path = write_samples("run", {"a": {"fda": [1.0, 1.0, 1.0]}}) / "samples.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1].replace('"score": 1.0', bad), lines[2]]))
    error = refused(capsys, path)
    assert f"{path}, line 2: " in error
    assert message in error


def test_a_sample_that_stands_there_twice_is_named(write_samples: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_samples("run", {"a": {"fda": [1.0]}}) / "samples.jsonl"
    path.write_text(path.read_text() * 2)
    assert "line 2: the sample fda-0 of a stands there a second time" in refused(capsys, path)


def test_a_bad_line_of_a_training_log_is_named(write_training: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_training("run") / "training_log.jsonl"
    path.write_text(path.read_text().replace('"loss": 3.0', '"loss": NaN'))
    assert f"{path}, line 2: expected finite numbers, got NaN" in refused(capsys, path.parent)


def test_whatever_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused(capsys, tmp_path / "nowhere")
    assert "is no run; expected a folder with results.json or training_log.jsonl" in refused(capsys, tmp_path)
    (tmp_path / "results.json").write_text('{"format": "other"}')
    assert "got the format 'other'" in refused(capsys, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--form", "pdf"], "unknown form 'pdf'; expected one of terminal, markdown, html, latex"),
        (["--correction", "none"], "unknown correction 'none'; expected one of holm, bh"),
        (["--rule", "strict"], "unknown rule 'strict'; expected one of exact, official"),
        (["--tasks", ","], "--tasks takes names separated by commas"),
    ],
)
def test_a_mistake_in_an_option_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in refused(capsys, tmp_path, *words)
