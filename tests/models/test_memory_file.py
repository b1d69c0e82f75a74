"""A memory comes back from its file bit for bit, and a file that is not what it should be is refused in one line."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import lm2_cases
import mom_cases
import pytest
import rmt_cases
import torch
from lm2_cases import SEGMENT, llama_config, lm2, tokens
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

import mnemon
from mnemon.data.tokenizer import train_tokenizer
from mnemon.errors import ConfigError, DataError, RunError, StateError
from mnemon.models.memory_file import MEMORY, StoredDecoder, StoredMemory, tokenizer_fingerprint
from mnemon.models.memory_model import MemoryModel
from mnemon.models.provenance import model_fingerprint
from mnemon.models.state import MemoryCache, MemoryState
from mnemon.typed_files import FileFormat, read_header, read_typed, write_typed

CASES = [*lm2_cases.CASES, *mom_cases.CASES, *rmt_cases.CASES]
LONG = 3 * SEGMENT + 4
KEPT_FILE = Path(__file__).parent / "data" / "version-1.memory.safetensors"


def case(name: str) -> MemoryModel:
    return next(cases for cases in (lm2_cases, mom_cases, rmt_cases) if name in cases.CASES).case(name)


def checksums(path: Path) -> dict[str, str]:
    return json.loads(read_header(path, MEMORY)["arrays"])


def assert_same(one: MemoryState, other: MemoryState) -> None:
    assert type(one) is type(other)
    assert (one.counts, one.pending, one.tokens_read) == (other.counts, other.pending, other.tokens_read)
    for mine, theirs in zip(one.decoder.key_positions, other.decoder.key_positions, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine == theirs).all()
    for mine, theirs in zip(one.tensors(), other.tensors(), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[MemoryModel, MemoryState, Path]:
    model = lm2(llama_config(), attention_span=9)
    state = model.memorize(tokens(1, LONG))
    return model, state, state.save(tmp_path / "a.memory.safetensors")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_state_comes_back_bit_for_bit(name, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("mnemon.models.modeling_mom._BLOCK_LENGTH", SEGMENT)
    model, ids = case(name), tokens(rows, 2 * LONG)
    mask = torch.ones_like(ids)
    mask[0, : 5 * (rows - 1)] = 0
    with torch.no_grad():  # mid-segment: statistics, keys of an unfinished segment, what waits
        unfinished = model(ids[:, :10], attention_mask=mask[:, :10], use_cache=True).past_key_values.state
    for number, state in enumerate((model.memorize(ids, mask), unfinished, model.initial_state(rows))):
        path = state.save(tmp_path / f"{number}.memory.safetensors")
        back = MemoryState.load(path)
        assert_same(back, state)
        after = tokens(rows, 4, 2)
        with torch.no_grad():
            found, expected = (model(after, past_key_values=MemoryCache(s)).logits for s in (back, state))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama-depth-span", "lfm2-layer-span", "mom", "mom-ttt", "rmt-llama"])
def test_going_on_from_a_file_is_as_if_read_in_one_go(name, tmp_path, monkeypatch):
    monkeypatch.setattr("mnemon.models.modeling_mom._BLOCK_LENGTH", SEGMENT)
    model, ids = case(name), tokens(3, 2 * LONG)
    for cut in (2, LONG):
        first = model.memorize(ids[:, :cut]).save(tmp_path / f"first-{cut}")
        model.memorize(ids[:, cut:], state=MemoryState.load(first)).save(tmp_path / f"then-{cut}")
        model.memorize(ids).save(tmp_path / f"whole-{cut}")
        assert checksums(tmp_path / f"then-{cut}") == checksums(tmp_path / f"whole-{cut}")


def test_half_precision_comes_back_bit_for_bit(tmp_path):
    model = lm2(llama_config(), attention_span=9).to(torch.bfloat16)
    state = model.memorize(tokens(2, LONG))
    assert torch.bfloat16 in {tensor.dtype for tensor in state.tensors()}
    assert_same(MemoryState.load(state.save(tmp_path / "b")), state)


def test_the_file_says_what_it_is_of(saved):
    model, state, path = saved
    header = read_header(path, MEMORY)
    content = json.loads(header["content"])
    assert (header["kind"], header["version"]) == ("mnemon memory", "1")
    assert header["library"] == f"mnemon {mnemon.__version__}"
    assert content["fingerprint"] == model_fingerprint(model)
    assert (content["family"], content["model_class"]) == ("lm2", "LM2ForCausalLM")
    assert content["tokens_read"] == [LONG]
    assert len(json.loads(header["arrays"])) == len(state.tensors()) + len(state.decoder.key_positions)


def test_loading_needs_no_model_and_using_it_elsewhere_names_both(saved):
    _, _, path = saved
    other = lm2(llama_config(), 1, attention_span=9)
    state = MemoryState.load(path)
    with pytest.raises(StateError, match=r"made by LM2ForCausalLM [0-9a-f]{16}, this is LM2ForCausalLM") as caught:
        other.generate(tokens(1, 2), memory=state)
    assert state.origin.fingerprint[:16] in str(caught.value)
    assert model_fingerprint(other)[:16] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loaded_memory_can_be_saved_again_without_the_model(saved, tmp_path):
    _, _, path = saved
    again = MemoryState.load(path).save(tmp_path / "again")
    assert read_header(again, MEMORY) == read_header(path, MEMORY)


def test_a_file_that_is_there_is_kept_unless_asked_for(saved):
    model, _, path = saved
    before = path.read_bytes()
    other = model.memorize(tokens(1, 3))
    with pytest.raises(ConfigError, match="exists already"):
        other.save(path)
    assert path.read_bytes() == before
    other.save(path, overwrite=True)
    assert MemoryState.load(path).tokens_read == (3,)


def test_nothing_is_left_of_a_file_that_could_not_be_written(saved, tmp_path, monkeypatch):
    _, state, _ = saved
    monkeypatch.setattr("mnemon.typed_files._save", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(RunError, match="disk is full"):
        state.save(tmp_path / "new" / "a.memory.safetensors")
    assert list((tmp_path / "new").iterdir()) == []


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut short":
        path.write_bytes(data[:-9])
    elif how == "one bit":
        data[-9] ^= 1
        path.write_bytes(data)
    elif how == "other header":
        with safe_open(str(path), framework="pt") as file:
            header = dict(file.metadata())
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header["content"] = header["content"].replace("LM2ForCausalLM", "LM3ForCausalLM")
        save_file(held, path, header)
    elif how == "newer":
        write_typed(path, read_typed(path, StoredMemory, MEMORY), FileFormat("mnemon memory", 2), overwrite=True)
    elif how == "another kind":
        write_typed(path, read_typed(path, StoredMemory, MEMORY), FileFormat("mnemon trace", 1), overwrite=True)
    elif how == "weights":
        save_file({"a": torch.zeros(2)}, path)
    elif how == "text":
        path.write_text("once upon a time")
    elif how == "missing":
        path.unlink()
    elif how == "other counts":
        stored = read_typed(path, StoredMemory, MEMORY)
        write_typed(path, replace(stored, tokens_read=(1,)), MEMORY, overwrite=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut short", "cut short"),
        ("one bit", "was altered after it was written"),
        ("other header", "was altered after it was written"),
        ("newer", "version 2 of its format .* upgrade it"),
        ("another kind", "expected a mnemon memory file, got mnemon trace"),
        ("weights", "expected a mnemon memory file"),
        ("text", "is no mnemon memory file"),
        ("missing", "no such file"),
        ("other counts", "says .* tokens and holds"),
    ],
)
def test_a_file_that_is_not_intact_is_one_line(saved, how, message):
    path = saved[2]
    damaged(path, how)
    with pytest.raises(DataError, match=message) as caught:
        MemoryState.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_of_version_1_is_read_for_ever():
    state = MemoryState.load(KEPT_FILE)
    assert state.tokens_read == (11,)
    assert state.counts == (8,)
    assert state.pending == ((9, 10, 11),)
    assert state.origin.fingerprint == "0123456789abcdef" * 4
    assert state.origin.tokenizer == "fedcba9876543210" * 4
    assert torch.equal(state.bank, torch.arange(6.0).reshape(1, 1, 2, 3))
    assert state.decoder.key_positions[0].tolist() == [[4, 5, 6, 7]]
    assert [tensor.dtype for tensor in state.decoder.base[0]] == [torch.bfloat16] * 2
    assert state.statistics[0].peak.shape == (1, 1, 2)


def test_an_older_version_is_brought_up_to_date_by_its_migration(saved, monkeypatch):
    @dataclass(frozen=True)
    class Older:  # as if version 0 had not yet known of tokens that wait, and had called the slots otherwise
        family: str
        model_class: str
        fingerprint: str
        decoder: StoredDecoder
        slots: torch.Tensor
        kept: torch.Tensor
        statistics: tuple

    def migrate(content: dict, arrays: dict) -> dict:
        arrays["bank"] = arrays.pop("slots")
        content.pop("slots")
        counts = content["decoder"]["counts"]
        return {**content, "bank": {"array": "bank"}, "pending": [], "tokens_read": counts, "tokenizer": None}

    _, state, path = saved
    known = MemoryState.load(path)
    decoder = StoredDecoder(state.counts, state.decoder.base, state.decoder.key_positions)
    older = Older("lm2", "LM2ForCausalLM", known.origin.fingerprint, decoder, state.bank, state.kept, state.statistics)
    write_typed(path, older, FileFormat("mnemon memory", 0), overwrite=True)
    with pytest.raises(DataError, match="version 0 of its format, which is no longer read"):
        MemoryState.load(path)
    monkeypatch.setattr("mnemon.models.memory_file.MEMORY", replace(MEMORY, migrations={0: migrate}))
    assert_same(MemoryState.load(path), replace(state, pending=()))


def small_tokenizer(text: str = "Mary went to the garden.") -> PreTrainedTokenizerFast:
    return train_tokenizer([text], 280)


def test_the_tokenizer_goes_into_the_file_and_another_one_is_refused(saved, tmp_path):
    model, state, _ = saved
    mine, other = small_tokenizer(), small_tokenizer("John took the milk to the office.")
    path = state.save(tmp_path / "t", mine)
    loaded = MemoryState.load(path)
    assert loaded.origin.tokenizer == tokenizer_fingerprint(mine)
    with pytest.raises(StateError, match=r"another tokenizer: [0-9a-f]{16}, this is [0-9a-f]{16}"):
        loaded.save(tmp_path / "u", other)
    on = model.memorize(tokens(1, 3), state=loaded)
    assert MemoryState.load(on.save(tmp_path / "v")).origin.tokenizer == tokenizer_fingerprint(mine)


def test_the_fingerprint_of_a_tokenizer_is_that_of_what_it_makes_of_texts(tmp_path):
    tokenizer = small_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == before
    tokenizer.add_tokens(["garden party"])
    assert tokenizer_fingerprint(tokenizer) != before
