"""How good a model is while it trains: bits per byte of unseen documents, and a story it tells."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ConfigError
from ..words import first_words
from .batches import Split
from .distributed import Ranks
from .model import Llama

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

    Forward = Callable[[torch.Tensor], torch.Tensor]

ROWS = 16
# Of the documents that samples begin as: how many, and how much of each.
N_BEGINNINGS, BEGINNING_WORDS, BEGINNING_TOKENS = 3, 4, 100


class Validation(NamedTuple):
    """Score of a split: mean loss of a token, and total loss in bits over the text's bytes.

    ``standard_error`` is that of ``nats_per_token`` as a mean over documents drawn at random, whose
    tokens are not independent of each other; None of a single document.
    """

    nats_per_token: float
    standard_error: float | None
    bits_per_byte: float
    n_tokens: int


def validate(
    model: Llama,
    split: Split,
    forward: Forward | None = None,
    ranks: Ranks | None = None,
    room: int = 2**20,
) -> Validation:
    """Score every token after BOS, EOS too, of each document of ``split`` on its own; of pairs,
    those of the completion.

    bits per byte = total nats / ln 2 / UTF-8 bytes of the scored text. A document longer than
    the context is scored in windows that overlap by half, each token once, in the first window
    that has it. ``forward`` (default: the model) maps tokens (rows, n) to logits; it gets at most
    ``room`` tokens at once, or a document's. The ``ranks`` of a training share the work, and all
    get the score.

    Raises ConfigError when the split is empty.
    """
    if not len(split) or not split.n_bytes:
        raise ConfigError(f"{split.name}: there are no documents to validate on")
    forward = forward or model
    device = model.tok_embed.device
    pieces = sorted(_pieces(split, model.config.max_seq_len), key=lambda piece: len(piece[0]))
    ranks = ranks or Ranks(device)
    n_rows = max(1, min(ROWS, room // len(pieces[-1][0])))
    by_document, count = np.zeros(len(split)), 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        # As many passes on every rank: those that share tensors wait for one another.
        for start in range(0, len(pieces), n_rows * ranks.count):
            i = start + n_rows * ranks.rank
            rows = pieces[i : i + n_rows] or [(pieces[0][0], len(pieces[0][0]), 0)]
            width = max(len(tokens) for tokens, _, _ in rows)
            tokens = np.zeros((len(rows), width), np.int64)
            scored = np.zeros((len(rows), width - 1), bool)
            for row, (piece, first, _) in enumerate(rows):
                tokens[row, : len(piece)] = piece
                scored[row, first : len(piece) - 1] = True
            batch = torch.from_numpy(tokens).to(device)
            logits = forward(batch[:, :-1]).float()
            nats = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            by_row = nats.cpu().double().numpy().reshape(scored.shape).sum(1, where=scored)
            np.add.at(by_document, [document for _, _, document in rows], by_row)
            count += int(scored.sum())
    model.train(was_training)
    n_scored, *sums = ranks.sum(count, *by_document)
    total, by_document = sum(sums), np.array(sums)
    mean = total / n_scored
    error = _standard_error(
        by_document - mean * (split.length - np.maximum(1, split.prompt)), n_scored
    )
    return Validation(mean, error, total / math.log(2) / split.n_bytes, int(n_scored))


def _standard_error(deviations: np.ndarray, n_tokens: float) -> float | None:
    """Of a mean over tokens that come in whole documents: the one of a ratio of two sums.

    ``deviations`` (n_documents,): the loss of each less what the mean would make of its tokens.
    (Cochran, Sampling Techniques, 1977, chapter 6.)
    """
    n = len(deviations)
    if n < 2:
        return None
    return math.sqrt(n / (n - 1) * float((deviations**2).sum())) / n_tokens


def _pieces(split: Split, context: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """(tokens, index of the first to score among tokens[1:], document) of each window."""
    for i in range(len(split)):
        n_targets = int(split.length[i]) - 1
        begin, scored = 0, max(0, int(split.prompt[i]) - 1)
        while scored < n_targets:
            end = min(begin + context, n_targets)
            if end > scored:
                yield split.document(i, begin, end + 1), scored - begin, i
                scored = end
            begin = max(0, end - context // 2)


def beginnings(split: Split, tokenizer: SentencePieceProcessor) -> list[str]:
    """What samples begin with: of three documents across ``split`` the first words, or the prompt.

    All differ. Fewer where documents are few or have no words; always the same of the same text.
    """
    found: list[str] = []
    for part in range(N_BEGINNINGS):
        for i in range(len(split) * part // N_BEGINNINGS, len(split) * (part + 1) // N_BEGINNINGS):
            given = int(split.prompt[i])
            text = tokenizer.decode(split.document(i, 0, given or BEGINNING_TOKENS).tolist())
            text = text if given else first_words(text, BEGINNING_WORDS)
            if text.strip() and text not in found:
                found.append(text)
                break
    return found


def tell(
    model: Llama,
    tokenizer: SentencePieceProcessor,
    prompt: str,
    *,
    seed: int,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
) -> str:
    """Continue ``prompt`` by sampling, until EOS: text. Slow (no cache), and only for a look.

    Tokens that would break a character are never drawn, as in the runtime.
    """
    random = torch.Generator().manual_seed(seed)
    values = byte_values(tokenizer)
    begun = b""  # of a character
    tokens = [tokenizer.bos_id(), *tokenizer.encode(prompt)]
    room = model.config.max_seq_len - len(tokens)
    device = model.tok_embed.device
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for _ in range(min(max_new_tokens, room)):
            logits = model(torch.tensor([tokens], device=device))[0, -1].float().cpu()
            logits[torch.from_numpy(~goes_on(values, begun))] = -math.inf
            token = int(torch.multinomial((logits / temperature).softmax(0), 1, generator=random))
            if token == tokenizer.eos_id():
                break
            tokens.append(token)
            begun = begun + bytes([values[token]]) if values[token] >= 0 else b""
            if _is_whole(begun):
                begun = b""
    model.train(was_training)
    return str(tokenizer.decode(tokens[1 : len(tokens) - len(begun)]))


def byte_values(tokenizer: SentencePieceProcessor) -> np.ndarray:
    """Of each token that is a byte its value, -1 of the others: int (vocab_size,)."""
    ids = range(tokenizer.vocab_size())
    return np.array([int(tokenizer.id_to_piece(i)[1:-1], 16) if tokenizer.is_byte(i) else -1
                     for i in ids])  # fmt: skip


def goes_on(values: np.ndarray, begun: bytes) -> np.ndarray:
    """Which tokens may follow the first bytes of a character: bool (vocab_size,)."""
    allowed = np.array([_begins(begun + bytes([value])) for value in range(256)])
    return np.where(values >= 0, allowed[values], not begun)


def _begins(data: bytes) -> bool:
    """Whether ``data`` are the first bytes of text in UTF-8."""
    if data[:1] == b"\xed" and data[1:2] >= b"\xa0":  # halves of a pair, which Python lets begin
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def _is_whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
