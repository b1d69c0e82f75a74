"""Typed files: what is written comes back, and nothing damaged, foreign or newer is believed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from mnemon.errors import ConfigError, DataError
from mnemon.typed_files import FileFormat, read_header, read_typed, write_typed


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None


@dataclass(frozen=True)
class Part:
    name: str
    numbers: np.ndarray
    share: float | None = None


@dataclass(frozen=True)
class Arrays:
    title: str
    parts: tuple[Part, ...]
    by_name: Mapping[str, np.ndarray]
    counts: tuple[int, int]


@dataclass(frozen=True)
class Tensors:
    pairs: tuple[Pair, ...]
    nested: tuple[tuple[Tensor, ...], ...]
    positions: np.ndarray
    open: bool


FORMAT = FileFormat("mnemon test", version=2, migrations={1: lambda content, arrays: {**content, "counts": [1, 2]}})


def arrays() -> Arrays:
    part = Part('été \u2603\x01\x7f\u2028 "\\\n/', np.arange(6, dtype=np.int16).reshape(2, 3), 0.25)
    return Arrays(
        "title", (part, Part("empty", np.zeros((0, 3), np.float16))), {"a.b": np.array([True, False])}, (3, 4)
    )


def write(path: Path, value: Arrays | None = None) -> Path:
    return write_typed(path, arrays() if value is None else value, FORMAT)


def rewrite(path: Path, header: dict[str, str], tensors: Mapping[str, np.ndarray] = {}) -> None:
    """Write a file of the same arrays under another header, as a hand that alters it would."""
    with safe_open(str(path), framework="numpy") as file:
        old = dict(file.metadata())
        held = {name: file.get_tensor(name) for name in file.keys()} | dict(tensors)  # noqa: SIM118
    save_file(held, path, old | header)


def test_arrays_texts_and_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    value, back = arrays(), read_typed(write(tmp_path / "a.safetensors"), Arrays, FORMAT)
    assert (back.title, back.counts) == (value.title, value.counts)
    assert [part.name for part in back.parts] == [part.name for part in value.parts]
    assert [part.share for part in back.parts] == [0.25, None]
    for mine, theirs in zip(value.parts, back.parts, strict=True):
        assert mine.numbers.dtype == theirs.numbers.dtype
        np.testing.assert_array_equal(mine.numbers, theirs.numbers)
    np.testing.assert_array_equal(back.by_name["a.b"], [True, False])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    wide = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    value = Tensors((Pair(wide.T, None), Pair(wide[:0], wide[0])), ((wide, wide[1:]), ()), np.array([-1, 5]), True)
    back = read_typed(write_typed(tmp_path / "t.safetensors", value, FORMAT), Tensors, FORMAT)
    assert back.pairs[0].right is None
    assert back.open is True
    assert back.nested[1] == ()
    for mine, theirs in ((wide.T, back.pairs[0].left), (wide[:0], back.pairs[1].left), (wide[1:], back.nested[0][1])):
        assert theirs.dtype == dtype
        assert torch.equal(mine, theirs)
    assert isinstance(back.positions, np.ndarray)


def test_equal_values_make_equal_files(tmp_path: Path) -> None:
    files = {write(tmp_path / f"{number}.safetensors").read_bytes() for number in range(20)}
    assert len(files) == 1


def test_reading_arrays_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = write(tmp_path / "a.safetensors")
    code = f"import sys; from mnemon.typed_files import *; read_header({str(path)!r}, FileFormat('mnemon test', 2))"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' not in sys.modules"], check=True)


def test_a_file_that_is_there_is_replaced_only_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists already; use --overwrite"):
        write(path)
    assert path.read_bytes() == before
    write_typed(path, replace(arrays(), title="other"), FORMAT, overwrite=True)
    assert read_typed(path, Arrays, FORMAT).title == "other"


def test_every_way_to_shorten_a_file_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    data = path.read_bytes()
    for length in [0, 1, 7, 8, 20, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"a\.safetensors: .*(cut short|another safetensors file)"):
            read_typed(path, Arrays, FORMAT)


def test_every_altered_byte_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            back = read_typed(path, Arrays, FORMAT)
        except DataError:
            continue
        # What is left are blanks that fill up the header.
        assert back.title == "title"
        assert np.array_equal(back.parts[0].numbers, arrays().parts[0].numbers)


def test_an_array_of_another_hand_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    rewrite(path, {}, {"parts.0.numbers": np.zeros((2, 3), np.int16)})
    with pytest.raises(DataError, match=r"altered after it was written \(parts\.0\.numbers\)"):
        read_typed(path, Arrays, FORMAT)
    rewrite(write_typed(path, arrays(), FORMAT, overwrite=True), {}, {"more": np.zeros(1)})
    with pytest.raises(DataError, match="other arrays"):
        read_typed(path, Arrays, FORMAT)


def test_a_newer_version_and_another_kind_are_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.safetensors")
    newer = FileFormat("mnemon test", version=3)
    with monkeypatch.context() as patch:
        patch.setattr("mnemon.typed_files.__version__", "9.1")
        write_typed(path, arrays(), newer, overwrite=True)
    with pytest.raises(DataError, match=r"version 3 .* by mnemon 9\.1; this mnemon .* up to version 2: upgrade it"):
        read_typed(path, Arrays, FORMAT)
    with pytest.raises(DataError, match="expected a mnemon trace file, got mnemon test"):
        read_header(path, FileFormat("mnemon trace", 1))
    with pytest.raises(DataError, match="no such file; expected a mnemon test file"):
        read_header(tmp_path / "none", FORMAT)


def test_an_older_version_is_brought_up_to_date_and_one_without_a_way_refused(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Old:
        title: str
        parts: tuple[Part, ...]
        by_name: Mapping[str, np.ndarray]

    value = arrays()
    old = Old(value.title, value.parts, value.by_name)
    path = write_typed(tmp_path / "old.safetensors", old, FileFormat("mnemon test", version=1))
    assert read_typed(path, Arrays, FORMAT).counts == (1, 2)
    with pytest.raises(DataError, match="version 1 of its format, which is no longer read"):
        read_typed(path, Arrays, FileFormat("mnemon test", version=2))


def test_content_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    path = write_typed(tmp_path / "p.safetensors", Part("a", np.zeros(1)), FORMAT)
    with pytest.raises(DataError, match="the content does not fit its format") as caught:
        read_typed(path, Arrays, FORMAT)
    assert "\n" not in str(caught.value)


def test_the_header_can_be_read_alone(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "a.safetensors"), FORMAT)
    assert json.loads(header["content"])["title"] == "title"
    assert header["library"].startswith("mnemon ")
