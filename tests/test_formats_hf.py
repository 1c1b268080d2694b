"""Hugging Face folders: there and back, against transformers, and damaged in every way."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from random_models import random_checkpoint, random_config, tiny_checkpoint
from tinyllama.config import RopeScaling
from tinyllama.errors import FormatError
from tinyllama.formats import read_checkpoint
from tinyllama.formats.dtypes import decode_tensor, encode_tensor
from tinyllama.formats.gguf import gguf_bytes
from tinyllama.formats.hf import load_hf, save_hf
from tinyllama.reference import forward

pytest.importorskip("safetensors", reason="needs the extra convert")


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def damaged_tensors(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a safetensors file's header; ``change`` returns the new one, or its text."""
    data = path.read_bytes()
    (n,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + n])
    header = change(header) or header
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + n :])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_hf(tiny_checkpoint(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_random_models_there_and_back(tmp_path: Path, dtype: str) -> None:
    for seed in range(15):
        rng = np.random.default_rng(seed)
        checkpoint = random_checkpoint(random_config(rng), rng)
        save_hf(checkpoint, tmp_path / str(seed), dtype)
        back = load_hf(tmp_path / str(seed))
        assert back.config == checkpoint.config
        assert back.dtype == dtype
        for name, tensor in checkpoint.tensors.items():
            data = np.frombuffer(encode_tensor(tensor, dtype, name), np.uint8)
            rounded = decode_tensor(data, dtype).reshape(tensor.shape)
            np.testing.assert_array_equal(back.tensors[name], rounded)
        for field in dataclasses.fields(back.vocabulary):
            found = getattr(back.vocabulary, field.name)
            np.testing.assert_array_equal(found, getattr(checkpoint.vocabulary, field.name))


def test_only_a_new_or_empty_folder_is_written(tmp_path: Path) -> None:
    foreign, empty = tmp_path / "foreign", tmp_path / "empty"
    foreign.mkdir()
    empty.mkdir()
    (foreign / "config.json").write_text("another program's")
    with pytest.raises(FileExistsError, match="foreign: the folder is not empty"):
        save_hf(tiny_checkpoint(1), foreign)
    assert (foreign / "config.json").read_text() == "another program's"
    save_hf(tiny_checkpoint(1), empty)
    want = tiny_checkpoint(1).tensors["tok_embed"]
    np.testing.assert_array_equal(load_hf(empty).tensors["tok_embed"], want)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "foreign"]


# --- against transformers -----------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "head_dim": {"head_dim": 24},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


def transformers_model(variant: str) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    values = {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.LlamaConfig(**(values | VARIANTS[variant]))
    return transformers.LlamaForCausalLM(config).eval()


def add_tokenizer(folder: Path, source: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())


def spell_as_v4(folder: Path) -> None:
    """The fields of transformers 5's config.json as transformers 4 wrote them."""
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    scaling = {"type": rope.pop("rope_type"), **rope}
    fields = {"rope_theta": theta, "torch_dtype": "float32"}
    if scaling["type"] != "default":
        fields["rope_scaling"] = scaling
    edit(folder / "config.json", rope_parameters=None, dtype=None, **fields)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["v5", "v4", "sharded"])
def test_what_transformers_saves(tmp_path: Path, folder: Path, variant: str, form: str) -> None:
    import torch

    model = transformers_model(variant)
    saved = tmp_path / "saved"
    model.save_pretrained(saved, max_shard_size="40KB" if form == "sharded" else "5GB")
    assert (saved / "model.safetensors.index.json").exists() == (form == "sharded")
    add_tokenizer(saved, folder)
    if form == "v4":
        spell_as_v4(saved)
    checkpoint = load_hf(saved)
    tokens = np.random.default_rng(0).integers(0, 300, 60).tolist()
    with torch.no_grad():
        want = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(forward(checkpoint, tokens), want, atol=1e-4)


def test_bf16_of_transformers(tmp_path: Path, folder: Path) -> None:
    import torch

    model = transformers_model("plain").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    add_tokenizer(tmp_path / "saved", folder)
    checkpoint = load_hf(tmp_path / "saved")
    assert checkpoint.dtype == "bf16"
    want = model.model.embed_tokens.weight.detach().float().numpy()
    np.testing.assert_array_equal(checkpoint.tensors["tok_embed"], want)


def random_texts(n: int) -> list[str]:
    rng = random.Random(0)
    letters = " \u2581\n\tabetaoinshAB.é日😀\u3000"
    texts = ["".join(rng.choices(letters, k=rng.randint(0, 20))) for _ in range(n)]
    return ["", " ", "  ", "the rain  in the  shed ", *texts]


@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_tokenizer_json_encodes_as_sentencepiece(
    tmp_path: Path, collapse: bool, prefix: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    sentencepiece = pytest.importorskip("sentencepiece")
    import tinyllama

    checkpoint = tiny_checkpoint()
    vocabulary = dataclasses.replace(
        checkpoint.vocabulary, add_space_prefix=prefix, remove_extra_whitespaces=collapse
    )
    checkpoint = dataclasses.replace(checkpoint, vocabulary=vocabulary)
    save_hf(checkpoint, tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "model" / "tokenizer.model")
    )
    (tmp_path / "model" / "tokenizer.model").unlink()
    ours = tinyllama.load(gguf_bytes(load_hf(tmp_path / "model"))).tokenizer
    for text in random_texts(400):
        want = pieces.encode(text)
        assert theirs.encode(text) == [1, *want], repr(text)
        assert ours.encode(text, bos=False) == want, repr(text)
        if not collapse:  # then sentencepiece drops literal U+2581 at the front as well
            space = " " if prefix and text else ""
            assert theirs.decode(want) == space + pieces.decode(want), repr(text)


def test_tokenizer_json_that_transformers_writes(tmp_path: Path, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import tinyllama

    pipeline = json.loads((folder / "tokenizer.json").read_text())
    merges = [tuple(pair) for pair in pipeline["model"]["merges"]]
    theirs = transformers.LlamaTokenizer(vocab=pipeline["model"]["vocab"], merges=merges)
    theirs.save_pretrained(tmp_path / "saved")
    (folder / "tokenizer.model").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / "saved" / name).read_bytes())
    checkpoint = load_hf(folder)
    ours = tinyllama.load(gguf_bytes(checkpoint)).tokenizer
    for text in random_texts(300):
        if text.startswith((" ", "\u2581")):
            continue  # Metaspace puts no second space there, SentencePiece does
        want = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, bos=False) == want, repr(text)


