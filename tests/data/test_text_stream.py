"""Text in pieces: nothing lost at the edges of pieces, nothing accepted that cannot be meant."""

import gzip
import io
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemon.data.text_stream import TextSource
from mnemon.errors import ConfigError, DataError
from mnemon.files import read_text

TEXT = "Été: naïve café — \U0001f600 fin.\r\nSecond line\nthird\r\n\r\r\nend\r"


def read(path: Path, encoding: str = "utf-8", size: int = 7) -> str:
    return "".join(TextSource(path, encoding).pieces(size))


@given(
    text=st.text().filter(lambda text: text.strip() and "\0" not in text and text[0] != "\ufeff"),
    size=st.integers(1, 9),
)
def test_pieces_of_any_size_make_the_text_that_reading_at_once_makes(text, size, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode("utf-8", "ignore"))
    if path.read_bytes().strip():
        assert read(path, size=size) == read_text(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1", "cp1252", "utf-8-sig"])
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_every_encoding_is_read_across_the_edges(tmp_path, encoding, size):
    text = TEXT.replace("\U0001f600", "").replace("—", "-")
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    assert read(path, encoding, size) == text.replace("\r\n", "\n")


def test_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfMary")
    assert read(path, size=1) == "Mary"


def test_a_packed_file_is_unpacked_and_its_progress_counted_in_packed_bytes(tmp_path):
    path = tmp_path / "a.txt.gz"
    noise = "".join(random.Random(0).choices("abcdefgh \n", k=200_000))
    path.write_bytes(gzip.compress(noise.encode()))
    source = TextSource(path)
    places = [source.progress.bytes_read for _ in source.pieces(1 << 14)]
    assert read(path) == noise
    assert places == sorted(places)
    assert 0 < places[0] < places[-1] == source.progress.total_bytes == path.stat().st_size


def test_standard_input_is_read_and_has_no_known_size(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Mary é".encode())))
    source = TextSource("-")
    assert source.progress.total_bytes is None
    assert "".join(source.pieces(3)) == "Mary é"
    assert source.progress.bytes_read == 7


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\r\n", "is empty"),
        (b"one\ntwo \xff three", "line 2, byte 8: 0xff is not UTF-8; .* --encoding"),
        (b"caf\xc3\xa9\n\nna\xefve", "line 3, byte 9: 0xef is not UTF-8"),
        (b"one\n\xe2\x82", "line 2, byte 4: 0xe2 is not UTF-8"),
        (b"one\ntwo\nth\0ree", "line 3, byte 10: expected text, got a NUL byte"),
        ("é\n\0".encode(), "line 2, byte 3: expected text, got a NUL byte"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "line 1, byte 0: 0x89 is not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_with_line_and_byte(tmp_path, content, message, size):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path, size=size)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_packed_file_cut_short_or_not_packed_is_refused(tmp_path):
    path = tmp_path / "a.gz"
    whole = gzip.compress(bytes(range(32, 127)) * 50)
    for content in (whole[:-12], b"plain text"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a complete gzip file"):
            read(path)


def test_a_missing_file_a_folder_and_an_unknown_encoding_are_refused_at_once(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        TextSource(tmp_path / "none")
    with pytest.raises(DataError, match="is a folder"):
        TextSource(tmp_path)
    path = tmp_path / "a"
    path.write_text("a")
    for encoding in ("klingon", "hex", "rot13"):
        with pytest.raises(ConfigError, match="encoding"):
            TextSource(path, encoding)
