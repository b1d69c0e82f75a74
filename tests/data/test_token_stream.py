"""Tokens of a stream are those of the whole text, for tokenizers of every kind, however the text arrives."""

import functools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mnemon.data.token_stream import TokenStream, beginning_ids
from mnemon.errors import ConfigError

PROSE = (
    "It was the best of times, it was the worst of times; Mary's café — naïve, isn't it? — cost 12,345.67 francs.\n"
    "  def f(x):\n        return x  # four   blanks\n\n\n\tЖили-были старик со старухой у самого синего моря.\n"
    "天地玄黃宇宙洪荒 日月盈昃 \U0001f600\U0001f469\u200d\U0001f680 e\u0301a\u030a"
    " ﬁne <eos> don't stop-ping 1234567890 ÀÉÎ\n"
)
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bpe(pre_tokenizer: object = None, normalizer: object = None, **options: object) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    return tokenizer


def training_texts() -> list[str]:
    return [PROSE] * 3


def byte_level() -> Tokenizer:
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))


def byte_level_prefix_space() -> Tokenizer:
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=True))


def llama3_like() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(GPT4), behavior="isolated")
    tokenizer = bpe(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", 0), ("<eos>", 1)]
    )
    return tokenizer


def llama2_like() -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return bpe(None, normalizer, unk_token="<unk>", fuse_unk=True)


def metaspace_first() -> Tokenizer:
    return bpe(pre_tokenizers.Metaspace(prepend_scheme="first"), normalizers.NFKC(), unk_token="<unk>")


def nfc_lowercase() -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer)


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "<eos>"], show_progress=False)
    tokenizer.train_from_iterator(training_texts(), trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<eos>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([line for line in PROSE.splitlines() for _ in range(3)], trainer)
    return tokenizer


KINDS = [
    byte_level, byte_level_prefix_space, llama3_like, llama2_like, metaspace_first, nfc_lowercase, word_piece, unigram,
]  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@functools.lru_cache
def made(kind) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=kind(), eos_token="<eos>")


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def cut(text: str, seed: int) -> Iterator[str]:
    chance = random.Random(seed)
    while text:
        size = chance.choice([1, 3, 17, 200])
        yield text[:size]
        text = text[size:]


def streamed(stream: TokenStream, text: str, seed: int = 0) -> list[int]:
    return [number for ids in stream.tokens(cut(text, seed)) for number in ids]


def words(seed: int, length: int) -> str:
    """Return text of words, blanks, digits and scripts in random order."""
    chance = random.Random(seed)
    parts = [*PROSE.split(" "), " ", "  ", "\n", "\n\n", "\t", "a", "12", "é", "e\u0301", "天地", "<eos>", "ab" * 9]
    text = ""
    while len(text) < length:
        text += chance.choice(parts) + chance.choice([" ", " ", " ", "", "\n"])
    return text


@every_kind
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 3000), cuts=st.integers(0, 9))
def test_the_tokens_are_those_of_the_whole_text(kind, seed, length, cuts):
    stream = TokenStream(made(kind), window=512, overlap=128, longest_window=2**14)
    text = words(seed, length)
    assert streamed(stream, text, cuts) == whole(made(kind), text)
    assert stream.forced_cuts == 0


@every_kind
@settings(max_examples=15)
@given(text=st.text(alphabet=st.sampled_from("ab e\n\t1.,'é\u0301天▁<>os-"), min_size=600, max_size=1500))
def test_so_are_those_of_noise(kind, text):
    stream = TokenStream(made(kind), window=256, overlap=128, longest_window=2**14)
    assert streamed(stream, text) == whole(made(kind), text)


@every_kind
@pytest.mark.parametrize("unit", ["a", " ", "7", "\n", "ab", "é", "天", "-", " a", "\U0001f600"])
def test_so_are_those_of_endless_runs_that_fit_the_longest_window(kind, unit):
    stream = TokenStream(made(kind), window=512, overlap=128, longest_window=2**15)
    text = words(1, 700) + unit * 2000 + words(2, 700)
    assert streamed(stream, text) == whole(made(kind), text)
    assert stream.forced_cuts == 0


@every_kind
def test_the_shipped_sizes_give_the_tokens_of_a_long_text(kind):
    text = words(3, 150_000)
    assert streamed(TokenStream(made(kind)), text) == whole(made(kind), text)


def test_a_run_that_no_window_holds_is_cut_at_places_of_the_text_and_counted():
    tokenizer = made(word_piece)
    text = words(1, 700) + "a" * 5000 + words(2, 700)
    results = set()
    for seed in range(4):
        stream = TokenStream(tokenizer, window=512, overlap=128, longest_window=1024)
        results.add(tuple(streamed(stream, text, seed)))
        assert stream.forced_cuts > 0
    assert len(results) == 1


def test_only_a_window_of_a_long_text_is_held():
    stream = TokenStream(made(byte_level))
    given_out = 0
    ahead = []

    def pieces() -> Iterator[str]:
        nonlocal given_out
        for number in range(60):
            piece = words(number, 5000)
            given_out += len(piece)
            yield piece

    passed_on = 0
    for ids in stream.tokens(pieces()):
        passed_on += len(made(byte_level).decode(ids))
        ahead.append(given_out - passed_on)
    assert max(ahead) < 50_000


def test_truncation_and_padding_of_earlier_calls_do_not_matter():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<eos>", pad_token="<eos>")
    text = words(5, 3000)
    expected = whole(tokenizer, text)
    tokenizer(["a", "a b c d"], padding="max_length", truncation=True, max_length=3)
    assert tokenizer.backend_tokenizer.truncation is not None
    stream = TokenStream(tokenizer, window=512, overlap=128)
    assert streamed(stream, text) == expected
    assert tokenizer.backend_tokenizer.truncation is not None


def test_the_beginning_is_what_stands_before_every_text_and_not_what_stands_after():
    assert beginning_ids(made(llama3_like)) == [0]
    assert beginning_ids(made(byte_level)) == []
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<eos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    assert beginning_ids(tokenizer) == []


def test_a_tokenizer_that_is_not_fast_is_refused():
    with pytest.raises(ConfigError, match="expected a fast tokenizer, got object"):
        TokenStream(object())


@pytest.mark.parametrize("kind", [byte_level, llama2_like, word_piece], ids=lambda kind: kind.__name__)
def test_a_book_is_cut_as_a_whole(kind, real_data: Path):
    book = next(iter(sorted((real_data / "background").rglob("*.txt"))))
    text = book.read_text(encoding="utf-8", errors="replace")[:120_000]
    stream = TokenStream(made(kind))
    assert streamed(stream, text) == whole(made(kind), text)
