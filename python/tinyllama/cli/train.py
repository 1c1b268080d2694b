"""``tinyllama train``."""

from __future__ import annotations

import argparse
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArgumentError, MissingExtraError
from ..report import check_page_place

if TYPE_CHECKING:
    from ..train.recipe import Recipe

EPILOG = """\
A recipe is a preset, a TOML file, chosen for a --size, or for going on --from a trained model;
--set changes single values of it. DATA is a folder made by `tinyllama data prepare`; of pairs of
prompt and completion only the completions are learned. Below RUN come checkpoints (Hugging Face
directories step-…, the last two and the best kept), metrics.jsonl and report.html, a page with
curves, samples and scores that is renewed at validations, once a minute at most.

mfu in the progress bar is the share that the model's FLOPs have of the matrix products that this
machine can do, as measured at the start (PaLM, arXiv 2204.02311, appendix B).

Where DATA has several sources, weights mix them: --set weights.NAME=3 sees each of its documents
three times in an epoch, 0.5 half of them (the same in each), 0 none; 1 is the default. Validation
text is never weighted.

Ctrl-C, or SIGTERM, saves and stops; the same command then goes on exactly where it was.

examples:
  tinyllama train --preset stories1m --data tokens --out run
  tinyllama train --size 3M --data tokens --out run
  tinyllama train --preset stories15m --set batch_size=32 --data tokens --out run
  tinyllama train --size 3M --set weights.stories=3 --data tokens --out run
  tinyllama train --config my.toml --data tokens --out run
  tinyllama train --from bundled --data pairs --out tuned
  tinyllama train --resume --data tokens --out run
  tinyllama train --preset ttl-160m --data tokens --out run --energy BRA --tensorboard
  tinyllama train compare run other_run --out compare.html

on four devices of this machine, or processes where there is no GPU; on several machines with the
arguments of torchrun (--nnodes, --rdzv-endpoint) and folders that all of them see:
  torchrun --nproc-per-node 4 -m tinyllama.train --preset stories110m --data tokens --out run
  torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
      -m tinyllama.train --preset stories110m --data tokens --out run     (on each of two machines)
They share each step's batch_size × grad_accum windows evenly; --set parallel=fsdp shares the
weights too. What was stopped goes on on any other number of them.
Ctrl-C saves and stops here as well; torchrun then prints a traceback of its own.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    from ..train.recipe import preset_names

    published = [name for name in preset_names() if not name.startswith("bundled_")]
    parser = subparsers.add_parser(
        "train",
        help="train a model from a recipe and prepared tokens",
        usage="tinyllama train (--preset NAME | --size N | --from MODEL | --config FILE | --resume)"
        "\n                       --data DIR --out RUN [options]\n"
        "       tinyllama train report RUN\n"
        "       tinyllama train compare RUN RUN ... [--out FILE.html]",
        description="Train a Llama on prepared tokens.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(
        title="verbs for runs that are there", metavar="VERB", prog="tinyllama train"
    )
    _register_report(verbs)
    _register_compare(verbs)
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument(
        "--preset",
        metavar="NAME",
        help=f"a recipe of this package, named for its parameters: {', '.join(published)}",
    )
    recipe.add_argument(
        "--size",
        metavar="N",
        help="about so many parameters, such as 3M: shape, steps and learning rate are chosen",
    )
    recipe.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        help="fine-tune a run, a .gguf file, a Hugging Face folder, or `bundled`, the model that"
        " ships; DATA has to be prepared with its tokenizer",
    )
    recipe.add_argument("--config", metavar="FILE", help="a recipe as a TOML file")
    recipe.add_argument("--resume", action="store_true", help="the recipe of the run in RUN itself")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="the recipe's [fast] values, which learn the same from fewer tokens",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one value of the recipe, e.g. steps=500 or model.n_layers=4; repeatable;"
        " docs/recipes.md lists the keys",
    )
    parser.add_argument("--data", metavar="DIR", help="prepared token folder")
    parser.add_argument("--out", metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write event files into RUN/tensorboard too (extra tensorboard)",
    )
    parser.add_argument(
        "--energy",
        metavar="COUNTRY",
        help="estimate energy, and CO2 equivalent by the electricity of a country: three letters,"
        " such as BRA, or world for the average (extra energy)",
    )
    parser.set_defaults(handler=train)


def _register_report(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "report",
        help="write the page of a run, ended or under way",
        description="Write a run's page from its metrics: curves, samples, scores, energy.",
        epilog="example:\n  tinyllama train report run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.set_defaults(handler=report)


def _register_compare(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "compare",
        help="lay runs over each other",
        description="Compare runs: their bits per byte, and the tokens and the time that each\n"
        "took to those that all of them reached.",
        epilog="example:\n  tinyllama train compare run other_run --out compare.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", metavar="FILE.html", help="write the curves as a page")
    parser.set_defaults(handler=compare)


def train(args: argparse.Namespace) -> int:
    """Train, or go on with a run that was stopped."""
    from ..train.recipe import load_preset, load_recipe, recipe_from_dict

    # Not left to argparse, which would ask the verbs for them as well.
    if not (args.preset or args.size or args.config or args.start or args.resume):
        raise ArgumentError("train needs one of --preset, --size, --from, --config and --resume")
    if args.fast and not (args.preset or args.config):
        raise ArgumentError("--fast takes the [fast] section of a --preset or a --config")
    if not (args.data and args.out):
        raise ArgumentError("train needs --data and --out")
    if find_spec("torch") is None:  # said before anything is looked for
        raise MissingExtraError("torch", "train")
    settings = [*args.set]
    if args.tensorboard:
        settings.append("tensorboard=true")
    if args.energy:
        settings.append(f"energy={args.energy}")
    source = _source(args)
    if args.preset:
        recipe = load_preset(args.preset, settings, args.fast)
    elif args.config:
        recipe = load_recipe(args.config, settings, args.fast)
    elif args.start:
        from ..train.checkpoint import read_start
        from ..train.sizing import tuned_recipe

        values = tuned_recipe(read_start(args.start).config, args.start).to_dict()
        recipe = recipe_from_dict(values, source, settings)
    elif args.size:
        from ..train.batches import TokenFolder, mixture
        from ..train.sizing import parse_size, sized_recipe

        folder, size = TokenFolder(args.data), parse_size(args.size)
        split = folder.split("train")

        def sized(n_tokens: int, steps: int = 0) -> Recipe:
            values = sized_recipe(size, folder.vocab_size, n_tokens, steps).to_dict()
            return recipe_from_dict(values, source, settings)

        # What is set counts for what is chosen: weights for the text, steps for what is due when.
        recipe = sized(split.n_tokens)
        documents = mixture(split, recipe.weights, recipe.seed)
        recipe = sized(n_tokens := int(split.length[documents].sum()))
        if not recipe.epochs:
            recipe = sized(n_tokens, recipe.steps)
    else:
        from ..train.checkpoint import find_checkpoint, load_state

        previous = find_checkpoint(args.out)
        file = str(previous / "trainer.json")
        recipe = recipe_from_dict(load_state(previous).recipe, file, settings)
    from ..train.trainer import Trainer

    trainer = Trainer(recipe, args.data, args.out, source)
    checkpoint = trainer.train()
    done = trainer.state.step == trainer.recipe.steps
    if trainer.ranks.is_first:
        print(checkpoint)
        if done:
            run = shlex.quote(args.out)
            print(f"next: tinyllama export {run} --out model.gguf", file=sys.stderr)
    return 0 if done else 130


def _source(args: argparse.Namespace) -> str:
    """Where the recipe is from, as it was typed; empty with --resume: the run itself knows."""
    choices = {"preset": args.preset, "size": args.size, "from": args.start, "config": args.config}
    typed = [f"--{name} {value}" for name, value in choices.items() if value]
    settings = [f"--set {shlex.quote(setting)}" for setting in args.set]
    return " ".join([*typed, *(["--fast"] if args.fast else []), *settings])


def report(args: argparse.Namespace) -> None:
    """Write a run's page."""
    from ..train.page import run_page

    path = Path(args.run) / "report.html"
    run_page(Path(args.run)).write(path)
    print(f"wrote {path}")


def compare(args: argparse.Namespace) -> None:
    """Print how runs stand, and draw them."""
    from ..train.compare import Comparison

    if args.out:
        check_page_place(args.out)
    comparison = Comparison(args.runs)
    _print_table(*comparison.table())
    for line in comparison.notes():
        print(line)
    header, rows = comparison.differences()
    if rows:
        _print_table(header, rows)
    if args.out:
        comparison.page().write(args.out)
        print(f"wrote {args.out}")


def _print_table(header: list[str], rows: list[list[object]]) -> None:
    cells = [header, *([f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip())
