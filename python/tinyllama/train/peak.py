"""How much of what the machine can multiply a training uses: its FLOPs, and the measured peak."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..config import Config

SIZES = (512, 1024, 2048, 4096, 8192)
LONGEST_S = 0.005


def flops_per_token(config: Config, seq_len: int) -> int:
    """Floating-point operations that training needs for one token of ``seq_len``.

    6 · N + 12 · n_layers · n_heads · head_dim · seq_len (PaLM, arXiv 2204.02311, appendix B): N
    counts the matrices that a token is multiplied by, the output head among them, the look-up in
    the embedding not; the second term is attention, causal masking not taken into account. What
    activation checkpointing computes again is no need.
    """
    shapes = config.tensor_shapes()
    n = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("layers.")
            and len(shape) == 2) + config.vocab_size * config.dim  # fmt: skip
    return 6 * n + 12 * config.n_layers * config.n_heads * config.head_dim * seq_len


def measure_peak(
    device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]
) -> float:
    """FLOP/s of the fastest square matrix product on ``device``, in the dtype of ``autocast``.

    Sizes grow until a product takes five milliseconds, so that it is over in about a tenth of a
    second. No random number is drawn.
    """
    wait = getattr(torch, device.type).synchronize
    with torch.no_grad(), autocast():
        one = torch.ones(1, 1, device=device)
        dtype = (one @ one).dtype
        peak = 0.0
        for n in SIZES:
            x = torch.ones(n, n, dtype=dtype, device=device)
            best = math.inf
            for _ in range(3):
                wait()
                began = time.perf_counter()
                torch.mm(x, x)
                wait()
                best = min(best, time.perf_counter() - began)
            peak = max(peak, 2 * n**3 / best)
            if best > LONGEST_S:
                break
    return peak
