"""The page is one file that loads nothing, cannot be broken by what a model read, and says what the trace says."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trace_cases import HOSTILE, empty_trace, lm2_trace, long_trace, mom_trace, rmt_trace

from mnemon.errors import ConfigError
from mnemon.inspection.page import page, write_page
from mnemon.inspection.trace import KnockOut, KnockOuts, Trace

MEBIBYTE = 2**20


class Document(HTMLParser):
    """Collects what a browser would see: start tags, and the content of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None:
            self.raw.append((self.cdata_elem, data))

    def script(self, name: str) -> str:
        """Return the content of the script with an id."""
        names = [attributes.get("id") for tag, attributes in self.tags if tag == "script"]
        contents = [data for tag, data in self.raw if tag == "script"]
        return contents[names.index(name)]


def document(trace: Trace) -> Document:
    return Document(page(trace).decode("utf-8"))


def content(trace: Trace) -> dict[str, Any]:
    return json.loads(document(trace).script("trace"))


def array(trace: Trace, entry: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Decode an array as the page does."""
    kind, first, shape, largest = entry["array"]
    data = base64.b64decode(document(trace).script("arrays"))
    values = np.frombuffer(data, f"<{kind}", int(np.prod(shape)), first).reshape(shape)
    return np.where(values == 255, np.nan, largest * (values / 254) ** 2) if kind == "u1" else values


TRACES = {"lm2": lm2_trace, "mom": mom_trace, "rmt": rmt_trace, "empty": empty_trace}


@pytest.mark.parametrize("name", TRACES)
def test_the_page_refers_to_nothing_outside_itself(name: str) -> None:
    found = document(TRACES[name]())
    for tag, attributes in found.tags:
        for attribute in ("src", "href", "action", "data", "poster", "srcset"):
            value = attributes.get(attribute)
            assert value is None or value.startswith(("#", "data:,")), (tag, attribute, value)
    for tag, data in found.raw:
        if tag == "style":
            assert "url(" not in data
            assert "@import" not in data
    own = found.raw[-1][1]
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(|innerHTML|\beval\b", own)


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else() -> None:
    found = document(lm2_trace())
    (policy,) = [
        attributes["content"]
        for tag, attributes in found.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    (style,) = [data for tag, data in found.raw if tag == "style"]
    for text, name in ((style, "style-src"), (found.raw[-1][1], "script-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy


def test_what_a_model_read_stays_text() -> None:
    trace = lm2_trace()
    hostile = HOSTILE[0]
    trace = replace(
        trace,
        model=hostile,
        source=replace(trace.source, name=hostile, question=hostile),
        notes=(hostile,),
        knock_outs=KnockOuts(hostile, -1.0, (KnockOut("all", hostile, None, None, -2.0),)),
    )
    text = page(trace).decode("utf-8")
    assert "<img" not in text
    assert text.count("</script>") == 3
    assert [tag for tag, _ in Document(text).tags if tag in ("img", "b", "i")] == []
    shown = json.loads(Document(text).script("trace"))["trace"]
    assert shown["model"] == shown["notes"][0] == hostile
    assert shown["text"]["pieces"][: len(HOSTILE)] == list(HOSTILE)


def test_the_same_trace_gives_the_same_bytes() -> None:
    assert page(lm2_trace()) == page(lm2_trace())


def test_numbers_of_the_page_are_those_of_the_trace() -> None:
    trace = lm2_trace(complete=False)
    shown = content(trace)
    assert shown["rounding"] is None
    for block, entry in zip(trace.bank, shown["trace"]["bank"], strict=True):
        for name in ("read", "read_after", "write"):
            np.testing.assert_array_equal(array(trace, entry[name]), getattr(block, name))
        for name in ("input_gate", "half_life", "output_gate", "word_scores"):
            np.testing.assert_allclose(array(trace, entry[name]), getattr(block, name), rtol=1e-6)
        np.testing.assert_array_equal(array(trace, entry["slots"]), block.slots)
    assert np.isnan(array(trace, shown["trace"]["bank"][0]["input_gate"])[-1]).all()
    assert trace.predictions is not None
    np.testing.assert_array_equal(
        array(trace, shown["trace"]["predictions"]["with_memory"]), trace.predictions.with_memory
    )


@pytest.mark.parametrize("most_fine", [0, 10**6])
def test_a_missing_share_stays_missing(most_fine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnemon.inspection.page.MOST_FINE_SHARES", most_fine)
    trace = lm2_trace()
    after = trace.bank[0].read_after.astype(np.float32)
    after[-1] = np.nan
    trace = replace(trace, bank=(replace(trace.bank[0], read_after=after),))
    decoded = array(trace, content(trace)["trace"]["bank"][0]["read_after"])
    np.testing.assert_array_equal(np.isnan(decoded), np.isnan(after))


def test_numbers_without_end_are_said_so() -> None:
    trace = lm2_trace()
    assert trace.knock_outs is not None
    never = replace(trace.knock_outs.parts[0], log_probability=-math.inf)
    trace = replace(trace, knock_outs=replace(trace.knock_outs, parts=(never,)))
    assert content(trace)["trace"]["knock_outs"]["parts"][0]["log_probability"] == "-inf"


@pytest.fixture(scope="module")
def long() -> Trace:
    return long_trace()


def test_a_hundred_thousand_tokens_stay_below_ten_megabytes(long: Trace) -> None:
    assert long.text.num_tokens == 100_000
    assert len(page(long)) < 10e6


def test_shares_of_a_large_trace_are_rounded_as_the_page_says(long: Trace) -> None:
    shown = content(long)
    for block, entry in zip(long.bank, shown["trace"]["bank"], strict=True):
        true = np.asarray(block.read, dtype=np.float64)
        assert np.abs(array(long, entry["read"]) - true).max() <= shown["rounding"] * true.max()


def test_a_page_that_exists_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "page.html"
    write_page(empty_trace(), path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists already; use --overwrite"):
        write_page(lm2_trace(), path)
    assert path.read_bytes() == before
    write_page(lm2_trace(), path, overwrite=True)
    assert path.read_bytes() == page(lm2_trace())


def test_making_a_page_needs_no_model() -> None:
    code = "import sys, mnemon.inspection.page; print(*{'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
