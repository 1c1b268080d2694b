"""``tinyllama data``: look at text, mend it, and turn it into token shards."""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from ..data.documents import ENCODINGS, SEPARATOR
from ..errors import ArgumentError
from ..report import check_page_place

if TYPE_CHECKING:
    from ..data.checking import Report

# What is spelled in bytes has 1, Chinese by 3,000 tokens of its own 2.7.
POOR_BYTES_PER_TOKEN = 1.5
FEW_DOCUMENTS = 20

INPUTS = """\
Inputs are files, folders or globs: .txt (documents end at a line <|endoftext|>; without one
the file is one document), .jsonl, .json (a list of objects), .csv, .tsv and .parquet, each also
with .gz or .zst. Of folders and globs only these are read; a file named in full that ends in
something else is read as .txt. In records the text is --field, or else story, text or content;
records with prompt and completion are pairs, of which training learns the completions.

hf:OWNER/NAME is a data set of the Hugging Face Hub, streamed (extra data); config, split (train
unless named) and revision follow after commas: hf:roneneldan/TinyStories,split=validation. In
place of OWNER/NAME may stand a folder that the package datasets reads.

NAME=INPUT gives a source a name, and several inputs may share one; without it, it is "text".
A path that begins like that is written ./NAME=…
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
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a file, folder, glob or hf:…")
    parser.add_argument("--field", help="the field of each record that holds the text")
    parser.add_argument(
        "--separator",
        default=SEPARATOR,
        help="the line between two documents of a .txt file (default: %(default)s)",
    )


def _register_check(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "check",
        help="count text, report damaged encoding, duplicates, empty and over-long documents",
        description="Count text, and look through it for damaged encoding (â€œ for “),\n"
        "duplicates, empty and over-long documents; with --repair, write the mended text.\n"
        "Of two documents that are alike, the first stays.\n\n" + INPUTS,
        epilog="examples:\n  tinyllama data check stories.txt --repair clean.txt\n"
        "  tinyllama data check held_out=valid.txt stories=train.txt --near 0.8 --repair clean\n"
        "  tinyllama data check old.txt --encoding windows-1252 --repair clean.txt\n"
        "  tinyllama data check clean.txt --tokenizer tok.model --report text.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--encoding",
        metavar="E",
        help=f"the encoding of all inputs, where it is not UTF-8: {ENCODINGS}, utf-16, …; the"
        " repaired text is UTF-8. Files of several encodings take a command for each",
    )
    parser.add_argument(
        "--repair",
        metavar="OUT",
        help="write the mended text to this .txt file, or each source's to a .txt file of its name"
        " in this new folder",
    )
    parser.add_argument(
        "--near",
        type=float,
        metavar="J",
        help="look for near duplicates: of the runs of five words in two documents, they share"
        " this part or more, 0.5 to 1 (extra data; 2 KB of memory a document, and a temporary"
        " copy of the text)",
    )
    parser.add_argument(
        "--tokenizer", metavar="T", help="count tokens: a .model file, or a model (`bundled`)"
    )
    parser.add_argument("--report", metavar="FILE.html", help="write the report as a page too")
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
        "goes on where it was when started again. Training mixes the sources by weight:\n"
        "tinyllama train … --set weights.NAME=3 (see its --help).\n\n" + INPUTS,
        epilog="examples:\n  tinyllama data prepare clean.txt --tokenizer tok.model --out tokens\n"
        "  tinyllama data prepare stories=clean.txt books=books/ books=hf:owner/books \\\n"
        "      --valid held_out.txt --tokenizer tok.model --out tokens\n"
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
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="the folder to write, a new one"
    )
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--valid",
        action="append",
        metavar="INPUT",
        help="text to validate on, instead of a share of the inputs (may be repeated); documents"
        " that it has too are not trained on",
    )
    held_out.add_argument(
        "--valid-fraction",
        type=float,
        default=0.01,
        help="share of the documents to validate on, chosen by a hash of their text; of few, one"
        " (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="for the split (default: 0)")
    parser.add_argument(
        "--workers", type=int, default=None, help="processes (default: one per core)"
    )
    parser.set_defaults(handler=run_prepare)


def run_check(args: argparse.Namespace) -> None:
    from ..data.checking import check
    from ..loading import find_model

    if args.report:
        check_page_place(args.report)
    report = check(
        args.inputs,
        repair=args.repair,
        near=args.near,
        tokenizer=args.tokenizer and find_model(args.tokenizer),
        max_bytes=args.max_bytes,
        field=args.field,
        separator=args.separator,
        encoding=args.encoding,
        progress=True,
    )
    _print_report(report, repaired=bool(args.repair))
    if args.repair:
        print(f"wrote {args.repair}")
    if args.report:
        from ..data.page import report_page

        report_page(report).write(args.report)
        print(f"wrote {args.report}")
    if not report.total.kept.documents:
        raise ArgumentError(f"{', '.join(args.inputs)}: there is no text")


def _print_report(report: Report, repaired: bool) -> None:
    from ..data.checking import FINDINGS, LENGTHS

    for name, source in report.rows:
        kept = source.kept
        print(
            f"{name}: {source.documents:,} documents, {source.bytes:,} bytes; kept"
            f" {kept.documents:,}, {kept.bytes:,} bytes, {kept.characters:,} characters"
        )
        if kept.tokens:
            print(
                f"{'':11}{kept.tokens:,} tokens, {kept.bytes / kept.tokens:.3f} bytes per token,"
                f" {kept.unknown / kept.tokens:.3%} unknown,"
                f" {kept.byte_tokens / kept.tokens:.3%} single bytes"
            )
    total = report.total
    lengths = (f"{title} {total.kept.length(share):,}" for title, share in LENGTHS.items())
    print(f"bytes of a document: {', '.join(lengths)}")
    for key, finding in total.findings.items():
        title, action = FINDINGS[key]
        done = f"  ({action})" if repaired else f"  (in a repair: {action})"
        done = done if finding.count else ""
        print(f"{finding.count:>9,}  {title}{done}")
        for example in finding.examples:
            print(f"{'':11}{example}")


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
        sources = split["sources"] if len(split["sources"]) > 1 else []
        for count in (split, *sources):
            title = f"  {count['name']}" if "name" in count else name
            tokens = count["tokens"]
            rate = f", {count['bytes'] / tokens:.2f} bytes per token" if tokens else ""
            pairs = f"; {count['pairs']:,} are pairs" if "pairs" in count else ""
            print(f"{title}: {count['documents']:,} documents, {tokens:,} tokens{rate}{pairs}")
    if manifest["left_out"]:
        print(f"left out of train: {manifest['left_out']:,} documents that valid has")
    if manifest["empty"]:
        print(f"left out: {manifest['empty']:,} documents, empty or pairs without a completion")
    _hint_at_tokenizer(manifest)
    _hint_at_validation(manifest)
    print(f"wrote {args.out}")


def _hint_at_validation(manifest: dict[str, Any]) -> None:
    """Say so where a score would hang on few of many documents."""
    splits = manifest["splits"]
    valid = splits["valid"]["documents"] if "valid" in splits else 0
    n_documents = valid + splits["train"]["documents"]
    if 0 < valid < FEW_DOCUMENTS < n_documents / 2:
        share = math.ceil(100 * FEW_DOCUMENTS / n_documents) / 100
        more = (
            f"--valid-fraction {share:g} holds out more"
            if share <= 0.2
            else "the text has few in all"
        )
        print(f"tinyllama: scores will hang on {valid} held-out documents; {more}", file=sys.stderr)


def _hint_at_tokenizer(manifest: dict[str, Any]) -> None:
    """Say so where the tokenizer has hardly more than single bytes for a source."""
    for source in manifest["splits"]["train"]["sources"]:
        n_tokens = source["tokens"] - 2 * source["documents"]  # without begin and end
        if source["bytes"] < POOR_BYTES_PER_TOKEN * n_tokens:
            print(
                f"tinyllama: {source['name']}: only {source['bytes'] / n_tokens:.2f} bytes per"
                " token: the tokenizer hardly knows this language or script; make one of this text"
                " with `tinyllama tokenizer train`",
                file=sys.stderr,
            )
