"""``tinyllama tokenizer``: train a tokenizer, and see what it makes of a text."""

from __future__ import annotations

import argparse

from .data import INPUTS, add_input_arguments


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``tokenizer`` with its verbs ``train`` and ``show``."""
    parser = subparsers.add_parser(
        "tokenizer",
        help="train a tokenizer, or look at one",
        description="Train a tokenizer, or see how one cuts a text.",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
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
    parser.add_argument("--vocab-size", type=int, required=True, help="number of tokens")
    parser.add_argument("--out", required=True, metavar="FILE.model", help="the file to write")
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
        epilog='example:\n  tinyllama tokenizer show tok.model "Once upon a time"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tokenizer", metavar="TOK", help="a SentencePiece .model file")
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
    print(f"wrote {args.out}: {len(vocabulary):,} tokens")


def run_show(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..tokenizer import open_processor, read_sentencepiece

    model = Path(args.tokenizer).read_bytes()
    vocabulary = read_sentencepiece(model, source=args.tokenizer)
    tokens = open_processor(model).encode(args.text)
    print(" ".join(f"{vocabulary.pieces[token]}:{token}" for token in tokens))
    n_characters, n_bytes = len(args.text), len(args.text.encode())
    print(
        f"{len(tokens)} tokens, {n_characters} characters, {n_bytes} bytes:"
        f" {len(tokens) / max(n_characters, 1):.3f} tokens per character,"
        f" {len(tokens) / max(n_bytes, 1):.3f} per byte"
    )
