"""Hugging Face Llama folders: config.json, safetensors (one file or shards), tokenizer files.

Spellings of transformers 4 and 5 are read, and both are written. Hugging Face pairs element i of a
head with element i + head_dim / 2 for the rotary embedding, a Checkpoint pairs 2i with 2i + 1: wq
and wk are permuted on the way.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config, RopeScaling
from ..errors import ArgumentError, ConfigError, FormatError, MissingExtraError
from ..files import PathLike, whole_folder
from .checkpoint import Checkpoint
from .dtypes import decode_tensor, encode_tensor
from .hf_tokenizer import load_tokenizer, padding_id, read_json, to_json, tokenizer_files

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "tok_embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
# safetensors' name of a dtype, ours, and the one of config.json
_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def load_hf(folder: PathLike) -> Checkpoint:
    """Read a Hugging Face folder of a Llama, with all weights as float32.

    Raises FormatError when a file is missing or damaged, when a tensor is missing, repeated,
    unknown or of the wrong shape, and when the model is no plain Llama: another architecture or
    activation, biases, partial rotary embedding, rotary scaling other than linear and llama3, a
    byte-level tokenizer. Raises MissingExtraError without the package safetensors.
    """
    folder = Path(folder)
    source = str(folder)
    fields = read_json(folder / "config.json")
    stored, dtypes = _read_tensors(folder)
    config = _read_config(fields, str(folder / "config.json"), len(stored))
    if config.tie_embeddings:
        stored.pop("lm_head.weight", None)  # some writers store the shared matrix twice
    tensors: dict[str, np.ndarray] = {}
    for name, shape in config.tensor_shapes().items():
        tensor = stored.pop(hf_name(name), None)
        if tensor is None:
            raise FormatError(f"{source}: tensor {hf_name(name)} is missing")
        if tensor.shape != shape:
            raise FormatError(
                f"{source}: tensor {hf_name(name)} has shape {tensor.shape}, expected {shape}"
            )
        tensors[name] = from_hf(name, tensor, config)
    for name in stored:
        if not name.endswith("rotary_emb.inv_freq"):  # a table that follows from the config
            raise FormatError(f"{source}: unknown tensor {name}")
    vocabulary = load_tokenizer(folder, fields)
    return Checkpoint(config, tensors, vocabulary, dtypes[_TOP_NAMES["tok_embed"]], source)


def save_hf(checkpoint: Checkpoint, folder: PathLike, dtype: str = "f32") -> None:
    """Write the checkpoint as a Hugging Face folder that transformers 4 and 5 load: config.json,
    generation_config.json, model.safetensors, tokenizer.model, tokenizer.json,
    tokenizer_config.json, special_tokens_map.json.

    All files appear at once, or none, in a new or empty folder (see
    :func:`tinyllama.files.whole_folder`). ``dtype``: "f32", "f16" or "bf16", of all tensors.

    Raises ArgumentError for another dtype, OSError when the folder is not empty or cannot be
    written, NonFiniteError when a weight is NaN or infinite or becomes so, FormatError when the
    tokenizer has no SentencePiece form.
    """
    if dtype not in _TORCH_DTYPES:
        raise ArgumentError(f"dtype is {dtype!r}; a Hugging Face folder takes f32, f16 or bf16")
    texts: dict[str, bytes] = tokenizer_files(checkpoint.vocabulary, checkpoint.config)
    texts["config.json"] = to_json(_config_fields(checkpoint, dtype))
    texts["generation_config.json"] = to_json(_generation_fields(checkpoint))
    with whole_folder(folder) as temporary:
        for name, data in texts.items():
            (temporary / name).write_bytes(data)
        _write_tensors(temporary / "model.safetensors", checkpoint, dtype)


def hf_name(name: str) -> str:
    """``layers.3.wq`` -> ``model.layers.3.self_attn.q_proj.weight``, and so on."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, layer, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.weight"


def from_hf(name: str, tensor: np.ndarray, config: Config) -> np.ndarray:
    """A Hugging Face model's tensor as a Checkpoint holds the one of that ``name``."""
    return _to_interleaved(tensor, config) if name.endswith((".wq", ".wk")) else tensor


