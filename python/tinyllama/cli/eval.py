"""``tinyllama eval``: how good a model is, on text it has not seen and by the stories it tells."""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import datetime, timezone
from typing import Any

from ..errors import ArgumentError
from ..files import check_place
from ..report import check_page_place
from .loading import MODELS, add_model_options, open_model
from .measures import measure_text, run_tasks, story_sampling, tell_stories, text_documents

DESCRIPTION = """\
Measure a model in one way or several at once.

--text scores every token of every document, ends included, given all before it (where a document is
longer than the context, half a context of it or more): nats per token, and bits per byte, which
compare models with different tokenizers.

--stories lets it continue beginnings of stories and measures what it tells: how often it ends, how
much it repeats, how varied it is, what it copies from --train-text, and which of two continuations
it finds likelier in small questions. With --judge another model grades the stories. The beginnings
that ship and the questions are English; of another language, take --prompts or --cut.

--tasks runs tasks of lm-evaluation-harness on the native engine.

"""

EPILOG = """\
examples:
  tinyllama eval model.gguf --text held_out.txt
  tinyllama eval model.gguf --stories --train-text stories.txt --report report.html
  tinyllama eval model.gguf --stories --judge http://localhost:8000/v1 --judge-model NAME
  tinyllama eval model.gguf --tasks arc_easy,hellaswag --limit 200

The judge's replies are kept in a file; the same command asks only what is missing there. Its key,
if it needs one, is read from the environment: OPENAI_API_KEY.
"""


# What has to be asked for as well where an option is given.
NEEDS = {
    "stories": ("prompts", "cut", "max_prompts", "train_text", "judge"),
    "judge": ("judge_model", "price_in", "price_out"),
    "tasks": ("task_folder", "num_fewshot", "limit"),
}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``eval``."""
    parser = subparsers.add_parser(
        "eval",
        help="measure a model",
        description=DESCRIPTION + MODELS,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="the model to measure")
    modes = parser.add_argument_group("what to measure")
    modes.add_argument(
        "--text",
        metavar="FILE",
        help="documents, in any form that `tinyllama data prepare` reads (in a .txt a line"
        " <|endoftext|> separates them), or a folder that it wrote: those held out there",
    )
    modes.add_argument("--stories", action="store_true", help="the stories it tells")
    modes.add_argument("--tasks", metavar="NAME,…", help="tasks, as `lm-eval ls tasks` names them")
    parser.add_argument("--field", help="the field of each record that holds the text")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--report", metavar="FILE.html", help="write a page with all of it")
    _add_story_options(parser)
    _add_judge_options(parser)
    _add_task_options(parser)
    add_model_options(parser)
    parser.set_defaults(handler=run)


def _add_story_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --stories")
    sources = group.add_mutually_exclusive_group()
    sources.add_argument(
        "--prompts",
        metavar="FILE",
        help="beginnings: a .txt with one a line, or a list in a .json or .yaml (default: 40 that"
        " ship)",
    )
    sources.add_argument(
        "--cut",
        metavar="FILE",
        help="documents, as for --text; 40 to 60 %% of the words of each are a beginning",
    )
    group.add_argument("--max-prompts", type=int, metavar="N", help="take N of them, by --seed")
    group.add_argument(
        "--completions", type=int, default=3, metavar="N", help="of each prompt (default: 3)"
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="of the stories (default: 1)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    group.add_argument(
        "--train-text",
        nargs="+",
        metavar="FILE",
        help="what the model was trained on, as for --text: look for copies from it",
    )


def _add_judge_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a judge of the stories")
    group.add_argument("--judge", metavar="URL", help="an endpoint that speaks OpenAI's protocol")
    group.add_argument("--judge-model", metavar="NAME", help="the model to ask for there")
    group.add_argument(
        "--judge-temperature", type=float, default=0.0, metavar="X", help="(default: 0)"
    )
    group.add_argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="grade each story N times, which shows the judge's noise (default: 1)",
    )
    group.add_argument(
        "--answers",
        default="judge.jsonl",
        metavar="FILE",
        help="where replies are kept (default: judge.jsonl)",
    )
    group.add_argument("--price-in", type=float, metavar="X", help="of a million tokens read")
    group.add_argument("--price-out", type=float, metavar="X", help="of a million tokens written")


def _add_task_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --tasks")
    group.add_argument("--task-folder", metavar="DIR", help="a folder with tasks of your own")
    group.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before a question (else the task's)"
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N questions")


def run(args: argparse.Namespace) -> None:
    from .. import __version__

    _check(args)
    model = open_model(args.model, args)
    results: dict[str, Any] = {
        "model": args.model,
        "version": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if args.text:
        results["text"] = measure_text(model, args)
    if args.stories:
        results["stories"] = tell_stories(model, args)
    if args.tasks:
        results["tasks"] = run_tasks(model, args)
    if args.report:
        from ..evaluate.page import write_page

        write_page(args.report, results)
        print(f"wrote {args.report}", file=sys.stderr)
    if args.json:
        print(json.dumps(results))
    else:
        _print(results)


def _check(args: argparse.Namespace) -> None:
    """Complain of what can be seen to be wrong before any work."""
    from ..data.documents import Documents

    if not (args.text or args.stories or args.tasks):
        raise ArgumentError("nothing to measure: give --text, --stories or --tasks")
    for needed, names in NEEDS.items():
        for name in names:
            if getattr(args, name) is not None and not getattr(args, needed):
                raise ArgumentError(f"--{name.replace('_', '-')} needs --{needed}")
    if args.task_folder and not os.path.isdir(args.task_folder):
        raise ArgumentError(f"--task-folder {args.task_folder}: there is no such folder")
    if args.judge and not args.judge_model:
        raise ArgumentError("--judge and --judge-model belong together")
    if (args.price_in is None) != (args.price_out is None):
        raise ArgumentError("--price-in and --price-out belong together")
    for name in ("max_prompts", "completions", "repeat", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.text:
        text_documents(args)
    for inputs in (args.cut, args.train_text):
        if inputs:
            Documents(inputs)
    if args.report:
        check_page_place(args.report)
    if args.stories:
        _check_stories(args)


def _check_stories(args: argparse.Namespace) -> None:
    from ..evaluate.judge import Answers, ask
    from ..evaluate.overlap import overlaps
    from ..evaluate.prompts import read_prompts
    from ..evaluate.stories import measure

    story_sampling(args)
    if args.prompts:
        read_prompts(args.prompts)
    measure([])  # of nothing: complains where a package is missing, as do the others
    if args.train_text:
        overlaps([], [])
    if args.judge:
        check_place(args.answers)
        ask([], Answers(args.answers), args.judge, {})


def _print(results: dict[str, Any]) -> None:
    from ..evaluate.page import tables

    for number, table in enumerate(tables(results)):
        print("\n" * (number > 0) + str(table))
        if table.caption:
            print(f"  {table.caption}")
