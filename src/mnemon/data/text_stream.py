"""Text of any size, read in pieces: what a file or standard input holds, decoded, never all of it in memory.

A text is refused as `mnemon.files.read_text` refuses it: one that is missing, empty, cut short (`.gz`), wrongly encoded
or binary, with the line and the byte. A byte-order mark is dropped, Windows line ends become Unix ones.
"""

import codecs
import gzip
import stat
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnemon.errors import ConfigError, DataError

STANDARD_INPUT = "-"
_PIECE_BYTES = 2**16


@dataclass
class Progress:
    """How far the reading of a text is.

    Attributes:
        bytes_read: bytes taken from the file so far (of a packed one, packed bytes).
        total_bytes: bytes of the file; None where that cannot be known.
    """

    bytes_read: int = 0
    total_bytes: int | None = None


class TextSource:
    """One text.

    Args:
        name: a file, plain or `.gz`, or "-" for standard input.
        encoding: how it is encoded (`"utf-8"`, `"latin-1"`, ...).

    Raises:
        ConfigError: Python knows no such text encoding.
        DataError: there is no such file.
    """

    def __init__(self, name: str | Path, encoding: str = "utf-8") -> None:
        self.name = str(name)
        self.encoding = check_encoding(encoding)
        self.is_standard_input = self.name == STANDARD_INPUT
        self.label = "standard input" if self.is_standard_input else self.name
        self.progress = Progress()
        if not self.is_standard_input:
            self.progress.total_bytes = _size_of(Path(name))

    def pieces(self, piece_bytes: int = _PIECE_BYTES) -> Iterator[str]:
        """Yield the text in pieces of about `piece_bytes` bytes; where they end says nothing about the text.

        Raises:
            DataError: the text is empty, wrongly encoded, binary or cut short; line and byte are named.
        """
        check = _Checker(self.label, self.encoding)
        raw, file = self._open()
        try:
            while True:
                data = self._read(file, piece_bytes)
                self.progress.bytes_read = _position(raw, self.progress.bytes_read + len(data))
                text = check.decoded(data)
                if text:
                    yield text
                if not data:
                    break
        finally:
            if not self.is_standard_input:
                file.close()
                raw.close()

    def _open(self) -> tuple[Any, Any]:
        """Return the file as it is on the disk, and as it is read."""
        if self.is_standard_input:
            return None, sys.stdin.buffer
        try:
            raw = open(self.name, "rb")  # noqa: SIM115 (closed by `pieces`)
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read ({error.strerror or error})") from error
        return raw, gzip.GzipFile(fileobj=raw) if Path(self.name).suffix == ".gz" else raw

    def _read(self, file: Any, size: int) -> bytes:
        try:
            data: bytes = file.read(size)
            return data
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self.name}: is not a complete gzip file ({error}); fetch it again") from error
        except OSError as error:
            raise DataError(f"{self.label}: cannot be read ({error.strerror or error})") from error


class _Checker:
    """Decode a text piece by piece and refuse what cannot be meant."""

    def __init__(self, label: str, encoding: str) -> None:
        self.label = label
        self.encoding = encoding
        self.decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)()
        self.bytes_before = 0
        self.lines_before = 0
        self.is_blank = True
        self.held_back = ""  # a carriage return that a line feed may follow

    def decoded(self, data: bytes) -> str:
        """Return the text of the next bytes; b"" ends it.

        Raises:
            DataError: naming line and byte.
        """
        try:
            text = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise self._undecodable(error, data) from error
        nul = text.find("\0")
        if nul >= 0:
            line = 1 + self.lines_before + text.count("\n", 0, nul)
            left = len(self.decoder.getstate()[0]) + len(text[nul:].encode(self.encoding, "replace"))
            byte = self.bytes_before + len(data) - left
            raise DataError(
                f"{self.label}, line {line}, byte {byte}: expected text, got a NUL byte (is it binary, or is its "
                "--encoding another?)"
            )
        self.bytes_before += len(data)
        self.lines_before += text.count("\n")
        self.is_blank = self.is_blank and not text.strip()
        if not data and self.is_blank:
            raise DataError(f"{self.label}: is empty, expected text")
        text = self.held_back + text
        self.held_back = "\r" if text.endswith("\r") and data else ""
        return text.removesuffix(self.held_back).replace("\r\n", "\n")

    def _undecodable(self, error: UnicodeDecodeError, data: bytes) -> DataError:
        # What the decoder had kept of earlier bytes stands before the new ones, so count from the end.
        place = self.bytes_before + len(data) - (len(error.object) - error.start)
        known = bytes(error.object[: error.start]).decode(self.encoding, "ignore")
        line = 1 + self.lines_before + known.count("\n")
        what = f"0x{error.object[error.start]:02x} is not" if error.start < len(error.object) else "the end is not"
        return DataError(
            f"{self.label}, line {line}, byte {place}: {what} {self.encoding.upper()}; convert the text or name its "
            "--encoding"
        )


def check_encoding(encoding: str) -> str:
    """Return Python's name of a text encoding.

    Raises:
        ConfigError: there is none, or it is no encoding of text.
    """
    try:
        found = codecs.lookup(encoding)
    except LookupError:
        raise ConfigError(f"unknown encoding {encoding!r}; expected a name such as utf-8, latin-1 or cp1252") from None
    if not getattr(found, "_is_text_encoding", True) or found.incrementaldecoder is None:
        raise ConfigError(f"{encoding!r} is no encoding of text; expected a name such as utf-8, latin-1 or cp1252")
    return found.name


def _size_of(path: Path) -> int | None:
    """Return the bytes of a file; None for a pipe.

    Raises:
        DataError: there is no such file, or it is a folder.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: no such file; check the path") from error
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path}: is a folder, expected a file")
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _position(raw: Any, counted: int) -> int:
    """Return how far a file has been read, for a packed one in packed bytes."""
    try:
        return counted if raw is None else int(raw.tell())
    except OSError:  # a pipe has no place
        return counted
