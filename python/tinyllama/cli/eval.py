"""``tinyllama eval``: how good a model is, on text it has not seen."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import ArgumentError
from .loading import MODELS, add_model_options, open_model, progress_bar

if TYPE_CHECKING:
    from ..data.documents import Documents


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``eval``."""
    parser = subparsers.add_parser(
        "eval",
        help="measure a model on text",
        description="Score every token of every document, ends included, given all before it:\n"
        "nats per token, and bits per byte, which compare models with different tokenizers.\n\n"
        + MODELS,
        epilog="example:\n  tinyllama eval model.gguf --text held_out.txt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="the model to measure")
    parser.add_argument(
        "--text",
        metavar="FILE",
        required=True,
        help="documents, in any form that `tinyllama data prepare` reads; in a .txt a line"
        " <|endoftext|> separates them",
    )
    parser.add_argument("--field", help="the field of each record that holds the text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> None:
    from ..data.documents import Documents
    from ..evaluate.perplexity import of_documents

    documents = Documents(args.text, field=args.field)
    model = open_model(args.model, args)
    seen = {"documents": 0, "bytes": 0}
    start = time.perf_counter()
    try:
        score = of_documents(model, _watched(documents, seen))
    except ArgumentError as error:
        raise ArgumentError(f"{args.text}: {error}") from None
    seconds = time.perf_counter() - start
    figures = {
        "nats_per_token": score.nats_per_token,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.n_tokens,
        **seen,
        "tok_per_s": score.n_tokens / seconds,
    }
    if args.json:
        print(json.dumps({"model": args.model, "text": args.text, **figures}))
        return
    print(f"{score.bits_per_byte:.4f} bits per byte, {score.nats_per_token:.4f} nats per token")
    print(
        f"{seen['documents']:,} documents, {seen['bytes']:,} bytes, {score.n_tokens:,} tokens,"
        f" {figures['tok_per_s']:,.0f} tokens per second"
    )


def _watched(documents: Documents, seen: dict[str, int]) -> Iterator[str]:
    """The texts that are not empty, counted in ``seen``, with a bar on stderr on a terminal."""
    bar = progress_bar(documents.size, "scoring", unit="B", unit_scale=True)
    for _, text in documents:
        if text:
            yield text
            seen["documents"] += 1
            seen["bytes"] += len(text.encode())
        if bar is not None:
            bar.update(documents.position - bar.n)
    if bar is not None:
        bar.close()
