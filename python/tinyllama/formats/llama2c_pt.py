"""``.pt`` checkpoints of llama2.c's trainer (model.py and train.py there), read with torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from ..errors import ConfigError, FormatError, MissingExtraError
from .checkpoint import Checkpoint
from .llama2c import PathLike, find_tokenizer, load_tokenizer

_NAMES = {
    "tok_embeddings": "tok_embed",
    "norm": "final_norm",
    "output": "lm_head",
    "attention_norm": "attn_norm",
    "attention.wq": "wq",
    "attention.wk": "wk",
    "attention.wv": "wv",
    "attention.wo": "wo",
    "feed_forward.w1": "w_gate",
    "feed_forward.w2": "w_down",
    "feed_forward.w3": "w_up",
}


def read_llama2c_pt(path: PathLike, tokenizer: PathLike | None = None) -> Checkpoint:
    """Read a ``.pt`` checkpoint of llama2.c's trainer; ``tokenizer`` as for a ``.bin``.

    Nothing but tensors and plain values is unpickled. Raises MissingExtraError without torch,
    FormatError when the file is something else.
    """
    try:
        import torch
    except ImportError:
        raise MissingExtraError("torch", "train") from None
    with open(path, "rb") as stream:
        try:
            content = torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen kinds for damaged files
            reason = str(error).strip().splitlines()[0]
            raise FormatError(f"{path}: not a checkpoint of tensors alone: {reason}") from None
    try:
        args, state = dict(content["model_args"]), dict(content["model"])
    except (TypeError, KeyError, IndexError, ValueError):
        raise FormatError(f"{path}: holds no model_args and model, as llama2.c's do") from None
    tensors = {}
    for name, value in state.items():
        name = _name(name.removeprefix("_orig_mod."))
        if name is not None and isinstance(value, torch.Tensor):
            tensors[name] = value.float().numpy()
    config = _config(args, tensors, str(path))
    if config.tie_embeddings:
        tensors.pop("lm_head", None)
    vocabulary = (
        load_tokenizer(tokenizer, config.vocab_size)
        if tokenizer is not None
        else find_tokenizer(Path(path), config.vocab_size)
    )
    return Checkpoint(config, tensors, vocabulary, "f32", str(path))


def _name(name: str) -> str | None:
    if name in ("freqs_cos", "freqs_sin", "rope.freqs"):
        return None
    name = name.removesuffix(".weight")
    match = re.fullmatch(r"(layers\.\d+\.)(.+)", name)
    prefix, kind = match.groups() if match else ("", name)
    return prefix + _NAMES.get(kind, kind)


def _config(args: dict[str, Any], tensors: dict[str, np.ndarray], source: str) -> Config:
    try:
        embed, head = tensors["tok_embed"], tensors.get("lm_head")
        return Config(
            dim=args["dim"],
            n_layers=args["n_layers"],
            n_heads=args["n_heads"],
            n_kv_heads=args.get("n_kv_heads") or 0,
            vocab_size=args["vocab_size"],
            max_seq_len=args["max_seq_len"],
            hidden_dim=tensors["layers.0.w_gate"].shape[0],
            norm_eps=args.get("norm_eps", 1e-5),
            tie_embeddings=head is None or np.array_equal(head, embed),
        )
    except KeyError as error:
        raise FormatError(f"{source}: {error.args[0]} is missing") from None
    except ConfigError as error:
        raise FormatError(f"{source}: {error}") from None
