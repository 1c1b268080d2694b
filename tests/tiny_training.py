"""A run so small that a step takes milliseconds: its recipe, its text, and what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from tinyllama.config import Config
from tinyllama.train.recipe import Recipe
from tinyllama.train.trainer import Trainer

VOCAB = 300
CONFIG = Config(dim=16, n_layers=2, n_heads=2, vocab_size=VOCAB, max_seq_len=32, hidden_dim=32)
RECIPE = Recipe(
    model=CONFIG, steps=6, batch_size=2, grad_accum=2, seq_len=16, optimizer="muon",
    learning_rate=1e-2, warmup_steps=2, dropout=0.1, every_eval=3, every_save=1, every_sample=0,
    device="cpu", dtype="f32", compile="no", n_threads=1,
)  # fmt: skip


def write_tokens(folder: Path) -> Path:
    """A token folder of made-up stories, as ``tinyllama data prepare`` lays it out."""
    random = np.random.default_rng(0)
    words = [
        *["the", "a", "cat", "dog", "sat", "ran", "saw", "big", "red", "ball"],
        "tree",
        "and",
        "then",
        "happy",
    ]
    stories = [" ".join(random.choice(words, random.integers(3, 30))) + "." for _ in range(60)]
    (folder / "text.txt").write_text("\n".join(stories) * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=VOCAB,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    splits = {}
    for name, texts in (("train", stories[:50]), ("valid", stories[50:])):
        documents = [[1, *processor.encode(text), 2] for text in texts]
        shards = []
        for i in range(2):
            half = documents[i::2]
            flat = np.array([token for document in half for token in document], "<u2")
            flat.tofile(folder / f"{name}-{i}.bin")
            shards.append({"file": f"{name}-{i}.bin", "documents": len(half), "tokens": len(flat)})
        splits[name] = {
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "shards": shards,
        }
    manifest = {
        "format": "tinyllama-tokens", "version": 1, "dtype": "uint16", "bos_id": 1, "eos_id": 2,
        "tokenizer": {"file": "tokenizer.model", "vocab_size": VOCAB}, "splits": splits,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def learned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a run has recorded of its learning: without clocks, and without where it began
    and stopped."""
    clocks = ("seconds", "tok_per_s", "peak_share")
    return [
        {key: value for key, value in record.items() if key not in clocks}
        for record in records
        if "recipe" not in record and "stopped" not in record
    ]


def as_toml(recipe: Recipe) -> str:
    """The recipe as ``--config`` reads it."""
    values = recipe.to_dict()
    model = {k: v for k, v in values.pop("model").items() if v is not None}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join([*lines, "[model]", *(f"{k} = {json.dumps(v)}" for k, v in model.items())])


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in trainer.model.state_dict().items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)
