import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mnemon.errors import ConfigError
from mnemon.training import load_recipe, save_recipe, shipped_recipes
from mnemon.training.recipe_io import check_recipe


def changed(recipe: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    recipe = copy.deepcopy(recipe)
    *parents, last = path.split(".")
    node = recipe
    for parent in parents:
        node = node[parent]
    node[last] = value
    return recipe


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            "optimisation.learning_rat",
            1,
            "unknown key optimisation.learning_rat; did you mean optimisation.learning_rate",
        ),
        ("data.curriculum.treshold", 1, "did you mean data.curriculum.threshold?"),
        ("sed", 1, "unknown key sed; did you mean seed?"),
        ("optimisation.zzz", 1, "unknown key optimisation.zzz; known: learning_rate"),
        ("optimisation.learning_rate", "fast", "optimisation.learning_rate: .*got 'fast'"),
        ("optimisation.learning_rate", -1, "optimisation.learning_rate: .*greater than 0, got -1"),
        ("optimisation.schedule", "cosin", "optimisation.schedule: .*'cosine'.*got 'cosin'"),
        ("optimisation.batch_tokens", 0, "optimisation.batch_tokens"),
        ("optimisation.max_tokens", None, "max_tokens, max_minutes or both"),
        ("data.tasks", {"qa99": 1}, "unknown task 'qa99'; known: qa1"),
        ("data.lengths", [64, 64], "lengths must grow"),
        ("data.lengths", ["1x"], "expected a length such as"),
        ("data.lengths", [], "data.lengths"),
        ("data.curriculum.max_stage_tokens", [], "max_stage_tokens: expected a number of tokens above 0"),
        ("data.curriculum.max_stage_tokens", [9, 0], r"above 0, null, or a list of these, got \[9, 0\]"),
        ("data.curriculum.start_stage", 3, "start_stage must be below"),
        ("data.first_tasks", ["qa9"], "first_tasks names qa9, which is not among the tasks"),
        ("data.ask_once", ["qa99"], "unknown task 'qa99'; known: qa1"),
        ("model.base", {"hidden_size": 3}, "base needs a model_type"),
        ("model.lm2", {"num_slots": 4}, "kind: plain takes no lm2 options"),
        ("model.kind", "lm2", "needs an lm2 section"),
        ("name", "a/b", "name: "),
        ("evaluation.tasks", ["qa0"], "unknown task 'qa0'"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line_that_names_the_key(
    tiny: dict[str, Any], path: str, value: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        check_recipe(changed(tiny, path, value))
    assert "\n" not in str(caught.value)


def test_a_missing_section_is_named(tiny: dict[str, Any]) -> None:
    del tiny["data"]
    with pytest.raises(ConfigError, match="data is missing"):
        check_recipe(tiny)


def test_overrides_are_typed_and_checked(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny))
    changes = ["optimisation.learning_rate=1e-3", "data.lengths=[0, 1k]", "data.tasks=[qa1]", "model.init_from=null"]
    recipe = load_recipe(path, changes)
    assert recipe.optimisation.learning_rate == 1e-3
    assert recipe.data.lengths == [0, 1000]
    assert recipe.data.tasks == {"qa1": 1.0}
    for change, said in [
        ("optimisation.lerning_rate=1", "did you mean optimisation.learning_rate"),
        ("optimization.learning_rate=1", "unknown key optimization; did you mean optimisation"),
        ("seed", "expected section.key=value"),
        ("seed.x=1", "seed is a value, not a section"),
        ("seed=[", "not a YAML value"),
        ("seed=x", "seed: .*integer"),
    ]:
        with pytest.raises(ConfigError, match=said):
            load_recipe(path, [change])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [1", "line 1: not valid YAML"),
        (b"- a", "expected sections"),
        (b"", "is empty"),
        (b"a\0b", "NUL byte"),
        (b"name: \xff", "not UTF-8"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        load_recipe(path)


def test_an_unknown_recipe_name_suggests_the_nearest_shipped_one() -> None:
    with pytest.raises(ConfigError, match="did you mean babilong-tiny-lm2"):
        load_recipe("babilong-tiny-lm3")


def test_a_saved_recipe_reads_back_equal(tiny: dict[str, Any], tmp_path: Path) -> None:
    recipe = check_recipe(tiny)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_and_carries_its_own_name(name: str) -> None:
    assert load_recipe(name).name == name
