"""How fast this machine could be: what the probe (probe.c) reads and multiplies, turned into tokens
per second."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from models import matrix_parameters, weight_bytes

from tinyllama.config import Config

UNITS = {"f32": "f32", "bf16": "bf16", "q8_0": "int8", "q4_0": "int8"}


class Probe:
    """The compiled probe, and what it last told."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "probe"
        self.figures: dict[str, list[float]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        source = Path(__file__).with_name("probe.c")
        options = ["-O3", "-march=native", "-fopenmp"]
        subprocess.run(["cc", *options, source, "-o", self.program], check=True)

    def bandwidth(self, n_bytes: float, n_threads: int) -> float:
        """Bytes per second, when as many are read over and over."""
        name = f"reading {n_bytes / 1e6:.0f} MB, {n_threads} threads, GB/s"
        return self._tell(name, ["read", str(int(n_bytes))], n_threads) * 1e9

    def peak(self, unit: str, n_threads: int) -> float:
        """Operations per second of f32, bf16 or int8: the better of one thread and n_threads."""
        counts = {1, n_threads}
        name = "multiplying in {}, {} threads, Gop/s"
        return max(self._tell(name.format(unit, n), [unit], n) for n in counts) * 1e9

    def _tell(self, name: str, arguments: list[str], n_threads: int) -> float:
        environment = os.environ | {"OMP_NUM_THREADS": str(n_threads)}
        done = subprocess.run(
            [self.program, *arguments], env=environment, capture_output=True, check=True
        )
        answer = json.loads(done.stdout)
        if answer["unit"] != "read":
            name = name.replace("in " + arguments[0], "with " + answer["unit"])
        self.figures.setdefault(name, []).append(answer["median"])
        return float(answer["median"])


def decode(probe: Probe, config: Config, weights: str, n_threads: int, n_streams: int = 1) -> float:
    """Tokens per second in all: a step reads the weights once, and multiplies for each stream."""
    n_bytes = weight_bytes(config, weights)
    seconds = n_bytes / probe.bandwidth(n_bytes, n_threads)
    if n_streams > 1:
        operations = 2.0 * matrix_parameters(config) * n_streams
        seconds = max(seconds, operations / probe.peak(UNITS[weights], n_threads))
    return n_streams / seconds


def prompt(probe: Probe, config: Config, weights: str, n_threads: int, n_tokens: int) -> float:
    """Prompt tokens per second; only the last has logits."""
    body, all_parameters = matrix_parameters(config, head=False), matrix_parameters(config)
    operations = 2.0 * (body * (n_tokens - 1) + all_parameters)
    n_bytes = weight_bytes(config, weights)
    seconds = max(
        operations / probe.peak(UNITS[weights], n_threads),
        n_bytes / probe.bandwidth(n_bytes, n_threads),
    )
    return n_tokens / seconds
