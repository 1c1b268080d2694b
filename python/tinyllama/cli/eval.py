"""``tinyllama eval``: how good a model is, on text it has not seen and by the stories it tells."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..files import check_place
from .loading import MODELS, add_model_options, open_model, progress_bar

if TYPE_CHECKING:
    from ..data.documents import Documents
    from ..evaluate.prompts import Prompts
    from ..generation import Completion
    from ..model import Model
    from ..sampling import SamplingParams

DESCRIPTION = """\
Measure a model in one way or several at once.

--text scores every token of every document, ends included, given all before it: nats per token,
and bits per byte, which compare models with different tokenizers.

--stories lets it continue beginnings of stories and measures what it tells: how often it ends, how
much it repeats, how varied it is, what it copies from --train-text, and which of two continuations
it finds likelier in small questions. With --judge another model grades the stories.

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
        help="documents, in any form that `tinyllama data prepare` reads; in a .txt a line"
        " <|endoftext|> separates them",
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
        results["text"] = _text(model, args)
    if args.stories:
        results["stories"] = _stories(model, args)
    if args.tasks:
        results["tasks"] = _tasks(model, args)
    if args.report:
        from ..evaluate.page import write_page

        write_page(args.report, results)
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
    if args.judge and not args.judge_model:
        raise ArgumentError("--judge and --judge-model belong together")
    if (args.price_in is None) != (args.price_out is None):
        raise ArgumentError("--price-in and --price-out belong together")
    for name in ("max_prompts", "completions", "repeat", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    for inputs in (args.text, args.cut, args.train_text):
        if inputs:
            Documents(inputs)
    if args.report:
        check_place(args.report)
    if args.stories:
        _check_stories(args)


def _check_stories(args: argparse.Namespace) -> None:
    from ..evaluate.judge import Answers, ask
    from ..evaluate.overlap import overlaps
    from ..evaluate.prompts import read_prompts
    from ..evaluate.stories import measure

    _sampling(args)
    if args.prompts:
        read_prompts(args.prompts)
    measure([])  # of nothing: complains where a package is missing, as do the others
    if args.train_text:
        overlaps([], [])
    if args.judge:
        check_place(args.answers)
        ask([], Answers(args.answers), args.judge, {})


def _sampling(args: argparse.Namespace) -> SamplingParams:
    from ..sampling import SamplingParams

    return SamplingParams(
        temperature=args.temperature, seed=args.seed, num_return_sequences=args.completions
    )


def _print(results: dict[str, Any]) -> None:
    from ..evaluate.page import tables

    for number, table in enumerate(tables(results)):
        print("\n" * (number > 0) + str(table))
        if table.caption:
            print(f"  {table.caption}")


def _text(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """Bits per byte of ``--text``."""
    from ..data.documents import Documents
    from ..evaluate.perplexity import of_documents

    documents = Documents(args.text, field=args.field)
    seen = {"documents": 0, "bytes": 0}
    texts = (text for _, text in _watched(documents, seen, "scoring"))
    start = time.perf_counter()
    try:
        score = of_documents(model, texts)
    except ArgumentError as error:
        raise ArgumentError(f"{args.text}: {error}") from None
    return {
        "file": args.text,
        "nats_per_token": score.nats_per_token,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.n_tokens,
        **seen,
        "tok_per_s": score.n_tokens / (time.perf_counter() - start),
    }


def _stories(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """What the model tells when it is given beginnings, and the measures of that."""
    from ..evaluate.cloze import cloze
    from ..evaluate.stories import measure, tell

    params = _sampling(args)
    prompts = _prompts(model, args)
    scores = cloze(model)
    bar = progress_bar(len(prompts.texts) * args.completions, "telling")
    groups = tell(model, prompts.texts, params, lambda *_: bar is not None and bar.update())
    if bar is not None:
        bar.close()
    return {
        "settings": {
            "completions": args.completions,
            "temperature": args.temperature,
            "top_p": params.top_p,
            "seed": args.seed,
        },
        "rule": prompts.rule,
        "measures": asdict(measure(groups)),
        "cloze": {kind: asdict(score) for kind, score in scores.items()},
        "overlap": _overlap(groups, args) if args.train_text else None,
        "judge": _judge(prompts, groups, args) if args.judge else None,
        "prompts": list(prompts.texts),
        "completions": [
            [{"text": s.text, "finish_reason": s.finish_reason, "seed": s.seed} for s in group]
            for group in groups
        ],
    }


def _prompts(model: Model, args: argparse.Namespace) -> Prompts:
    from ..data.documents import Documents
    from ..evaluate.prompts import cut_documents, read_prompts, shipped

    if args.cut:
        prompts = cut_documents(model, Documents(args.cut, field=args.field), args.seed)
    else:
        prompts = read_prompts(args.prompts) if args.prompts else shipped()
    if args.max_prompts:
        prompts = prompts.some(args.max_prompts, args.seed)
    prompts.check(model)
    return prompts


def _overlap(groups: list[list[Completion]], args: argparse.Namespace) -> dict[str, Any]:
    """What the stories have in common with ``--train-text``."""
    from ..data.documents import Documents
    from ..evaluate.intervals import of_prompts
    from ..evaluate.overlap import overlaps
    from ..evaluate.page import N_COPIES

    seen = {"documents": 0, "bytes": 0}
    documents = _watched(Documents(args.train_text, field=args.field), seen, "comparing")
    found = overlaps([story.text for group in groups for story in group], documents)
    of_stories = [found[i : i + args.completions] for i in range(0, len(found), args.completions)]
    means = {
        name: of_prompts([[float(getattr(one, name)) for one in group] for group in of_stories])
        for name in ("copied", "rouge_2", "rouge_l")
    }
    longest = sorted(found, key=lambda one: -one.copied)[:N_COPIES]
    return {
        "files": args.train_text,
        **seen,
        **{name: estimate and asdict(estimate) for name, estimate in means.items()},
        "longest": [asdict(one) for one in longest],
    }


def _judge(
    prompts: Prompts, groups: list[list[Completion]], args: argparse.Namespace
) -> dict[str, Any]:
    """What the model behind ``--judge`` makes of the stories."""
    from ..evaluate.judge import INSTRUCTION, Answers, ask, grades, questions_of

    asked = questions_of(
        prompts.texts, groups, args.judge_model, args.judge_temperature, args.seed, args.repeat
    )
    questions = [question for group in asked for question in group]
    answers = Answers(args.answers)
    n_kept = sum(map(answers.settled, questions))
    facts = {"model": args.model, "rule": prompts.rule, "temperature_of_stories": args.temperature}
    bar = progress_bar(len(questions), "judging")
    try:
        ask(questions, answers, args.judge, facts, lambda: bar is not None and bar.update())
    finally:
        if bar is not None:
            bar.close()
    verdict = grades(asked, answers)
    priced = args.price_in is not None
    return {
        "model": args.judge_model,
        "temperature": args.judge_temperature,
        "seed": args.seed,
        "repeat": args.repeat,
        "rule": prompts.rule,
        "instruction": INSTRUCTION,
        "answers": args.answers,
        "n_asked_now": len(questions) - n_kept,
        **asdict(verdict),
        "estimated_cost": verdict.cost(args.price_in, args.price_out) if priced else None,
    }


def _tasks(model: Model, args: argparse.Namespace) -> dict[str, dict[str, float]]:
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


def _watched(documents: Documents, seen: dict[str, int], what: str) -> Iterator[tuple[str, str]]:
    """The documents that are not empty, counted in ``seen``, with a bar on stderr on a terminal."""
    bar = progress_bar(documents.size, what, unit="B", unit_scale=True)
    for where, text in documents:
        if text:
            yield where, text
            seen["documents"] += 1
            seen["bytes"] += len(text.encode())
        if bar is not None:
            bar.update(documents.position - bar.n)
    if bar is not None:
        bar.close()
