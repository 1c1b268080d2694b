"""A task of lm-evaluation-harness on the native engine, beside the harness's own ``hf`` model.

    python benchmarks/tasks.py HF_DIR blimp/*.jsonl [--rounds 5] [--threads 2]
    python benchmarks/tasks.py HF_DIR --questions 200

HF_DIR is a Hugging Face folder (`tinyllama export --to hf`); the files are BLiMP's, each a line of
JSON with sentence_good and sentence_bad. Questions are made up, each with four choices, behind the
same five examples. Both score the same texts in alternating rounds, in float32, on the same
threads; ``hf`` in batches of 8 and 32, of which the fastest counts. Then the whole commands take
turns, `tinyllama eval` and `lm-eval run`: what they start with and what the harness itself does is
in them. Printed as JSON: accuracies, the largest difference of any log-likelihood, seconds of the
model's own call and of the commands, and ratios.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import tinyllama
from tinyllama.evaluate.harness import TinyLlamaLM

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
num_fewshot: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = """\
task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{train: {file}, validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
fewshot_split: train
fewshot_config: {{sampler: first_n}}
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 5
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
HF_BATCHES = (8, 32)


def made_up(n: int) -> str:
    """n questions, each a line of JSON."""
    random, lines = Random(0), []
    for _ in range(n):
        name = random.choice(["Tom", "Lily", "Ben", "Anna", "Sam", "Mia"])
        animal = random.choice(["dog", "cat", "bird", "frog", "horse", "mouse"])
        place = random.choice(["park", "garden", "house", "forest", "kitchen", "school"])
        colours = random.sample(["red", "blue", "green", "black"], 4)
        question = (
            f"{name} saw a {colours[0]} {animal} in the {place}. Which {animal} did {name} see?"
        )
        choices = [f"The {colour} {animal}." for colour in sorted(colours)]
        answer = choices.index(f"The {colours[0]} {animal}.")
        lines.append(json.dumps({"question": question, "choices": choices, "answer": answer}))
    return "\n".join(lines) + "\n"


def run(model: Any, names: list[str], folder: str) -> tuple[float, dict[str, float], list[float]]:
    """(seconds of the model's own call, accuracy by task, log-likelihoods of all texts in order)"""
    seconds = 0.0
    score = model._loglikelihood_tokens

    def timed(*args: Any, **options: Any) -> Any:
        nonlocal seconds
        begin = time.perf_counter()
        result = score(*args, **options)
        seconds += time.perf_counter() - begin
        return result

    model._loglikelihood_tokens = timed
    manager = TaskManager(include_path=folder, include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    model._loglikelihood_tokens = score
    samples = [sample for name in names for sample in found["samples"][name]]
    return (
        seconds,
        {name: found["results"][name]["acc,none"] for name in names},
        [answer[0][0] for sample in samples for answer in sample["resps"]],
    )


def commands(
    model: str, names: list[str], folder: str, threads: int, batch: int
) -> dict[str, list[str]]:
    """The two command lines that evaluate ``names``."""
    tasks = ",".join(names)
    ours = ["tinyllama", "eval", model, "--tasks", tasks, "--task-folder", folder]
    theirs = ["lm_eval", "run", "--model", "hf", "--tasks", tasks, "--include_path", folder]
    theirs += ["--model_args", f"pretrained={model},dtype=float32"]
    return {
        "tinyllama": [*ours, "--threads", str(threads)],
        "hf": [*theirs, "--device", "cpu", "--batch_size", str(batch)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="HF_DIR")
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--questions", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    ours = TinyLlamaLM(tinyllama.load(args.model, n_threads=args.threads))
    theirs = {
        size: HFLM(pretrained=args.model, device="cpu", dtype="float32", batch_size=size)
        for size in HF_BATCHES
    }
    with tempfile.TemporaryDirectory() as folder:
        names = [Path(file).stem for file in args.files]
        for name, file in zip(names, args.files, strict=True):
            text = TASK.format(name=name, file=Path(file).resolve())
            Path(folder, f"{name}.yaml").write_text(text)
        if args.questions:
            names.append("questions")
            Path(folder, "questions.jsonl").write_text(made_up(args.questions))
            text = QUESTIONS.format(file=Path(folder, "questions.jsonl"))
            Path(folder, "questions.yaml").write_text(text)
        results: dict[Any, list[Any]] = {"tinyllama": []} | {size: [] for size in HF_BATCHES}
        for _ in range(args.rounds):
            results["tinyllama"].append(run(ours, names, folder))
            for size in HF_BATCHES:
                results[size].append(run(theirs[size], names, folder))
        own = {k: statistics.median(r[0] for r in rounds) for k, rounds in results.items()}
        best = min(HF_BATCHES, key=own.__getitem__)
        whole: dict[str, list[float]] = {"tinyllama": [], "hf": []}
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        for _ in range(args.rounds):
            for name, line in commands(args.model, names, folder, args.threads, best).items():
                start = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-m", *line], check=True, env=environment,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
                whole[name].append(time.perf_counter() - start)
    (_, accuracy, mine), (_, other_accuracy, other) = results["tinyllama"][0], results[best][0]
    command = {name: statistics.median(seconds) for name, seconds in whole.items()}
    report = {
        "accuracy": accuracy,
        "accuracy_hf": other_accuracy,
        "largest_difference": max(abs(a - b) for a, b in zip(mine, other, strict=True)),
        "texts": len(mine),
        "own_seconds": round(own["tinyllama"], 2),
        "own_seconds_hf": {size: round(own[size], 2) for size in HF_BATCHES},
        "own_ratio": round(own[best] / own["tinyllama"], 2),
        "command_seconds": round(command["tinyllama"], 2),
        "command_seconds_hf": round(command["hf"], 2),
        "command_ratio": round(command["hf"] / command["tinyllama"], 2),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
