import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemon.data.babilong import Sample, read_json, write_json
from mnemon.errors import ConfigError, DataError

RECORD = {"input": "Mary went to the garden.", "question": "Where is Mary?", "target": "garden"}
TEXT = st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")).filter(
    lambda text: text.strip() == text
)


@given(texts=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4))
def test_what_was_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str, str]]
) -> None:
    path = tmp_path_factory.mktemp("samples") / "samples.json"
    samples = [Sample("qa1", 4000, *three) for three in texts]
    write_json(path, samples)
    assert read_json(path, "qa1", "4k") == samples
    assert json.loads(path.read_text("utf-8")) == [dict(zip(RECORD, three, strict=True)) for three in texts]


def test_a_list_and_one_object_per_line_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([RECORD, RECORD], indent=2))
    (tmp_path / "lines.jsonl").write_text(f"{json.dumps(RECORD)}\n\n{json.dumps(RECORD)}\n")
    assert read_json(tmp_path / "list.json") == read_json(tmp_path / "lines.jsonl")
    assert len(read_json(tmp_path / "list.json")) == 2


@pytest.mark.parametrize("name", ["qa10/4k.json", "qa10_4k.json", "qa10-4k-samples.json"])
def test_task_and_length_are_taken_from_the_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([RECORD]))
    (sample,) = read_json(path)
    assert (sample.task, sample.length) == ("qa10", 4000)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "empty"),
        ("[]", "at least one sample"),
        ('[{"input": "a",\n "question": }]', "line 2"),
        ('{"input": "a", "question": "b", "target": "c"}\n{"input": "a"', "line 2"),
        (json.dumps([RECORD])[:-9], "line 1"),
        (json.dumps([RECORD, {"input": "a", "question": "b"}]), "sample 2: expected a text in the field 'target'"),
        (json.dumps([RECORD | {"question": 5}]), "sample 1: .*'question', got int"),
        (json.dumps([RECORD | {"target": " "}]), "sample 1: .*'target', got an empty text"),
        (json.dumps(["text"]), "sample 1: expected an object"),
        ("just text", "line 1"),
    ],
)
def test_a_damaged_file_is_refused_with_file_and_place(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "samples.json"
    path.write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        read_json(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_files_binary_files_and_unknown_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b'[{"input": "\0"}]')
    with pytest.raises(DataError, match="NUL"):
        read_json(tmp_path / "binary.json")
    (tmp_path / "latin.json").write_bytes('[{"input": "é"}]'.encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_json(tmp_path / "latin.json")
    (tmp_path / "good.json").write_text(json.dumps([RECORD]))
    with pytest.raises(ConfigError, match="'4x'"):
        read_json(tmp_path / "good.json", length="4x")
