"""``tinyllama info``: what a model file holds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from .loading import MODELS, add_model_options, open_model


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``info``."""
    parser = subparsers.add_parser(
        "info",
        help="show what a model file holds",
        description="Show a model's hyperparameters, size and tokenizer, and how it would run here."
        "\n\n" + MODELS,
        epilog="examples:\n  tinyllama info model.gguf\n"
        "  tinyllama info stories15M.bin --tokenizer tokenizer.bin --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="default: the model that ships with the package")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> None:
    model = open_model(args.model, args)
    facts = model.info()
    facts["kv_bytes"] = facts["kv_bytes_per_token"] * model.config.max_seq_len
    facts["config"] = dataclasses.asdict(model.config)
    tokenizer = model.tokenizer
    facts["tokenizer"] = {
        name: getattr(tokenizer, name) for name in ("vocab_size", "bos_id", "eos_id", "unk_id")
    }
    if args.json:
        print(json.dumps(facts))
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    """Name and value in two columns; what belongs together is indented below its name."""
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for inner, inner_value in value.items():
                print(f"  {inner:<20}{_words(inner_value)}")
        else:
            print(f"{name:<22}{_words(value)}")


def _words(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    return "none" if value is None else str(value)
