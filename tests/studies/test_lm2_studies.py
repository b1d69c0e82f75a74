"""The studies of LM2: what is asked, how answers become rows and tests, and a run from end to end."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mnemon.errors import ConfigError
from mnemon.evaluation.results import BabilongResult, Cell, EvaluationSettings, ModelInfo, Prediction
from mnemon.studies.babilong_tables import (
    Answers,
    accuracy_grid,
    beyond_grid,
    compare_beyond,
    compare_with,
    model_rows,
    verdicts,
)
from mnemon.studies.lm2_ablation import Lm2Ablation
from mnemon.studies.lm2_figure5 import Lm2Figure5
from mnemon.studies.lm2_mmlu import Lm2Mmlu, choose
from mnemon.studies.lm2_more_tasks import Lm2MoreTasks
from mnemon.studies.lm2_table1 import Lm2Table1
from mnemon.studies.order import Order
from mnemon.studies.planning import base_recipe, choose_variants, plan_runs
from mnemon.studies.registry import get_study, parts_of
from mnemon.studies.results import read_results, reproduce
from mnemon.training.data_sections import BabilongData
from mnemon.training.recipe_io import load_recipe

TASKS = ("qa1", "qa6")


def answered(label: str, marks: Sequence[bool], length: str = "1k", sample: str = "s") -> BabilongResult:
    """Make the result of a model that answers both tasks with these marks."""
    settings = EvaluationSettings(TASKS, (length,), len(marks), 0, "stdlib", "generated", "test", "short", 20)
    cells = tuple(
        Cell(
            task,
            length,
            tuple(
                Prediction(f"{sample}{i}", task, length, f"{task}{i}", "p", "q", "t", "o", exact=mark, official=mark)
                for i, mark in enumerate(marks)
            ),
            seconds=1.0,
            prompt_tokens=1,
            new_tokens=1,
        )
        for task in TASKS
    )
    model = ModelInfo("made up", "llama", "plain", 100, training={"tokens": 5, "steps": 3, "trained_length": 64})
    return BabilongResult(label, model, settings, {}, cells)


GOOD, BAD = [True] * 20, [False] * 15 + [True] * 5


def test_every_model_has_a_row_and_lengths_it_was_not_asked_at_stay_out() -> None:
    answers = Answers([[[answered("plain", BAD), answered("LM2", GOOD)], [answered("LM2", GOOD, "32k")]]])
    plain, lm2 = model_rows(answers)
    assert list(plain["cells"]) == ["1k"]
    assert list(lm2["cells"]) == ["1k", "32k"]
    assert plain["cells"]["1k"]["mean"]["mean"] == 0.25
    assert lm2["cells"]["32k"]["samples"] == 20
    lines = accuracy_grid([plain, lm2], TASKS, with_published=False).lines
    assert [line[:2] for line in lines] == [("1k (20)", "plain"), ("1k (20)", "LM2"), ("32k (20)", "LM2")]


def test_published_models_stand_below_the_measured_ones_of_a_length() -> None:
    rows = model_rows(Answers([[[answered("LM2", GOOD)]]]))
    lines = accuracy_grid(rows, TASKS, with_published=True).lines
    assert lines[0][1] == "LM2"
    assert ("1k", "*LM2-1.7B, published*", "85", "84", "84") in lines  # 84.5, rounded to even


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_clear_difference_is_told_and_none_is_not(seeds: int) -> None:
    results = [answered("plain", BAD), answered("as good", GOOD), answered("LM2", GOOD)]
    tests = compare_with(Answers([[results]] * seeds), "LM2")
    assert [(test["against"], len(test["by_seed"])) for test in tests] == [("plain", seeds), ("as good", seeds)]
    assert tests[0]["difference"]["mean"] == pytest.approx(0.75)
    assert tests[0]["corrected_p"] < 0.001
    assert tests[1]["corrected_p"] == 1
    assert list(verdicts(tests, "LM2")) == [
        "- LM2 against plain: better at 1k.",
        "- LM2 against as good: cannot be told apart at 1k.",
    ]


@pytest.mark.parametrize("seeds", [1, 3])
def test_beyond_training_every_length_weighs_the_same_and_trained_lengths_do_not_count(seeds: int) -> None:
    near = [answered("plain", GOOD), answered("LM2", BAD), answered("RMT", BAD)]
    middle = [answered("plain", BAD, "4k"), answered("LM2", GOOD, "4k"), answered("RMT", BAD, "4k")]
    far = [answered("LM2", BAD[-8:], "32k"), answered("RMT", BAD[-8:], "32k")]
    answers = Answers([[near, middle, far]] * seeds)
    against_plain, against_rmt = compare_beyond(answers, 1024, [("LM2", "plain"), ("LM2", "RMT"), ("LM2", "nobody")])
    assert against_plain["lengths"] == ["4k"]
    assert against_plain["means"] == pytest.approx([1.0, 0.25])
    assert against_rmt["lengths"] == ["4k", "32k"]
    assert against_rmt["means"] == pytest.approx([(1 + 5 / 8) / 2, (0.25 + 5 / 8) / 2])
    assert against_rmt["difference"]["mean"] == pytest.approx(0.375)
    assert len(against_rmt["by_seed"]) == seeds
    assert against_plain["corrected_p"] < 0.001
    assert [line[:4] for line in beyond_grid([against_rmt]).lines] == [("4k to 32k", "LM2 − RMT", "81", "44")]
    assert compare_beyond(answers, 64_000, [("LM2", "plain")]) == []


def test_a_report_says_what_was_found_beyond_training_and_what_is_left_at_the_longest() -> None:
    near = [answered("plain", BAD, "4k"), answered("LM2", GOOD, "4k"), answered("RMT", BAD, "4k")]
    far = [answered("LM2", GOOD, "128k"), answered("RMT", BAD, "128k")]
    measures = {
        name: [{"results": {part: [asdict(found)] for part, found in parts.items()}}] * 2
        for name, parts in {
            "plain": {"near": near[0]},
            "lm2": {"near": near[1], "far": far[0]},
            "rmt": {"near": near[2], "far": far[1]},
        }.items()
    }
    study = Lm2Table1()
    results = study.analyse([], json.loads(json.dumps(measures)))
    found = study.findings(results)
    assert found[0].startswith("LM2 is ahead of plain from 4k to 4k tokens, in points: +75.0 [")
    assert found[1].startswith("LM2 is ahead of RMT from 4k to 128k tokens, in points: +75.0 [")
    assert found[2].startswith("RMT cannot be told from plain from 4k to 4k tokens, in points: +0.0 [")
    assert found[3].startswith("LM2 at 128k: qa1 100 % [")
    assert "ARMT-137M 100" in found[3]
    claim, best = study.claims(results)
    assert "(LM2, Table 1)" in claim.paper
    assert "98.1 at 4k" in best.paper
    untrained = "qa2, qa3, qa4, qa5 were not among its tasks"
    assert best.here == f"Not reached: one LM2 for 2 tasks, 100.0 at 4k, 100.0 at 128k (qa1 100/100; {untrained})."
    assert claim.here.startswith("Holds: ahead of plain, RMT. The lead over RMT in points: +75.0 [")
    against = {test["second"]: test for test in results["beyond"] if test["first"] == "LM2"}
    against["RMT"]["corrected_p"] = 0.2
    assert study.claims(results)[0].here.startswith("Holds in part: ahead of plain; not shown against RMT. The lead")
    against["plain"]["difference"]["mean"] = -0.1
    assert study.claims(results)[0].here.startswith("Not shown: ahead of none; not shown against plain, RMT. The")
    summary = "\n".join(study.summary(results))
    assert "| model | role | 4k | 128k |" in summary
    assert "| 4k to 128k | LM2 − RMT | 100 | 25 |" in summary


def test_tasks_of_several_facts_are_asked_of_the_same_arms_with_tokens_enough_for_the_last_stage() -> None:
    study, scale = Order("lm2-more-tasks", "tiny").resolve()
    runs = plan_runs(study, scale, choose_variants(study, scale, base_recipe(study, scale)), 1)
    assert [run.variant.name for run in runs] == ["plain", "window", "rmt", "armt", "lm2"]
    for run in runs:
        data, tokens = run.recipe.data, run.recipe.optimisation.max_tokens
        assert isinstance(data, BabilongData)
        assert data.task_names == ["qa1", "qa2", "qa7", "qa8"]
        most = [data.curriculum.most_tokens(stage) for stage in range(len(data.stages))]
        assert most[-1] is None
        assert sum(filter(None, most[:-1])) < tokens


def test_a_report_on_tasks_of_several_facts_names_them_and_what_every_model_answers_of_each() -> None:
    measures = {
        "plain": [{"results": {"near": [asdict(answered("plain", BAD, "16k"))]}}],
        "lm2": [{"results": {"near": [asdict(answered("LM2", GOOD, "16k"))]}}],
    }
    study = Lm2MoreTasks()
    results = study.analyse([], json.loads(json.dumps(measures)))
    assert study.findings(results)[-1] == "qa1, qa6 in percent at 16k: plain 25, 25; LM2 100, 100."
    claim = study.claims(results)[0]
    assert claim.here.startswith("On qa1, qa6: Holds: ahead of plain.")
    assert claim.paper == Lm2Table1().claims(results)[0].paper


def test_answers_to_different_questions_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="samples"):
        Answers([[[answered("plain", BAD), answered("LM2", GOOD, sample="other")]]])


def test_seeds_with_different_models_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="the seeds have different models"):
        Answers([[[answered("plain", BAD)]], [[answered("LM2", GOOD)]]])


def test_the_measures_of_a_run_come_back_as_they_were_written() -> None:
    measures = {
        "plain": [{"results": {"near": [asdict(answered("plain", BAD))]}}],
        "lm2": [{"results": {"near": [asdict(answered("LM2", GOOD))], "far": [asdict(answered("LM2", GOOD, "32k"))]}}],
    }
    results = Lm2Table1().analyse([], json.loads(json.dumps(measures)))
    assert [row["label"] for row in results["rows"]] == ["plain", "LM2"]
    assert [test["length"] for test in results["comparisons"]] == ["1k"]


def test_attention_over_everything_reads_less_than_a_memory_that_does_not_grow() -> None:
    order = Order("lm2-table1", "tiny", only=("plain", "window", "lm2"))
    study, scale = order.resolve()
    runs = plan_runs(study, scale, choose_variants(study, scale, base_recipe(study, scale), order.only), 1)
    tokens = {run.variant.name: study.tokens_read(run) for run in runs}
    assert tokens["lm2"] == 2 * tokens["window"]  # asked again with its bank knocked out
    assert tokens["plain"] < tokens["window"] / 2


def test_memory_goes_into_the_first_blocks_as_in_the_paper() -> None:
    study = Lm2Figure5()
    names = [variant.name for variant in study.variants(load_recipe("lm2-1.7b"), study.scales["paper"])]
    assert names == ["blocks-0", "blocks-1", "blocks-6", "blocks-12", "blocks-16"]
    small = study.variants(load_recipe(study.recipe), study.scales["small"])
    assert small[2].changes == ("model.lm2.memory_layers=[0, 1, 2]",)


class Counting(torch.nn.Module):
    """A model that knows how to count: after token t comes t + 1."""

    config, device = SimpleNamespace(vocab_size=50), torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=9.0 * torch.nn.functional.one_hot((input_ids + 1) % 50, 50).float())


def test_a_model_that_knows_what_follows_chooses_it_and_one_that_knows_nothing_does_not() -> None:
    blocks = (np.arange(12)[:, None] * 4 + np.arange(16)) % 50
    assert choose(Counting(), blocks).all()
    clueless = Counting()
    clueless.forward = lambda input_ids, **options: SimpleNamespace(  # type: ignore[method-assign]
        logits=torch.zeros(*input_ids.shape, 50)
    )
    assert not choose(clueless, blocks).any()


def test_one_name_stands_for_the_two_studies_of_mixtures() -> None:
    assert parts_of("mom-tables", "small") == ("mom-mqar", "mom-text")
    assert parts_of("mom-tables", "paper") == ("mom-text",)
    assert parts_of("lm2-mmlu", "tiny") == ("lm2-mmlu",)
    with pytest.raises(ConfigError, match="mom-tables has no scale 'papr'; did you mean paper"):
        parts_of("mom-tables", "papr")
    with pytest.raises(ConfigError, match="did you mean mom-tables"):
        parts_of("mom-table", "tiny")


FEW = (
    "data.tasks=[qa1]",
    "data.lengths=[0]",
    "data.fact_limits=[]",
    "tokenizer.vocab_size=400",
    "optimisation.max_tokens=1024",
    "evaluation.samples=2",
    "evaluation.lengths=[0]",
)


def test_a_table_is_made_from_end_to_end(tmp_path: Path) -> None:
    order = Order("lm2-table1", "tiny", only=("plain", "lm2"), changes=FEW, samples=3, lengths=("0k",))
    reproduce(order, tmp_path / "study", command="mnemon reproduce lm2-table1")
    results = read_results(tmp_path / "study")
    labels = [row["label"] for row in results["rows"]]
    assert labels == ["plain", "plain (bm25, 5 sentences)", "LM2", "LM2 (knocked out)"]
    page = (tmp_path / "study" / "page.md").read_text(encoding="utf-8")
    assert "| 0k (3) | LM2 (knocked out) |" in page
    assert "*LM2-1.7B, published*" in page
    assert "1,024 tokens in steps of 1,024 (lm2: 512); schedule" in page
    assert (tmp_path / "study" / "evaluation" / "near" / "report.html").is_file()
    assert get_study("lm2-table1").title in page


@pytest.mark.parametrize("name", ["lm2-figure5", "lm2-mmlu"])
def test_the_studies_of_text_are_made_from_end_to_end(name: str, tmp_path: Path) -> None:
    few = (
        "model.base.num_hidden_layers=2",
        "model.base.hidden_size=32",
        "tokenizer.vocab_size=320",
        "data.length=64",
        "optimisation.max_tokens=2048",
        "optimisation.batch_tokens=512",
        "evaluation.samples=2",
    )
    study = get_study(name)
    last = "blocks-2" if name == "lm2-figure5" else "lm2"
    first = "blocks-0" if name == "lm2-figure5" else "plain"
    samples = None if name == "lm2-figure5" else 8
    reproduce(Order(name, "tiny", only=(first, last), changes=few, samples=samples), tmp_path / "study")
    results = read_results(tmp_path / "study")
    assert [variant["name"] for variant in results["variants"]] == [first, last]
    assert len(results["comparisons"]) == 1
    page = (tmp_path / "study" / "page.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {study.title}")
    assert "perplexity at 512" in page
    found = study.findings(results)
    assert len(found) == (1 if name == "lm2-figure5" else 2)
    assert all("1 seed(s)" in line for line in found)
    assert page.count("Bits per byte of the first minus the second") == 1
    assert study.summary(results)[0] in page


def test_every_change_of_the_ablation_is_a_recipe_of_its_own() -> None:
    for size in Lm2Ablation.scales:
        order = Order("lm2-ablation", size)
        study, scale = order.resolve()
        variants = choose_variants(study, scale, base_recipe(study, scale), ())
        runs = plan_runs(study, scale, variants, 1)
        recipes = [run.recipe.model_dump_json() for run in runs]
        assert len(set(recipes)) == len(recipes) == len(variants) > 15
        assert variants[0].name == "base"
        placed = {
            run.variant.name: run.recipe.model.lm2 for run in runs if run.variant.name.startswith(("blocks", "flow"))
        }
        if size == "small":
            assert set(placed) == {"flow.layer", "blocks.first", "blocks.last"}
        else:  # one block with memory gets a second one
            banks = {name: (lm2.memory_layers, lm2.flow) for name, lm2 in placed.items() if lm2 is not None}
            assert banks == {
                "blocks.two": ([1, 2], "depth"),
                "blocks.two-banks": ([1, 2], "layer"),
                "blocks.two-attention": ([2], "depth"),
            }
        assert {run.recipe.optimisation.max_tokens for run in runs} == {runs[0].recipe.optimisation.max_tokens}


@pytest.mark.parametrize("seeds", [1, 3])
def test_changes_are_judged_over_all_lengths_together(seeds: int) -> None:
    def runs(label: str, marks: Sequence[bool]) -> list[dict[str, Any]]:
        settings = answered(label, marks)
        return [{"results": [asdict(settings)]}] * seeds

    measures = {"base": runs("base", BAD), "same": runs("same", BAD), "better": runs("better", GOOD)}
    learned: dict[str, list[int | None]] = {"same": [2_000_000, None, 4_000_000][:seeds]}
    variants = [
        {
            "name": name,
            "arm": f"what {name} is",
            "state_bytes": {"64": 8},
            "learned_after": learned.get(name, [None] * seeds),
        }
        for name in measures
    ]
    results = Lm2Ablation().analyse(variants, json.loads(json.dumps(measures)))
    assert [test["variant"] for test in results["comparisons"]] == ["same", "better"]
    assert results["comparisons"][1]["difference"]["mean"] == pytest.approx(0.75)
    assert results["rows"][0]["all"]["mean"] == 0.25
    lines = Lm2Ablation().body({**results, "variants": variants, "recipe": {"name": "r"}})
    assert "- Better than the base: `better`." in lines
    assert Lm2Ablation().findings(results)[0] == "Better than the base: `better`."
    assert "- Cannot be told from it: `same`." in lines
    table = "\n".join(lines)
    assert "| better | what better is | 100 | 8 | not | 100 |" in table
    assert "| base | what base is | 100 | 8 | not | 25 |" in table
    assert f"| same | what same is | 100 | 8 | {'2.00M' if seeds == 1 else '3.00M (2 of 3 seeds)'} | 25 |" in table


def test_an_ablation_is_made_from_end_to_end(tmp_path: Path) -> None:
    order = Order("lm2-ablation", "tiny", only=("base", "gates.no-skip"), changes=FEW, samples=2, lengths=("0k", "1k"))
    reproduce(order, tmp_path / "study")
    page = (tmp_path / "study" / "page.md").read_text(encoding="utf-8")
    assert "| gates.no-skip | no gate to skip an update |" in page
    assert (tmp_path / "study" / "differences.svg").is_file()
    assert [row["label"] for row in read_results(tmp_path / "study")["rows"]] == ["base", "gates.no-skip"]


@pytest.mark.parametrize(
    ("means", "said"),
    [
        ((-0.01, -0.02, -0.03), "Holds; memory in so many blocks against none: 1 of 8: helps"),
        ((-0.01, -0.04, -0.03), "Not shown;"),  # fewer blocks are better than all
        ((-0.01, 0.02, 0.03), "Does not hold;"),
    ],
)
def test_memory_in_all_blocks_has_to_be_the_best_for_the_papers_claim(means: tuple[float, ...], said: str) -> None:
    comparisons = [
        {
            "blocks": f"{blocks} of 8",
            "by_length": [{"by_seed": [mean] * 2, "corrected_p": 0.01, "difference": {"mean": mean}}],
        }
        for blocks, mean in zip((1, 3, 8), means, strict=True)
    ]
    (claim,) = Lm2Figure5().claims({"comparisons": comparisons})
    assert claim.here.startswith(said)
    assert Lm2Figure5().claims({"comparisons": []}) == []


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.03, "Holds: at least 1.0 points better."),
        (-0.03, -0.02, "Does not hold: at least 2.0 points worse."),
        (-0.03, 0.01, "No difference shown; a gain of more than 1.0 and a loss of more than 3.0 points are excluded."),
    ],
)
def test_a_general_skill_is_kept_or_lost_only_where_the_interval_says_so(low: float, high: float, said: str) -> None:
    (claim,) = Lm2Mmlu().claims({"comparisons": [{"difference": {"low": low, "high": high}}]})
    assert claim.here == said
