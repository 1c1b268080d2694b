"""tinyllama: train, export and natively run tiny Llamas on the CPU.

import tinyllama
print(tinyllama.generate("Once upon a time"))
"""

from __future__ import annotations

import importlib
from types import ModuleType

from . import errors
from ._core import Event, __version__, supported_isas
from .c_library import get_cmake_dir, get_include
from .config import Config, RopeScaling
from .errors import TinyllamaError
from .generation import Choice, Completion, TokenLogprob, Usage
from .loading import generate, load, stream
from .model import Model, Tokenizer
from .sampling import SamplingParams
from .scheduler import Request, Scheduler
from .session import Session

__all__ = [
    "Choice",
    "Completion",
    "Config",
    "Event",
    "Model",
    "Request",
    "RopeScaling",
    "SamplingParams",
    "Scheduler",
    "Session",
    "TinyllamaError",
    "TokenLogprob",
    "Tokenizer",
    "Usage",
    "__version__",
    "errors",
    "generate",
    "get_cmake_dir",
    "get_include",
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
