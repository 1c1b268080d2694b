"""GGUF written and read: against the gguf package, and there and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from random_models import byte_vocabulary, random_checkpoint, random_config, tiny_checkpoint
from tinyllama.config import RopeScaling, rope_factors
from tinyllama.errors import ArgumentError, FormatError, NonFiniteError
from tinyllama.formats import dtypes
from tinyllama.formats.checkpoint import Checkpoint
from tinyllama.formats.gguf import gguf_bytes, read_gguf, write_gguf

DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


def assert_same_config(a: Checkpoint, b: Checkpoint) -> None:
    """Equal but for the rounding of real numbers to float32."""

    def rounded(values: object) -> object:
        if isinstance(values, tuple):
            return tuple(rounded(value) for value in values)
        return np.float32(values) if isinstance(values, float) else values

    assert rounded(dataclasses.astuple(a.config)) == rounded(dataclasses.astuple(b.config))


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert_same_config(a, b)
    assert list(a.tensors) == list(b.tensors)
    for name, tensor in a.tensors.items():
        np.testing.assert_array_equal(tensor, b.tensors[name], err_msg=name)
    for field in dataclasses.fields(a.vocabulary):
        np.testing.assert_array_equal(
            getattr(a.vocabulary, field.name), getattr(b.vocabulary, field.name), field.name
        )


def hard_values() -> np.ndarray:
    """Rows of 64: normal numbers, zeros, ties of rounding, the smallest and largest numbers."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(200, 64)), np.zeros((2, 64))]
    rows.append((np.arange(64 * 16).reshape(16, 64) % 255 - 127) * 0.5)
    rows.append(rng.normal(size=(8, 64)) * 10.0 ** rng.integers(-38, 6, (8, 1)))
    return np.concatenate(rows).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_models_there_and_back(dtype: str) -> None:
    for seed in range(25):
        rng = np.random.default_rng(seed)
        checkpoint = random_checkpoint(random_config(rng), rng)
        once = read_gguf(gguf_bytes(checkpoint, dtype))
        assert_same_config(once, checkpoint)
        if dtype == "f32":
            assert_same(once, checkpoint)
        # What was rounded once stays as it is.
        assert_same(read_gguf(gguf_bytes(once, dtype)), once)


def test_every_field_of_a_vocabulary_survives() -> None:
    vocabulary = dataclasses.replace(
        byte_vocabulary(300),
        bos_id=None,
        eos_id=5,
        pad_id=7,
        add_bos=False,
        add_space_prefix=False,
        remove_extra_whitespaces=True,
    )
    types = vocabulary.types.copy()
    types[1] = 1  # no control token where Llama's BOS usually is
    checkpoint = tiny_checkpoint()
    changed = dataclasses.replace(vocabulary, types=types)
    checkpoint = dataclasses.replace(checkpoint, vocabulary=changed)
    assert_same(read_gguf(gguf_bytes(checkpoint)), checkpoint)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "BF16", "F16"])
