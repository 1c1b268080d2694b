"""``tinyllama eval``: how good a model is, on text it has not seen and on tasks."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from .loading import MODELS, add_model_options, open_model, progress_bar

if TYPE_CHECKING:
    from ..data.documents import Documents
    from ..model import Model

DESCRIPTION = """\
With --text: score every token of every document, ends included, given all before it: nats per
token, and bits per byte, which compare models with different tokenizers. With --tasks: run tasks
of lm-evaluation-harness (extra eval) on the native engine.

"""
EPILOG = """\
examples:
  tinyllama eval model.gguf --text held_out.txt
  tinyllama eval model.gguf --tasks arc_easy,hellaswag --limit 200
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``eval``."""
    parser = subparsers.add_parser(
        "eval",
        help="measure a model on text and tasks",
        description=DESCRIPTION + MODELS,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="the model to measure")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text",
        metavar="FILE",
        help="documents, in any form that `tinyllama data prepare` reads; in a .txt a line"
        " <|endoftext|> separates them",
    )
    text.add_argument("--field", help="the field of each record that holds the text")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness")
    tasks.add_argument("--tasks", metavar="NAME,…", help="names as `lm-eval ls tasks` lists them")
    tasks.add_argument("--task-folder", metavar="DIR", help="a folder with tasks of your own")
    tasks.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before a question (else the task's)"
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> None:
    if not args.text and not args.tasks:
        raise ArgumentError("there is nothing to measure on: give --text, --tasks or both")
    model = open_model(args.model, args)
    figures: dict[str, Any] = {"model": args.model}
    if args.text:
        figures |= {"text": args.text, **score_text(model, args)}
    if args.tasks:
        figures["tasks"] = score_tasks(model, args)
    if args.json:
        print(json.dumps(figures))
        return
    if args.text:
        print(
            "{bits_per_byte:.4f} bits per byte, {nats_per_token:.4f} nats per token\n"
            "{documents:,} documents, {bytes:,} bytes, {tokens:,} tokens,"
            " {tok_per_s:,.0f} tokens per second".format(**figures)
        )
    for task, scores in figures.get("tasks", {}).items():
        for metric, value in scores.items():
            error = scores.get(f"{metric}_stderr")
            if not metric.endswith("_stderr"):
                print(f"{task}  {metric} {value:.4f}" + (f" ± {error:.4f}" if error else ""))


def score_text(model: Model, args: argparse.Namespace) -> dict[str, float]:
    """The figures of ``--text``."""
    from ..data.documents import Documents
    from ..evaluate.perplexity import of_documents

    documents = Documents(args.text, field=args.field)
    seen = {"documents": 0, "bytes": 0}
    start = time.perf_counter()
    try:
        score = of_documents(model, _watched(documents, seen))
    except ArgumentError as error:
        raise ArgumentError(f"{args.text}: {error}") from None
    seconds = time.perf_counter() - start
    return {
        "nats_per_token": score.nats_per_token,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.n_tokens,
        **seen,
        "tok_per_s": score.n_tokens / seconds,
    }


def score_tasks(model: Model, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The figures of ``--tasks``: by task and metric, each with its standard error."""
    from ..evaluate.harness import evaluate

    results = evaluate(
        model,
        args.tasks.split(","),
        folder=args.task_folder,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
    )
    # The harness names a metric with the filter that its answers went through: "acc,none".
    return {
        task: {
            name.replace(",none", ""): value
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and "," in name
        }
        for task, metrics in results["results"].items()
    }


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
