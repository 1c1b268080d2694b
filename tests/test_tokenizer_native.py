"""The native tokenizer against sentencepiece itself: every id equal, every text back."""

from __future__ import annotations

import io
import os
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raw_gguf import ARRAY, BOOL, F32, I32, STRING, U32, small_llama
from tinyllama import _core
from tinyllama.config import Config
from tinyllama.errors import ArgumentError, FormatError
from tinyllama.formats.checkpoint import Checkpoint, TokenType
from tinyllama.formats.gguf import gguf_bytes
from tinyllama.formats.sentencepiece import read_sentencepiece, save_sentencepiece

spm = pytest.importorskip("sentencepiece")

FULL = os.environ.get("TINYLLAMA_FULL_TESTS") == "1"
WORDS = [
    "once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "a",
    "little",
    "fox",
    "in",
    "the",
    "old",
    "oak",
    "wood",
    ",",
    "it",
    "ran",
    ".",
]
WORDS += ["\u4ece\u524d", "\u6709\u4e00\u53ea", "\u72d0\u72f8", "\u00e9t\u00e9"]


def native(model: bytes) -> Any:
    """The core's tokenizer for the bytes of a SentencePiece model."""
    vocabulary = read_sentencepiece(model)
    config = Config(2, 1, 1, len(vocabulary), 8, hidden_dim=2)
    tensors = {k: np.ones(s, np.float32) for k, s in config.tensor_shapes().items()}
    return _core.Model(data=gguf_bytes(Checkpoint(config, tensors, vocabulary))).tokenizer


def train(**options: Any) -> bytes:
    rng = random.Random(1)
    lines = (" ".join(rng.choices(WORDS, k=12)) for _ in range(400))
    model = io.BytesIO()
    options = {
        "vocab_size": 420,
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
    } | options
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