def test_rounding_is_ggmls_to_the_bit(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    values = hard_values()
    ours = np.frombuffer(dtypes.encode_tensor(values, name.lower(), "x"), np.uint8)
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(ours, theirs.view(np.uint8).reshape(-1))
    back = dtypes.decode_tensor(ours, name.lower())
    numbers = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(back, numbers.reshape(-1))


def test_bf16_ties_go_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32)
    assert dtypes.to_bf16(bits.view(np.float32)).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80]


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    checkpoint = tiny_checkpoint(hidden_dim=172, rope_scaling=scaling, tie_embeddings=False)
    write_gguf(checkpoint, tmp_path / "model.gguf", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == 7
    assert fields["llama.feed_forward_length"] == 192
    assert fields["tinyllama.hidden_dim"] == 172
    assert tuple(fields["tokenizer.ggml.tokens"]) == checkpoint.vocabulary.pieces
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(checkpoint.tensors) + 1
    assert tensors["rope_freqs.weight"].data.shape == (4,)
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    down = tensors["blk.1.ffn_down.weight"]
    values = gguf.quants.dequantize(down.data, down.tensor_type)
    assert values.shape == (32, 192)
    assert not values[:, 172:].any()
    back = read_gguf((tmp_path / "model.gguf").read_bytes())
    np.testing.assert_array_equal(values[:, :172], back.tensors["layers.1.w_down"])


def test_rows_that_are_no_multiple_of_a_block_stay_f32(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(head_dim=6)  # n_heads · head_dim = 24 columns in wo
    back = read_gguf(gguf_bytes(checkpoint, "q8_0"))
    assert back.dtype == "q8_0"
    np.testing.assert_array_equal(back.tensors["layers.0.wo"], checkpoint.tensors["layers.0.wo"])
    assert (back.tensors["layers.0.wq"] != checkpoint.tensors["layers.0.wq"]).any()


def test_q4_0_keeps_embedding_and_output_in_8_bits(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    checkpoint = tiny_checkpoint(hidden_dim=172, tie_embeddings=False)
    write_gguf(checkpoint, tmp_path / "model.gguf", "q4_0")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.file_type"].contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds.pop("token_embd.weight") == kinds.pop("output.weight") == "Q8_0"
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"Q4_0"}
    back = read_gguf(tmp_path / "model.gguf")
    assert back.dtype == "q4_0"
    for name, part in {
        "layers.1.w_down": "blk.1.ffn_down",
        "layers.0.w_up": "blk.0.ffn_up",
    }.items():
        tensor = tensors[f"{part}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        rows, cols = back.tensors[name].shape
        np.testing.assert_array_equal(values[:rows, :cols], back.tensors[name])


def test_q4_0_blocks() -> None:
    """The largest is kept to the bit of its f16 scale, nothing is off by more than a step, and
    zeros and numbers too small for a scale come back as zeros."""
    x = np.random.default_rng(3).normal(size=(500, 32)).astype(np.float32)
    x[0], x[1] = 0, 1e-40
    back = dtypes.decode_tensor(
        np.frombuffer(dtypes.encode_tensor(x, "q4_0", "x"), np.uint8), "q4_0"
    )
    back = back.reshape(x.shape)
    assert not back[:2].any()
    largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    found = np.take_along_axis(back, np.abs(x).argmax(1)[:, None], 1)
    np.testing.assert_allclose(found[2:], largest[2:], rtol=2**-11)
    # A block reaches from -8 to 7 steps: the largest of the other sign may lose a whole one.
    error, step = np.abs(back - x)[2:], np.abs(largest[2:]) / 8
    assert (error <= step * 1.01).all()
    assert (error <= step * 0.51)[np.abs(x[2:]) <= 7 * step].all()


def test_written_file_equals_bytes(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    for dtype in DTYPES:
        write_gguf(checkpoint, tmp_path / "model.gguf", dtype)
        assert (tmp_path / "model.gguf").read_bytes() == gguf_bytes(checkpoint, dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("f32", np.nan, "holds NaN or infinity"),
        ("q8_0", -np.inf, "holds NaN or infinity"),
        ("f16", 1e5, "beyond f16's 65504"),
        ("bf16", 3.4e38, "beyond bf16's"),
        ("q8_0", 1e7, "too large for q8_0's"),
        ("q4_0", -6e5, "too large for q4_0's"),
    ],
)
def test_weights_that_cannot_be_written(
    tmp_path: Path, dtype: str, value: float, message: str
) -> None:
    checkpoint = tiny_checkpoint()
    checkpoint.tensors["layers.1.w_up"][3, 4] = value  # type: ignore[index]
    path = tmp_path / "model.gguf"
    path.write_bytes(b"what was there before")
    with pytest.raises(NonFiniteError, match=rf"layers\.1\.w_up.*{message}"):
        write_gguf(checkpoint, path, dtype)
    assert path.read_bytes() == b"what was there before"
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_dtype() -> None:
    with pytest.raises(ArgumentError, match="dtype is 'q4_1'"):
        gguf_bytes(tiny_checkpoint(), "q4_1")


FOREIGN = tiny_checkpoint(dim=128, n_kv_heads=4, head_dim=32)


def foreign_file(tmp_path: Path, **changes: object) -> Path:
    """A file as other converters write it: only what the standard requires."""
    gguf = pytest.importorskip("gguf")
    checkpoint = FOREIGN
    path = tmp_path / "foreign.gguf"
    writer = gguf.GGUFWriter(path, changes.get("arch", "llama"))
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(changes.get("rope_dims", config.head_dim))
    writer.add_tokenizer_model(changes.get("tokenizer", "llama"))
    writer.add_token_list([piece.encode() for piece in vocabulary.pieces])
    writer.add_token_scores(vocabulary.scores.tolist())
    writer.add_token_types(vocabulary.types.tolist())
    if "rope_type" in changes:
        writer.add_string("llama.rope.scaling.type", changes["rope_type"])
        writer.add_float32("llama.rope.scaling.factor", 2.0)
    if "hidden_dim" in changes:
        writer.add_uint32("tinyllama.hidden_dim", changes["hidden_dim"])
    if "rope_freqs" in changes:
        writer.add_tensor("rope_freqs.weight", changes["rope_freqs"])
    parts = dict(wq="attn_q", wk="attn_k", wv="attn_v", wo="attn_output", attn_norm="attn_norm")
    parts |= dict(ffn_norm="ffn_norm", w_gate="ffn_gate", w_up="ffn_up", w_down="ffn_down")
    top = {"tok_embed": "token_embd.weight", "final_norm": "output_norm.weight"}
    for name, tensor in checkpoint.tensors.items():
        if name not in top:
            _, layer, kind = name.split(".")
        writer.add_tensor(top.get(name) or f"blk.{layer}.{parts[kind]}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_with_only_the_required_keys(tmp_path: Path) -> None:
    back = read_gguf(foreign_file(tmp_path))
    assert_same(back, FOREIGN)


def test_llama3_scaling_told_by_its_factors_alone(tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 8.0)
    config = dataclasses.replace(FOREIGN.config, rope_scaling=scaling)
    factors = rope_factors(config).astype(np.float32)
    assert factors[-1] == 8.0
    assert read_gguf(foreign_file(tmp_path, rope_freqs=factors)).config.rope_scaling == scaling
    factors[8] = 5.0
    with pytest.raises(FormatError, match=r"rope_freqs\.weight holds another scaling"):
        read_gguf(foreign_file(tmp_path, rope_freqs=factors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "gpt2"}, "general.architecture is 'gpt2'"),
        ({"tokenizer": "gpt2"}, "tokenizer.ggml.model is 'gpt2'"),
        ({"rope_type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"rope_dims": 4}, "rope.dimension_count is 4"),
    ],
)
def test_foreign_models_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_gguf(foreign_file(tmp_path, **changes))


def test_padding_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    # Units beyond the true hidden_dim would compute something that reading back would lose.
    with pytest.raises(FormatError, match=r"beyond tinyllama\.hidden_dim are not zero"):
        read_gguf(foreign_file(tmp_path, hidden_dim=60))


@pytest.mark.parametrize("case", range(8))
def test_llama_cpp_computes_the_same(tmp_path: Path, case: int) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    import tinyllama

    scaling = (None, RopeScaling("linear", 2.5), RopeScaling("llama3", 4.0, 1.0, 4.0, 16))[case % 3]
    checkpoint = tiny_checkpoint(
        case,
        head_dim=(8, 24)[case % 2],
        n_kv_heads=(1, 2, 4)[case % 3],
        hidden_dim=(64, 172)[case // 4],
        tie_embeddings=case % 4 > 1,
        rope_scaling=scaling,
    )
    path = tmp_path / "model.gguf"
    write_gguf(checkpoint, path, "f32")
    theirs = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    tokens = np.random.default_rng(case).integers(3, 300, 40).tolist()
    theirs.eval([1, *tokens])
    ours = tinyllama.load(path).logits([1, *tokens])
    # llama.cpp keeps keys and values in f16.
    np.testing.assert_allclose(theirs.scores[: len(tokens) + 1], ours, atol=3e-2)
