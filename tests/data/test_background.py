import builtins
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mnemon.data.background import Background, load_background, read_book
from mnemon.errors import BackendUnavailable, ConfigError, DataError


def sentences(background: Background) -> set[str]:
    return {sentence for document in background.documents for sentence in document.sentences}


def names(background: Background) -> set[str]:
    return {document.name for document in background.documents}


def make_books(folder: Path, count: int = 5, encoding: str = "utf-8") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        text = f"[Book {number}]\r\n\r\nCHAPTER I\r\n\r\nThis café {number} was\r\nopen all day long. Nobody came.\r\n"
        (folder / f"book{number}.txt").write_bytes(text.encode(encoding))
    return folder


def test_the_standard_library_gives_about_a_megabyte_of_prose() -> None:
    train, test = load_background("stdlib", "train"), load_background("stdlib", "test")
    characters = [sum(map(len, sentences(background))) for background in (train, test)]
    assert sum(characters) > 800_000
    assert 0.1 < characters[1] / sum(characters) < 0.4


def test_train_and_test_of_the_standard_library_share_no_document_and_no_sentence() -> None:
    train, test = load_background("stdlib", "train"), load_background("stdlib", "test")
    assert not names(train) & names(test)
    assert not sentences(train) & sentences(test)


def test_standard_library_sentences_are_plain_prose() -> None:
    for sentence in sentences(load_background("stdlib", "test")):
        assert sentence == " ".join(sentence.split())
        assert ">>>" not in sentence
        assert sentence[-1] in ".!?\"')"


def test_another_process_gathers_the_same_text_without_importing_what_it_reads() -> None:
    code = (
        "import sys, hashlib\n"
        "from mnemon.data.background import load_background\n"
        "text = '\\n'.join(s for d in load_background('stdlib', 'train').documents for s in d.sentences)\n"
        "print(hashlib.sha256(text.encode()).hexdigest(), 'tkinter' in sys.modules or 'pydoc_data' in sys.modules)"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1
    assert runs.pop().split()[1] == "False"


def test_a_folder_is_split_by_book(tmp_path: Path) -> None:
    folder = make_books(tmp_path)
    train, test = load_background(folder, "train"), load_background(folder, "test")
    assert (len(names(train)), len(names(test))) == (4, 1)
    assert not names(train) & names(test)
    assert names(test) == names(load_background(str(folder), "test"))


def test_subfolders_train_and_test_decide_when_they_exist(tmp_path: Path) -> None:
    make_books(tmp_path / "train", 1)
    make_books(tmp_path / "test", 3)
    assert len(names(load_background(tmp_path, "test"))) == 3
    assert len(names(load_background(tmp_path, "train"))) == 1


def test_lines_are_joined_and_headings_dropped(tmp_path: Path) -> None:
    book = read_book(make_books(tmp_path) / "book0.txt")
    assert book.sentences == ("This café 0 was open all day long.", "Nobody came.")


def test_a_changed_book_is_read_again(tmp_path: Path) -> None:
    folder = make_books(tmp_path)
    before = load_background(folder, "test")
    assert load_background(folder, "test") is before
    (name,) = names(before)
    (folder / name).write_text("Quite another text.")
    assert sentences(load_background(folder, "test")) == {"Quite another text."}


def test_another_encoding_is_refused_by_file_and_line_until_it_is_named(tmp_path: Path) -> None:
    folder = make_books(tmp_path, encoding="latin-1")
    with pytest.raises(DataError, match=r"book\d\.txt, line 5: byte 0xe9"):
        load_background(folder, "test")
    assert "café" in " ".join(sentences(load_background(folder, "test", encoding="latin-1")))
    with pytest.raises(ConfigError, match="latin-99"):
        load_background(folder, "test", encoding="latin-99")


@pytest.mark.parametrize("content", [b"", b"  \n", b"Text with \0 inside.\n"])
def test_a_damaged_book_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    folder = make_books(tmp_path)
    for path in folder.iterdir():
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"book\d\.txt"):
        load_background(folder, "train")


def test_a_folder_without_prose_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at least 2 \.txt files .* got 0"):
        load_background(tmp_path, "train")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("TITLE\n")
    with pytest.raises(DataError, match="found no sentence"):
        load_background(tmp_path, "train")


def test_an_unknown_source_or_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stdlib.*'stdlb'"):
        load_background("stdlb", "train")
    with pytest.raises(ConfigError, match="'dev'"):
        load_background("stdlib", "dev")  # type: ignore[arg-type]


def test_a_hub_data_set_without_the_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_datasets(name: str, *rest: object) -> types.ModuleType:
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(BackendUnavailable, match=r"hf:some/books needs the package datasets: pip install"):
        load_background("hf:some/books", "train")


def hub(monkeypatch: pytest.MonkeyPatch, rows: object) -> None:
    class Rows:
        def take(self, count: int) -> object:
            if isinstance(rows, Exception):
                raise rows
            return rows

    fake = types.SimpleNamespace(load_dataset=lambda name, split, streaming: Rows())
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]


def test_a_hub_data_set_gives_its_books(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, [{"text": "TITLE\n\nIt was a dark\nand stormy night."}])
    assert sentences(load_background("hf:some/books1", "train")) == {"It was a dark and stormy night."}


def test_a_hub_data_set_that_cannot_be_reached_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, ConnectionError("no network\nsecond line"))
    with pytest.raises(BackendUnavailable, match=r"^hf:some/books2: cannot load the split 'test' \(no network\)$"):
        load_background("hf:some/books2", "test")
    hub(monkeypatch, [{"content": "x"}])
    with pytest.raises(DataError, match="'text' column"):
        load_background("hf:some/books3", "test")


def test_the_real_books_are_read(real_data: Path) -> None:
    folder = real_data / "background"
    train = load_background(folder, "train", encoding="latin-1")
    test = load_background(folder, "test", encoding="latin-1")
    assert len(names(train) | names(test)) == 17
    assert sum(map(len, sentences(train) | sentences(test))) > 6_000_000
    with pytest.raises(DataError, match=r"\.txt, line \d+: byte 0xe"):
        load_background(folder, "train")
