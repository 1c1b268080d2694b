"""Measure tinyllama beside its peers on the same weights, and beside what the machine can do.

Every engine runs in a process of its own, stopped while others are measured. In each round every
engine has its turn, in shuffled order, and the ceiling is measured too; ratios are taken within a
round, and medians over the rounds. Weights are random and seeded, decoding is greedy, no text ends
early. Engines that are not installed are left out, and named.

cases
  decode    one stream after a prompt of 5 tokens; median and 99th percentile per token
  prompt    prompts of 200 and 512 tokens to the first new token
  streams   8, 32 and 64 texts at once, 5 + 64 tokens each
  growth    time per token around position 700 over that around 10, with each kind of our cache
  sampling  time per token with top_p = 0.9 at temperature 1 over greedy
  cold      process start to first token, import and load, peak memory
  avx2      decode, ours held down to AVX2, beside llama.cpp built so
            (LLAMA_CPP_AVX2_PYTHON=/path/to/a/python that has such a llama-cpp-python)

llama2.c takes part where LLAMA2C_RUN=/path/to/run names it; runq is looked for beside it.
Results join those in the JSON file, so that one report can come from several runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import ceiling
import report
from entrants import Entrant, Worker, entrants
from models import ALL, MODELS, Files, prompt

from tinyllama.loading import bundled_model

CASES = ("decode", "prompt", "streams", "growth", "sampling", "cold", "avx2")
EXAMPLES = """\
examples
  python benchmarks/compare.py --cache /tmp/models          (everything: hours)
  python benchmarks/compare.py --cache /tmp/models --models stories15m \\
      --engines tinyllama,llama.cpp --cases decode --threads 1       (two minutes)
  python benchmarks/compare.py --cache /tmp/models --prepare       (only make the files: an hour)
  python benchmarks/compare.py --report           (docs/performance.md from the JSON file alone)
