"""Tokens per second of training, beside the Hugging Face ``Trainer`` on the same model and data.

    python benchmarks/training.py [--shapes 3m,15m] [--steps 20] [--threads 2] [--batch 16]

Both train a Llama of the same shape in bf16 autocast with AdamW, on the same random windows, the
same batch and threads, each in a process of its own with its own defaults. They take turns, a step
each, so that what disturbs the machine disturbs both; the first steps (compilation) do not count.
The peer also runs with torch.compile and with plain matrix attention ("eager"), its faster settings
here. Printed as JSON: the medians, and the ratio to each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama.train.recipe import Recipe, load_preset
from tinyllama.train.sizing import sized_recipe

PEERS = {
    "hf": {},
    "hf, eager attention": {"attention": "eager"},
    "hf, torch.compile": {"compile": True},
}
SEQ_LEN, WARM_UP = 256, 3


def shape(name: str) -> Recipe:
    recipe = load_preset("stories15m") if name == "15m" else sized_recipe(3_000_000, 2048, 10**9)
    return dataclasses.replace(
        recipe, seq_len=SEQ_LEN, grad_accum=1, optimizer="adamw", dtype="bf16", dropout=0.0,
        document_mask=False,  # the peer has none
        every_eval=0, every_save=0, every_sample=0, device="cpu", learning_rate=5e-4,
    )  # fmt: skip


def tokens(folder: Path, vocab_size: int, n: int) -> np.ndarray:
    """A token folder of one random document, and the tokens."""
    import sentencepiece

    data = np.random.default_rng(0).integers(3, vocab_size, n).astype("<u2")
    data[0] = 1
    data.tofile(folder / "train-0.bin")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"]), model_prefix=str(folder / "tokenizer"), vocab_size=263,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    split = {"documents": 1, "bytes": n, "tokens": n}
    shards = [{"file": "train-0.bin", "documents": 1, "tokens": n}]
    manifest = {
        "format": "tinyllama-tokens", "version": 1, "dtype": "uint16", "bos_id": 1, "eos_id": 2,
        "tokenizer": {"file": "tokenizer.model", "vocab_size": vocab_size},
        "splits": {"train": {**split, "shards": shards}},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return data


class Turns:
    """A worker's side of the game: wait to be asked, then say how long a step took."""

    def __init__(self) -> None:
        self.out = sys.stdout
        sys.stdout = sys.stderr

    def wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.start = time.perf_counter()

    def done(self) -> None:
        print(time.perf_counter() - self.start, file=self.out, flush=True)


def run_ours(recipe: Recipe, folder: Path, turns: Turns) -> None:
    from tinyllama.train.trainer import Trainer

    trainer = Trainer(recipe, folder, folder / "run")
    trainer.model.train()
    while True:
        turns.wait()
        trainer.step()
        turns.done()


def run_hf(
    recipe: Recipe, data: np.ndarray, folder: Path, settings: dict[str, Any], turns: Turns
) -> None:
    import torch
    import transformers

    torch.set_num_threads(recipe.n_threads)
    model = recipe.model
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.dim, intermediate_size=model.hidden_dim,
        num_hidden_layers=model.n_layers, num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads, max_position_embeddings=model.max_seq_len,
        tie_word_embeddings=model.tie_embeddings, rms_norm_eps=model.norm_eps, use_cache=False,
        attn_implementation=settings.get("attention", "sdpa"),
    )  # fmt: skip
    windows = torch.from_numpy(data[: len(data) // SEQ_LEN * SEQ_LEN].astype(np.int64))
    windows = windows.view(-1, SEQ_LEN)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, bf16=True, max_steps=10**6,
        per_device_train_batch_size=recipe.batch_size, learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay, adam_beta2=recipe.beta2, max_grad_norm=1.0,
        save_strategy="no", report_to="none", logging_steps=10, disable_tqdm=True,
        torch_compile=settings.get("compile", False),
    )  # fmt: skip

    class Player(transformers.TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            turns.wait()

        def on_step_end(self, *_: object, **__: object) -> None:
            turns.done()

    transformers.Trainer(
        model=transformers.LlamaForCausalLM(config),
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in windows],
        callbacks=[Player()],
    ).train()


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    recipe = shape(name)
    players = {}
    for player in ("tinyllama", *PEERS):
        command = [sys.executable, __file__, "--play", player, "--shapes", name]
        command += ["--threads", str(args.threads), "--batch", str(args.batch)]
        players[player] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=None if args.verbose else subprocess.DEVNULL,
        )  # fmt: skip
    seconds: dict[str, list[float]] = {player: [] for player in players}
    for _ in range(WARM_UP + args.steps):
        for player, process in players.items():
            assert process.stdin and process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise SystemExit(f"{player} ended; --verbose shows what it said")
            seconds[player].append(float(answer))
    for process in players.values():
        process.communicate()  # with nothing more to read it ends, and takes its files along
    medians = {player: statistics.median(s[WARM_UP:]) for player, s in seconds.items()}
    n = args.batch * SEQ_LEN
    return {
        "parameters": recipe.model.n_parameters,
        "tok_per_s": {player: round(n / median) for player, median in medians.items()},
        "ratio": {peer: round(medians[peer] / medians["tinyllama"], 2) for peer in PEERS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="3m,15m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--verbose", action="store_true", help="show what the workers say")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.play:
        print(json.dumps({name: measure(args, name) for name in args.shapes.split(",")}, indent=1))
        return
    turns = Turns()
    recipe = dataclasses.replace(
        shape(args.shapes), batch_size=args.batch, n_threads=args.threads, steps=10**6
    )
    with tempfile.TemporaryDirectory() as folder:
        data = tokens(Path(folder), recipe.model.vocab_size, 1 << 21)
        if args.play == "tinyllama":
            run_ours(recipe, Path(folder), turns)
        else:
            run_hf(recipe, data, Path(folder), PEERS[args.play], turns)


if __name__ == "__main__":
    main()
