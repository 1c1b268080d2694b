"""Adapters made with peft, LoRA and its kin, merged into the model they were trained on.

What an adapter's many options mean is peft's to say, so peft merges. Whether the result is a plain
Llama that computes the same is checked here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError, FormatError, MissingExtraError
from ..files import PathLike
from .checkpoint import Checkpoint
from .hf import from_hf, hf_name, load_hf
from .hf_tokenizer import read_json

WEIGHTS = "adapter_model.safetensors"
MAX_DIFFERENCE = 1e-4  # of the largest logit: float32 in another order
N_TOKENS = 24


def load_adapter(folder: PathLike, base: PathLike | None = None) -> Checkpoint:
    """The model that the adapter in ``folder`` makes of ``base``, as float32.

    ``base``: the Hugging Face folder it was trained on; None: the one that its
    adapter_config.json names.

    Raises FormatError when a file is missing or damaged, when the adapter does not fit its base, is
    of a kind that peft cannot merge or for another task than CAUSAL_LM; ExportError when the merged
    tensors do not compute what base and adapter compute together, as where only one of two tied
    matrices was trained; MissingExtraError without peft, transformers or torch.
    """
    folder = Path(folder)
    settings = read_json(folder / "adapter_config.json")
    where = _base_folder(folder, settings, base)
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise FormatError(
            f"{folder / 'adapter_config.json'}: task_type is {settings['task_type']!r};"
            " only CAUSAL_LM leaves a model that continues text"
        )
    if not (folder / WEIGHTS).is_file():  # peft would look for it elsewhere
        raise FormatError(f"{folder}: {WEIGHTS} is missing")
    checkpoint = load_hf(where)
    config = checkpoint.config
    n_tokens = min(N_TOKENS, config.max_seq_len)
    tokens = [i * (config.vocab_size - 1) // n_tokens for i in range(n_tokens)]
    state, logits = _merge(folder, where, tokens)
    tensors = {name: from_hf(name, state[hf_name(name)], config) for name in checkpoint.tensors}
    merged = replace(checkpoint, tensors=tensors, source=str(folder))
    _compare(merged, tokens, logits)
    return merged


def _base_folder(folder: Path, settings: dict[str, Any], base: PathLike | None) -> Path:
    where = Path(base if base is not None else str(settings.get("base_model_name_or_path")))
    if (where / "config.json").is_file():
        return where
    if base is not None:
        raise FormatError(f"{where}: the adapter's base has to be a Hugging Face folder")
    raise FormatError(
        f"{folder / 'adapter_config.json'}: base_model_name_or_path is {str(where)!r}, which is no"
        " Hugging Face folder here; name the model it was trained on (--base)"
    )


def _merge(
    folder: Path, where: Path, tokens: list[int]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The merged model's tensors, and the logits of ``tokens`` before merging."""
    try:
        import peft
        import torch
        from safetensors import safe_open
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtraError(error.name or "peft", "finetune") from None
    base = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    try:
        adapted = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    except Exception as error:  # peft has no class of its own for a bad adapter
        lines = [line.strip() for line in str(error).splitlines()]
        told = " ".join(lines[:2]) + (f" (and {len(lines) - 2} lines more)" if lines[2:] else "")
        raise FormatError(f"{folder}: peft cannot put it onto {where}: {told}") from None
    if not hasattr(adapted, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise FormatError(f"{folder}: adapters of kind {kind} cannot be merged")
    with safe_open(folder / WEIGHTS, framework="np") as file:
        odd = set(file.keys()) ^ set(peft.get_peft_model_state_dict(adapted))
    if odd:
        raise FormatError(f"{folder / WEIGHTS}: {min(odd)} is missing, or nothing of {where}")
    with torch.no_grad():
        logits: np.ndarray = adapted(torch.tensor([tokens])).logits[0].numpy()
        state = adapted.merge_and_unload().state_dict()
    return {name: tensor.numpy() for name, tensor in state.items()}, logits


def _compare(merged: Checkpoint, tokens: list[int], expected: np.ndarray) -> None:
    from ..reference import forward

    difference = np.abs(forward(merged, tokens) - expected).max()
    if not difference <= MAX_DIFFERENCE * np.abs(expected).max():
        raise ExportError(
            f"{merged.source}: merged, it computes something else (logits differ by"
            f" {difference:.3g}); does it train lm_head or the embedding of a model that ties them?"
        )
