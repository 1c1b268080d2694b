"""tinyllama: train, export and natively run tiny Llamas on the CPU.

import tinyllama
print(tinyllama.generate("Once upon a time"))
"""

# ruff: noqa: E402 (the core has to be loaded before what uses it)

from __future__ import annotations

import importlib
import os
from types import ModuleType

from . import errors

# GNU OpenMP's waiting threads spin for milliseconds unless told otherwise; where other work shares
# the cores, each wait then costs a time slice. It reads the bound once, when it is loaded with the
# core: below 100 microseconds where a pause takes 140 cycles, and the environment stays as it was.
_BOUND = "GOMP_SPINCOUNT"
_unset = _BOUND not in os.environ and "OMP_WAIT_POLICY" not in os.environ
if _unset:
    os.environ[_BOUND] = "2000"
try:
    from ._core import __version__, supported_isas
finally:
    if _unset:
        del os.environ[_BOUND]

from .config import Config, RopeScaling
from .errors import TinyllamaError
from .generation import Completion, TokenLogprob, Usage
from .loading import generate, load, stream
from .model import Model, Tokenizer
from .sampling import SamplingParams
from .session import Session

__all__ = [
    "Completion",
    "Config",
    "Model",
    "RopeScaling",
    "SamplingParams",
    "Session",
    "TinyllamaError",
    "TokenLogprob",
    "Tokenizer",
    "Usage",
    "__version__",
    "errors",
    "generate",
    "load",
    "stream",
    "supported_isas",
]

# Reached as tinyllama.train and so on, but loaded only when used: some need an extra.
_ROOMS = ("data", "evaluate", "formats", "reference", "tokenizer", "train")


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
