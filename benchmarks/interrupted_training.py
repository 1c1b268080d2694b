"""Train a preset twice, once straight and once stopped by Ctrl-C three times: the same weights?

    python benchmarks/interrupted_training.py --data tokens --out /tmp/runs [--preset stories1m]

Prints the minutes the straight run took, and whether both ended with the same bits.
"""

import argparse
import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path


def train(args: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tinyllama", "train", "--preset", args.preset]
    for setting in args.set:
        command += ["--set", setting]
    return subprocess.Popen([*command, "--data", args.data, "--out", str(out)])


def weights(run: Path) -> str:
    newest = run / (run / "LATEST").read_text().strip()
    return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--preset", default="stories1m")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    straight, stopped = args.out / "straight", args.out / "stopped"

    start = time.perf_counter()
    assert train(args, straight).wait() == 0
    minutes = (time.perf_counter() - start) / 60
    print(f"straight: {minutes:.1f} minutes", flush=True)

    lines = steps_done(straight)  # of metrics: what the stops are spread over
    for part in (1, 2, 3):
        process = train(args, stopped)
        while steps_done(stopped) < lines * part // 4 and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.wait()
        print(f"stopped after {steps_done(stopped)} of {lines} lines of metrics", flush=True)
    assert train(args, stopped).wait() == 0

    equal = weights(straight) == weights(stopped)
    print(
        f"straight {weights(straight)[:16]}, stopped three times {weights(stopped)[:16]}:", end=" "
    )
    print("the same bits" if equal else "DIFFERENT")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
