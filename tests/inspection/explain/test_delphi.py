"""What is written for delphi is read back by a reader made from its format alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mnemon.errors import ConfigError
from mnemon.inspection.explain.activations import Unit, UnitActivations
from mnemon.inspection.explain.delphi import export_delphi


def activations(tokens: int = 70, blocks: int = 2, slots: int = 5) -> UnitActivations:
    numbers = np.random.default_rng(0)
    units = tuple(Unit(f"block {b}, slot {s}", b, s) for b in range(blocks) for s in range(slots))
    values = numbers.random((tokens, len(units))) * (numbers.random((tokens, len(units))) < 0.4)
    return UnitActivations(
        "some/model", "read", units, ("x",) * tokens, np.arange(tokens, dtype=np.int32), values.astype(np.float16)
    )


def read_hookpoint(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return dense activations [contexts, length, units] and the tokens [contexts, length] of one hookpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found, tokens, width = [], None, 0
    files = sorted(folder.glob("*.safetensors"), key=lambda file: int(file.stem.split("_")[0]))
    assert len(files) == config["n_splits"]
    for file in files:
        first, last = map(int, file.stem.split("_"))
        assert first == width  # files follow each other without a gap
        width = last + 1
        content = load_file(file)
        assert content["activations"].dtype == np.float16
        assert content["locations"].dtype in (np.uint16, np.uint32)
        locations = content["locations"].astype(np.int64)
        locations[:, 2] += first
        assert (locations[:, 2] <= last).all()
        if tokens is not None:
            np.testing.assert_array_equal(content["tokens"], tokens)
        tokens = content["tokens"]
        found.append((locations, content["activations"]))
    assert tokens is not None
    assert tokens.shape[1] == config["cache_ctx_len"]
    assert tokens.size == config["n_tokens"]
    dense = np.zeros((*tokens.shape, width), dtype=np.float16)
    for locations, values in found:
        dense[tuple(locations.T)] = values
    return dense, tokens


@pytest.mark.parametrize("num_splits", [1, 2, 5, 9])
def test_an_independent_reader_gets_the_activations_back(tmp_path: Path, num_splits: int) -> None:
    given = activations()
    raw = export_delphi(given, tmp_path / "export", context_length=32, num_splits=num_splits)
    # delphi takes every entry of this folder for a hookpoint.
    assert sorted(entry.name for entry in raw.iterdir()) == ["blocks.0.memory.read", "blocks.1.memory.read"]
    for block, home in enumerate(sorted(raw.iterdir())):
        dense, tokens = read_hookpoint(home)
        np.testing.assert_array_equal(tokens.ravel(), given.ids[:64])
        np.testing.assert_array_equal(dense.reshape(64, 5), given.values[:64, 5 * block : 5 * block + 5])
        assert json.loads((home / "config.json").read_text(encoding="utf-8"))["model_name"] == "some/model"


def test_a_limit_leaves_weak_activations_out(tmp_path: Path) -> None:
    given = activations(blocks=1)
    raw = export_delphi(given, tmp_path / "export", context_length=70, least_share=0.5)
    dense, _ = read_hookpoint(next(raw.iterdir()))
    limit = given.values.max(axis=0).astype(np.float32) / 2
    np.testing.assert_array_equal(dense[0], np.where(given.values > limit, given.values, 0))


def test_units_keep_their_numbers_and_silent_ones_are_not_listed(tmp_path: Path) -> None:
    given = activations(blocks=1)
    values = given.values.copy()
    values[:, 3] = 0
    chosen = replace(given, values=values).select([1, 3, 4])
    dense, _ = read_hookpoint(next(export_delphi(chosen, tmp_path / "export", num_splits=2).iterdir()))
    np.testing.assert_array_equal(dense[0][:, [1, 3, 4]], values[:, [1, 3, 4]])
    assert not dense[0][:, [0, 2]].any()


def test_many_contexts_need_wider_numbers(tmp_path: Path) -> None:
    tokens = 2**16 + 1
    given = UnitActivations(
        "m", "route", (Unit("u", 0, 0),), ("x",) * tokens, np.zeros(tokens, np.int32), np.ones((tokens, 1), np.float16)
    )
    raw = export_delphi(given, tmp_path / "export", context_length=1)
    assert load_file(raw / "blocks.0.memory.route" / "0_0.safetensors")["locations"][-1].tolist() == [2**16, 0, 0]


def test_a_folder_with_files_and_impossible_sizes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files already"):
        export_delphi(activations(), tmp_path)
    for wrong in ({"context_length": 0}, {"num_splits": 0}, {"least_share": 1.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be at least"):
            export_delphi(activations(), tmp_path / "export", **wrong)
