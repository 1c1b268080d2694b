"""``tinyllama generate``: continue a text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from ..data.documents import SEPARATOR
from ..errors import ArgumentError
from ..generation import MAX_LIVE, Completion
from ..sampling import SamplingParams
from .loading import MODELS, add_model_options, open_model, progress_bar

if TYPE_CHECKING:
    from ..model import Model

EPILOG = """\
examples:
  tinyllama generate "Once upon a time"
  tinyllama generate "Tom had a red ball." --temperature 0.8 --seed 7
  echo "Once upon a time" | tinyllama generate -
  tinyllama generate "The cat" -m model.gguf --num-return-sequences 3 --stop "." --json
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``generate``."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text, or tell one from nothing, until the model ends it. Between\n"
        f"several texts (--num-return-sequences) stands a line {SEPARATOR}, as\n"
        "`tinyllama data` and `tinyllama tokenizer train` read them.\n\n" + MODELS,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        default="",
        help="the text to continue; - reads it from standard input, less a final line break",
    )
    parser.add_argument("-m", "--model", help="default: the model that ships with the package")
    add_sampling_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        action="store_true",
        help="one JSON object per continuation: prompt, text, tokens, finish_reason, seed, usage",
    )
    output.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="with --json: the log-probability of every token, and the N likeliest in its place",
    )
    output.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print while it is made (default: on a terminal)",
    )
    add_model_options(parser)
    parser.set_defaults(handler=run)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of SamplingParams, with its default and its help."""
    group = parser.add_argument_group("sampling")
    for option in dataclasses.fields(SamplingParams):
        flag = "--" + option.name.replace("_", "-")
        text = option.metadata["help"].replace("%", "%%")
        if option.name in ("stop", "choices"):
            group.add_argument(
                flag, action="append", metavar="TEXT", help=text + " (may be given several times)"
            )
        elif option.name == "logit_bias":
            group.add_argument(flag, action="append", type=bias, metavar="ID=NUMBER", help=text)
        elif option.name == "return_full_text":
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                help="print the prompt before its continuation (default: yes, but not with --json)",
            )
        elif "choices" in option.metadata:
            choices = option.metadata["choices"]
            text += f" (default: {option.default})"
            group.add_argument(flag, choices=choices, default=option.default, help=text)
        else:
            kind = option.metadata["kind"]
            if option.default is not None:
                text += f" (default: {option.default:g})"
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            group.add_argument(flag, type=kind, default=option.default, metavar=metavar, help=text)


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The options of :func:`add_sampling_options` as SamplingParams."""
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(SamplingParams)}
    if values["logit_bias"] is not None:
        values["logit_bias"] = dict(values["logit_bias"])
    if values["return_full_text"] is None:
        values["return_full_text"] = not args.json
    return SamplingParams(**values)


def bias(text: str) -> tuple[int, float]:
    token, _, number = text.partition("=")
    return int(token), float(number)  # argparse reports a ValueError with the option's name


def run(args: argparse.Namespace) -> None:
    params = sampling_params(args)
    if args.logprobs is not None and not args.json:
        raise ArgumentError("--logprobs needs --json")
    if args.stream and (args.json or params.num_return_sequences > 1):
        raise ArgumentError("--stream prints one text as it is made: not --json, not several")
    streamed = args.stream
    if streamed is None:
        streamed = sys.stdout.isatty() and not args.json and params.num_return_sequences == 1
    if args.prompt == "-":
        args.prompt = _read_prompt()
    model = open_model(args.model, args)
    if streamed:
        try:
            for piece in model.stream(args.prompt, params=params):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            raise
        print()
        return
    _print_completions(model, args, params)


def _read_prompt() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"the prompt on standard input: {error}") from None


def _print_completions(model: Model, args: argparse.Namespace, params: SamplingParams) -> None:
    """Each text as soon as it and those before it have ended, so that an interrupt loses little."""
    n, n_printed = params.num_return_sequences, 0
    ready: dict[int, Completion] = {}
    bar = progress_bar(n, "texts") if n > MAX_LIVE and not sys.stdout.isatty() else None
    before = args.prompt if params.return_full_text else ""
    utf8 = (sys.stdout.encoding or "").lower() == "utf-8"  # JSON has its own escapes for the rest

    def show(_: int, j: int, completion: Completion) -> None:
        nonlocal n_printed
        ready[j] = completion
        while n_printed in ready:
            following = ready.pop(n_printed)
            text = before + following.text
            if args.json:
                record = _record(args.prompt, dataclasses.replace(following, text=text))
                print(json.dumps(record, ensure_ascii=not utf8), flush=True)
            else:
                print(f"{SEPARATOR}\n" * (n_printed > 0) + text, flush=True)
            n_printed += 1
        if bar is not None:
            bar.update()

    model.complete([args.prompt], args.logprobs, params=params, on_done=show)
    if bar is not None:
        bar.close()


def _record(prompt: str, completion: Completion) -> dict[str, Any]:
    """A Completion as a JSON object; ``logprobs`` and ``choices`` only when they were asked for."""
    record = {"prompt": prompt, **dataclasses.asdict(completion)}
    record["usage"]["total_tokens"] = completion.usage.total_tokens
    for name in ("logprobs", "choices"):
        if record[name] is None:
            del record[name]
    return record
