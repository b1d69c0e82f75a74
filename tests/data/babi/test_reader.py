import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemon.data.babi import GENERATED_TASKS, TASKS, Question, Statement, format_stories, generate, read
from mnemon.errors import DataError

GOOD = "1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1\n"


def write(folder: Path, content: str | bytes, name: str = "qa1_some_test.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_story_is_read_with_its_question_answer_and_support(tmp_path: Path) -> None:
    (story,) = read(write(tmp_path, GOOD))
    assert story.task == "qa1"
    assert story.lines == (
        Statement(1, "Mary moved to the bathroom."),
        Statement(2, "John went to the hallway."),
        Question(3, "Where is Mary?", "bathroom", (1,)),
    )
    assert [statement.line for statement in story.facts_before(story.questions[0])] == [1, 2]


def test_id_one_starts_a_new_story(tmp_path: Path) -> None:
    assert len(read(write(tmp_path, GOOD * 3))) == 3


def test_gzip_and_windows_line_ends_are_read_alike(tmp_path: Path) -> None:
    plain = read(write(tmp_path, GOOD))
    assert read(write(tmp_path, gzip.compress(GOOD.encode()), "qa1_some_test.txt.gz")) == plain
    assert read(write(tmp_path, GOOD.replace("\n", "\r\n"), "qa1_windows.txt")) == plain


def test_the_task_is_unknown_when_the_file_name_does_not_say_it(tmp_path: Path) -> None:
    assert read(write(tmp_path, GOOD, "stories.txt"))[0].task is None
    assert read(write(tmp_path, GOOD, "qa12_x.txt"))[0].task == "qa12"
    assert read(write(tmp_path, GOOD, "qa21_x.txt"))[0].task is None


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ("", None, "empty"),
        (" \n\n", None, "empty"),
        (GOOD.encode() + b"1 Caf\xe9.\n", 4, "UTF-8"),
        (GOOD.encode() + b"1 Mary \0moved.\n", 4, "NUL"),
        (GOOD + "5 John went to the garden.\n", 5 - 1, "expected the id 4"),
        ("2 John went to the garden.\n", 1, "expected the id 1"),
        (GOOD + "x John went to the garden.\n", 4, "ID text"),
        (GOOD + "\n" + GOOD, 4, "ID text"),
        ("1 \n", 1, "expected a sentence"),
        ("1 Mary moved to the hall.\n2 Where is Mary?\n", 2, "expected an answer"),
        ("1 Mary moved to the hall.\n2 Where is Mary? \t\t1\n", 2, "expected an answer"),
        ("1 Mary moved to the hall.\n2 Where is Mary? \thall\n", 2, "2 field"),
        ("1 Mary moved to the hall.\n2 Where is Mary? \thall\t\n", 2, "supporting id"),
        ("1 Mary moved to the hall.\n2 Where is Mary? \thall\tone\n", 2, "'one'"),
        ("1 Mary moved to the hall.\n2 Where is Mary? \thall\t2\n", 2, "'2'"),
        ("1 Mary moved to the hall.\n2 Where is Mary? \thall\t7\n", 2, "'7'"),
    ],
)
def test_a_malformed_file_is_refused_with_its_name_and_line(
    tmp_path: Path, content: str | bytes, line: int | None, says: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert message.startswith(f"{path}:" if line is None else f"{path}, line {line}:")


def test_a_missing_file_and_a_torn_gzip_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt.*no such file"):
        read(tmp_path / "nowhere.txt")
    torn = write(tmp_path, gzip.compress(GOOD.encode() * 50)[:-20], "qa1.txt.gz")
    with pytest.raises(DataError, match=r"qa1\.txt\.gz"):
        read(torn)


@given(task=st.sampled_from(GENERATED_TASKS), seed=st.integers(0, 2**32))
def test_what_was_written_is_read_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, task: str, seed: int
) -> None:
    stories = generate(task, 2, seed)
    path = write(tmp_path_factory.mktemp("babi"), format_stories(stories), f"{task}_generated.txt")
    assert read(path) == stories


@pytest.mark.parametrize("task", TASKS)
def test_every_official_test_file_is_read_and_written_back(real_data: Path, task: str) -> None:
    (path,) = (real_data / "babi" / "en-10k").glob(f"{task}_*_test.txt.gz")
    stories = read(path)
    assert sum(len(story.questions) for story in stories) == 1000
    assert stories[0].task == task
    original = [" ".join(line.split()) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    assert [" ".join(line.split()) for line in format_stories(stories).splitlines()] == original
