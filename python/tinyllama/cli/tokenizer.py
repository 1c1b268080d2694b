"""``tinyllama tokenizer``: train a tokenizer, and see what it makes of a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .data import INPUTS, add_input_arguments

if TYPE_CHECKING:
    from ..formats.checkpoint import Vocabulary
    from ..model import Tokenizer


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``tokenizer`` with its verbs ``train`` and ``show``."""
    parser = subparsers.add_parser(
        "tokenizer",
        help="train a tokenizer, or look at one",
        description="Train a tokenizer, or see how one cuts a text.",
    )
    parser.set_defaults(handler=lambda args: parser.print_help())
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    _register_train(verbs)
    _register_show(verbs)


def _register_train(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "train",
        help="train a SentencePiece BPE tokenizer on one's own text",
        description="Train a SentencePiece BPE tokenizer of Llama's kind, readable by\n"
        "sentencepiece, transformers and llama.cpp. A small vocabulary (2,000 to 4,000) suits\n"
        "a small model: its embedding is most of a tiny Llama's weights.\n\n" + INPUTS,
        epilog="example:\n  tinyllama tokenizer train text.txt --vocab-size 3000 --out tok.model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        help="number of tokens: 261 (5 without byte tokens) to 1048576, 2,000 to 4,000 as a rule",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE.model",
        help="the file to write; its pieces and scores go into FILE.vocab, to be read by people",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        help="the most frequent characters that make up this share of the text get their own"
        " token; the rest is spelled in bytes (default: 0.9995, or less where that would take"
        " most of the vocabulary)",
    )
    parser.add_argument(
        "--sample-lines",
        type=int,
        default=1_000_000,
        help="learn from this many lines, drawn at random (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="for the draw (default: 0)")
    parser.add_argument(
        "--no-byte-fallback",
        action="store_true",
        help="no byte tokens: rare characters, and line breaks, become the unknown token",
    )
    parser.add_argument(
        "--no-split-digits", action="store_true", help="let tokens hold several digits"
    )
    parser.set_defaults(handler=run_train)


def _register_show(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "show",
        help="show the tokens of a text",
        description="Print the pieces a text is cut into, with their ids, and how many tokens\n"
        "a character and a byte cost. ▁ stands for a space.",
        epilog='examples:\n  tinyllama tokenizer show "Once upon a time"\n'
        '  tinyllama tokenizer show tok.model "Once upon a time"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "tokenizer",
        metavar="TOK",
        nargs="?",
        default="bundled",
        help="a .model file, a tokenizer.bin, or a model of any kind (default: `bundled`, the model"
        " that ships)",
    )
    parser.add_argument("text", metavar="TEXT")
    parser.set_defaults(handler=run_show)


def run_train(args: argparse.Namespace) -> None:
    from ..tokenizer import train

    vocabulary = train(
        args.inputs,
        args.out,
        args.vocab_size,
        character_coverage=args.character_coverage,
        byte_fallback=not args.no_byte_fallback,
        split_digits=not args.no_split_digits,
        sample_lines=args.sample_lines,
        seed=args.seed,
        field=args.field,
        separator=args.separator,
    )
    vocab = Path(args.out).with_suffix(".vocab")
    print(f"wrote {args.out} and {vocab}: {len(vocabulary):,} tokens")


def run_show(args: argparse.Namespace) -> None:
    from ..formats import read_vocabulary
    from ..loading import find_model

    vocabulary = read_vocabulary(find_model(args.tokenizer))
    tokens = _native(vocabulary).encode(args.text, bos=False)
    print(" ".join(f"{vocabulary.pieces[token]}:{token}" for token in tokens))
    n_characters, n_bytes = len(args.text), len(args.text.encode())
    print(
        f"{len(tokens)} tokens, {n_characters} characters, {n_bytes} bytes:"
        f" {len(tokens) / max(n_characters, 1):.3f} tokens per character,"
        f" {len(tokens) / max(n_bytes, 1):.3f} per byte"
    )


def _native(vocabulary: Vocabulary) -> Tokenizer:
    """The core's tokenizer, which lives in a model: the smallest there is carries this one."""
    import numpy as np

    from ..config import Config
    from ..formats.checkpoint import Checkpoint
    from ..formats.gguf import gguf_bytes
    from ..loading import load

    config = Config(dim=2, n_layers=1, n_heads=1, vocab_size=len(vocabulary), max_seq_len=1)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in config.tensor_shapes().items()}
    return load(gguf_bytes(Checkpoint(config, tensors, vocabulary))).tokenizer
