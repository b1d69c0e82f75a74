"""A trace as one HTML page that loads nothing: its data, style and script are inside, and no model is needed.

The page's source lies beside this file in `assets/`: a template, a style sheet and plain scripts, which are put
together in the order of `SCRIPTS`. Texts of a trace may be anything that a model read; they enter the page as JSON in
which no character can end a script, and the scripts show them as text only. A content security policy with the digests
of the page's own style and script forbids everything else.

Numbers travel as one block of bytes: shares (reads, writes, router weights), and what else is kept in it, in half
precision, all others in single. Where there are so many shares that the page would become large, they are rounded to
254 steps between 0 and the largest, finer towards 0, and the page says so.
"""

import base64
import dataclasses
import hashlib
import html
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mnemon import __version__
from mnemon.errors import ConfigError
from mnemon.files import atomic_write_bytes
from mnemon.inspection.trace import Floats, Trace

SCRIPTS = (
    "dom.js",
    "data.js",
    "theme.js",
    "figure.js",
    "charts.js",
    "text.js",
    "summary.js",
    "bank.js",
    "mixture.js",
    "token_memory.js",
    "tables.js",
    "page.js",
)
"""Scripts of the page in the order in which they are put together."""

MOST_FINE_SHARES = 1_000_000
"""Shares, of all arrays together, up to which each has two bytes; above, one."""

_SHARES = ("read", "read_after", "write", "weights")
_STEPS = 254  # the code of the largest share; one more is NaN
_ALIGNMENT = 4


def write_page(trace: Trace, path: str | Path, overwrite: bool = False) -> Path:
    """Write a trace as a page.

    Args:
        trace: what to show.
        path: the HTML file; its folder is made when missing.
        overwrite: replace a file that is there.

    Returns:
        The path as a `Path`.

    Raises:
        ConfigError: a file is there, and `overwrite` is not given.
        RunError: the disk is full or the place is not writable.
    """
    if Path(path).exists() and not overwrite:
        raise ConfigError(f"{path}: exists already; use --overwrite or another name")
    return atomic_write_bytes(path, page(trace))


def page(trace: Trace) -> bytes:
    """Return a trace as a complete HTML document, in UTF-8; the same trace gives the same bytes."""
    style, script = asset("page.css"), _script()
    pack = _Pack(coarse=sum(array.size for array in _shares(trace)) > MOST_FINE_SHARES)
    content = pack.content(trace)
    # On the scale `largest * (code / steps) ** 2`, a share is off by at most half of the last step.
    rounding = 1 / _STEPS if pack.coarse else None
    about = {"trace": content, "library": f"mnemon {__version__}", "rounding": rounding}
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(f"{trace.source.name} read by {trace.model}"),
        "style": style,
        "script": script,
        "trace": _inert(json.dumps(about, ensure_ascii=False, allow_nan=False, separators=(",", ":"))),
        "arrays": base64.b64encode(bytes(pack.data)).decode("ascii"),
    }
    return b"".join(_filled(asset("template.html"), parts))


def asset(name: str) -> str:
    """Return the text of one of the page's source files."""
    return (files("mnemon.inspection") / "assets" / name).read_text(encoding="utf-8")


@cache
def _script() -> str:
    """Return the page's scripts as one, in a scope of their own."""
    body = "\n".join(asset(name) for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{body}}})();\n'


def _filled(template: str, parts: dict[str, str]) -> Iterator[bytes]:
    """Put the parts into the places `{{name}}` of a template, each once and without looking into the parts."""
    first, *rest = template.split("{{")
    yield first.encode()
    for piece in rest:
        name, _, after = piece.partition("}}")
        # Half a character that a tokenizer left behind has no UTF-8; written as \udc80 it is valid JSON.
        yield parts[name].encode("utf-8", errors="backslashreplace")
        yield after.encode()


def _digest(text: str) -> str:
    """Return the digest by which a content security policy knows an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _inert(text: str) -> str:
    """Return JSON in which nothing means anything to HTML or to an old script engine."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _shares(trace: Trace) -> Iterator[Floats]:
    """Yield all arrays of shares."""
    for owner in (*trace.bank, *trace.mixture, trace.token_memory):
        for name in _SHARES:
            if isinstance(array := getattr(owner, name, None), np.ndarray):
                yield array


@dataclass
class _Pack:
    """Turns values into JSON and collects their arrays in one block of bytes.

    An array becomes {"array": [kind, first byte, shape, largest]}; `kind` is f4, i4, or f2 and u1 for shares.

    Attributes:
        coarse: whether shares get one byte instead of two.
        data: the block of bytes.
    """

    coarse: bool
    data: bytearray = field(default_factory=bytearray)

    def content(self, value: Any, name: str = "") -> Any:
        """Return a value of a trace as JSON."""
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, np.ndarray):
            return {"array": self._array(value, name)}
        if isinstance(value, tuple):
            return [self.content(part, name) for part in value]
        return {entry.name: self.content(getattr(value, entry.name), entry.name) for entry in dataclasses.fields(value)}

    def _array(self, array: np.ndarray[Any, Any], name: str) -> list[Any]:
        """Append an array and return where it lies."""
        kind, largest = "i4" if np.issubdtype(array.dtype, np.integer) else "f4", 0.0
        if name in _SHARES or array.dtype == np.float16:
            kind = "u1" if name in _SHARES and self.coarse else "f2"
        if kind == "u1":
            largest = float(np.nanmax(array, initial=0.0))
            scaled = np.sqrt(np.clip(array.astype(np.float64) / (largest or 1.0), 0, 1)) * _STEPS
            array = np.where(np.isnan(scaled), _STEPS + 1, np.rint(scaled))
        self.data.extend(bytes(-len(self.data) % _ALIGNMENT))
        first = len(self.data)
        self.data += array.astype(f"<{kind}").tobytes()
        return [kind, first, list(array.shape), largest]
