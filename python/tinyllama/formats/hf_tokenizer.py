"""The tokenizer files of a Hugging Face folder, read and written as plain JSON.

``tokenizer.json`` describes a pipeline for the library `tokenizers`: a normaliser that turns
spaces into U+2581, byte-pair merges with byte fallback, a template that adds BOS. It says in
merges (pairs, in order) what SentencePiece says in scores (any pair that makes a piece).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from ..errors import FormatError
from .checkpoint import TokenType, Vocabulary
from .sentencepiece import load_sentencepiece, save_sentencepiece

SPACE = "\u2581"
# What merging may produce; the rest never comes out of text.
_MERGED = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)


def load_tokenizer(folder: Path, config_fields: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a folder: ``tokenizer.model`` where there is one, else ``tokenizer.json``,
    with the added tokens and the ids of the model's config.json.

    Raises FormatError when there is neither or it is not of SentencePiece's kind.
    """
    plain, rules = folder / "tokenizer.model", folder / "tokenizer.json"
    extra = folder / "tokenizer_config.json"
    settings = read_json(extra) if extra.is_file() else {}
    pipeline = read_json(rules) if rules.is_file() else {}
    with _laid_out(rules):
        if plain.is_file():
            vocabulary = load_sentencepiece(plain)
            vocabulary = _with_added(vocabulary, pipeline.get("added_tokens", []), str(rules))
        elif pipeline:
            vocabulary = _from_pipeline(pipeline, str(rules))
        else:
            raise FormatError(f"{folder}: neither tokenizer.model nor tokenizer.json is there")
    with _laid_out(extra):
        decoder = settings.get("added_tokens_decoder", {})
        added = [{"id": int(token), **entry} for token, entry in decoder.items()]
        vocabulary = _with_added(vocabulary, added, str(extra))
    changes: dict[str, Any] = {}
    for name in ("bos", "eos", "pad"):
        token = config_fields.get(f"{name}_token_id")
        if isinstance(token, list):  # several tokens may end a text; the first is the usual one
            token = token[0] if token else None
        borrowed = name == "pad" and token == vocabulary.unk_id  # see padding_id
        if isinstance(token, int) and token >= 0 and not borrowed:
            changes[f"{name}_id"] = token
    if isinstance(settings.get("add_bos_token"), bool):
        changes["add_bos"] = settings["add_bos_token"]
    try:
        return replace(vocabulary, **changes)
    except FormatError as error:
        raise FormatError(f"{folder / 'config.json'}: {error}") from None


def padding_id(vocabulary: Vocabulary) -> int | None:
    """The token that fills up batches in transformers, which refuses them without one.

    A vocabulary that has none lends its unknown token. EOS would do to generate, but training on
    leaves padding out of the loss, and such a model would forget how to end.
    """
    return vocabulary.unk_id if vocabulary.pad_id is None else vocabulary.pad_id


def tokenizer_files(vocabulary: Vocabulary, config: Config) -> dict[str, bytes]:
    """File name -> bytes of everything transformers and llama.cpp's converter look for."""
    special = {}
    ids = {
        "bos": vocabulary.bos_id,
        "eos": vocabulary.eos_id,
        "unk": vocabulary.unk_id,
        "pad": padding_id(vocabulary),
    }
    for name, token in ids.items():
        if token is not None:
            special[f"{name}_token"] = vocabulary.pieces[token]
    settings = {
        # The class that takes tokenizer.json as it is, in transformers 4 and 5.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # a text goes on at its end
        "model_input_names": ["input_ids", "attention_mask"],  # a Llama takes no token_type_ids
        "model_max_length": config.max_seq_len,
        **special,
    }
    files = {
        "tokenizer.json": _pipeline(vocabulary),
        "tokenizer_config.json": settings,
        "special_tokens_map.json": special,
    }
    data = {name: to_json(fields) for name, fields in files.items()}
    return {"tokenizer.model": save_sentencepiece(vocabulary)} | data


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises OSError, or FormatError when it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def to_json(fields: dict[str, Any]) -> bytes:
    """As transformers lays its files out."""
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def _laid_out(path: Path) -> Iterator[None]:
    """Make a FormatError that names ``path`` of what reading another layout than its own raises."""
    try:
        yield
    except FormatError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{path}: not laid out as such a file is: {error!r}") from None