MODELS: dict[str, dict[str, Any]] = {
    "byte_fallback": {},
    "whitespace_removed": {"remove_extra_whitespaces": True},
    "no_prefix": {"add_dummy_prefix": False},
    "no_prefix_whitespace_removed": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    "unknown_token": {"byte_fallback": False, "vocab_size": 120},
    "user_defined": {"user_defined_symbols": ["<go>", "<go", "fox\u2581in", "  ", "a"]},
    "whitespace_pieces": {
        "allow_whitespace_only_pieces": True,
        "user_defined_symbols": ["\u2581" * 3],
    },
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> bytes:
    return train(**MODELS[request.param])


def random_texts(n: int, seed: int = 0) -> Iterable[str]:
    """Words, spaces, controls, combining marks, and characters of all planes, mixed."""
    rng = random.Random(seed)
    ranges = [(0, 0x20), (0x20, 0x7F), (0x80, 0x250), (0x300, 0x370), (0x2000, 0x2070)]
    ranges += [(0x2580, 0x2583), (0x4E00, 0x4F00), (0xFFF0, 0x10000), (0x1F300, 0x1F700)]
    ranges += [(0x10000, 0x110000), (0, 0xD800), (0xE000, 0x10000)]
    for _ in range(n):
        parts = []
        for _ in range(rng.randrange(12)):
            kind = rng.random()
            if kind < 0.3:
                parts.append(rng.choice(WORDS))
            elif kind < 0.5:
                parts.append(
                    rng.choice([" ", "  ", "   ", "\u2581", "<go>", "<go", "<s>", "<0x41>"])
                )
            else:
                start, end = rng.choice(ranges)
                parts.append(
                    "".join(chr(rng.randrange(start, end)) for _ in range(rng.randrange(1, 5)))
                )
        yield "".join(parts)


def compare(sp: Any, ours: Any, texts: Iterable[str], trips: bool) -> int:
    """Every id as sentencepiece's, the decoded text as well, and the text itself where nothing is
    normalised away. Returns the number of tokens compared."""
    n_tokens = 0
    for text in texts:
        expected = sp.encode(text)
        tokens = ours.encode(text, False, False)
        assert tokens == expected, repr(text)
        decoded = ours.decode(tokens).decode()
        assert decoded == sp.decode(expected), repr(text)
        if trips:
            assert decoded == text.replace("\u2581", " ")
        n_tokens += len(tokens)
    return n_tokens


def test_ids_are_those_of_sentencepiece(model: bytes) -> None:
    sp, vocabulary = spm.SentencePieceProcessor(model_proto=model), read_sentencepiece(model)
    lossless = TokenType.BYTE in vocabulary.types and vocabulary.add_space_prefix
    lossless = lossless and not vocabulary.remove_extra_whitespaces
    texts = [*random_texts(1500), "", " ", "  ", "\u2581", "a ", " a", "\0", "a\0b", "\n", "\t a"]
    assert compare(sp, native(model), texts, lossless) > 10_000


def test_malformed_utf8_is_replaced_as_sentencepiece_does(model: bytes) -> None:
    sp, ours, rng = spm.SentencePieceProcessor(model_proto=model), native(model), random.Random(2)
    texts = [
        b"\xff",
        b"a\xe4\xb8",
        b"\xed\xa0\x80",
        b"\xc0\x80 b",
        b"\xf4\x90\x80\x80",
        b"\xe4 \xb8",
    ]
    for text in random_texts(500, seed=3):
        data = bytearray(text.encode())
        for _ in range(min(len(data), 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        texts.append(bytes(data))
    for data in texts:
        assert ours.encode(data, False, False) == sp.encode(data), data


def test_decoding_any_tokens(model: bytes) -> None:
    sp, ours, rng = spm.SentencePieceProcessor(model_proto=model), native(model), random.Random(4)
    n = ours.vocab_size
    for _ in range(1500):
        tokens = [
            rng.choice((rng.randrange(n), rng.randrange(min(n, 262))))
            for _ in range(rng.randrange(9))
        ]
        has_bytes = any(sp.is_byte(token) for token in tokens)
        if has_bytes:  # a control token between the bytes of a character breaks it there, not here
            tokens = [token for token in tokens if not sp.is_control(token)]
        text, expected = ours.decode(tokens).decode(errors="replace"), sp.decode(tokens)
        if has_bytes:  # U+FFFD for each malformed byte there, for each broken character here
            text, expected = (re.sub("\ufffd+", "\ufffd", t) for t in (text, expected))
        assert text == expected, tokens


def test_a_stream_gives_what_decoding_the_whole_gives(model: bytes) -> None:
    ours, rng = native(model), random.Random(5)
    for text in random_texts(400, seed=6):
        tokens = ours.encode(text, True, True)
        if rng.random() < 0.5 and tokens:
            tokens = [rng.choice((t, rng.randrange(min(ours.vocab_size, 262)))) for t in tokens]
        at_start = rng.random() < 0.5
        decoder = _core.StreamDecoder(ours, at_start)
        pieces = [decoder.push(token) for token in tokens] + [decoder.finish()]
        assert "".join(pieces) == ours.decode(tokens, at_start).decode(errors="replace")


def test_a_stream_holds_back_unfinished_characters() -> None:
    ours = native(train())
    tokens = [3 + byte for byte in "\u5b57\U0001f98a".encode()]
    decoder = _core.StreamDecoder(ours, False)
    assert [decoder.push(t) for t in tokens] == ["", "", "\u5b57", "", "", "", "\U0001f98a"]
    assert [decoder.push(3 + 0xF0), decoder.push(3 + 0x9F), decoder.finish()] == ["", "", "\ufffd"]
    # The space before the text is dropped at the start only.
    space = ours.encode("a", False, False)
    assert ours.decode(space) == b"a" and ours.decode(space, at_start=False) == b" a"


def test_text_that_continues_another(model: bytes) -> None:
    """Nothing is put before it or taken away there, so that the two decode to the joint text."""
    ours, vocabulary = native(model), read_sentencepiece(model)
    prefix = vocabulary.add_space_prefix
    first, second = ours.encode("a fox", False, False), "  in the wood"
    tokens = first + ours.encode(second, False, False, at_start=False)
    kept = " in the wood" if vocabulary.remove_extra_whitespaces else second
    assert ours.decode(tokens) == b"a fox" + kept.encode()
    assert (ours.decode(ours.encode("fox", False, False), at_start=False) == b" fox") == prefix
    assert ours.decode(ours.encode("fox", False, False, at_start=False), at_start=False) == b"fox"


def test_unused_tokens_are_taken_apart_again() -> None:
    vocabulary = read_sentencepiece(train())
    types, rng = vocabulary.types.copy(), random.Random(7)
    long_ones = [i for i, piece in enumerate(vocabulary.pieces) if i > 258 and len(piece) > 1]
    types[rng.sample(long_ones, len(long_ones) // 2)] = TokenType.UNUSED
    changed = save_sentencepiece(replace(vocabulary, types=types))
    sp, ours = spm.SentencePieceProcessor(model_proto=changed), native(changed)
    assert compare(sp, ours, random_texts(1500, seed=8), True) > 10_000
    used = set(ours.encode(" ".join(WORDS), False, False))
    assert not used & set(np.flatnonzero(types == TokenType.UNUSED).tolist())


def test_control_tokens_come_only_when_asked_for() -> None:
    ours = native(train())
    assert ours.encode("<s></s><unk><0x41>", True, True)[0] == ours.bos_id == 1
    inner = ours.encode("<s></s><unk><0x41>", False, False)
    assert not {0, 1, 2, 3 + 0x41} & set(inner)
    assert ours.encode("", True, True) == [1, 2] and ours.encode("", False, False) == []
    assert ours.decode([1, *ours.encode("a fox", False, False), 2]) == b"a fox"
    assert ours.decode([0]).decode() == " \u2047 "


@pytest.mark.parametrize("text", ["a" * 200_000, "fox " * 50_000, " " * 100_000, "\u4ece" * 50_000])
def test_long_texts(text: str) -> None:
    model = train()
    sp, ours = spm.SentencePieceProcessor(model_proto=model), native(model)
    assert compare(sp, ours, [text], True) > 0


@pytest.mark.parametrize("token", [-1, 420, 2**31 - 1, -(2**31)])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    ours = native(train(vocab_size=420))
    token = ours.vocab_size if token == 420 else token
    calls: list[Callable[[], object]] = [
        lambda: ours.decode([1, token]),
        lambda: ours.token_bytes(token),
        lambda: _core.StreamDecoder(ours, True).push(token),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match=f"token {token} is outside the vocabulary"):
            call()


PIECES = ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "'tokenizer.ggml.model' is missing"),
        ({"model": (STRING, "gpt2")}, "tokenizer.ggml.model is 'gpt2'"),
        ({"tokens": None}, "'tokenizer.ggml.tokens' is missing"),
        ({"tokens": (ARRAY, (I32, [1]))}, "'tokenizer.ggml.tokens' is not an array of strings"),
        ({"tokens": (ARRAY, (STRING, []))}, "tokenizer.ggml.tokens has 0 tokens"),
        ({"scores": None}, "'tokenizer.ggml.scores' is missing"),
        ({"scores": (ARRAY, (F32, [0.0] * 5))}, "tokenizer.ggml.scores 5"),
        ({"scores": (ARRAY, (F32, [0.0] * 5 + [float("nan")]))}, "score of token 5 is -?nan"),
        ({"scores": (ARRAY, (F32, [float("inf")] + [0.0] * 5))}, "score of token 0 is inf"),
        ({"token_type": (ARRAY, (I32, [1] * 7))}, "tokenizer.ggml.token_type 7"),
        ({"token_type": (ARRAY, (I32, [2, 3, 3, 1, 1, 7]))}, "type of token 5 is 7"),
        ({"token_type": (ARRAY, (I32, [2, 3, 3, 6, 1, 1]))}, "token 3 is of type byte"),
        ({"token_type": (ARRAY, (I32, [1] * 6)), "unknown_token_id": None}, "neither an unknown"),
        ({"bos_token_id": (U32, 6)}, "tokenizer.ggml.bos_token_id is 6, outside the 6 tokens"),
        ({"eos_token_id": (I32, -1)}, "tokenizer.ggml.eos_token_id is -1"),
        ({"unknown_token_id": (F32, 0.0)}, "'tokenizer.ggml.unknown_token_id' is not an integer"),
        ({"add_bos_token": (U32, 1)}, "'tokenizer.ggml.add_bos_token' is not a bool"),
    ],
)
def test_a_bad_vocabulary_is_refused(changes: dict[str, Any], message: str) -> None:
    metadata = {f"tokenizer.ggml.{key}": entry for key, entry in changes.items()}
    raw = small_llama()
    raw.metadata = {k: v for k, v in (raw.metadata | metadata).items() if v is not None}
    with pytest.raises(FormatError, match=message):
        _core.Model(data=raw.bytes())


@pytest.mark.parametrize("text", ["<0x4>", "<0x-1>", "<0xGG>", "<0x041>", "<0x4a>", "0x41", ""])
def test_a_byte_token_has_exactly_two_digits(text: str) -> None:
    raw = small_llama(
        tokens=(ARRAY, (STRING, [*PIECES[:3], text, *PIECES[4:]])),
        token_type=(ARRAY, (I32, [2, 3, 3, 6, 1, 1])),
    )
    with pytest.raises(FormatError, match="token 3 is of type byte"):
        _core.Model(data=raw.bytes())


def test_missing_special_tokens_are_minus_one() -> None:
    raw = small_llama(bos_token_id=None, eos_token_id=None)
    tokenizer = _core.Model(data=raw.bytes()).tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (-1, -1, 0)
    assert not tokenizer.add_bos
    assert tokenizer.encode("a", True, True) == [5]


def test_flags_of_the_file_are_followed() -> None:
    raw = small_llama()
    raw.metadata["tokenizer.ggml.add_bos_token"] = (BOOL, False)
    raw.metadata["tokenizer.ggml.add_space_prefix"] = (BOOL, False)
    tokenizer = _core.Model(data=raw.bytes()).tokenizer
    assert not tokenizer.add_bos
    assert tokenizer.encode("a a", False, False) == [4, 5]
    assert tokenizer.decode([5, 4]) == b" aa"


def real_models(shared: Path) -> dict[str, bytes]:
    """Three tokenizers of others, and a Chinese one of 3,000 tokens trained here."""
    weights = shared / "weights"
    models = {
        "32000": (weights / "tokenizers/llama_32000_tokenizer.model").read_bytes(),
        "4096": (weights / "tokenizers/tok4096_cheetahbooked.model").read_bytes(),
        "512": (weights / "stories260k/tok512.model").read_bytes(),
    }
    chinese = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines_of(shared / "data/zh/xiyouji.txt", 20_000 if FULL else 3000)),
        model_writer=chinese,
        model_type="bpe",
        vocab_size=3000,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return models | {"chinese": chinese.getvalue()}


def lines_of(path: Path, n: int) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [line.rstrip("\n") for line, _ in zip(file, range(n), strict=False)]


def test_real_text_with_real_tokenizers(shared: Path) -> None:
    """All of valid.txt and 2,000 lines each with TINYLLAMA_FULL_TESTS=1, else a part of them."""
    data = shared / "data"
    texts = lines_of(data / "tinystories/valid.txt", 10**9 if FULL else 2000)
    texts += lines_of(data / "zh/wikipedia.txt", 2000 if FULL else 200)
    texts += lines_of(data / "pt/novels.txt", 2000 if FULL else 200)
    texts += random_texts(10_000 if FULL else 2000, seed=9)
    for name, model in real_models(shared).items():
        sp = spm.SentencePieceProcessor(model_proto=model)
        lossless = not read_sentencepiece(model).remove_extra_whitespaces
        assert compare(sp, native(model), texts, lossless) > 10_000, name
