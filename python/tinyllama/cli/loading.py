"""The arguments with which a command opens a model, the same for all commands that do."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..model import Model

MODELS = """\
A model is a .gguf file, a Hugging Face directory, a training run's folder, `bundled` (the one that
ships), or a llama2.c .bin with its tokenizer (--tokenizer, or a tokenizer.bin or .model beside it).
"""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--tokenizer, --dtype, --threads, --isa; the command itself adds the model."""
    group = parser.add_argument_group("how the model is opened")
    group.add_argument("--tokenizer", metavar="FILE", help="tokenizer.bin or .model, for a .bin")
    group.add_argument("--dtype", help="keep the weights as f32, bf16, q8_0 or q4_0")
    group.add_argument("--threads", type=int, help="default: one per physical core")
    group.add_argument("--isa", help="the kernel set; default: the best this machine has")


def open_model(path: str | None, args: argparse.Namespace) -> Model:
    """The model at ``path``, or the one that ships, opened as ``args`` say."""
    from ..loading import find_model, load

    return load(
        None if path is None else find_model(path),
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        n_threads=args.threads,
        isa=args.isa,
    )


def progress_bar(total: int | None, what: str, **options: Any) -> Any:
    """A bar on stderr where that is a terminal; None without tqdm, which only the bar needs."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{what} …", file=sys.stderr)
        return None
    return tqdm(total=total, desc=what, leave=False, **options)
