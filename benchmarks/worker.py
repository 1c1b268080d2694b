"""One engine in a process of its own: opens a model and does what it is told, a JSON line each.

compare.py starts these; by hand:

    echo '{"do": "tokens", "prompt": [1, 300], "n": 20, "sampled": false}' |
        python benchmarks/worker.py tinyllama model.gguf f32 1
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from engines import ENGINES

now = time.perf_counter


def peak_memory() -> float | None:
    """The most memory this process has held, in MB; None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(found[1]) / 1000 if found else None


def main() -> None:
    name, path, weights, n_threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    engine = None
    begin = now()
    try:
        engine = ENGINES[name](path, weights, int(n_threads))
        answer(load=now() - begin, version=engine.version)
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}"[:300])
    for line in sys.stdin:
        if engine is None:
            break
        order = json.loads(line)
        what = order.pop("do")
        try:
            if what == "memory":
                answer(result=peak_memory())
            else:
                answer(result=getattr(engine, what)(**order))
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}"[:300])
    answers.flush()
    os._exit(0)  # some engines crash while Python takes them down


if __name__ == "__main__":
    main()
