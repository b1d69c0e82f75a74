"""What studies would run: variants, sizes, tokens. Nothing is trained here."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mnemon.errors import ConfigError
from mnemon.ops import list_rules
from mnemon.studies import estimate as estimate_module
from mnemon.studies.dry_run import dry_run
from mnemon.studies.equal_size import as_large_as, parameters, refuse_unequal
from mnemon.studies.estimate import measured_speed, open_data, run_seconds
from mnemon.studies.order import Order
from mnemon.studies.planning import base_recipe, choose_variants, model_facts, plan_runs
from mnemon.studies.registry import get_scale, get_study, list_studies
from mnemon.studies.study import PlannedRun
from mnemon.training.recipe_io import changed_recipe, load_recipe, save_recipe


def planned(order: Order) -> tuple[PlannedRun, ...]:
    study, scale = order.resolve()
    variants = choose_variants(study, scale, base_recipe(study, scale, order.changes), order.only)
    return plan_runs(study, scale, variants, scale.seeds, order.changes)


def test_every_rule_has_its_arms_and_two_have_ablations() -> None:
    names = {run.variant.name for run in planned(Order("mom-mqar", "small", seeds=1))}
    for rule in list_rules():
        assert {f"{rule}.single", f"{rule}.mom", f"{rule}.enlarged"} <= names
    assert {"gla.memories-2", "gla.memories-8", "gla.top-1", "gla.top-4", "gla.shared-off"} <= names
    assert "attention" in names
    assert len(names) == 1 + 3 * len(list_rules()) + 2 * 6


def test_the_language_modelling_study_has_no_enlarged_memories() -> None:
    names = {run.variant.name for run in planned(Order("mom-text", "small", seeds=1))}
    assert names == {"attention"} | {f"{rule}.{arm}" for rule in list_rules() for arm in ("single", "mom")}


def test_runs_differ_in_what_their_variant_says_and_in_nothing_else() -> None:
    single, mixture = planned(Order("mom-mqar", "tiny", seeds=1, only=("gla.single", "gla.mom")))
    first, second = single.recipe.model_dump(), mixture.recipe.model_dump()
    assert first["model"]["mom"].pop("num_memories") == 1
    assert second["model"]["mom"].pop("num_memories") == 4
    for recipe in (first, second):
        for key in ("top_k", "shared_memory"):
            recipe["model"]["mom"].pop(key)
        recipe.pop("name")
    assert first == second


def test_seeds_come_outermost_so_that_what_is_there_first_compares_all_variants() -> None:
    runs = planned(Order("mom-mqar", "tiny", seeds=2, only=("gla.single", "gla.mom")))
    assert [(run.recipe.seed, run.variant.arm) for run in runs] == [
        (0, "single"),
        (0, "mom"),
        (1, "single"),
        (1, "mom"),
    ]


@pytest.mark.parametrize("rule", ["gla", "gated_delta_net", "ttt"])
def test_an_enlarged_memory_carries_as_many_bytes_as_the_mixture(rule: str) -> None:
    changes = ("model.mom.conv_size=0",)  # the tokens that a convolution still needs are no memory
    arms = (f"{rule}.mom", f"{rule}.enlarged")
    mixture, enlarged = planned(Order("mom-mqar", "small", seeds=1, only=arms, changes=changes))
    sizes = [model_facts(run.recipe, [64])["state_bytes"]["64"] for run in (mixture, enlarged)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.03)


def test_a_change_of_the_user_reaches_every_run_and_the_variant_has_the_last_word() -> None:
    runs = planned(Order("mom-mqar", "tiny", only=("gla.*",), changes=("data.vocab_size=80", "model.mom.rule=ttt")))
    assert {run.recipe.data.vocab_size for run in runs} == {80}
    assert {run.recipe.model.mom.rule for run in runs if run.recipe.model.mom} == {"gla"}


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (Order("mom-mqra", "tiny"), "no study is called 'mom-mqra'; did you mean mom-mqar"),
        (Order("mom-mqar", "tny"), "mom-mqar has no scale 'tny'; did you mean tiny"),
        (Order("mom-mqar", "tiny", only=("glaa.mom",)), "did you mean gla.mom"),
        (Order("mom-mqar", "tiny", lengths=("4k",)), "--lengths says nothing about mom-mqar"),
        (Order("mom-text", "tiny", samples=5), "--samples says nothing about mom-text"),
        (Order("lm2-table1", "tiny", lengths=("4q",)), "4q"),
        (Order("mom-mqar", "tiny", changes=("evaluation.samples=0",)), "set evaluation.samples to at least 1"),
        (
            Order("mom-mqar", "tiny", changes=("optimisation.max_tokens=null", "optimisation.max_minutes=1")),
            "set optimisation.max_tokens",
        ),
        (Order("mom-mqar", "tiny", changes=("data.vocab=3",)), "unknown key data.vocab"),
    ],
)
def test_what_cannot_be_ordered_is_refused_in_one_line(order: Order, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refusal:
        planned(order)
    assert "\n" not in str(refusal.value)


def test_every_study_has_a_tiny_and_a_small_scale() -> None:
    for name in list_studies():
        for scale in ("tiny", "small"):
            assert get_scale(get_study(name), scale).seeds >= 1


def test_models_are_made_equally_large_by_wider_feed_forward_layers() -> None:
    base = load_recipe("babilong-tiny-lm2")
    changes = as_large_as(base, ("model.kind=plain", "model.lm2=null"))
    assert changes[-1].startswith("model.base.intermediate_size=")
    assert parameters(changed_recipe(base, changes)) == pytest.approx(parameters(base), rel=0.005)


def test_the_shipped_arms_are_equally_large_and_read_the_same_tokens() -> None:
    runs = planned(Order("lm2-table1", "tiny", only=("plain", "window", "lm2")))
    refuse_unequal(runs)
    assert len({run.recipe.optimisation.max_tokens for run in runs}) == 1


def test_models_of_different_size_are_refused() -> None:
    order = Order("lm2-table1", "tiny", only=("plain", "lm2"), changes=("model.base.hidden_size=32",))
    with pytest.raises(ConfigError, match="differ in size by more than 2 %: lm2 has"):
        refuse_unequal(planned(order))


def test_a_run_of_the_published_size_is_counted_and_its_data_opened_and_nothing_built(tmp_path: Path) -> None:
    changes = ("tokenizer.vocab_size=400",)
    plan = dry_run(Order("mom-text", "paper", only=("gated_delta_net.mom",), changes=changes), tmp_path)
    (row,) = plan["runs"]
    missing_rows = (32000 - 400) * 1024
    assert row["parameters"]["total"] + missing_rows == 512_351_424  # as published, embedding tied
    assert row["data"] == {"text": 2048}
    assert row["flop"] == pytest.approx(6 * row["parameters"]["active"] * 16_106_127_360)
    assert "seconds" not in row
    for line, start in zip(
        row["launch"], ("torchrun --standalone --nproc_per_node=8", "torchrun --nnodes=2"), strict=True
    ):
        assert line.startswith(start)
        assert f"-m mnemon train mom-340m --set {changes[0]}" in line
        assert line.endswith(f"--output {tmp_path}/runs/gated_delta_net.mom/lr-0.0003/seed-0")
    assert not list(tmp_path.iterdir())


def test_every_kind_of_data_can_be_opened() -> None:
    assert open_data(load_recipe("mqar-study", ["data.slices=[{length: 64, num_pairs: 4}]"])) == {"4 pairs": 64}
    few = ["data.tasks=[qa1, qa6]", "data.lengths=[0, 128]", "tokenizer.vocab_size=400"]
    assert open_data(load_recipe("babilong-tiny-lm2", few)) == {"qa1": 128, "qa6": 128}


def test_time_is_estimated_from_earlier_runs_of_the_same_recipe(tmp_path: Path) -> None:
    order = Order("mom-mqar", "tiny", seeds=2, only=("gla.single",))
    run, another_seed = planned(order)
    study = get_study("mom-mqar")
    assert run_seconds(study, run, tmp_path)["from"] == "measured"
    folder = another_seed.folder(tmp_path)
    folder.mkdir(parents=True)
    summary = {"stop_reason": "max_tokens", "validation": {"16": {}}, "tokens_per_second": 2.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    elsewhere = another_seed.recipe.output.model_copy(update={"folder": "elsewhere"})
    save_recipe(another_seed.recipe.model_copy(update={"output": elsewhere}), folder / "recipe.yaml")
    estimate = run_seconds(study, run, tmp_path)
    assert estimate["from"] == "earlier run"
    assert estimate["seconds"] == pytest.approx(1024, rel=0.05)
    deeper = run.recipe.model.model_copy(update={"base": {**run.recipe.model.base, "num_hidden_layers": 5}})
    save_recipe(run.recipe.model_copy(update={"model": deeper}), folder / "recipe.yaml")
    assert run_seconds(study, run, tmp_path)["from"] == "measured"


def test_a_long_call_is_timed_once_and_a_short_one_until_it_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = planned(Order("mom-mqar", "tiny", only=("gla.single",)))
    calls: list[int] = []

    class Counted(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            calls.append(input_ids.numel())
            return SimpleNamespace(loss=torch.zeros((), requires_grad=True))

    monkeypatch.setattr(estimate_module, "build_model", lambda *_: Counted())
    measured_speed(run.recipe)
    assert len(calls) == 8  # four training steps and four readings
    calls.clear()
    monkeypatch.setattr(estimate_module, "_LONG_CALL", 0.0)
    measured_speed(run.recipe)
    assert len(calls) == 2
