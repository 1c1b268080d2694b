"""Who is measured: every engine with every kind of weights it has, each in its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import ALL

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Entrant:
    """An engine with one kind of weights. ``kind``: those of ours with as many bits; ``options``:
    what the worker is told about the weights; ``only``: the cases it takes part in, if not all."""

    engine: str
    file: str
    kind: str
    options: str = ""
    only: tuple[str, ...] = ()
    python: str = sys.executable

    @property
    def label(self) -> str:
        return self.file + self.options

    def takes_part(self, case: str) -> bool:
        if case == "avx2":
            return "avx2" in self.only or (self.engine == "tinyllama" and not self.only)
        return not self.only or case in self.only


def entrants() -> list[Entrant]:
    everybody = [Entrant("tinyllama", kind, kind) for kind in ALL]
    for kind in ALL:
        for cache in ("bf16", "int8"):
            long_cases = ("growth", "streams", "prompt")
            everybody.append(Entrant("tinyllama", kind, kind, f",kv_dtype={cache}", long_cases))
        everybody.append(Entrant("tinyllama", kind, kind, ",isa=avx2", ("avx2",)))
        python = os.environ.get("LLAMA_CPP_AVX2_PYTHON")
        if python:
            everybody.append(Entrant("llama.cpp", kind, kind, ",avx2", ("avx2",), python))
    peers = {
        "llama.cpp": {kind: kind for kind in ALL} | {"f16": "bf16"},
        "ctranslate2": {"float32": "f32", "int8": "q8_0"},
        "openvino": {"fp32": "f32", "fp32@bf16": "bf16", "int8": "q8_0", "int4": "q4_0"},
        "onnxruntime": {"fp32": "f32", "int4": "q4_0"},
        "transformers": {"float32": "f32", "bfloat16": "bf16"},
    }
    if "LLAMA2C_RUN" in os.environ:
        peers["llama2.c"] = {"f32": "f32", "q8_0": "q8_0"}
    for engine, kinds in peers.items():
        for file, kind in kinds.items():
            file, at, hint = file.partition("@")
            everybody.append(Entrant(engine, file, kind, at + hint))
    return everybody


class Worker:
    """An entrant's process, which sleeps unless it is asked something."""

    def __init__(self, entrant: Entrant, path: Path, n_threads: int) -> None:
        self.entrant = entrant
        self.started = time.perf_counter()
        command = [entrant.python, WORKER, entrant.engine, path, entrant.label]
        self._process = subprocess.Popen(
            [*command, str(n_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.facts = self._answer()

    def ask(self, what: str, **order: Any) -> Any:
        """Raises RuntimeError with what the engine said when it cannot, or has died."""
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin
        try:
            print(json.dumps({"do": what} | order), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise RuntimeError("its process has ended") from None
        return self._answer()["result"]

    def rest(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"its process ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer
