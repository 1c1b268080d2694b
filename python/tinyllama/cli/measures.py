"""What each mode of ``tinyllama eval`` finds out: the parts of its result, by the arguments."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from .loading import progress_bar

if TYPE_CHECKING:
    from ..data.documents import Documents, Pair
    from ..evaluate.prompts import Prompts
    from ..generation import Completion
    from ..model import Model
    from ..sampling import SamplingParams
    from ..train.batches import Texts


def measure_text(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """Bits per byte of ``--text``; of pairs of prompt and completion, of the completions."""
    from ..evaluate.perplexity import of_documents
    from ..train.batches import Texts

    documents = text_documents(args)
    seen = {"documents": 0, "pairs": 0, "bytes": 0}
    pairs = (pair for _, pair in _watched(documents, seen, "scoring"))
    start = time.perf_counter()
    try:
        score = of_documents(model, pairs)
    except ArgumentError as error:
        raise ArgumentError(f"{args.text}: {error}") from None
    if isinstance(documents, Texts) and documents.position != documents.size:
        print(
            f"tinyllama: {args.text}: of the {documents.size:,} bytes held out the tokens tell"
            f" {documents.position:,}: its tokenizer does not keep all of a text; name the file it"
            " is from to score it as it is",
            file=sys.stderr,
        )
    return {
        "file": args.text,
        "nats_per_token": score.nats_per_token,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.n_tokens,
        **seen,
        "tok_per_s": score.n_tokens / (time.perf_counter() - start),
    }


def text_documents(args: argparse.Namespace) -> Documents | Texts:
    """The documents of ``--text``."""
    from ..data.documents import Documents
    from ..formats.sentencepiece import open_processor
    from ..train.batches import Texts, TokenFolder

    if not (Path(args.text) / "manifest.json").exists():
        return Documents(args.text, field=args.field)
    folder = TokenFolder(args.text)
    texts = Texts(folder, open_processor(folder.tokenizer.read_bytes()))
    folder.check_files("valid")
    return texts


def story_sampling(args: argparse.Namespace) -> SamplingParams:
    from ..sampling import SamplingParams

    return SamplingParams(
        temperature=args.temperature, seed=args.seed, num_return_sequences=args.completions
    )


def tell_stories(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """What the model tells when it is given beginnings, and the measures of that."""
    from ..evaluate.cloze import cloze
    from ..evaluate.stories import measure, tell

    params = story_sampling(args)
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
        try:
            prompts = cut_documents(model, Documents(args.cut, field=args.field), args.seed)
        except ArgumentError as error:
            raise ArgumentError(f"--cut {args.cut}: {error}") from None
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

    seen = {"documents": 0, "pairs": 0, "bytes": 0}

    def whole() -> Iterator[tuple[str, str]]:
        documents = Documents(args.train_text, field=args.field)
        for where, pair in _watched(documents, seen, "comparing"):
            seen["bytes"] += len(pair.prompt.encode())
            yield where, "".join(pair)

    found = overlaps([story.text for group in groups for story in group], whole())
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


def run_tasks(model: Model, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of ``--tasks``: by task the metrics, each with its standard error, how many of
    its questions were asked, and behind how many examples."""
    from ..evaluate.harness import evaluate

    results = evaluate(
        model,
        args.tasks.split(","),
        folder=args.task_folder,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
    )
    return {
        task: _task(metrics, results["n-samples"].get(task), results["n-shot"].get(task))
        for task, metrics in results["results"].items()
    }


def _task(
    metrics: dict[str, Any], n_questions: dict[str, int] | None, shots: int | None
) -> dict[str, Any]:
    """A task's part of the result; of a group the harness counts neither questions nor shots."""
    found: dict[str, Any] = {}
    if n_questions is not None:
        found |= {"questions": n_questions["effective"], "of": n_questions["original"]}
    if shots is not None:
        found["shots"] = shots
    # The harness names a metric with the filter that its answers went through: "acc,none".
    found["metrics"] = {
        name.replace(",none", ""): value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and "," in name
    }
    return found


def _watched(
    documents: Documents | Texts, seen: dict[str, int], what: str
) -> Iterator[tuple[str, Pair]]:
    """The documents that are not empty, counted in ``seen``, with a bar on stderr on a terminal."""
    bar = progress_bar(documents.size, what, unit="B", unit_scale=True)
    for where, pair in documents.pairs():
        if pair.completion:
            yield where, pair
            seen["documents"] += 1
            seen["pairs"] += bool(pair.prompt)
            seen["bytes"] += len(pair.completion.encode())
        if bar is not None:
            bar.update(documents.position - bar.n)
    if bar is not None:
        bar.close()
