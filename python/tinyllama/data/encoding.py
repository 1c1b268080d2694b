"""How a document becomes tokens: the tokenizer, the ends, and where a prompt stops."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import FormatError
from ..files import PathLike
from ..formats import read_vocabulary
from ..formats.sentencepiece import open_processor, read_sentencepiece, save_sentencepiece
from .documents import Pair


@dataclass(frozen=True)
class Encoding:
    """All that decides a document's tokens and its split; sent once to every process."""

    model: bytes
    bos_id: int
    eos_id: int
    dtype: str
    valid_fraction: float
    seed: int

    def key(self) -> bytes:
        rest = (self.bos_id, self.eos_id, self.dtype, self.valid_fraction, self.seed)
        return hashlib.sha256(self.model + repr(rest).encode()).digest()


def choose_encoding(tokenizer: PathLike, valid_fraction: float, seed: int) -> Encoding:
    """The encoding by a SentencePiece ``.model``, or by the tokenizer of a model or of shards.

    Raises OSError, and FormatError for what has no such tokenizer, or one without BOS or EOS.
    """
    path = Path(tokenizer)
    if (path / "tokenizer.model").is_file() and not (path / "config.json").is_file():
        path = path / "tokenizer.model"  # of shards; a model's other files may add to it
    if path.is_dir() or path.suffix in (".gguf", ".bin"):
        model = save_sentencepiece(read_vocabulary(path))
    else:
        model = path.read_bytes()
    vocabulary = read_sentencepiece(model, source=str(path))
    for name in ("bos_id", "eos_id"):
        if getattr(vocabulary, name) is None:
            raise FormatError(f"{path}: the tokenizer has no {name}: documents need both ends")
    assert vocabulary.bos_id is not None and vocabulary.eos_id is not None
    dtype = "uint16" if len(vocabulary) <= 65535 else "uint32"
    return Encoding(model, vocabulary.bos_id, vocabulary.eos_id, dtype, valid_fraction, seed)


class Encoder:
    """Encodes documents by sentencepiece. Raises MissingExtraError where that is missing."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self._processor = open_processor(encoding.model)
        # A completion goes on in the middle of a text: no space is put before it, none taken away.
        vocabulary = read_sentencepiece(encoding.model)
        vocabulary = replace(vocabulary, add_space_prefix=False, remove_extra_whitespaces=False)
        self._following = open_processor(save_sentencepiece(vocabulary))

    def encode(self, pair: Pair) -> tuple[list[int], int]:
        """The tokens of a document, BOS … EOS, and how many of them, BOS too, are its prompt.

        Prompt and completion are encoded apart, as they are when a model continues a prompt. A
        plain text has no prompt: 0.
        """
        bos, eos = self.encoding.bos_id, self.encoding.eos_id
        if not pair.prompt:
            return [bos, *self._processor.encode(pair.completion), eos], 0
        prompt = [bos, *self._processor.encode(pair.prompt)]
        return [*prompt, *self._following.encode(pair.completion), eos], len(prompt)