def _to_interleaved(tensor: np.ndarray, config: Config) -> np.ndarray:
    """Rows of each head from (first halves, second halves) to pairs."""
    half = config.head_dim // 2
    heads = tensor.reshape(-1, 2, half, tensor.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(tensor.shape)


def _to_halves(tensor: np.ndarray, config: Config) -> np.ndarray:
    half = config.head_dim // 2
    heads = tensor.reshape(-1, half, 2, tensor.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(tensor.shape)


# --- config.json --------------------------------------------------------------------------------


def _read_config(fields: dict[str, Any], source: str, n_tensors: int) -> Config:
    _refuse_what_is_no_llama(fields, source)
    rope = _rope_fields(fields, source)
    n_layers = fields.get("num_hidden_layers", 32)
    if isinstance(n_layers, int) and n_layers > n_tensors:  # before anything is made per layer
        raise FormatError(f"{source}: num_hidden_layers is {n_layers}, but tensors {n_tensors}")
    try:
        return Config(
            dim=fields.get("hidden_size", 4096),
            n_layers=n_layers,
            n_heads=fields.get("num_attention_heads", 32),
            vocab_size=fields.get("vocab_size", 32000),
            max_seq_len=fields.get("max_position_embeddings", 2048),
            n_kv_heads=_given(fields, "num_key_value_heads", 0),
            head_dim=_given(fields, "head_dim", 0),
            hidden_dim=_given(fields, "intermediate_size", 11008),
            rope_theta=_number(rope, "rope_theta", 10000.0),
            rope_scaling=_rope_scaling(rope, source),
            norm_eps=_number(fields, "rms_norm_eps", 1e-6),
            tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        )
    except (ConfigError, OverflowError) as error:
        raise FormatError(f"{source}: {error}") from None


def _number(fields: dict[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} is {value!r}; it must be a number")
    return float(value)


def _given(fields: dict[str, Any], name: str, default: int) -> Any:
    """A size that may be null or absent but not zero: Config would derive one for a zero."""
    value = fields.get(name)
    if value is None:
        return default
    if value == 0:
        raise ConfigError(f"{name} is 0")
    return value


def _refuse_what_is_no_llama(fields: dict[str, Any], source: str) -> None:
    kind = fields.get("model_type", "llama")
    architectures = fields.get("architectures") or ["LlamaForCausalLM"]
    is_list = isinstance(architectures, list)
    if kind != "llama" or not is_list or "LlamaForCausalLM" not in architectures:
        raise FormatError(
            f"{source}: model_type is {kind!r} and architectures {architectures};"
            " only 'llama' with LlamaForCausalLM is supported"
        )
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise FormatError(f"{source}: hidden_act is {fields['hidden_act']!r}, only 'silu' works")
    for name in ("attention_bias", "mlp_bias"):
        if fields.get(name):
            raise FormatError(f"{source}: {name} is true; biases are not supported")
    if fields.get("quantization_config"):
        raise FormatError(f"{source}: quantization_config is set; only plain weights are read")


def _rope_fields(fields: dict[str, Any], source: str) -> dict[str, Any]:
    """rope_theta and the scaling in one dict, whichever version of transformers wrote them."""
    rope = {"rope_theta": fields.get("rope_theta", 10000.0)}
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.get(name) or {}
        if not isinstance(value, dict):
            raise FormatError(f"{source}: {name} is {value!r}, expected an object")
        rope |= value
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise FormatError(f"{source}: partial_rotary_factor is {partial}, only 1 is supported")
    return rope


def _rope_scaling(rope: dict[str, Any], source: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise FormatError(f"{source}: rope_type is {kind!r}; known: 'default', 'linear', 'llama3'")
    names = {"factor": "factor"}
    if kind == "llama3":
        names |= {
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_max_seq_len",
        }
    for name in names:
        if isinstance(rope.get(name), bool) or not isinstance(rope.get(name), (int, float)):
            raise FormatError(f"{source}: {kind} rope scaling needs a number {name}")
    values = {ours: rope[name] for name, ours in names.items()}
    return RopeScaling(kind, **values)


def _config_fields(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": config.rope_scaling.kind, "factor": config.rope_scaling.factor}
        if config.rope_scaling.kind == "llama3":
            scaling |= {
                "low_freq_factor": config.rope_scaling.low_freq_factor,
                "high_freq_factor": config.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
            }
    parameters = scaling or {"rope_type": "default"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**parameters, "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": padding_id(vocabulary),
        "torch_dtype": _TORCH_DTYPES[dtype],
        "dtype": _TORCH_DTYPES[dtype],
    }


def _generation_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    ids = checkpoint.vocabulary
    return {
        "bos_token_id": ids.bos_id,
        "eos_token_id": ids.eos_id,
        "pad_token_id": padding_id(ids),
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 0.9,
        "max_length": checkpoint.config.max_seq_len,
    }


# --- safetensors --------------------------------------------------------------------------------


def _read_tensors(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Name -> float32 array, and name -> the dtype it was stored in, of one file or all shards."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    weight_map: dict[str, str] = {}
    if single.is_file():
        files = [single]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map", {})
        is_map = isinstance(weight_map, dict)
        names = sorted({str(name) for name in weight_map.values()}) if is_map else []
        if not names or any(Path(name).name != name for name in names):
            raise FormatError(f"{index}: weight_map names no files of this folder")
        files = [folder / name for name in names]
    else:
        raise FormatError(
            f"{folder}: neither model.safetensors nor model.safetensors.index.json is there"
            " (pickled pytorch_model.bin files are not read: loading one can run any code)"
        )
    tensors: dict[str, np.ndarray] = {}
    dtypes: dict[str, str] = {}
    for file in files:
        for name, dtype, tensor in _read_safetensors(file):
            if name in tensors:
                raise FormatError(f"{file}: tensor {name} is in another file too")
            tensors[name], dtypes[name] = tensor, dtype
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise FormatError(f"{folder / file_name}: tensor {name} is missing")
    return tensors, dtypes


def _read_safetensors(path: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Each tensor's name, dtype ("f32", "f16", "bf16") and values as float32."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingExtraError("safetensors", "convert") from None
    try:
        with safe_open(path, framework="np"):
            pass  # the library has checked every size and offset; its numpy side lacks bf16
    except SafetensorError as error:
        raise FormatError(f"{path}: not a safetensors file, or damaged: {error}") from None
    with open(path, "rb") as stream:
        (n_bytes,) = struct.unpack("<Q", stream.read(8))
        header = _unrepeated(stream.read(n_bytes), path)
        start = 8 + n_bytes
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                raise FormatError(f"{path}: tensor {name} is {entry['dtype']}; known: F32 F16 BF16")
            begin, end = entry["data_offsets"]
            stream.seek(start + begin)
            data = np.fromfile(stream, np.uint8, end - begin)
            dtype = _DTYPES[entry["dtype"]]
            yield name, dtype, decode_tensor(data, dtype).reshape(entry["shape"])


def _unrepeated(header: bytes, path: Path) -> dict[str, Any]:
    """The header as a dict; a name that comes twice is an error, JSON would take the last."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise FormatError(f"{path}: tensor {twice} is there twice")
        return dict(items)

    content: dict[str, Any] = json.loads(header, object_pairs_hook=pairs)
    return content


def _write_tensors(path: Path, checkpoint: Checkpoint, dtype: str) -> None:
    """A safetensors file: length of the header, header as JSON, then the data, 8-aligned."""
    width = 4 if dtype == "f32" else 2
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in checkpoint.tensors.items():
        begin, end = end, end + tensor.size * width
        kind = dtype.upper()
        offsets = [begin, end]
        header[hf_name(name)] = {"dtype": kind, "shape": tensor.shape, "data_offsets": offsets}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(head)) + head)
        for name, tensor in checkpoint.tensors.items():
            if name.endswith((".wq", ".wk")):
                tensor = _to_halves(tensor, checkpoint.config)
            data = encode_tensor(tensor, dtype, f"{checkpoint.source}: tensor {name}")
            stream.write(data)
