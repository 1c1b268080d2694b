"""Where and how the arithmetic of training runs: device, precision, compilation, memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..errors import ConfigError
from .recipe import Recipe

# On a CPU compiling takes a minute or two, which a run of fewer tokens does not win back.
COMPILED_TOKENS = 1_000_000


def choose_device(name: str) -> torch.device:
    """ "auto": cuda, else mps, else cpu. Raises ConfigError for one that is not here."""
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, usable in here.items() if usable)
    if not here[name]:
        raise ConfigError(f"device is {name!r}, which this machine or this torch does not have")
    return torch.device(name)


def choose_autocast(dtype: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A function giving the context of a forward pass: bf16 matrix products, or all float32.

    "auto" is bf16 where the processor multiplies bf16 natively; elsewhere it would be slower.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if dtype == "f32" or (dtype == "auto" and not native):
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def pays_to_compile(recipe: Recipe, device: torch.device) -> bool:
    """Whether a training is to go through torch.compile: "auto" says where that gains time.

    It asks the recipe alone, not the step, so that a run goes on as it began.
    """
    if recipe.compile == "auto":
        long_enough = recipe.steps * recipe.tokens_per_step >= COMPILED_TOKENS
        return device.type == "cuda" or (device.type == "cpu" and long_enough)
    return recipe.compile == "yes"


def be_deterministic() -> None:
    """Have torch sum in one order: the same run gives the same bits each time.

    Compiled code otherwise adds up the embedding's gradient from several threads in whatever order
    they come. Where torch has no ordered way (on some devices), it warns and goes on.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: training frees and takes the same buffers every step.

    Returning them to the system costs page faults on each; keeping them made a step of a 5M model
    8 to 25 % faster. Elsewhere than glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**28)