def test_added_tokens_extend_the_vocabulary(tmp_path: Path) -> None:
    base = tiny_checkpoint()
    save_hf(base, tmp_path / "base")
    save_hf(tiny_checkpoint(vocab_size=302), tmp_path / "model")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tmp_path / "base" / name).read_bytes())
    with pytest.raises(FormatError, match="has 300 tokens, the model's vocab_size is 302"):
        load_hf(tmp_path / "model")
    entries = {"300": {"content": "<pad>", "special": True}, "301": {"content": "Mia"}}
    edit(tmp_path / "model" / "tokenizer_config.json", added_tokens_decoder=entries)
    edit(tmp_path / "model" / "config.json", pad_token_id=300)
    vocabulary = load_hf(tmp_path / "model").vocabulary
    assert vocabulary.pieces[300:] == ("<pad>", "Mia")
    assert vocabulary.types[300:].tolist() == [3, 4]
    assert vocabulary.pad_id == 300


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs a number factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 0}, "n_heads is 0"),
        ({"num_attention_heads": -4}, "n_heads is -4"),
        ({"num_key_value_heads": 3}, r"n_heads \(4\) is not divisible by n_kv_heads \(3\)"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"hidden_size": "32"}, "dim is '32'"),
        ({"hidden_size": 48}, r"has shape \(300, 32\), expected \(300, 48\)"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers is 2147483647"),
        ({"num_hidden_layers": 3}, "layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "unknown tensor model.layers.1"),
        ({"architectures": 5}, "architectures 5"),
        ({"rms_norm_eps": -1.0}, "norm_eps is -1.0"),
        ({"rms_norm_eps": []}, r"rms_norm_eps is \[\]"),
        ({"rms_norm_eps": 10**400}, "too large"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x'"),
        ({"eos_token_id": 300}, "eos_id is 300, outside the 300 tokens"),
    ],
)
def test_config_that_is_no_llama(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(FormatError, match=message):
        load_hf(folder)


def test_eos_may_be_a_list(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=[5, 2])
    assert load_hf(folder).vocabulary.eos_id == 5


def test_config_that_is_no_json(folder: Path) -> None:
    for text in ("", "{", "[]", "\xff"):
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(FormatError, match=r"config\.json"):
            load_hf(folder)


def test_tensor_missing(folder: Path) -> None:
    folder = folder.with_name("untied")
    save_hf(tiny_checkpoint(tie_embeddings=False), folder)
    damaged = folder / "model.safetensors"

    def rename(header: dict[str, Any]) -> None:
        header["other.weight"] = header.pop("lm_head.weight")

    damaged_tensors(damaged, rename)
    with pytest.raises(FormatError, match=r"lm_head\.weight is missing"):
        load_hf(folder)


def test_tensor_twice_in_a_file(folder: Path) -> None:
    def repeat(header: dict[str, Any]) -> str:
        text = json.dumps(header)
        return text.replace("model.layers.1.self_attn.k_proj", "model.layers.0.self_attn.k_proj")

    damaged_tensors(folder / "model.safetensors", repeat)
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        load_hf(folder)


def test_tensor_twice_at_the_same_place(folder: Path) -> None:
    # The library lets a repeated name pass when both entries say the same.
    def repeat(header: dict[str, Any]) -> str:
        name = "model.norm.weight"
        return json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"

    damaged_tensors(folder / "model.safetensors", repeat)
    with pytest.raises(FormatError, match=r"model\.norm\.weight is there twice"):
        load_hf(folder)


def test_tensor_in_two_shards(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "a.safetensors").write_bytes(data)
    (folder / "b.safetensors").write_bytes(data)
    weight_map = {"model.norm.weight": "a.safetensors", "other": "b.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError, match="is in another file too"):
        load_hf(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(FormatError, match="names no files of this folder"):
        load_hf(folder)
    index.write_text(json.dumps({"weight_map": ["a.safetensors"]}))
    with pytest.raises(FormatError, match="names no files of this folder"):
        load_hf(folder)
    index.write_text(json.dumps({"weight_map": {"lost.weight": "a.safetensors"}}))
    with pytest.raises(FormatError, match=r"a\.safetensors: tensor lost\.weight is missing"):
        load_hf(folder)


def test_tensor_of_another_dtype(folder: Path) -> None:
    def integers(header: dict[str, Any]) -> None:
        header["model.norm.weight"]["dtype"] = "I32"

    damaged_tensors(folder / "model.safetensors", integers)
    with pytest.raises(FormatError, match=r"model\.norm\.weight is I32"):
        load_hf(folder)


def test_truncated_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (n,) = struct.unpack_from("<Q", data)
    for size in [*range(0, 8 + n, 37), 8 + n, 8 + n + 1, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            load_hf(folder)


def test_tied_model_that_stores_its_output_matrix_too(folder: Path) -> None:
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    checkpoint = load_hf(folder)
    assert checkpoint.config.tie_embeddings
    assert "lm_head" not in checkpoint.tensors


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FormatError, match=r"neither model\.safetensors nor"):
        load_hf(folder)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        load_hf(folder)


def change_pipeline(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    (folder / "tokenizer.model").unlink()
    pipeline = json.loads((folder / "tokenizer.json").read_text())
    change(pipeline)
    (folder / "tokenizer.json").write_text(json.dumps(pipeline))


def byte_level(pipeline: dict[str, Any]) -> None:
    pipeline["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}


def unigram(pipeline: dict[str, Any]) -> None:
    pipeline["model"] = {"type": "Unigram", "vocab": []}


def lower_case(pipeline: dict[str, Any]) -> None:
    pipeline["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})


def merge_lost(pipeline: dict[str, Any]) -> None:
    pipeline["model"]["merges"].pop(3)


def merge_of_nothing(pipeline: dict[str, Any]) -> None:
    pipeline["model"]["merges"].append(["q", "qqq"])


def byte_lost(pipeline: dict[str, Any]) -> None:
    vocab = pipeline["model"]["vocab"]
    vocab["other"] = vocab.pop("<0x41>")


def gap(pipeline: dict[str, Any]) -> None:
    pipeline["model"]["vocab"]["far"] = 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (byte_level, "byte-level BPE tokenizer"),
        (unigram, "model type is 'Unigram'"),
        (lower_case, "Lowercase.* is not of SentencePiece's kind"),
        (merge_lost, "make a token but no merge lists them"),
        (merge_of_nothing, "is not of tokens into a token"),
        (byte_lost, "<0x41> is missing"),
        (gap, "ids are not 0 to"),
    ],
)
def test_tokenizer_json_of_another_kind(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change_pipeline(folder, change)
    with pytest.raises(FormatError, match=rf"tokenizer\.json.*{message}"):
        load_hf(folder)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tokenizer.json", {"model": 5}),
        ("tokenizer.json", {"model": {"vocab": [], "merges": []}}),
        ("tokenizer.json", {"model": {"vocab": {"a": {}}, "merges": []}}),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}, "merges": [3]}}),
        ("tokenizer.json", {"normalizer": "x"}),
        ("tokenizer.json", {"post_processor": {"single": {}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 0}]}),
        ("tokenizer.json", {"added_tokens": [{"id": float("nan"), "content": "a"}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": []}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": 1}}),
    ],
    ids=str,
)
def test_tokenizer_files_of_another_layout(folder: Path, name: str, fields: dict[str, Any]) -> None:
    (folder / "tokenizer.model").unlink()
    edit(folder / name, **fields)
    with pytest.raises(FormatError, match=re.escape(str(folder / name))):
        load_hf(folder)


def test_rope_scaling_is_written_in_both_spellings(tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    checkpoint = tiny_checkpoint(rope_scaling=scaling, rope_theta=500000.0)
    for kept in ("rope_scaling", "rope_parameters"):
        save_hf(checkpoint, tmp_path / kept)
        if kept == "rope_scaling":
            edit(tmp_path / kept / "config.json", rope_parameters=None)
        else:
            edit(tmp_path / kept / "config.json", rope_scaling=None, rope_theta=None)
        assert load_hf(tmp_path / kept).config == checkpoint.config


def test_folder_is_recognised(folder: Path, tmp_path: Path) -> None:
    assert read_checkpoint(folder).config == tiny_checkpoint().config
    with pytest.raises(FormatError, match="give the folder it lies in"):
        read_checkpoint(folder / "model.safetensors")
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(FormatError, match=r"a folder without config\.json is no model"):
        read_checkpoint(run)
    folder.rename(run / "step-7")
    (run / "LATEST").write_text("step-7\n")
    assert read_checkpoint(run).source == str(run / "step-7")
    (run / "BEST").write_text("step-8\n")
    with pytest.raises(FormatError, match="names 'step-8', which is no checkpoint here"):
        read_checkpoint(run)
