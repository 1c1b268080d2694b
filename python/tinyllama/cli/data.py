"""``tinyllama data``: look at text, mend it, and turn it into token shards."""

from __future__ import annotations

import argparse
import os

from ..data.documents import SEPARATOR

INPUTS = """\
Inputs are files, folders or globs: .txt (documents end at a line <|endoftext|>; without one
the file is one document), .jsonl, .json (a list of objects), .csv, .tsv and .parquet, each also
with .gz or .zst. Of folders and globs only these are read; a file named in full that ends in
something else is read as .txt. In records the text is --field, or else story, text or content;
records with prompt and completion are pairs, of which training learns the completions.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``data`` with its verbs ``check`` and ``prepare``."""
    parser = subparsers.add_parser(
        "data",
        help="look at text, mend it, turn it into tokens",
        description="Look at text, mend it, and turn it into token shards.",
    )
    parser.set_defaults(handler=lambda args: parser.print_help())
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    _register_check(verbs)
    _register_prepare(verbs)


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """INPUT…, --field and --separator, the same wherever text is read."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a file, folder or glob")
    parser.add_argument("--field", help="the field of each record that holds the text")
    parser.add_argument(
        "--separator",
        default=SEPARATOR,
        help="the line between two documents of a .txt file (default: %(default)s)",
    )


def _register_check(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "check",
        help="report damaged encoding, duplicates, empty and over-long documents",
        description="Look through text for damaged encoding (â€œ for “), duplicates, empty and\n"
        "over-long documents; with --repair, write the mended text.\n\n" + INPUTS,
        epilog="example:\n  tinyllama data check stories.txt --repair clean.txt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_input_arguments(parser)
    parser.add_argument("--repair", metavar="OUT", help="write the mended text to this .txt file")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=100_000,
        help="documents above this are over-long (default: %(default)s)",
    )
    parser.set_defaults(handler=run_check)


def _register_prepare(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "prepare",
        help="turn text into the token shards that training reads",
        description="Encode documents into memory-mapped token shards, each between begin and end\n"
        "of document, with a manifest and a validation split. A run that was stopped\n"
        "goes on where it was when started again.\n\n" + INPUTS,
        epilog="examples:\n  tinyllama data prepare clean.txt --tokenizer tok.model --out tokens\n"
        "  tinyllama data prepare pairs.jsonl --tokenizer bundled --out pairs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--instruct",
        action="store_true",
        help="texts are laid out as in TinyStories-Instruct: Words:, Features: and Summary: in any"
        " order, then Story:, to where it is the prompt of a pair",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="T",
        help="a .model file, or a model whose tokenizer to use (`bundled`: the one that ships)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--valid",
        action="append",
        metavar="INPUT",
        help="text to validate on, instead of a share of the inputs (may be repeated)",
    )
    held_out.add_argument(
        "--valid-fraction",
        type=float,
        default=0.01,
        help="share of the documents to validate on, chosen by a hash of their text"
        " (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="for the split (default: 0)")
    parser.add_argument(
        "--workers", type=int, default=None, help="processes (default: one per core)"
    )
    parser.set_defaults(handler=run_prepare)


def run_check(args: argparse.Namespace) -> None:
    from ..data.mending import FINDINGS, check

    report = check(
        args.inputs,
        repair=args.repair,
        max_bytes=args.max_bytes,
        field=args.field,
        separator=args.separator,
    )
    print(f"{report.documents:,} documents, {report.bytes:,} bytes")
    for key, (title, action) in FINDINGS.items():
        finding = report.findings[key]
        done = f"  ({action})" if args.repair and finding.count else ""
        print(f"{finding.count:>9,}  {title}{done}")
        for example in finding.examples:
            print(f"{'':11}{example}")
    if args.repair:
        print(
            f"wrote {args.repair}: {report.written_documents:,} documents,"
            f" {report.written_bytes:,} bytes"
        )


def run_prepare(args: argparse.Namespace) -> None:
    from ..data.shards import prepare
    from ..loading import find_model

    manifest = prepare(
        args.inputs,
        find_model(args.tokenizer),
        args.out,
        valid=args.valid,
        valid_fraction=args.valid_fraction,
        seed=args.seed,
        n_workers=(os.cpu_count() or 1) if args.workers is None else args.workers,
        field=args.field,
        separator=args.separator,
        instruct=args.instruct,
        progress=True,
    )
    for name, split in manifest["splits"].items():
        documents, tokens, n_bytes = split["documents"], split["tokens"], split["bytes"]
        rate = f", {n_bytes / tokens:.2f} bytes per token" if tokens else ""
        pairs = f"; {split['pairs']:,} are pairs" if "pairs" in split else ""
        print(f"{name}: {documents:,} documents, {tokens:,} tokens{rate}{pairs}")
    print(f"wrote {args.out}")
