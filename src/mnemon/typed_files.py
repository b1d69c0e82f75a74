"""A typed value as one file: arrays in safetensors, the rest as JSON in its header, a checksum for everything.

What is written is a dataclass (or NamedTuple) of arrays, tensors, numbers, texts, tuples, dictionaries with text keys,
and dataclasses of these; the annotations say what is read back, so nothing is ever unpickled:

    @dataclass(frozen=True)
    class Reading:
        title: str
        weights: np.ndarray
        blocks: tuple[Block, ...]

    FORMAT = FileFormat("mnemon reading", version=1)
    write_typed("a.safetensors", Reading(...), FORMAT)
    read_typed("a.safetensors", Reading, FORMAT)

A file that is cut short, altered, of another kind or of a newer version is refused with one line. A file of an older
version is brought up to date by the format's migrations, one version at a time.
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from mnemon import __version__
from mnemon.errors import ConfigError, DataError, RunError
from mnemon.files import atomic_file

_ARRAY = "array"
_SEAL = "sha256"
_HEADER = ("kind", "version", "library", "content", "arrays", _SEAL)
Value = TypeVar("Value")
Json = Any
"""What the json module reads and writes."""

Migration = Callable[[Json, dict[str, Any]], Json]
"""Takes the content and the arrays of one version, and returns the content of the next; may change the arrays."""


@dataclass(frozen=True)
class FileFormat:
    """A kind of file.

    Attributes:
        kind: what such a file is, in words: "mnemon memory".
        version: the version that is written, and the newest that is read.
        migrations: for every older version that is still read, what turns its content into that of the next.
    """

    kind: str
    version: int
    migrations: Mapping[int, Migration] = field(default_factory=dict)


def write_typed(path: str | Path, value: Any, file_format: FileFormat, overwrite: bool = False) -> Path:
    """Write a value; the file appears complete or not at all.

    Args:
        path: the file; its folder is made when missing.
        value: a dataclass or NamedTuple of what the module names.
        file_format: what kind of file it is.
        overwrite: replace a file that is there.

    Raises:
        ConfigError: a file is there, and `overwrite` is not given.
        RunError: the disk is full or the place is not writable.
    """
    if Path(path).exists() and not overwrite:
        raise ConfigError(f"{path}: exists already; use --overwrite or another name")
    arrays: dict[str, Any] = {}
    content = json.dumps(_pack(value, "", arrays), ensure_ascii=False, allow_nan=False)
    header = {
        "kind": file_format.kind,
        "version": str(file_format.version),
        "library": f"mnemon {__version__}",
        "content": content,
        "arrays": json.dumps({name: _sha256(_data(array)) for name, array in arrays.items()}),
    }
    with atomic_file(path) as temporary:
        try:
            _save(arrays, temporary, header | {_SEAL: _seal(header)})
            _sort_header(temporary)
        except SafetensorError as error:  # the library's word for a full disk, too
            raise RunError(f"{path}: cannot be written ({error}); free some space or choose another place") from error
    return Path(path)


def read_typed(path: str | Path, kind: type[Value], file_format: FileFormat) -> Value:
    """Read a value back.

    Args:
        path: the file.
        kind: the class that was written.
        file_format: what kind of file it has to be.

    Raises:
        DataError: the file is missing, of another kind, cut short, altered, of a newer version, or its content does not
            fit the class.
    """
    header = read_header(path, file_format)
    content = json.loads(header["content"])
    arrays = _read_arrays(path, json.loads(header["arrays"]), kind)
    for version in range(int(header["version"]), file_format.version):
        content = file_format.migrations[version](content, arrays)
    try:
        value: Value = _unpack(kind, content, arrays)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: the content does not fit its format ({error!r}); write the file again") from None
    return value


def read_header(path: str | Path, file_format: FileFormat) -> dict[str, str]:
    """Read the header of a file: its kind, version, the library that wrote it, and its content as JSON.

    Raises:
        DataError: the file is missing, damaged, of another kind, altered, or of a version that is not read.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; expected a {file_format.kind} file")
    try:
        with safe_open(str(path), framework="numpy") as file:
            header: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: is no {file_format.kind} file, or cut short ({error})") from None
    if header.get("kind") != file_format.kind:
        raise DataError(
            f"{path}: expected a {file_format.kind} file, got {header.get('kind', 'another safetensors file')}"
        )
    version = header.get("version", "")
    if version.isdecimal() and int(version) > file_format.version:
        raise DataError(
            f"{path}: was written in version {version} of its format by {header.get('library', 'another library')}; "
            f"this mnemon {__version__} reads up to version {file_format.version}: upgrade it"
        )
    if set(header) != set(_HEADER) or not version.isdecimal():
        raise DataError(f"{path}: was altered after it was written (other entries in its header); use an intact copy")
    for old in range(int(version), file_format.version):
        if old not in file_format.migrations:
            raise DataError(f"{path}: was written in version {version} of its format, which is no longer read")
    if _seal(header) != header[_SEAL]:
        raise DataError(f"{path}: was altered after it was written (its header); use an intact copy")
    return header


