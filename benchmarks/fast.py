"""Does a preset's [fast] section learn the same from fewer tokens? Recipe and fast, seed by seed.

    python benchmarks/fast.py --data tokens --out runs [--preset stories1m] [--seeds 1,2,3]
                              [--set KEY=VALUE]

Trains two runs for each seed, below --out, one after the other; what is there already is not
trained again, what was stopped goes on. Printed as a table and as JSON: the bits per byte at the
end of both, and the share of the recipe's tokens and seconds after which fast had those of the
recipe's end (between two validations a straight line is drawn), "not reached" where it never had.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama.train.metrics import read_records, series


def trained(run: Path, arguments: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, seconds and bits per byte at each validation of a run, trained if need be."""
    command = [sys.executable, "-m", "tinyllama", "train", *arguments, "--out", str(run)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    tokens, seconds, bits = series(read_records(run), "tokens", "seconds", "bits_per_byte")
    return tokens, seconds, bits


def compared(out: Path, seed: int, arguments: list[str]) -> dict[str, Any]:
    """How fast did beside its recipe, on one seed."""
    arguments = [*arguments, "--set", f"seed={seed}"]
    tokens, seconds, bits = trained(out / f"recipe_{seed}", arguments)
    fast_tokens, fast_seconds, fast_bits = trained(out / f"fast_{seed}", [*arguments, "--fast"])
    result = {
        "seed": seed,
        "recipe": bits[-1],
        "fast": fast_bits[-1],
        "recipe_tokens": tokens[-1],
        "fast_tokens": fast_tokens[-1],
    }
    if fast_bits.min() <= bits[-1]:
        best = np.minimum.accumulate(fast_bits)
        for name, x, whole in (
            ("tokens", fast_tokens, tokens[-1]),
            ("seconds", fast_seconds, seconds[-1]),
        ):
            result[f"share_of_{name}"] = float(np.interp(-bits[-1], -best, x)) / whole
    return {key: round(float(value), 4) for key, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="stories1m")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    arguments = ["--preset", args.preset, "--data", args.data]
    for setting in args.set:
        arguments += ["--set", setting]
    results = []
    print("| seed | recipe | fast | share of the tokens | of the time |\n|---|---|---|---|---|")
    for seed in map(int, args.seeds.split(",")):
        one = compared(args.out, seed, arguments)
        shares = [one.get(f"share_of_{name}", "not reached") for name in ("tokens", "seconds")]
        print(f"| {seed} | {one['recipe']} | {one['fast']} | {shares[0]} | {shares[1]} |")
        results.append(one)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
