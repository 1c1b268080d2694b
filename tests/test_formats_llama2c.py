"""llama2.c's files: there and back, the real ones, and damaged in every way."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest

from random_models import byte_vocabulary, random_checkpoint, random_config, tiny_checkpoint
from tinyllama.config import RopeScaling
from tinyllama.errors import ArgumentError, FormatError, NonFiniteError
from tinyllama.formats import read_checkpoint
from tinyllama.formats.checkpoint import Checkpoint
from tinyllama.formats.llama2c import FIELDS, read_llama2c, read_tokenizer_bin, write_llama2c
from tinyllama.formats.sentencepiece import save_sentencepiece


def plain_checkpoint(seed: int) -> Checkpoint:
    """A random model of a shape that llama2.c's format can tell."""
    rng = np.random.default_rng(seed)
    config = random_config(rng)
    config = dataclasses.replace(
        config,
        dim=config.n_heads * config.head_dim,
        rope_theta=10000.0,
        rope_scaling=None,
        norm_eps=1e-5,
    )
    return random_checkpoint(config, rng)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_llama2c(tiny_checkpoint(), tmp_path / "model.bin", 1)
    return tmp_path / "model.bin"


@pytest.mark.parametrize("version", [0, 1, 2])
def test_random_models_there_and_back(tmp_path: Path, version: int) -> None:
    for seed in range(20):
        checkpoint = plain_checkpoint(seed)
        path = tmp_path / str(seed) / "model.bin"
        path.parent.mkdir()
        write_llama2c(checkpoint, path, version)
        back = read_checkpoint(path)
        assert back.config == checkpoint.config
        assert back.dtype == ("q8_0" if version == 2 else "f32")
        assert back.vocabulary.pieces == checkpoint.vocabulary.pieces
        np.testing.assert_array_equal(back.vocabulary.scores, checkpoint.vocabulary.scores)
        np.testing.assert_array_equal(back.vocabulary.types, checkpoint.vocabulary.types)
        for name, tensor in checkpoint.tensors.items():
            close = 0.501 / 127 * np.abs(tensor).max() if version == 2 and tensor.ndim == 2 else 0
            np.testing.assert_allclose(back.tensors[name], tensor, rtol=0, atol=close)


def test_int8_groups_divide_every_row(tmp_path: Path) -> None:
    write_llama2c(tiny_checkpoint(dim=64, head_dim=16, hidden_dim=172), tmp_path / "model.bin", 2)
    data = (tmp_path / "model.bin").read_bytes()
    assert struct.unpack_from("<i", data, 37) == (4,)


def test_real_files_are_written_to_the_byte(shared: Path, tmp_path: Path) -> None:
    folder = shared / "weights" / "stories260k"
    checkpoint = read_llama2c(folder / "stories260K.bin")
    write_llama2c(checkpoint, tmp_path / "v1.bin", 1)
    assert (tmp_path / "v1.bin").read_bytes() == (folder / "stories260K_v1.bin").read_bytes()
    assert (tmp_path / "tokenizer.bin").read_bytes() == (folder / "tok512.bin").read_bytes()
    write_llama2c(checkpoint, tmp_path / "v0.bin", 0)
    ours, theirs = (
        np.fromfile(p, "<f4") for p in (tmp_path / "v0.bin", folder / "stories260K.bin")
    )
    np.testing.assert_allclose(ours[7:], theirs[7:], rtol=0, atol=3e-6)  # tables by another libm
    assert read_tokenizer_bin(folder / "tok512.bin").pieces == checkpoint.vocabulary.pieces


@pytest.mark.parametrize(
    ("name", "group"), [("stories260K_q80_Ciroha.bin", 32), ("stories260K-q8_ruhai.bin", 8)]
)
def test_real_int8_files_whose_groups_straddle_rows(shared: Path, name: str, group: int) -> None:
    reason = rf"groups of {group} do not divide hidden_dim \(172\).*groups of 4"
    with pytest.raises(FormatError, match=reason):
        read_llama2c(shared / "weights" / "stories260k" / name)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1, 2])
def test_truncated_at_every_byte_of_the_header(tmp_path: Path, version: int) -> None:
    path = tmp_path / "model.bin"
    write_llama2c(tiny_checkpoint(), path, version)
    data = path.read_bytes()
    header = 28 if version == 0 else 256
    for size in [*range(header + 1), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match=r"model\.bin"):
            read_checkpoint(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(FormatError, match=f"{len(data) + 1} bytes, but its header"):
        read_checkpoint(path)


NO_DIMENSIONS = [
    (version, field, value)
    for version in (0, 1)
    for field in FIELDS
    for value in (0, -1, -(2**31), 2**31 - 1)
    # v1 stores nothing per position, so any context is consistent with the file.
    if (version, field, value) != (1, "max_seq_len", 2**31 - 1)
]


@pytest.mark.parametrize(("version", "field", "value"), NO_DIMENSIONS)
def test_dimensions_that_are_no_models(
    tmp_path: Path, version: int, field: str, value: int
) -> None:
    path = tmp_path / "model.bin"
    write_llama2c(tiny_checkpoint(), path, version)
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, FIELDS.index(field) * 4 + (0 if version == 0 else 8), value)
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"model\.bin.*") as raised:
        read_checkpoint(path)
    if value <= 0 and not (version == 0 and field == "vocab_size" and value == -1):
        assert field in str(raised.value)


