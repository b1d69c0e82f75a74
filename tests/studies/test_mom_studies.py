"""The two studies of mixtures, at a size that shows only that everything works."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mnemon.errors import ConfigError, RunError
from mnemon.studies.mom_mqar import verdict
from mnemon.studies.order import Order
from mnemon.studies.results import reproduce, write_page
from mnemon.studies.text_study import loss_curve, sign_of

MQAR = Order("mom-mqar", "tiny", only=("attention", "gla.single", "gla.mom", "gla.enlarged", "gla.top-1"))
TEXT = Order("mom-text", "tiny", only=("gla.single", "gla.mom"))


@pytest.fixture(scope="module")
def mqar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mqar") / "study"
    reproduce(MQAR, folder, command="mnemon reproduce mom-mqar")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "study"
    reproduce(TEXT, folder, tune=(0.003, 0.01), command="mnemon reproduce mom-text")
    return folder


def results_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return value


def test_every_variant_of_the_recall_study_is_measured_on_the_same_slices(mqar: Path) -> None:
    results = results_of(mqar)
    assert [variant["name"] for variant in results["variants"]] == list(MQAR.only)
    for variant in results["variants"]:
        assert [(row["num_pairs"], row["length"]) for row in variant["rows"]] == [(2, 16), (4, 32)]
        assert variant["tokens"] == [2048]
        assert all(0 <= row["accuracy"]["mean"] <= 1 for row in variant["rows"])


def test_the_mixture_is_compared_with_one_memory_and_with_one_as_large(mqar: Path) -> None:
    results = results_of(mqar)
    by_name = {variant["name"]: variant for variant in results["variants"]}
    assert [comparison["against"] for comparison in results["comparisons"]] == ["single", "enlarged"]
    for comparison in results["comparisons"]:
        pair = [by_name[f"gla.{arm}"]["mean"]["accuracy"]["mean"] for arm in ("mom", comparison["against"])]
        assert comparison["difference"]["mean"] == pytest.approx(pair[0] - pair[1])
        assert comparison["verdict"] == "cannot be told"  # of one seed


def test_an_ablation_is_compared_with_the_mixture_that_it_changes(mqar: Path) -> None:
    results = results_of(mqar)
    means = {variant["name"]: variant["mean"]["accuracy"]["mean"] for variant in results["variants"]}
    (ablation,) = results["ablations"]
    assert (ablation["rule"], ablation["arm"]) == ("gla", "top-1")
    assert ablation["difference"]["mean"] == pytest.approx(means["gla.top-1"] - means["gla.mom"])
    assert "| gla | top-1 − mom |" in (mqar / "page.md").read_text(encoding="utf-8")


def test_the_page_says_what_the_results_say(mqar: Path) -> None:
    page = (mqar / "page.md").read_text(encoding="utf-8")
    variant = results_of(mqar)["variants"][1]
    assert f"| gla | single | {variant['parameters']['total']:,} |" in page
    assert "Command: `mnemon reproduce mom-mqar`." in page
    for figure in ("accuracy-over-pairs.svg", "accuracy-over-state.svg"):
        assert f"]({figure})" in page
        assert (mqar / figure).read_bytes().startswith(b"<?xml")


def test_the_same_command_again_trains_nothing_and_says_the_same(mqar: Path) -> None:
    before, told = results_of(mqar), list[str]()
    assert reproduce(MQAR, mqar, command="mnemon reproduce mom-mqar", report=told.append) == before
    assert told == ["5 of 5 runs are finished already"]


def test_a_study_of_an_earlier_version_goes_on_where_a_key_has_come_since(mqar: Path) -> None:
    plan = mqar / "study.json"
    written = plan.read_text(encoding="utf-8")
    begun_with, told = json.loads(written), list[str]()
    assert begun_with["recipe"]["optimisation"].pop("gradient_checkpointing") is False  # its default
    plan.write_text(json.dumps(begun_with), encoding="utf-8")
    reproduce(MQAR, mqar, command="mnemon reproduce mom-mqar", report=told.append)
    assert told == ["5 of 5 runs are finished already"]
    assert json.loads(plan.read_text(encoding="utf-8")) == json.loads(written)


@pytest.mark.slow
def test_runs_in_processes_of_their_own_give_the_same_numbers(mqar: Path, tmp_path: Path) -> None:
    told = list[str]()
    order = Order("mom-mqar", "tiny", only=("gla.single", "gla.mom"))
    results = reproduce(order, tmp_path / "study", jobs=2, report=told.append)
    alone = {variant["name"]: variant["rows"] for variant in results_of(mqar)["variants"]}
    assert {variant["name"]: variant["rows"] for variant in results["variants"]} == {
        name: alone[name] for name in order.only
    }
    assert sorted(line.split(": ")[1] for line in told) == ["gla.mom/lr-0.003/seed-0", "gla.single/lr-0.003/seed-0"]


@pytest.mark.slow
def test_what_goes_wrong_in_a_process_of_its_own_is_told_with_the_run(tmp_path: Path) -> None:
    order = Order("mom-mqar", "tiny", only=("gla.single", "gla.mom"), changes=("optimisation.sharding=fsdp",))
    with pytest.raises(RunError, match=r"gla\.(single|mom)/lr-0.003/seed-0: .*fsdp"):
        reproduce(order, tmp_path / "study", jobs=2)


def test_a_study_is_not_continued_with_another_recipe(mqar: Path) -> None:
    changed = Order("mom-mqar", "tiny", only=MQAR.only, changes=("optimisation.weight_decay=0.5",))
    with pytest.raises(ConfigError, match=r"begun with recipe.optimisation.weight_decay 0.01, now it is 0.5"):
        reproduce(changed, mqar)
    with pytest.raises(ConfigError, match=r"begun with .*study"):
        reproduce(TEXT, mqar)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"holds|already"):
            reproduce(MQAR, tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_every_variant_of_the_text_study_has_perplexities_and_a_curve(text: Path) -> None:
    for variant in results_of(text)["variants"]:
        assert [row["length"] for row in variant["rows"]] == [16, 32, 64, 128]
        for row in variant["rows"]:
            assert row["perplexity"]["low"] <= row["perplexity"]["mean"] <= row["perplexity"]["high"]
        assert [point[0] for point in variant["curve"]] == [512, 1024, 1536, 2048]


def test_a_mixture_is_compared_with_one_memory_on_the_same_windows_of_text(text: Path) -> None:
    results = results_of(text)
    rows = {variant["name"]: variant["rows"] for variant in results["variants"]}
    (comparison,) = results["comparisons"]
    assert (comparison["rule"], comparison["arm"], comparison["against"]) == ("gla", "mom", "single")
    for test, ours, theirs in zip(comparison["by_length"], rows["gla.mom"], rows["gla.single"], strict=True):
        difference = ours["bits_per_byte"]["mean"] - theirs["bits_per_byte"]["mean"]
        assert test["difference"]["mean"] == pytest.approx(difference) == pytest.approx(test["by_seed"][0])
        assert test["difference"]["low"] <= test["difference"]["mean"] <= test["difference"]["high"]
        assert test["corrected_p"] == test["p_value"]  # of one rule


def test_bits_per_byte_of_the_windows_are_those_of_the_whole_text(text: Path) -> None:
    for variant in results_of(text)["variants"]:
        folder = text / "runs" / variant["name"] / f"lr-{variant['learning_rate']:g}" / "seed-0"
        cells = json.loads((folder / "measures.json").read_text(encoding="utf-8"))["cells"]
        for row, cell in zip(variant["rows"], cells, strict=True):
            assert row["bits_per_byte"]["mean"] == pytest.approx(cell["bits_per_byte"])
            assert row["perplexity"]["mean"] == pytest.approx(cell["perplexity"]["mean"])


@pytest.mark.parametrize(
    ("by_seed", "corrected_p", "sign"),
    [([-0.1], 0.01, -1), ([-0.1, -0.2], 0.01, -1), ([-0.1, 0.2], 0.01, 0), ([0.1, 0.2], 0.01, 1), ([-0.1], 0.06, 0)],
)
def test_a_difference_in_bits_counts_only_if_it_is_sure_and_all_seeds_agree(
    by_seed: list[float], corrected_p: float, sign: int
) -> None:
    assert sign_of({"by_seed": by_seed, "corrected_p": corrected_p}) == sign


def test_a_learning_rate_is_chosen_by_the_better_score_and_its_run_counts(text: Path) -> None:
    for variant in results_of(text)["variants"]:
        scores = variant["tuning"]
        assert set(scores) == {"0.003", "0.01"}
        assert f"{variant['learning_rate']:g}" == max(scores, key=scores.__getitem__)


def test_all_runs_of_the_text_study_have_one_tokenizer(text: Path) -> None:
    files = {path.read_bytes() for path in text.glob("runs/*/*/*/tokenizer.json")}
    assert len(files) == 1


def test_the_page_of_the_repository_names_no_folder_of_this_machine(
    text: Path, repository: Path, tmp_path: Path
) -> None:
    import runpy

    script = runpy.run_path(str(repository / "scripts" / "update_studies.py"))
    assert script["main"]([str(text), "--root", str(tmp_path)]) == 0
    page = (tmp_path / "docs" / "results" / "mom-text.md").read_text(encoding="utf-8")
    assert "](mom-text-loss-curves.svg)" in page
    assert str(text.parent) not in page
    assert str(text.parent) not in (text / "results.json").read_text(encoding="utf-8")
    assert script["main"]([str(tmp_path), "--root", str(tmp_path)]) == 2


def test_a_study_goes_on_from_what_the_repository_keeps_of_it(mqar: Path, repository: Path, tmp_path: Path) -> None:
    import runpy
    import tarfile

    script = runpy.run_path(str(repository / "scripts" / "update_studies.py"))
    assert script["main"]([str(mqar), "--root", str(tmp_path)]) == 0
    archive = tmp_path / "docs" / "results" / "runs" / "mom-mqar.tar.gz"
    assert archive.read_bytes() == script["packed"](mqar)
    folder = tmp_path / "again"
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    assert not list(folder.rglob("*.safetensors"))
    results = reproduce(MQAR, folder)
    before = results_of(mqar)
    assert results["variants"] == before["variants"]
    assert results["comparisons"] == before["comparisons"]


def test_a_page_names_every_machine_that_runs_were_trained_on(mqar: Path, tmp_path: Path) -> None:
    results = results_of(mqar)
    ((machine, runs),) = ((entry["machine"], entry["runs"]) for entry in results["machines"])
    assert runs == len(MQAR.only)
    other = {"machine": {**machine, "processor": "abacus"}, "runs": 2}
    page = write_page(tmp_path / "page.md", {**results, "machines": [*results["machines"], other]}, "").read_text()
    assert f"- {runs} runs on: processor {machine['processor']}," in page
    assert "- 2 runs on: processor abacus," in page
    assert f"Machine: processor {machine['processor']}," in (mqar / "page.md").read_text()


def test_a_report_over_all_studies_names_what_was_found_and_what_is_open(
    mqar: Path, text: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import runpy

    write, report = (
        runpy.run_path(str(repository / "scripts" / f"{name}.py"))["main"]
        for name in ("update_studies", "update_study_report")
    )
    assert report(["--root", str(tmp_path)]) == 2
    assert "expected archives of studies, found none" in capsys.readouterr().err
    assert write([str(mqar), str(text), "--root", str(tmp_path)]) == 0
    assert report(["--root", str(tmp_path)]) == 0
    page = (tmp_path / "docs" / "results" / "study.md").read_text(encoding="utf-8")
    assert "- **Mixtures of memories on associative recall** (1 training seed(s))\n  - On associative recall a" in page
    assert (
        "(MoM, Table 5) | [Helps for 0 of 1 rules, does not help for 0, cannot be told for 1.](mom-mqar.md) | 1 |"
        in page
    )
    assert "| [Better for " in page
    assert "- Not run yet: `lm2-table1`, `lm2-more-tasks`, `lm2-ablation`, `lm2-figure5`, `lm2-mmlu`." in page
    assert "| rule | single | mom | enlarged |" in page
    assert re.search(r"tokens each in steps of [\d,]+\. All of it: \[mom-mqar\]", page)
    for figure in re.findall(r"\]\(([^)]*\.svg)\)", page):
        assert (tmp_path / "docs" / "results" / figure).is_file()
    assert "mnemon reproduce mom-mqar\nmnemon reproduce mom-text\n" in page
    (tmp_path / "docs" / "results" / "runs" / "mom-mqar.tar.gz").write_bytes(b"nothing")
    assert report(["--root", str(tmp_path)]) == 2
    assert "is no archive of a study" in capsys.readouterr().err


def test_a_loss_curve_does_not_depend_on_where_the_log_was_cut() -> None:
    whole = [{"step": 2, "tokens": 20, "loss": 1.5}, {"step": 4, "tokens": 40, "loss": 3.5}]
    cut = [
        {"step": 1, "tokens": 10, "loss": 1.0},
        {"step": 2, "tokens": 20, "loss": 2.0},
        {"step": 4, "tokens": 40, "loss": 3.5},
    ]
    assert loss_curve(whole, 2) == loss_curve(cut, 2) == [[20, 1.5], [40, 3.5]]
    assert loss_curve(cut[:2], 4) == [[20, 1.5]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "helps"),
        ({"corrected_p": 0.2}, "cannot be told"),
        ({"by_seed": [0.2, -0.01, 0.3]}, "cannot be told"),
        ({"by_seed": [0.2]}, "cannot be told"),
        ({"corrected_p": 0.9, "difference": {"high": 0.005}}, "does not help"),
        ({"accuracies": [0.12, 0.1], "guessing": 0.15}, "cannot be told"),
        ({"accuracies": [1.0, 0.995]}, "cannot be told"),
    ],
)
def test_a_mixture_helps_only_where_seeds_and_samples_say_so(changes: dict[str, Any], said: str) -> None:
    comparison = {
        "corrected_p": 0.01,
        "by_seed": [0.2, 0.1, 0.3],
        "difference": {"high": 0.4},
        "accuracies": [0.8, 0.6],
        "guessing": 0.15,
    }
    assert verdict(comparison | changes) == said
