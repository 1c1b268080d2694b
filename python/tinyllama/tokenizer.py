"""Training SentencePiece tokenizers on one's own text; loading and saving them."""

from __future__ import annotations

import io
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from .data.documents import SEPARATOR, Documents
from .data.sources import listed
from .errors import ArgumentError, MissingExtraError
from .files import check_place, whole_file
from .formats.checkpoint import Vocabulary
from .formats.sentencepiece import (
    load_sentencepiece,
    open_processor,
    read_sentencepiece,
    save_sentencepiece,
)

__all__ = [
    "load_sentencepiece",
    "open_processor",
    "read_sentencepiece",
    "save_sentencepiece",
    "train",
]

# sentencepiece holds a position within a word in 16 bits, and a line of Chinese may be one word.
MAX_LINE_CHARACTERS = 4096
DEFAULT_COVERAGE = 0.9995
ALPHABET_SHARE = 0.7
ASCII = frozenset(map(chr, range(0x21, 0x7F)))
# sentencepiece's own marks and NUL: it skips whole lines that hold them.
RESERVED = frozenset("\u2581\u2585\u2047\0")


def train(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    vocab_size: int,
    *,
    character_coverage: float | None = None,
    byte_fallback: bool = True,
    split_digits: bool = True,
    sample_lines: int = 1_000_000,
    seed: int = 0,
    field: str | None = None,
    separator: str = SEPARATOR,
) -> Vocabulary:
    """Train a SentencePiece BPE tokenizer of ``vocab_size`` tokens, as Llama's is made.

    ``inputs``: files, folders or globs as ``tinyllama.data.Documents`` reads them, all merged;
    ``sample_lines`` of their non-empty lines, drawn at random with ``seed``, are learned from.
    ``character_coverage``: the most frequent characters that together make up this share of the
    text get a token of their own, and so does all of ASCII that occurs; with ``byte_fallback``
    the rest is spelled in bytes, without it they become the unknown token. None: 0.9995, or
    less where so many characters would take more than ALPHABET_SHARE of the vocabulary (Chinese).
    ``split_digits``: every digit is a token, which makes numbers easier to learn.

    Writes ``out`` (``….model``) and the pieces as text beside it (``….vocab``): text is taken
    as it is (no normalisation, white space kept), 0 is unknown, 1 begins and 2 ends a document.
    The same arguments give the same bytes. Raises ArgumentError for values out of range and for
    a vocabulary too small or too large for the text, FormatError for unreadable text.
    """
    out = Path(out)
    if out.suffix != ".model":
        raise ArgumentError(f"out is {str(out)!r}: the name of a tokenizer ends in .model")
    check_place(out)
    n_special = 3 + 256 * byte_fallback
    coverage = character_coverage
    if coverage is not None and not 0 < coverage <= 1:
        raise ArgumentError(f"character_coverage is {coverage}, expected above 0 and up to 1")
    for name, value, low, high in (
        ("vocab_size", vocab_size, n_special + 2, 2**20),
        ("sample_lines", sample_lines, 1, 10**9),
    ):
        if not low <= value <= high:
            raise ArgumentError(f"{name} is {value}, expected {low} to {high}")
    lines = _sample(_lines(Documents(inputs, field=field, separator=separator)), sample_lines, seed)
    if not lines:
        names = ", ".join(map(str, listed(inputs)))
        raise ArgumentError(f"{names}: there is no text to learn from")
    alphabet = _alphabet(lines, character_coverage, vocab_size - n_special)
    model = _fit(_keep(lines, alphabet), vocab_size, byte_fallback, split_digits)
    vocabulary = read_sentencepiece(model, source=str(out))
    rows = zip(vocabulary.pieces, vocabulary.scores.tolist(), strict=True)
    with whole_file(out.with_suffix(".vocab")) as file:
        file.write("".join(f"{piece}\t{score:g}\n" for piece, score in rows).encode())
    with whole_file(out) as file:
        file.write(model)
    return vocabulary


def _lines(documents: Iterable[tuple[str, str]]) -> Iterator[str]:
    for _, text in documents:
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_LINE_CHARACTERS):
                if piece := line[start : start + MAX_LINE_CHARACTERS].strip():
                    yield piece


def _sample(lines: Iterator[str], n: int, seed: int) -> list[str]:
    """``n`` lines, each as likely as any other (reservoir sampling: Vitter, Algorithm R)."""
    rng = random.Random(seed)
    chosen: list[str] = []
    for seen, line in enumerate(lines):
        if seen < n:
            chosen.append(line)
        elif (slot := rng.randrange(seen + 1)) < n:
            chosen[slot] = line
    return chosen


def _alphabet(lines: list[str], coverage: float | None, n_free: int) -> set[str]:
    """The characters that get a token, when ``n_free`` tokens are left for them and for merges."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    wanted = (DEFAULT_COVERAGE if coverage is None else coverage) * counts.total()
    alphabet = {" "} | {char for char in counts if char in ASCII}
    covered = sum(counts[char] for char in alphabet)
    for char, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        full = coverage is None and len(alphabet) >= ALPHABET_SHARE * n_free
        if covered >= wanted or full:
            break
        if char not in alphabet and char not in RESERVED:
            alphabet.add(char)
            covered += count
    if len(alphabet) > n_free:
        raise ArgumentError(
            f"{len(alphabet):,} characters want a token of their own, but the vocabulary has room"
            f" for {n_free:,}: raise vocab_size or lower character_coverage"
        )
    return alphabet


def _keep(lines: list[str], alphabet: set[str]) -> Iterator[str]:
    """The lines with every other character as a digit, which no token joins to its neighbours.

    sentencepiece can leave out rare characters itself, but at most 2 % of the text.
    """
    others = {ord(char): "0" for line in lines for char in set(line) - alphabet - {" "}}
    return (line.translate(others) for line in lines) if others else iter(lines)


def _fit(lines: Iterator[str], vocab_size: int, byte_fallback: bool, split_digits: bool) -> bytes:
    try:
        import sentencepiece
    except ImportError:
        raise MissingExtraError("sentencepiece", "data") from None
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=byte_fallback,
            split_digits=split_digits,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            unk_surface=" \u2047 ",
            max_sentence_length=4 * MAX_LINE_CHARACTERS + 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # "INTERNAL: path/to/source.cc(123) [condition] What it means."
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise ArgumentError(f"vocab_size {vocab_size} does not suit the text: {reason}") from None
    return model.getvalue()
