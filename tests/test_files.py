"""Files appear whole or not at all; bad ones are refused with the file and the line."""

import errno
import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemon.errors import ConfigError, DataError, RunError
from mnemon.files import (
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    complete_folder,
    prepare_output_folder,
    read_bytes,
    read_text,
)


@given(
    text=st.text().filter(lambda text: text.strip() and "\0" not in text and "\r" not in text and text[0] != "\ufeff")
)
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "deep" / "file.txt"
    atomic_write_text(path, text)
    assert path.read_bytes() == text.encode()
    if text.encode().strip():
        assert read_text(path) == text


def test_a_full_disk_keeps_the_old_content_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = atomic_write_text(tmp_path / "results.json", "old")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RunError, match=r"results\.json: the disk is full"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_really_full_device_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot be written|disk is full"):
        atomic_write_bytes("/dev/full/x", b"data")


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_text(tmp_path / "a", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_link_keeps_pointing_to_the_file_that_is_rewritten(tmp_path: Path) -> None:
    target = atomic_write_text(tmp_path / "target", "old")
    link = tmp_path / "link"
    link.symlink_to(target)
    atomic_write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_written_files_have_the_users_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    written = atomic_write_text(tmp_path / "written", "x")
    assert written.stat().st_mode == plain.stat().st_mode


def test_json_is_written_whole_and_refuses_nan(tmp_path: Path) -> None:
    path = atomic_write_json(tmp_path / "a.json", {"é": [1, 2.5]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, 2.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(path, float("nan"))
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, 2.5]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"one\ntwo\xff\n", r"data\.txt, line 2: byte 0xff is not UTF-8"),
        (b"one\ntwo\nthree\0\0\0", r"data\.txt, line 3: expected text, got a NUL byte"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_text(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_text(tmp_path / "nothing")
    with pytest.raises(DataError, match="is a folder"):
        read_text(tmp_path)


def test_packed_files_are_unpacked_and_cut_ones_refused_at_every_cut(tmp_path: Path) -> None:
    packed = gzip.compress(b"Mary went home.\n" * 20)
    path = tmp_path / "story.txt.gz"
    path.write_bytes(packed)
    assert read_text(path) == "Mary went home.\n" * 20
    for length in range(1, len(packed)):
        path.write_bytes(packed[:length])
        with pytest.raises(DataError, match=r"story\.txt\.gz"):
            read_bytes(path)


def test_windows_files_read_like_others(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_text(path) == "one\ntwo\n"


def test_a_run_is_protected_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    folder = prepare_output_folder(tmp_path / "runs" / "first")
    atomic_write_text(folder / "checkpoints" / "step-1", "weights")
    with pytest.raises(ConfigError, match="already holds a run; use --resume, --overwrite"):
        prepare_output_folder(folder)
    assert prepare_output_folder(folder, resume=True) == folder
    assert (folder / "checkpoints" / "step-1").read_text() == "weights"
    prepare_output_folder(folder, overwrite=True)
    assert not (folder / "checkpoints").exists()


def test_overwriting_never_empties_a_folder_of_another_origin(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="another origin"):
        prepare_output_folder(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_nothing_to_resume_contradictions_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run to resume"):
        prepare_output_folder(tmp_path / "missing", resume=True)
    assert not (tmp_path / "missing").exists()
    with pytest.raises(ConfigError, match="exclude each other"):
        prepare_output_folder(tmp_path, overwrite=True, resume=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file, expected a folder"):
        prepare_output_folder(tmp_path / "file", overwrite=True)


def test_an_empty_folder_is_free_to_use_even_after_a_run_that_wrote_nothing(tmp_path: Path) -> None:
    assert prepare_output_folder(tmp_path) == tmp_path
    assert prepare_output_folder(tmp_path) == tmp_path


def write(folder: Path, text: str, overwrite: bool = False) -> None:
    with complete_folder(folder, overwrite) as temporary:
        assert temporary.parent == folder.parent
        (temporary / "file").write_text(text)


def test_a_complete_folder_appears_with_all_its_files_and_nothing_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    write(folder, "first")
    assert (folder / "file").read_text() == "first"
    assert os.listdir(folder.parent) == ["out"]


def test_a_complete_folder_is_replaced_only_where_it_may_be(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, "first")
    with pytest.raises(ConfigError, match="holds files already; use --overwrite"):
        write(folder, "second")
    write(folder, "second", overwrite=True)
    assert (folder / "file").read_text() == "second"
    assert os.listdir(tmp_path) == ["out"]
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    write(foreign, "into an empty folder")
    (foreign / ".mnemon-run").unlink()
    with pytest.raises(ConfigError, match="another origin"):
        write(foreign, "third", overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        write(foreign / "file", "third")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_could_not_be_completed_leaves_what_was_there(tmp_path: Path, overwrite: bool) -> None:
    folder = tmp_path / "out"
    if overwrite:
        write(folder, "first")

    def fail() -> None:
        with complete_folder(folder, overwrite) as temporary:
            (temporary / "file").write_text("second")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="disk is full"):
        fail()
    assert os.listdir(tmp_path) == (["out"] if overwrite else [])
    assert not overwrite or (folder / "file").read_text() == "first"
