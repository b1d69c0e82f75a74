"""Reading and writing files so that nothing is lost and every fault is one clear line.

A file is written under a temporary name in its own folder and renamed when complete: a reader sees the old content or
the new, never a half. What the files contain is the business of the callers.
"""

import contextlib
import errno
import gzip
import json
import math
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mnemon.errors import ConfigError, DataError, RunError

RUN_MARKER = ".mnemon-run"
"""Name of the file that marks a folder as written by us; only such a folder may be emptied by `overwrite`."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException) -> bool:
    """Say whether an exception means that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in _DISK_FULL


@contextlib.contextmanager
def explain_disk_errors(path: str | Path) -> Iterator[None]:
    """Turn an operating-system error while writing `path` into one clear line.

    Raises:
        RunError: if the disk is full or the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise RunError(
                f"{path}: the disk is full; free some space and run again (earlier files are intact)"
            ) from error
        reason = error.strerror or str(error)
        raise RunError(f"{path}: cannot be written ({reason}); choose another place") from error


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Write a file in a `with` block; it appears complete when the block ends without an error, or not at all.

    Args:
        path: file to write; an existing one is replaced. A link is followed, not replaced. Missing parent folders are
            made.

    Yields:
        An empty file to write into.

    Raises:
        RunError: if the disk is full or the place is not writable. What stood there before is kept.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with explain_disk_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # some libraries leave their files to their owner alone
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def atomic_write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a file so that it appears complete or not at all; missing parent folders are made.

    Args:
        path: file to write; an existing one is replaced. A link is followed, not replaced.
        data: the whole content.

    Returns:
        The path as a `Path`.

    Raises:
        RunError: if the disk is full or the place is not writable. What stood there before is kept.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def atomic_write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 text file (line ends as given) so that it appears complete or not at all.

    Args:
        path: file to write; an existing one is replaced.
        text: the whole content.

    Returns:
        The path as a `Path`.

    Raises:
        RunError: if the disk is full or the place is not writable.
    """
    return atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, value: Any) -> Path:
    """Write a value as indented JSON so that the file appears complete or not at all.

    Args:
        path: file to write; an existing one is replaced.
        value: anything the json module can write; NaN and infinity are refused, for they are not JSON.

    Returns:
        The path as a `Path`.

    Raises:
        RunError: if the disk is full or the place is not writable.
        ValueError: if the value holds NaN or infinity.
    """
    return atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_bytes(path: str | Path) -> bytes:
    """Read a file, unpacking it when its name ends in `.gz`.

    Raises:
        DataError: if the file is missing, a folder, unreadable, or packed and cut short.
    """
    try:
        data = Path(path).read_bytes()
        return gzip.decompress(data) if Path(path).suffix == ".gz" and data else data
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder, expected a file") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: is not a complete gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """Read a text file, plain or `.gz`, and refuse one that cannot be what the user meant.

    Args:
        path: file to read. A byte-order mark is dropped, Windows line ends become Unix ones.
        encoding: how the file is encoded (`"utf-8"`, `"latin-1"`, ...).

    Returns:
        The text.

    Raises:
        DataError: if the file is missing, empty, cut short, wrongly encoded, or holds NUL bytes; file and line are
            named.
    """
    data = read_bytes(path)
    if not data.strip():
        raise DataError(f"{path}: is empty, expected text")
    nul = data.find(b"\0")
    if nul >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise DataError(f"{path}, line {line}: expected text, got a NUL byte (is the file binary or half-written?)")
    try:
        text = data.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not {encoding.upper()}; convert the file to UTF-8 "
            "(such as by iconv -f latin1 -t utf-8), or name its encoding where the command has --encoding"
        ) from error
    return text.replace("\r\n", "\n")


def parse_object(text: str, where: str, advice: str = "") -> dict[str, Any]:
    """Parse a JSON object whose numbers are all finite.

    Args:
        text: a line or a whole file.
        where: names the place in messages.
        advice: what to do about a damaged one, with its separator, such as "; evaluate again".

    Raises:
        DataError: it is not valid JSON, no object, or holds NaN or an infinity.
    """

    def finite(word: str) -> float:
        number = float(word)
        if not math.isfinite(number):
            raise DataError(f"{where}: expected finite numbers, got {word}{advice}")
        return number

    try:
        value = json.loads(text, parse_float=finite, parse_constant=finite)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg}){advice}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}{advice}")
    return value


def prepare_output_folder(
    path: str | Path, overwrite: bool = False, resume: bool = False, *, resumable: bool = True
) -> Path:
    """Make the folder of a run, and protect a run that is already there.

    Args:
        path: folder to write into; made, with its parents, when missing.
        overwrite: empty a folder that holds an earlier run. A folder with other content is never emptied.
        resume: keep what is there and go on with it.
        resumable: whether the caller can resume at all; if not, nobody is told to.

    Returns:
        The folder as a `Path`.

    Raises:
        ConfigError: if the folder holds a run and neither option is given, if there is nothing to resume, if it holds
            files that are not ours to delete, or if both options are given.
        RunError: if the folder cannot be written.
    """
    folder = Path(path)
    if overwrite and resume:
        raise ConfigError("--overwrite and --resume exclude each other; give one of them")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file, expected a folder for the results")
    # A run that failed before it wrote anything leaves the marker alone, and nothing to protect.
    occupied = folder.is_dir() and any(entry.name != RUN_MARKER for entry in folder.iterdir())
    if resume and not occupied:
        raise ConfigError(f"{folder}: holds no run to resume; leave out --resume to start one")
    if occupied and not resume:
        if not overwrite:
            ways = "--resume, --overwrite" if resumable else "--overwrite"
            raise ConfigError(f"{folder}: already holds a run; use {ways} or another folder")
        _empty(folder)
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN_MARKER).touch()
    return folder


@contextlib.contextmanager
def complete_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder in a `with` block; it appears complete or not at all.

    What is written goes to a temporary folder beside it, which takes its place when the block ends without an error.

    Args:
        path: the folder; its parents are made when missing. A link is followed, not replaced.
        overwrite: replace a folder that an earlier call has written. A folder of another origin is never replaced.

    Yields:
        The folder to write into.

    Raises:
        ConfigError: if something is there already, and `overwrite` is not given or it is not ours to delete.
        RunError: if the disk is full or the place is not writable.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{path}: is a file, expected a folder to write")
    occupied = target.is_dir() and any(target.iterdir())
    if occupied and not overwrite:
        raise ConfigError(f"{path}: holds files already; use --overwrite or another folder")
    if occupied:
        _refuse_other_origin(target)
    mark = secrets.token_hex(4)
    temporary, old = target.with_name(f".{target.name}.{mark}.tmp"), target.with_name(f".{target.name}.{mark}.old")
    with explain_disk_errors(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            (temporary / RUN_MARKER).touch()
            if occupied:
                os.replace(target, old)
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not target.exists():
                os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _refuse_other_origin(folder: Path) -> None:
    """Refuse a folder that is not marked as written by us."""
    if not (folder / RUN_MARKER).is_file():
        raise ConfigError(f"{folder}: holds files of another origin (no {RUN_MARKER}); choose another folder")


def _empty(folder: Path) -> None:
    """Delete the content of a run folder, marker last, so that an interrupted deletion can be repeated."""
    _refuse_other_origin(folder)
    marker = folder / RUN_MARKER
    with explain_disk_errors(folder):
        for entry in folder.iterdir():
            if entry == marker:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        marker.unlink()
