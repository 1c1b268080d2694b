"""The ``tinyllama`` command: one module per verb group, nothing but arguments and printing."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from ..errors import TinyllamaError

# In the order of a model's life: text, tokens, training, a file, judgement, use.
GROUPS = ("data", "tokenizer", "train", "export", "eval", "info", "generate", "bench")

DESCRIPTION = """\
Train, export and run tiny Llamas on the CPU.

The life of a model:
  tinyllama data check stories.txt --repair clean.txt
  tinyllama tokenizer train clean.txt --vocab-size 2048 --out tok.model
  tinyllama data prepare clean.txt --tokenizer tok.model --out tokens
  tinyllama train --preset stories1m --data tokens --out run
  tinyllama export run --out model.gguf
  tinyllama eval model.gguf --text held_out.txt
  tinyllama generate "Once upon a time" -m model.gguf
  tinyllama bench -m model.gguf
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Every group sets ``handler``, called with the parsed arguments.

    Where a command is still to be named, its help is shown: who types that wants to know more.
    """
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="tinyllama",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tinyllama {__version__}")
    parser.set_defaults(handler=lambda args: parser.print_help())
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for group in GROUPS:
        importlib.import_module(f".{group}", __package__).register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` defaults to the process's arguments. Returns the exit status.

    0: done; 2: an error that is the input's or the machine's, told in one line on stderr;
    130: interrupted from the keyboard.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What a terminal or pipe of another encoding than UTF-8 cannot show appears as \u2581.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = build_parser().parse_args(argv)
        status = args.handler(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output (`| head`) has gone. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (TinyllamaError, OSError, MemoryError) as error:
        message = str(error) or "out of memory"
        if isinstance(error, OSError) and error.filename is not None:
            message = f"{error.filename}: {error.strerror}"
        print(f"tinyllama: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tinyllama: interrupted", file=sys.stderr)
        return 130
    return int(status or 0)