def _with_added(vocabulary: Vocabulary, added: list[dict[str, Any]], source: str) -> Vocabulary:
    """Tokens that were added to a finished vocabulary: special ones never come out of text."""
    pieces, scores, types = (
        list(vocabulary.pieces),
        vocabulary.scores.tolist(),
        vocabulary.types.tolist(),
    )
    for entry in sorted(added, key=lambda entry: int(entry["id"])):
        token, content = int(entry["id"]), str(entry["content"])
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        if token > len(pieces) or token < 0:
            raise FormatError(f"{source}: added token {token} leaves a gap after {len(pieces)}")
        if token == len(pieces):
            pieces.append(content)
            scores.append(0.0)
            types.append(int(kind))
        elif pieces[token] != content:
            raise FormatError(
                f"{source}: token {token} is {pieces[token]!r} and added as {content!r}"
            )
        elif types[token] == TokenType.NORMAL:
            types[token] = int(kind)
    return replace(
        vocabulary,
        pieces=tuple(pieces),
        scores=np.array(scores, np.float32),
        types=np.array(types, np.int32),
    )


# --- tokenizer.json -> Vocabulary ---------------------------------------------------------------


def _from_pipeline(pipeline: dict[str, Any], source: str) -> Vocabulary:
    model = pipeline.get("model") or {}
    steps = [
        step
        for part in ("normalizer", "pre_tokenizer", "decoder")
        for step in _steps(pipeline.get(part))
    ]
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds:
        raise FormatError(
            f"{source}: a byte-level BPE tokenizer (as GPT-2's and Llama 3's) is not supported,"
            " only one of SentencePiece's kind"
        )
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise FormatError(f"{source}: model type is {model.get('type')!r}, only 'BPE' is supported")
    ids = model["vocab"]
    if sorted(ids.values()) != list(range(len(ids))):
        raise FormatError(f"{source}: the vocabulary's ids are not 0 to {len(ids) - 1}")
    pieces = tuple(sorted(ids, key=ids.__getitem__))
    types = np.full(len(pieces), TokenType.NORMAL, np.int32)
    if model.get("byte_fallback"):
        for byte in range(256):
            token = ids.get(f"<0x{byte:02X}>")
            if token is None:
                raise FormatError(f"{source}: byte_fallback is on, but <0x{byte:02X}> is missing")
            types[token] = TokenType.BYTE
    unk_id = ids.get(model.get("unk_token"))
    if unk_id is not None:
        types[unk_id] = TokenType.UNKNOWN
    vocabulary = Vocabulary(
        pieces,
        np.zeros(len(pieces), np.float32),
        types,
        bos_id=ids.get("<s>"),
        eos_id=ids.get("</s>"),
        unk_id=unk_id,
        add_bos=_adds_token(pipeline.get("post_processor")),
        **_spaces(pipeline, source),
    )
    vocabulary = _with_added(vocabulary, pipeline.get("added_tokens", []), source)
    scores = _scores(vocabulary, model["merges"], source)
    return replace(vocabulary, scores=scores)


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a pipeline's part, those of a sequence one by one."""
    if part is None:
        return
    for name in ("normalizers", "pretokenizers", "decoders", "processors"):
        if name in part:
            for step in part[name]:
                yield from _steps(step)
            return
    yield part


def _adds_token(part: dict[str, Any] | None) -> bool:
    return any(
        "SpecialToken" in item for step in _steps(part) for item in step.get("single", [])[:1]
    )


def _spaces(pipeline: dict[str, Any], source: str) -> dict[str, bool]:
    """How white space is treated: what the normaliser and the pre-tokeniser say."""
    prefix = escaped = collapse = False
    for step in _steps(pipeline.get("normalizer")):
        pattern = step.get("pattern", {})
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif step.get("type") == "Replace" and pattern == {"String": " "}:
            escaped = step.get("content") == SPACE
        elif step in _COLLAPSE:
            collapse = True
        else:
            raise FormatError(f"{source}: normalizer {step} is not of SentencePiece's kind")
    for step in _steps(pipeline.get("pre_tokenizer")):
        if step.get("type") != "Metaspace" or step.get("replacement") != SPACE:
            raise FormatError(
                f"{source}: pre_tokenizer {step.get('type')!r} is not of SentencePiece's kind"
            )
        escaped = True
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space") else "never")
        prefix = prefix or scheme != "never"
        vocab = pipeline["model"]["vocab"]
        if step.get("split", True) and any(SPACE in piece[1:] for piece in vocab):
            raise FormatError(f"{source}: pre_tokenizer splits at spaces, but some tokens hold one")
    if not escaped:
        raise FormatError(f"{source}: spaces do not become U+2581, as SentencePiece's kind has it")
    return {"add_space_prefix": prefix, "remove_extra_whitespaces": collapse}


