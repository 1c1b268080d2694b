"""``tinyllama train``."""

from __future__ import annotations

import argparse

EPILOG = """\
A recipe is a preset, a TOML file, chosen for a --size, or for going on --from a trained model;
--set changes single values of it. DATA is a folder made by `tinyllama data prepare`; of pairs of
prompt and completion only the completions are learned. Below RUN come checkpoints (Hugging Face
directories step-…, the last two and the best kept), metrics.jsonl, samples.txt and loss.png.

Ctrl-C saves and stops; the same command then goes on exactly where it was.

examples:
  tinyllama train --preset stories1m --data tokens --out run
  tinyllama train --size 3M --data tokens --out run
  tinyllama train --preset stories15m --set batch_size=32 --data tokens --out run
  tinyllama train --config my.toml --data tokens --out run
  tinyllama train --from bundled --data pairs --out tuned
  tinyllama train --resume --data tokens --out run
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train a model from a recipe and prepared tokens",
        description="Train a Llama on prepared tokens.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe = parser.add_mutually_exclusive_group(required=True)
    recipe.add_argument("--preset", metavar="NAME", help="a recipe of this package, by name")
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
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one value of the recipe, e.g. steps=500 or model.n_layers=4; repeatable",
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="prepared token folder")
    parser.add_argument("--out", required=True, metavar="RUN", help="folder of the run")
    parser.set_defaults(handler=train)


def train(args: argparse.Namespace) -> int:
    """Train, or go on with a run that was stopped."""
    from ..train.recipe import load_preset, load_recipe

    if args.preset:
        recipe = load_preset(args.preset, args.set)
    elif args.config:
        recipe = load_recipe(args.config, args.set)
    elif args.start:
        from ..train.checkpoint import read_start
        from ..train.recipe import recipe_from_dict
        from ..train.sizing import tuned_recipe

        recipe = tuned_recipe(read_start(args.start).config, args.start)
        recipe = recipe_from_dict(recipe.to_dict(), f"--from {args.start}", args.set)
    elif args.size:
        from ..train.batches import TokenFolder
        from ..train.recipe import recipe_from_dict
        from ..train.sizing import parse_size, sized_recipe

        folder = TokenFolder(args.data)
        n_tokens = folder.split("train").n_tokens
        recipe = sized_recipe(parse_size(args.size), folder.vocab_size, n_tokens)
        recipe = recipe_from_dict(recipe.to_dict(), f"--size {args.size}", args.set)
    else:
        from ..train.checkpoint import find_checkpoint, load_state
        from ..train.recipe import recipe_from_dict

        checkpoint = find_checkpoint(args.out)
        source = str(checkpoint / "trainer.json")
        recipe = recipe_from_dict(load_state(checkpoint).recipe, source, args.set)
    from ..train.trainer import Trainer

    trainer = Trainer(recipe, args.data, args.out)
    print(trainer.train())
    return 0 if trainer.state.step == trainer.recipe.steps else 130