def test_heads_that_do_not_divide(tmp_path: Path, model: Path) -> None:
    data = bytearray(model.read_bytes())
    struct.pack_into("<i", data, 8 + 4 * FIELDS.index("n_kv_heads"), 3)
    model.write_bytes(data)
    with pytest.raises(FormatError, match=r"n_heads \(4\) is not divisible by n_kv_heads \(3\)"):
        read_checkpoint(model)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (4, "<i", 3, "version is 3"),
        (4, "<i", -1, "version is -1"),
        (36, "<B", 7, "shared_classifier is 7"),
        (37, "<i", 0, "group_size is 0"),
        (37, "<i", -32, "group_size is -32"),
        (37, "<i", 64, r"groups of 64 do not divide dim \(32\)"),
        (37, "<i", 16, "bytes, but its header"),
    ],
)
def test_header_fields(tmp_path: Path, offset: int, layout: str, value: int, message: str) -> None:
    path = tmp_path / "model.bin"
    write_llama2c(tiny_checkpoint(), path, 2)
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, offset, value)
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        read_checkpoint(path)


def test_unknown_format(tmp_path: Path) -> None:
    for name, data in {"a.txt": b"Once upon a time", "b.gguf": b"", "c.onnx": bytes(400)}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormatError, match="unknown format"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(FormatError, match="unknown format"):
        read_checkpoint(b"nonsense")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "missing.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 6}, "cannot tell head_dim 6"),
        ({"rope_theta": 500000.0}, "cannot tell rope_theta"),
        ({"norm_eps": 1e-6}, "cannot tell norm_eps"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, "cannot tell rope_scaling"),
    ],
)
def test_models_the_format_cannot_tell(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        write_llama2c(tiny_checkpoint(**change), tmp_path / "model.bin")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    checkpoint.tensors["layers.0.wo"][0, 0] = np.nan  # type: ignore[index]
    with pytest.raises(NonFiniteError, match=r"layers\.0\.wo"):
        write_llama2c(checkpoint, tmp_path / "model.bin")
    assert not list(tmp_path.iterdir())


def test_unknown_version(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="version is 3"):
        write_llama2c(tiny_checkpoint(), tmp_path / "model.bin", 3)


# --- tokenizers ---------------------------------------------------------------------------------


def test_no_tokenizer_beside(model: Path) -> None:
    (model.parent / "tokenizer.bin").unlink()
    with pytest.raises(FormatError, match=r"none beside it fits.*pass tokenizer="):
        read_checkpoint(model)
    with pytest.raises(FormatError, match="pass tokenizer="):
        read_checkpoint(model.read_bytes())


def test_the_only_tokenizer_that_fits(model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.bin").rename(tmp_path / "tok300.bin")
    (tmp_path / "other.model").write_bytes(save_sentencepiece(byte_vocabulary(290)))
    assert len(read_checkpoint(model).vocabulary) == 300
    # The same tokenizer in both forms is one tokenizer.
    (tmp_path / "tok300.model").write_bytes(save_sentencepiece(byte_vocabulary(300)))
    assert len(read_checkpoint(model).vocabulary) == 300
    (tmp_path / "second.model").write_bytes(save_sentencepiece(byte_vocabulary(300)))
    with pytest.raises(FormatError, match=r"several beside it fit.*second"):
        read_checkpoint(model)
    assert len(read_checkpoint(model, tokenizer=tmp_path / "second.model").vocabulary) == 300
    by_bytes = read_checkpoint(model.read_bytes(), tokenizer=tmp_path / "tok300.bin")
    assert len(by_bytes.vocabulary) == 300


@pytest.mark.parametrize("name", ["other.model", "other.bin"])
def test_tokenizer_of_another_size(model: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    write_llama2c(tiny_checkpoint(vocab_size=290), folder / "model.bin")
    (folder / "tokenizer.bin").rename(tmp_path / "other.bin")
    (tmp_path / "other.model").write_bytes(save_sentencepiece(byte_vocabulary(290)))
    with pytest.raises(FormatError, match="has 290 tokens, the model's vocab_size is 300"):
        read_checkpoint(model, tokenizer=tmp_path / name)


def test_tokenizer_given_for_a_file_that_holds_one(tmp_path: Path) -> None:
    from tinyllama.formats.gguf import gguf_bytes

    with pytest.raises(ArgumentError, match="this format holds its own"):
        read_checkpoint(gguf_bytes(tiny_checkpoint()), tokenizer=tmp_path / "tokenizer.bin")


def test_another_tokenizer_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    before = (tmp_path / "tokenizer.bin").read_bytes()
    with pytest.raises(ArgumentError, match="is another model's tokenizer"):
        write_llama2c(tiny_checkpoint(vocab_size=290), tmp_path / "second.bin")
    assert (tmp_path / "tokenizer.bin").read_bytes() == before
    assert not (tmp_path / "second.bin").exists()


def test_tokenizer_bin_truncated_at_every_byte(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    data = path.read_bytes()
    for size in [*range(60), *range(60, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match=r"tokenizer\.bin"):
            read_checkpoint(model)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (8, "<i", -1, "token 0 has length -1"),
        (8, "<i", 2**31 - 1, "token 0 has length 2147483647"),
        (0, "<I", 3, r"token 0 has length 5, outside \[0, 3\]"),
        (4, "<f", float("nan"), "score of token 0 is nan"),
        (12, "<B", 0xFF, "token 0 is not UTF-8"),
    ],
)
def test_damaged_tokenizer_bin(
    model: Path, tmp_path: Path, offset: int, layout: str, value: float, message: str
) -> None:
    path = tmp_path / "tokenizer.bin"
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, offset, value)
    path.write_bytes(data)
    with pytest.raises(FormatError, match=rf"tokenizer\.bin.*{message}"):
        read_checkpoint(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bos_id": 2, "eos_id": 1}, r"not \(0, 2, 1\)"),
        ({"add_space_prefix": False}, "always puts a space before the text"),
    ],
)
def test_tokenizers_the_format_cannot_tell(tmp_path: Path, change: dict, message: str) -> None:
    checkpoint = tiny_checkpoint()
    vocabulary = dataclasses.replace(checkpoint.vocabulary, **change)
    with pytest.raises(FormatError, match=message):
        write_llama2c(dataclasses.replace(checkpoint, vocabulary=vocabulary), tmp_path / "m.bin")
    assert not list(tmp_path.iterdir())


# --- checkpoints of its trainer -----------------------------------------------------------------

PT_NAMES = {
    "attn_norm": "attention_norm",
    "wq": "attention.wq",
    "wk": "attention.wk",
    "wv": "attention.wv",
    "wo": "attention.wo",
    "ffn_norm": "ffn_norm",
    "w_gate": "feed_forward.w1",
    "w_up": "feed_forward.w3",
    "w_down": "feed_forward.w2",
    "tok_embed": "tok_embeddings",
    "final_norm": "norm",
    "lm_head": "output",
}


def save_pt(checkpoint: Checkpoint, path: Path, prefix: str) -> None:
    """As llama2.c's train.py saves: the tied output matrix stands there a second time."""
    torch = pytest.importorskip("torch")
    state = {}
    for name, tensor in checkpoint.tensors.items():
        *layer, kind = name.split(".")
        key = ".".join([*layer, PT_NAMES[kind], "weight"])
        state[prefix + key] = torch.from_numpy(tensor)
    if checkpoint.config.tie_embeddings:
        state[prefix + "output.weight"] = state[prefix + "tok_embeddings.weight"]
    fields = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    args = {name: getattr(checkpoint.config, name) for name in fields}
    args |= {"multiple_of": 32, "dropout": 0.0}
    torch.save({"model": state, "model_args": args, "iter_num": 5, "config": {}}, path)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("tied", [False, True])
def test_pt_checkpoint(model: Path, tmp_path: Path, prefix: str, tied: bool) -> None:
    checkpoint = tiny_checkpoint(tie_embeddings=tied)
    save_pt(checkpoint, tmp_path / "ckpt.pt", prefix)
    back = read_checkpoint(tmp_path / "ckpt.pt")
    assert back.config == checkpoint.config
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(back.tensors[name], tensor)


def test_pt_that_is_something_else(model: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "ckpt.pt"
    torch.save([1, 2], path)
    with pytest.raises(FormatError, match="holds no model_args"):
        read_checkpoint(path)
    torch.save({"model": {}, "model_args": {"dim": 8}}, path)
    with pytest.raises(FormatError, match="tok_embed is missing"):
        read_checkpoint(path)
    torch.save({"model": Path("/"), "model_args": {}}, path)  # would run code when unpickled
    with pytest.raises(FormatError, match="not a checkpoint of tensors alone"):
        read_checkpoint(path)
    path.write_bytes(b"PK\3\4" + bytes(50))
    with pytest.raises(FormatError, match="not a checkpoint of tensors alone"):
        read_checkpoint(path)