def _scores(vocabulary: Vocabulary, merges: list[Any], source: str) -> np.ndarray:
    """Scores that merge in the order of ``merges``: minus the rank of the merge of each piece.

    Pieces whose merges are interleaved share one score. Raises FormatError when a pair of tokens
    that makes a token is not listed: SentencePiece would merge it, the file does not.
    """
    ids = {piece: token for token, piece in enumerate(vocabulary.pieces)}
    pairs = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges
    ]
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        product = "".join(pair)
        if len(pair) != 2 or product not in ids or not all(part in ids for part in pair):
            raise FormatError(f"{source}: merge {rank} ({pair}) is not of tokens into a token")
        first.setdefault(product, rank)
        last[product] = rank
    missing = set(_splits(vocabulary)) - set(pairs)
    if missing:
        left, right = min(missing)
        raise FormatError(
            f"{source}: {left!r} and {right!r} make a token but no merge lists them, so this is"
            " not a SentencePiece model's and would encode differently"
        )
    scores = np.zeros(len(vocabulary), np.float32)
    start, reach = 0, -1
    for product, rank in first.items():  # in order of rank
        if rank > reach:
            start = rank
        reach = max(reach, last[product])
        scores[ids[product]] = -start
    return scores


def _splits(vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    """Every pair of pieces that makes a piece, piece by piece in order of falling score."""
    ids = {
        piece: token
        for token, piece in enumerate(vocabulary.pieces)
        if vocabulary.types[token] in _MERGED
    }
    falling = sorted(ids, key=lambda piece: -vocabulary.scores[ids[piece]])
    for piece in falling:
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        yield from sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


# --- Vocabulary -> tokenizer.json ---------------------------------------------------------------


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


# What sentencepiece calls remove_extra_whitespaces, in its order: spaces at the front vanish, runs
# become one, then spaces at the end vanish, U+2581 from the text itself among them.
_COLLAPSE = [
    _replace({"Regex": r"\A +"}, ""),
    _replace({"Regex": " +"}, " "),
    _replace({"Regex": rf"[ {SPACE}]+\z"}, ""),
]


def _pipeline(vocabulary: Vocabulary) -> dict[str, Any]:
    has_bytes = bool((vocabulary.types == TokenType.BYTE).any())
    normalizers = list(_COLLAPSE) if vocabulary.remove_extra_whitespaces else []
    # A space put in front of a text stays there: transformers 5 decodes what goes on after a prompt
    # by itself, and would lose the space between the two.
    decoders = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if vocabulary.add_space_prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append(_replace({"String": " "}, SPACE))
    unk = None if vocabulary.unk_id is None else vocabulary.pieces[vocabulary.unk_id]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != TokenType.USER_DEFINED,
            }
            for token, (piece, kind) in enumerate(
                zip(vocabulary.pieces, vocabulary.types.tolist(), strict=True)
            )
            if kind in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": _template(vocabulary),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": has_bytes,
            "ignore_merges": False,
            "vocab": {piece: token for token, piece in enumerate(vocabulary.pieces)},
            "merges": [list(pair) for pair in _splits(vocabulary)],
        },
    }


def _template(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """The step that puts BOS before a text, where the vocabulary says so."""
    if not vocabulary.add_bos or vocabulary.bos_id is None:
        return None
    bos = vocabulary.pieces[vocabulary.bos_id]

    def item(kind: str, name: str, type_id: int) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": type_id}}

    single = [item("SpecialToken", bos, 0), item("Sequence", "A", 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, item("SpecialToken", bos, 1), item("Sequence", "B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}},
    }
