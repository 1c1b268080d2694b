"""Does saving hold up training? Steps beside which a checkpoint is written, and steps alone.

    python benchmarks/saving.py --data tokens [--preset stories15m] [--saves 5] [--set KEY=VALUE]

Every 8th step a snapshot is taken and written in the background. Printed as JSON, in seconds: the
median step, the copy into memory that a step waits for, how long the writing took, and how much
longer than the median the steps of that time were, together: what a save costs in all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

from tinyllama.train.recipe import load_preset
from tinyllama.train.trainer import Trainer

EVERY = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--preset", default="stories15m")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    recipe = load_preset(args.preset, args.set)
    with tempfile.TemporaryDirectory() as run:
        trainer = Trainer(recipe, args.data, run)
        trainer.model.train()
        for _ in range(3):  # compilation
            trainer.step()
        alone, beside, copies, writings = [], [], [], []
        for _ in range(args.saves):
            start = time.perf_counter()
            trainer._start_saving()
            saved = time.perf_counter()
            copies.append(saved - start)
            writing = trainer._saver._writing
            assert writing is not None
            writing.add_done_callback(lambda _, s=saved: writings.append(time.perf_counter() - s))
            for _ in range(EVERY):
                was_writing = not writing.done()
                start = time.perf_counter()
                trainer.step()
                (beside if was_writing else alone).append(time.perf_counter() - start)
            trainer._saver.wait()
    step = statistics.median(alone)
    print(
        json.dumps(
            {
                "step": round(step, 3),
                "copy": round(statistics.median(copies), 3),
                "writing": round(statistics.median(writings), 3),
                "longer_steps": round((sum(beside) - step * len(beside)) / args.saves, 3),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
