"""`mnemon memorize`, and `mnemon generate` and `mnemon chat` with what it wrote."""

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saved_models import save_models, tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM

import mnemon
from mnemon.cli.app import main
from mnemon.models.memory_file import MEMORY
from mnemon.models.state import MemoryState
from mnemon.typed_files import read_header

Run = Callable[..., str]
TEXTS = {
    "a.txt": "Mary went to the garden. John took the milk to the office.\n" * 12,
    "b.txt": "Sandra is in the hallway.\r\nDaniel went back to the kitchen.\r\n" * 9,
}
CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}[{{ m.role }}] {{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Save random models of every family with a tiny tokenizer; return their folders."""
    tokenizer = tiny_tokenizer(*TEXTS.values())
    base = tiny_llama(tokenizer, max_position_embeddings=512)
    lm2 = {"base_config": base, "num_slots": 4, "slot_dim": 8, "num_memory_heads": 2, "segment_length": 16}
    built = {
        "lm2": lambda: mnemon.LM2ForCausalLM(mnemon.LM2Config(**lm2, attention_span=32, attention_sinks=2)),
        "other": lambda: mnemon.LM2ForCausalLM(mnemon.LM2Config(**lm2, attention_span=32, attention_sinks=2)),
        "spanless": lambda: mnemon.LM2ForCausalLM(mnemon.LM2Config(**lm2)),
        "no-memory": lambda: mnemon.LM2ForCausalLM(mnemon.LM2Config(**lm2, memory_layers=[])),
        "mom": lambda: mnemon.MoMForCausalLM(
            mnemon.MoMConfig(base_config=base, num_heads=2, head_dim=8, initial_output=1)
        ),
        "rmt": lambda: mnemon.RMTForCausalLM(mnemon.RMTConfig(base_config=base, segment_length=16)),
        "plain": lambda: LlamaForCausalLM(base),
    }
    root = tmp_path_factory.mktemp("models")
    folders = save_models(root, tokenizer, built)
    mnemon.LM2ForCausalLM.from_pretrained(folders["lm2"]).save_pretrained(root / "other-tokenizer")
    tiny_tokenizer("quite another text").save_pretrained(root / "other-tokenizer")
    talker = tiny_tokenizer(*TEXTS.values())
    talker.chat_template = CHAT_TEMPLATE
    mnemon.LM2ForCausalLM.from_pretrained(folders["lm2"]).save_pretrained(root / "talker")
    talker.save_pretrained(root / "talker")
    return folders | {name: str(root / name) for name in ("other-tokenizer", "talker")}


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Write the texts; return their paths."""
    paths = {}
    for name, text in TEXTS.items():
        (tmp_path / name).write_bytes(text.encode())
        paths[name[0]] = str(tmp_path / name)
    return paths


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command, expects success and returns standard output."""

    def run_command(*words: object) -> str:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run_command


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command, expects exit code 2 and returns the one line."""

    def run_command(*words: object) -> str:
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1, captured.err
        assert captured.out == ""
        return captured.err

    return run_command


def type_in(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def content(path: Path) -> dict[str, str]:
    """Return all that a file says: checksums of its tensors, tokens, fingerprints."""
    return read_header(path, MEMORY)


@pytest.mark.parametrize("name", ["lm2", "mom", "rmt"])
def test_appending_gives_the_memory_of_reading_in_one_go(models, texts, run, tmp_path, name):
    whole, first, then = (tmp_path / f"{part}.memory.safetensors" for part in ("whole", "first", "then"))
    run("memorize", models[name], texts["a"], texts["b"], "-o", whole)
    run("memorize", models[name], texts["a"], "-o", first)
    run("memorize", models[name], texts["b"], "--append-to", first, "-o", then)
    assert content(then) == content(whole) != content(first)
    run("memorize", models[name], texts["b"], "--append-to", first, "-o", first, "--overwrite")
    assert content(first) == content(whole)


def test_standard_input_and_packed_files_are_the_same_text(models, texts, run, tmp_path, monkeypatch):
    run("memorize", models["lm2"], texts["a"], "-o", tmp_path / "file")
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(TEXTS["a.txt"].encode()))
    run("memorize", models["lm2"], packed, "-o", tmp_path / "packed")
    type_in(monkeypatch, TEXTS["a.txt"])
    run("memorize", models["lm2"], "-o", tmp_path / "piped")
    type_in(monkeypatch, TEXTS["a.txt"])
    run("memorize", models["lm2"], "-", "-o", tmp_path / "dash")
    assert all(content(tmp_path / name) == content(tmp_path / "file") for name in ("packed", "piped", "dash"))


def test_the_report_says_what_was_read(models, texts, run, tmp_path):
    target = tmp_path / "a.memory.safetensors"
    report = json.loads(run("memorize", models["lm2"], texts["a"], "-o", target, "--json"))
    assert report["memory"] == str(target)
    assert report["tokens"] == report["tokens_remembered"] == MemoryState.load(target).tokens_read[0]
    assert report["bytes"] == target.stat().st_size
    more = json.loads(run("memorize", models["lm2"], texts["b"], "--append-to", target, "-o", tmp_path / "b", "--json"))
    assert more["tokens_remembered"] == report["tokens"] + more["tokens"]


def test_an_encoding_is_obeyed(models, run, tmp_path):
    text = "café naïve " * 30
    for encoding in ("utf-8", "latin-1", "utf-16"):
        (tmp_path / encoding).write_bytes(text.encode(encoding))
        run("memorize", models["lm2"], tmp_path / encoding, "--encoding", encoding, "-o", tmp_path / f"{encoding}.m")
    assert content(tmp_path / "utf-8.m") == content(tmp_path / "latin-1.m") == content(tmp_path / "utf-16.m")


@pytest.mark.parametrize("name", ["lm2", "mom", "rmt"])
def test_generating_from_a_memory_is_generating_after_the_text(models, texts, run, tmp_path, name):
    target = tmp_path / "a.memory.safetensors"
    run("memorize", models[name], texts["a"], "-o", target)
    words = ("--max-new-tokens", "9", "--json")
    report = json.loads(run("generate", models[name], "--memory", target, "--prompt", "Mary is", *words))
    (tmp_path / "whole.txt").write_text(TEXTS["a.txt"] + "Mary is")
    expected = json.loads(run("generate", models[name], "--prompt-file", tmp_path / "whole.txt", *words))
    assert report["text"] == expected["text"]
    assert report["tokens_remembered"] == MemoryState.load(target).tokens_read[0]
    again = run("generate", models[name], "--memory", target, "--prompt", "Mary is", "--max-new-tokens", "9")
    assert again.strip() == report["text"].strip()
    beams = run("generate", models[name], "--memory", target, "--prompt", "Mary is", "--beams", "3", *words)
    assert json.loads(beams)["settings"]["num_beams"] == 3


def test_every_refusal_is_one_line_and_leaves_no_file(models, texts, run, refused, tmp_path, monkeypatch):
    memory, target = tmp_path / "a.memory.safetensors", tmp_path / "new.memory.safetensors"
    run("memorize", models["lm2"], texts["a"], "-o", memory)
    kept = memory.read_bytes()
    for name, content in {"empty": b"", "binary": b"\x89PNG\0", "latin": b"one\ncaf\xe9", "nul": b"a\n\0"}.items():
        (tmp_path / name).write_bytes(content)

    def refuses(*words: object) -> str:
        before = sorted(tmp_path.iterdir())
        line = refused("memorize", *words)
        assert sorted(tmp_path.iterdir()) == before
        assert memory.read_bytes() == kept
        return line

    lm2, text = models["lm2"], texts["a"]
    assert "name a file with -o" in refuses(lm2, text)
    assert "exists already; use --overwrite" in refuses(lm2, text, "-o", memory)
    assert "is a folder" in refuses(lm2, text, "-o", tmp_path)
    assert "cannot be written" in refuses(lm2, text, "-o", Path(text) / "below" / "a.memory.safetensors")
    assert "no such file" in refuses(lm2, tmp_path / "none", "-o", target)
    assert "is empty" in refuses(lm2, tmp_path / "empty", "-o", target)
    assert "line 1, byte 0: 0x89 is not UTF-8" in refuses(lm2, tmp_path / "binary", "-o", target)
    assert "line 2, byte 7: 0xe9 is not UTF-8" in refuses(lm2, text, tmp_path / "latin", "-o", target)
    assert "line 2, byte 2: expected text, got a NUL byte" in refuses(lm2, tmp_path / "nul", "-o", target)
    assert "unknown encoding 'klingon'" in refuses(lm2, text, "--encoding", "klingon", "-o", target)
    assert "can be read only once" in refuses(lm2, "-", "-", "-o", target)
    assert "has no memory" in refuses(models["plain"], text, "-o", target)
    assert "has no memory" in refuses(models["no-memory"], text, "-o", target)
    assert "512 positions of llama" in refuses(models["spanless"], text, text, text, text, "-o", target)
    assert "memory is of another model" in refuses(models["other"], text, "--append-to", memory, "-o", target)
    assert "memory is of another model" in refuses(models["mom"], text, "--append-to", memory, "-o", target)
    assert "another tokenizer" in refuses(models["other-tokenizer"], text, "--append-to", memory, "-o", target)
    type_in(monkeypatch, b"")
    assert "standard input: is empty" in refuses(lm2, "-o", target)


def test_a_memory_that_does_not_fit_is_one_line_everywhere(models, texts, run, refused, tmp_path):
    memory = tmp_path / "a.memory.safetensors"
    run("memorize", models["lm2"], texts["a"], "-o", memory)
    damaged = tmp_path / "damaged.memory.safetensors"
    damaged.write_bytes(memory.read_bytes()[:-5])
    two = MemoryState.load(memory)
    two.select(torch.tensor([0, 0])).save(tmp_path / "two")
    for command in (("generate", "--prompt", "a"), ("chat",)):

        def refuses(model: str, path: Path, command: tuple[str, ...] = command) -> str:
            return refused(command[0], models[model], *command[1:], "--memory", path)

        line = refuses("other", memory)
        assert str(memory) in line
        assert "it was made by LM2ForCausalLM" in line
        assert "another tokenizer" in refuses("other-tokenizer", memory)
        assert "has no memory" in refuses("plain", memory)
        assert "cut short" in refuses("lm2", damaged)
        assert "no such file" in refuses("lm2", tmp_path / "none")
        assert "is no mnemon memory file" in refuses("lm2", Path(texts["a"]))
        assert "holds 2 memories side by side" in refuses("lm2", tmp_path / "two")


def test_an_interrupted_reading_leaves_no_file(models, texts, tmp_path, monkeypatch, capsys):
    calls = []

    def interrupted(*_: object, **__: object) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("mnemon.models.modeling_lm2.LM2ForCausalLM._stream", interrupted)
    before = sorted(tmp_path.iterdir())
    assert main(["memorize", models["lm2"], texts["a"], "-o", str(tmp_path / "new")]) == 130
    assert calls
    assert sorted(tmp_path.iterdir()) == before
    assert "interrupted" in capsys.readouterr().err


def test_the_bar_counts_tokens(models, texts, run, tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", shown)
    run("memorize", models["lm2"], texts["a"], "-o", tmp_path / "m")
    assert "tokens/s" in shown.getvalue()


def test_a_conversation_is_remembered_saved_and_gone_on_with(models, texts, run, tmp_path, monkeypatch):
    book = tmp_path / "book.memory.safetensors"
    run("memorize", models["lm2"], texts["a"], "-o", book)
    words = ("--max-new-tokens", "6")
    type_in(monkeypatch, f"Where is Mary?\n\n/save {tmp_path / 'one'}\nWhere is John?\n/save {tmp_path / 'two'}\n")
    whole = run("chat", models["lm2"], "--memory", book, *words)
    assert "tokens remembered" in whole
    type_in(monkeypatch, f"Where is John?\n/save {tmp_path / 'then'}\n/quit\nnever read\n")
    run("chat", models["lm2"], "--memory", tmp_path / "one", *words)
    assert content(tmp_path / "then") == content(tmp_path / "two") != content(tmp_path / "one")
    counts = [MemoryState.load(tmp_path / name).tokens_read[0] for name in ("one", "two")]
    assert MemoryState.load(book).tokens_read[0] < counts[0] < counts[1]


def test_the_first_answer_is_what_generate_gives(models, texts, run, tmp_path, monkeypatch):
    book = tmp_path / "book.memory.safetensors"
    run("memorize", models["mom"], texts["a"], "-o", book)
    words = ("--max-new-tokens", "6")
    type_in(monkeypatch, "Where is Mary?\n")
    template = "Question: {}\\nAnswer:"
    found = run("chat", models["mom"], "--memory", book, "--template", template, *words)
    prompt = "Question: Where is Mary?\nAnswer:"
    assert found.strip() == run("generate", models["mom"], "--memory", book, "--prompt", prompt, *words).strip()


def test_commands_in_a_conversation(models, run, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    type_in(monkeypatch, f"/help\n/save x\n/save\n/sing\nhello\n/save {kept}\n/forget\n/save {tmp_path / 'x'}\n")
    found = run("chat", models["lm2"], "--max-new-tokens", "2")
    assert "/forget" in found
    assert found.count("there is nothing to save yet") == 2
    assert "(name a file: /save FILE)" in found
    assert "(no command /sing; /help lists them)" in found
    assert "exists already" in found
    assert kept.read_text() == "kept"


def test_a_chat_template_makes_one_running_text(models, run, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["talker"])
    asked: list[str] = []
    memorized: list[str] = []
    generate, memorize = mnemon.LM2ForCausalLM.generate, mnemon.LM2ForCausalLM.memorize

    def note_asked(self, ids, **options):
        asked.append(tokenizer.decode(ids[0]))
        return generate(self, ids, **options)

    def note_memorized(self, ids, **options):
        memorized.append(tokenizer.decode(ids[0]))
        return memorize(self, ids, **options)

    monkeypatch.setattr(mnemon.LM2ForCausalLM, "generate", note_asked)
    monkeypatch.setattr(mnemon.LM2ForCausalLM, "memorize", note_memorized)
    type_in(monkeypatch, "Where is Mary?\nWhere is John?\n")
    run("chat", models["talker"], "--max-new-tokens", "3")
    assert asked[0] == "<bos>[user] Where is Mary?<eos>\n[assistant] "
    assert asked[1] == "[user] Where is John?<eos>\n[assistant] "
    assert all(text.startswith(question) for text, question in zip(memorized, asked, strict=True))
    assert all(text.endswith("<eos>\n") for text in memorized)


def test_leaving_a_conversation_is_no_error(models, monkeypatch, capsys):
    type_in(monkeypatch, "hello\n")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mnemon.LM2ForCausalLM, "generate", interrupted)
    assert main(["chat", models["lm2"]]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("template", ["no place", "{} and {}"])
def test_a_template_without_one_place_for_the_line_is_refused(models, refused, template):
    assert "must hold {} once" in refused("chat", models["lm2"], "--template", template)


def test_memory_stays_flat_over_a_long_text(tmp_path):
    """Run in a fresh process: the resident set after ten thousand tokens and after forty thousand differ by little."""
    import subprocess

    code = f"""
import json, sys
from mnemon.bench.peak import resident_bytes
from mnemon.models.memory_model import MemoryModel
import torch
torch.set_num_threads(1)
seen, inner = [], MemoryModel.memorize
def memorize(self, ids, *args, **options):
    state = inner(self, ids, *args, **options)
    seen.append((state.tokens_read[0], resident_bytes()))
    return state
MemoryModel.memorize = memorize
from mnemon.cli.app import main
assert main(["memorize", "babilong-tiny-lm2", {str(tmp_path / "text")!r}, "-o", {str(tmp_path / "m")!r}]) == 0
print(json.dumps(seen))
"""
    (tmp_path / "text").write_text("Mary went to the garden, and John took the milk to the office again.\n" * 2500)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    settled = [size for tokens, size in seen if tokens > 10_000]
    assert seen[-1][0] > 39_000
    assert max(settled) - settled[0] < 20 * 2**20