def _read_arrays(path: str | Path, checksums: dict[str, str], kind: type) -> dict[str, Any]:
    """Read all arrays and compare them with their checksums; as tensors where the class speaks of tensors."""
    framework = "pt" if _speaks_of_tensors(kind) else "numpy"
    arrays: dict[str, Any] = {}
    try:
        with safe_open(str(path), framework=framework) as file:
            if set(file.keys()) != set(checksums):
                raise DataError(f"{path}: was altered after it was written (other arrays); use an intact copy")
            for name in checksums:
                array = file.get_tensor(name)
                # The file may be mapped into memory: a copy outlives whatever happens to it.
                arrays[name] = array.clone() if framework == "pt" else np.array(array)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: is cut short or damaged ({error}); use an intact copy") from None
    for name, array in arrays.items():
        if _sha256(_data(array)) != checksums[name]:
            raise DataError(f"{path}: was altered after it was written ({name}); use an intact copy")
    return arrays


def _pack(value: Any, name: str, arrays: dict[str, Any]) -> Json:
    """Return a value as JSON in which arrays are named, and put these into `arrays`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if _is_array(value):
        arrays[name] = value
        return {_ARRAY: name}
    prefix = f"{name}." if name else ""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return {key: _pack(part, f"{prefix}{key}", arrays) for key, part in parts.items()}
    if hasattr(value, "_fields"):
        return {key: _pack(part, f"{prefix}{key}", arrays) for key, part in zip(value._fields, value, strict=True)}
    if isinstance(value, tuple | list):
        return [_pack(part, f"{prefix}{index}", arrays) for index, part in enumerate(value)]
    if isinstance(value, Mapping):
        return {key: _pack(part, f"{prefix}{key}", arrays) for key, part in value.items()}
    raise TypeError(f"{name}: a {type(value).__name__} cannot be written")


def _unpack(kind: Any, content: Json, arrays: dict[str, Any]) -> Any:
    """Build what an annotation asks for."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if content is None and type(None) in arguments:
            return None
        (only,) = (argument for argument in arguments if argument is not type(None))
        return _unpack(only, content, arrays)
    if origin is tuple:
        kinds = [arguments[0]] * len(content) if arguments[-1] is ... else arguments
        return tuple(_unpack(one, part, arrays) for one, part in zip(kinds, content, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        return {key: _unpack(arguments[1], part, arrays) for key, part in content.items()}
    if isinstance(content, dict) and set(content) == {_ARRAY}:
        array = arrays[content[_ARRAY]]
        return array.numpy() if _is_tensor(array) and (origin or kind) is np.ndarray else array
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        hints = typing.get_type_hints(kind)
        return kind(**{key: _unpack(hints[key], part, arrays) for key, part in content.items()})
    if kind in (bool, int, float, str) and isinstance(content, (int, float) if kind is float else kind):
        return content
    raise TypeError(f"expected {kind}, got {content!r}")


def _speaks_of_tensors(kind: Any) -> bool:
    """Say whether a class holds PyTorch tensors, here or further inside."""
    if getattr(kind, "__module__", "").startswith("torch"):
        return True
    if (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")) and isinstance(kind, type):
        return any(_speaks_of_tensors(hint) for hint in typing.get_type_hints(kind).values())
    return any(_speaks_of_tensors(argument) for argument in typing.get_args(kind))


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.startswith("torch")


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or _is_tensor(value)


def _save(arrays: dict[str, Any], path: Path, header: dict[str, str]) -> None:
    """Write arrays, in rows and without shared memory; as tensors if there is one among them."""
    if not any(map(_is_tensor, arrays.values())):
        from safetensors.numpy import save_file

        save_file({name: np.array(array, order="C") for name, array in arrays.items()}, path, header)
        return
    import torch
    from safetensors.torch import save_file as save_tensors

    rows = {name: torch.as_tensor(array).detach().cpu() for name, array in arrays.items()}
    save_tensors({name: row.clone(memory_format=torch.contiguous_format) for name, row in rows.items()}, path, header)


def _sort_header(path: Path) -> None:
    """Put the header's entries in order: the library leaves the order to chance, and equal values make equal files."""
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(ordered) <= length, "the same entries in another order take the same room"
        file.seek(8)
        file.write(ordered.ljust(length))


def _data(array: Any) -> Any:
    """Return the bytes of an array, in row order."""
    if not _is_tensor(array):
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    import torch

    return array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _seal(header: Mapping[str, str]) -> str:
    """Return the checksum of a header, all entries but the seal itself."""
    return _sha256(json.dumps([header[name] for name in _HEADER if name != _SEAL]).encode())


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