"""


class Measurement:
    """One model on one number of threads."""

    def __init__(self, args: argparse.Namespace, name: str, n_threads: int) -> None:
        self.args, self.name, self.n_threads = args, name, n_threads
        self.files = Files(args.cache, name)
        self.probe = ceiling.Probe(args.cache)
        self.run_name = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        self.results: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self._seed = 0

    def entrants(self, case: str) -> list[Entrant]:
        """Who takes part: the named engines with the named (or the model's) kinds of weights."""
        kinds = self.args.formats or (MODELS[self.name].formats if self.name in MODELS else ALL)
        return [
            one
            for one in entrants()
            if one.engine in self.args.engines and one.kind in kinds and one.takes_part(case)
        ]

    def path(self, entrant: Entrant) -> Path:
        if self.name == "shipped":
            return bundled_model()
        return self.files.path(entrant.engine, entrant.file)

    def run(self, cases: list[str]) -> None:
        if self.name == "shipped":
            cases = [case for case in cases if case == "cold"]
        elif MODELS[self.name].config.max_seq_len < 708:
            cases = [case for case in cases if case != "growth"]
        everybody = list(dict.fromkeys(one for case in cases for one in self.entrants(case)))
        if self.name == "shipped":
            everybody = [Entrant("tinyllama", "q8_0", "q8_0")]
        everybody = self._prepared(everybody)
        if self.args.prepare:
            return
        if "cold" in cases:
            self._cold([one for one in everybody if not one.only])
        if set(cases) - {"cold"}:
            workers = self._open(everybody)
            try:
                for case in cases:
                    mine = [w for w in workers if w.entrant in self.entrants(case)]
                    self._case(case, mine)
            finally:
                for worker in workers:
                    worker.close()

    def _prepared(self, everybody: list[Entrant]) -> list[Entrant]:
        """Those whose files are there, or could be made."""
        ready = []
        for one in everybody:
            try:
                self.path(one)
                ready.append(one)
            except Exception as error:
                self._leave_out(one, error)
        self.files.forget()
        return ready

    def _open(self, everybody: list[Entrant]) -> list[Worker]:
        workers = []
        for one in everybody:
            try:
                worker = Worker(one, self.path(one), self.n_threads)
                self.versions[one.engine] = worker.facts["version"]
                worker.rest()
                workers.append(worker)
            except RuntimeError as error:
                self._leave_out(one, error)
        return workers

    def _case(self, case: str, workers: list[Worker]) -> None:
        config, n_new = MODELS[self.name].config, MODELS[self.name].n_new
        room = config.max_seq_len
        if case in ("decode", "avx2"):
            self._rounds(case, workers, lambda w: self._decode(w, n_new), ceiling.decode)
        elif case == "prompt":
            for n in (200, 512):
                if n < room:
                    self._rounds(f"prompt {n}", workers, self._prompt(n), ceiling.prompt, n)
        elif case == "streams":
            for n in (8, 32, 64):
                self._rounds(f"streams {n}", workers, self._streams(n), ceiling.decode, n)
        elif case == "sampling":
            self._rounds(case, workers, lambda w: self._sampling(w, min(n_new, 64)))
        elif case == "growth":
            self._rounds(case, workers, self._growth)

    # Each measures one worker once: a dict with "value", the figure that is compared, and others.

    def _decode(self, worker: Worker, n: int) -> dict[str, Any]:
        seconds = worker.ask("tokens", prompt=self._prompt_of(5), n=n, sampled=False)
        return {"value": n / sum(seconds), "token_s": seconds}

    def _prompt(self, n: int) -> Any:
        return lambda w: {"value": n / w.ask("first_token", prompt=self._prompt_of(n))}

    def _streams(self, n: int) -> Any:
        def measure(worker: Worker) -> dict[str, Any]:
            prompts = [self._prompt_of(5) for _ in range(n)]
            return {"value": n * 64 / worker.ask("streams", prompts=prompts, n=64)}

        return measure

    def _sampling(self, worker: Worker, n: int) -> dict[str, Any]:
        """Some of each in turn: the difference is small."""
        greedy, sampled = [], []
        for _ in range(3):
            order = {"prompt": self._prompt_of(5), "n": n}
            greedy += worker.ask("tokens", sampled=False, **order)
            sampled += worker.ask("tokens", sampled=True, **order)
        return {"value": statistics.median(sampled) / statistics.median(greedy)}

    def _growth(self, worker: Worker) -> dict[str, Any]:
        medians = []
        for position in (10, 700):
            order = {"prompt": self._prompt_of(position - 8), "n": 16, "sampled": False}
            medians.append(statistics.median(worker.ask("tokens", **order)))
        return {"value": medians[1] / medians[0], "at_10": medians[0], "at_700": medians[1]}

    def _cold(self, everybody: list[Entrant]) -> None:
        turns: dict[Entrant, list[dict[str, Any]]] = {one: [] for one in everybody}
        for turn in range(-1, self.args.rounds):  # the first fills the page cache
            for one in random.Random(turn).sample(everybody, len(everybody)):
                if one not in turns:
                    continue
                worker = None
                try:
                    worker = Worker(one, self.path(one), self.n_threads)
                    worker.ask("first_token", prompt=[1, 300, 301, 302, 303])
                    seconds = time.perf_counter() - worker.started
                    self.versions[one.engine] = worker.facts["version"]
                    facts = {"load_s": worker.facts["load"], "memory_mb": worker.ask("memory")}
                    if turn >= 0:
                        turns[one].append({"value": seconds, **facts})
                except RuntimeError as error:
                    self._leave_out(one, error, "cold")
                    del turns[one]
                finally:
                    if worker:
                        worker.close()
        for one, results in turns.items():
            self._keep("cold", one, results, None)

    def _rounds(self, case: str, workers: list[Worker], measure: Any, *limit: Any) -> None:
        """Everybody once per round, and the ceiling: ``limit`` is its function and arguments."""
        turns: dict[Worker, list[dict[str, Any]]] = {worker: [] for worker in workers}
        limits: dict[str, list[float]] = {w.entrant.kind: [] for w in workers if limit}
        for turn in range(-1, self.args.rounds):  # the first warms up
            for worker in random.Random(turn).sample(workers, len(workers)):
                if worker not in turns:
                    continue
                self._seed = 1000 * (turn + 1)  # the same prompts for everybody, new ones each turn
                try:
                    result = measure(worker)
                    worker.rest()
                except RuntimeError as error:
                    self._leave_out(worker.entrant, error, case)
                    del turns[worker]
                    continue
                if turn >= 0:
                    turns[worker].append(result)
            if turn < 0:
                continue
            config = MODELS[self.name].config
            for kind, rates in limits.items():
                function, *arguments = limit
                rates.append(function(self.probe, config, kind, self.n_threads, *arguments))
        for worker, results in turns.items():
            self._keep(case, worker.entrant, results, limits.get(worker.entrant.kind))

    def _prompt_of(self, n: int) -> list[int]:
        self._seed += 1
        return prompt(MODELS[self.name].config, n, self._seed)

    def _keep(
        self, case: str, one: Entrant, turns: list[dict[str, Any]], limits: list[float] | None
    ) -> None:
        record: dict[str, Any] = {"model": self.name, "threads": self.n_threads, "case": case}
        record |= {"engine": one.engine, "weights": one.label, "kind": one.kind}
        record["run"] = self.run_name
        record["rounds"] = [turn.pop("value") for turn in turns]
        tokens = sorted(s for turn in turns for s in turn.pop("token_s", []))
        if tokens:
            record["p50_ms"] = 1e3 * tokens[len(tokens) // 2]
            record["p99_ms"] = 1e3 * tokens[int(0.99 * len(tokens))]
        for name in turns[0]:
            values = [turn[name] for turn in turns if turn[name] is not None]
            record[name] = statistics.median(values) if values else None
        if limits:
            record["ceiling"] = statistics.median(limits)
        self.results.append(record)
        median = statistics.median(record["rounds"])
        share = f"{median / record['ceiling']:6.0%}" if limits else ""
        print(f"  {case:12s}{one.engine:14s}{one.label:22s}{median:12,.3f}{share}", flush=True)

    def _leave_out(self, one: Entrant, error: Exception, case: str = "") -> None:
        what = f"{one.engine} {one.label} {case}".strip()
        self.left_out[f"{self.name}, {self.n_threads} threads: {what}"] = str(error)
        print(f"  left out: {what}: {error}", flush=True)


def machine() -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text()
        cpu = next(line.split(":")[1].strip() for line in text.splitlines() if "model name" in line)
    except (OSError, StopIteration):
        cpu = platform.processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "system": platform.platform()}


def merge(path: Path, run: Measurement) -> None:
    """Put a measurement into the JSON file; what was measured again is replaced."""
    data = json.loads(path.read_text()) if path.exists() else {"results": []}
    names = ("model", "threads", "case", "engine", "weights")
    results = {tuple(r[name] for name in names): r for r in data["results"] + run.results}
    data["machine"] = machine()
    data["rounds"] = run.args.rounds
    data["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    data["versions"] = data.get("versions", {}) | run.versions
    here = f"{run.name}, {run.n_threads} threads: "
    before = {k: v for k, v in data.get("left_out", {}).items() if not k.startswith(here)}
    data["left_out"] = before | run.left_out
    figures = {name: statistics.median(values) for name, values in run.probe.figures.items()}
    data["probe"] = data.get("probe", {}) | figures
    data["results"] = list(results.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    def names(*known: str) -> Any:
        def parse(text: str) -> list[str]:
            unknown = [name for name in text.split(",") if name not in known]
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r}; known: {', '.join(known)}")
            return text.split(",")

        return parse

    engines = list(dict.fromkeys(one.engine for one in entrants()))
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--models",
        type=names(*MODELS, "shipped"),
        default=list(MODELS),
        metavar="A,B",
        help=f"of {', '.join(MODELS)}; shipped: ours that comes with the package, cold only",
    )
    add(
        "--engines",
        type=names(*engines),
        default=engines,
        metavar="A,B",
        help=f"of {', '.join(engines)}",
    )
    add(
        "--formats",
        type=names(*ALL),
        metavar="A,B",
        help="f32, bf16, q8_0, q4_0: peers join with weights of as many bits"
        " (default: all; the two largest models: q8_0,q4_0)",
    )
    add("--cases", type=names(*CASES), default=list(CASES), metavar="A,B", help="see above")
    add(
        "--threads",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[1, 2],
        metavar="N,M",
        help="default: 1,2",
    )
    add("--rounds", type=int, default=5, help="default: 5")
    add(
        "--cache",
        type=Path,
        default=Path("benchmark-models"),
        metavar="DIR",
        help="where models are written, once; all of them need 20 GB (default: %(default)s)",
    )
    add(
        "--docs",
        type=Path,
        default=Path(__file__).parents[1] / "docs",
        metavar="DIR",
        help="where performance.json, .md and .png go (default: docs)",
    )
    add("--prepare", action="store_true", help="measure nothing, only make the models' files")
    add("--report", action="store_true", help="measure nothing, only write the report")
    return parser.parse_args()  # fmt: skip


def main() -> None:
    args = arguments()
    results = args.docs / "performance.json"
    for name in [] if args.report else args.models:
        for n_threads in args.threads[:1] if args.prepare else args.threads:
            print(f"{name}, {n_threads} threads", flush=True)
            run = Measurement(args, name, n_threads)
            try:
                run.run(args.cases)
            finally:
                if not args.prepare:
                    merge(results, run)
    if not args.prepare:
        report.write(json.loads(results.read_text()), args.docs)


if __name__ == "__main__":
    main()
