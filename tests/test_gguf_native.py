"""The core's GGUF reader: what it accepts, and one clear refusal for everything else."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raw_gguf import (
    ARRAY,
    BOOL,
    F32,
    F64,
    FORMATS,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    RawGguf,
    Tensor,
    small_llama,
    text,
    value,
)
from tinyllama import _core
from tinyllama.errors import ConfigError, FormatError, TinyllamaError

F16, Q4_0, Q4_1, Q8_0, Q4_K, BF16 = 1, 2, 3, 8, 12, 30


def read(raw: RawGguf) -> Any:
    return _core.GgufReader(data=raw.bytes(), name="file.gguf")


def vectors(*sizes: int) -> list[Tensor]:
    return [Tensor(f"t{i}", (n,), bytes(4 * n)) for i, n in enumerate(sizes)]


# --- what is accepted ---------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_type(version: int) -> None:
    integers = {U8: 255, I8: -128, U16: 65535, I16: -1, U32: 2**32 - 1, I32: -(2**31)}
    integers |= {U64: 2**64 - 1, I64: -(2**63)}
    entries: dict[str, tuple[int, Any]] = {f"int.{k}": (k, n) for k, n in integers.items()}
    entries |= {"f32": (F32, 1.5), "f64": (F64, 1e300), "yes": (BOOL, True), "no": (BOOL, False)}
    entries |= {"text": (STRING, "\u72d0\u72f8 \0 end"), "empty": (STRING, "")}
    entries["not utf-8"] = (STRING, b"a\xffb")
    entries |= {f"ints.{k}": (ARRAY, (k, [1, 2, 3])) for k in integers}
    entries |= {"bools": (ARRAY, (BOOL, [True, False])), "none": (ARRAY, (STRING, []))}
    entries |= {f"floats.{k}": (ARRAY, (k, [0.5, -2.0])) for k in (F32, F64)}
    entries["texts"] = (ARRAY, (STRING, ["", "a", "\u2581b"]))
    metadata = read(RawGguf(entries, version=version)).metadata()
    expected = {k: v[1] if kind == ARRAY else v for k, (kind, v) in entries.items()}
    assert metadata == expected | {"not utf-8": "a\ufffdb", "bools": [1, 0]}


@pytest.mark.parametrize("alignment", [1, 2, 8, 32, 4096, 2**20])
def test_tensors_and_their_bytes(alignment: int) -> None:
    sizes = {0: 4 * 64, F16: 2 * 64, BF16: 2 * 64, Q8_0: 2 * 34, Q4_0: 2 * 18}
    rng = np.random.default_rng(0)
    tensors = [Tensor(f"m{kind}", (32, 2), rng.bytes(size), kind) for kind, size in sizes.items()]
    tensors += [Tensor("v", (3,), rng.bytes(12)), Tensor("ones", (2, 1, 1, 1), rng.bytes(8))]
    raw = RawGguf({"general.alignment": (U32, alignment)}, tensors, alignment=alignment)
    reader = read(raw)
    names = {0: "f32", F16: "f16", BF16: "bf16", Q8_0: "q8_0", Q4_0: "q4_0"}
    shapes = [(t.name, names[t.kind], t.dims[:2][::-1]) for t in tensors]
    assert reader.tensors() == shapes
    for tensor in tensors:
        found = reader.tensor_bytes(tensor.name)
        assert found.tobytes() == tensor.data and not found.flags.writeable


def test_tensors_may_lie_in_any_order() -> None:
    tensors = vectors(8, 3)
    tensors[0].offset, tensors[1].offset = 32, 0
    raw = RawGguf({}, tensors).bytes()[: -2 * 32] + b"\1" * 12 + bytes(20) + b"\2" * 32
    reader = _core.GgufReader(data=raw)
    assert set(reader.tensor_bytes("t1")) == {1} and set(reader.tensor_bytes("t0")) == {2}


def test_nothing_in_it() -> None:
    reader = read(RawGguf())
    assert reader.metadata() == {} and reader.tensors() == []


def test_files_of_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = str(tmp_path / "theirs.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([0.0, -1.0])
    matrix = np.arange(96, dtype=np.float32).reshape(3, 32)
    writer.add_tensor("matrix", matrix)
    quantised = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = _core.GgufReader(path=path)
    assert reader.metadata()["llama.context_length"] == 128
    assert reader.metadata()["tokenizer.ggml.tokens"] == ["a", "b"]
    assert reader.tensors() == [("matrix", "f32", (3, 32)), ("q", "q8_0", (3, 32))]
    assert reader.tensor_bytes("matrix").tobytes() == matrix.tobytes()
    assert reader.tensor_bytes("q").tobytes() == quantised.tobytes()


# --- what is refused ----------------------------------------------------------------------------


def entry(key: str | bytes, kind: int, content: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + content


def with_entry(data: bytes) -> RawGguf:
    return RawGguf(n_metadata=1, extra_entries=data)


def with_tensor(dims: tuple[int, ...], kind: int = 0, **changes: Any) -> RawGguf:
    return RawGguf(tensors=[Tensor("t", dims, bytes(64), kind, **changes)])


HUGE = struct.pack("<Q", 2**64 - 1)

HOSTILE: dict[str, tuple[RawGguf, str]] = {
    "magic": (RawGguf(magic=b"GGML"), "not a GGUF file: it begins with 'GGML'"),
    "version_1": (RawGguf(version=1), "GGUF version 1; known are 2 and 3"),
    "version_4": (RawGguf(version=4), "GGUF version 4"),
    "big_endian": (RawGguf(version=3 << 24), "a big-endian GGUF file"),
    "tensor_count": (RawGguf(n_tensors=2**64 - 1), "claims 18446744073709551615 tensors"),
    "metadata_count": (RawGguf(n_metadata=65537), "65537 metadata entries; at most 65536"),
    "too_few_entries": (RawGguf(n_metadata=1), "key of metadata entry '0' is empty"),
    "key_length": (with_entry(HUGE), "key of metadata entry '0' at byte 32 claims"),
    "key_empty": (with_entry(entry("", U8, b"\0")), "key of metadata entry '0' is empty"),
    "key_long": (with_entry(entry("k" * 65536, U8, b"\0")), "has 65536 bytes; at most 65535"),
    "key_bytes": (with_entry(entry(b"\xff", U8, b"\0")), r"is not UTF-8: '\\xff'"),
    "key_twice": (
        RawGguf(n_metadata=2, extra_entries=2 * entry("key", U8, b"\0")),
        "metadata key 'key' appears twice",
    ),
    "value_type": (
        with_entry(entry("key", 13, bytes(64))),
        "value type of metadata key 'key' is 13",
    ),
    "bool": (with_entry(entry("key", BOOL, b"\2")), "'key' is 2; a bool must be 0 or 1"),
    "string_length": (with_entry(entry("key", STRING, HUGE)), "value of metadata key 'key'"),
    "array_type": (
        with_entry(entry("key", ARRAY, struct.pack("<IQ", 99, 0))),
        "array type of metadata key 'key' is 99",
    ),
    "array_nested": (
        with_entry(entry("key", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(64))),
        "metadata key 'key' is an array of arrays",
    ),
    "array_bool": (
        with_entry(entry("key", ARRAY, struct.pack("<IQB", BOOL, 1, 7))),
        "array item of metadata key 'key' is 7",
    ),
    "array_u64": (
        with_entry(entry("key", ARRAY, value(ARRAY, (U64, [2**63])))),
        "array item of metadata key 'key' is above 2\\^63",
    ),
    **{
        f"array_length_{kind}": (
            with_entry(entry("key", ARRAY, struct.pack("<I", kind) + HUGE + bytes(64))),
            "array length of metadata key 'key' at byte .* claims 18446744073709551615",
        )
        for kind in [*FORMATS, STRING]
    },
    **{
        f"alignment_{number}": (
            RawGguf({"general.alignment": (I64, number)}, vectors(1)),
            f"general.alignment is {number}; it must be a power of two up to 1048576",
        )
        for number in (0, -32, 3, 2**21, 2**62, -(2**63))
    },
    "alignment_type": (
        RawGguf({"general.alignment": (F32, 32.0)}, vectors(1)),
        "'general.alignment' is not an integer",
    ),
    "alignment_u64": (
        RawGguf({"general.alignment": (U64, 2**63)}, vectors(1)),
        "'general.alignment' is not an integer below 2\\^63",
    ),
    "tensor_name_empty": (RawGguf(tensors=[Tensor("", (1,), b"")]), "name of tensor entry '0' is"),
    "tensor_name_long": (RawGguf(tensors=[Tensor("n" * 1025, (1,), b"")]), "at most 1024"),
    "tensor_twice": (
        RawGguf(tensors=[Tensor("t", (8,), bytes(32)), Tensor("t", (8,), bytes(32))]),
        "tensor 't' appears twice",
    ),
    "no_dims": (with_tensor((), n_dims=0), "number of dimensions of tensor 't' is 0"),
    "five_dims": (with_tensor((1,) * 5), "number of dimensions of tensor 't' is 5"),
    "many_dims": (with_tensor((1,), n_dims=2**32 - 1), "number of dimensions of tensor 't'"),
    "cube": (with_tensor((2, 2, 2)), "only vectors and matrices"),
    "zero_dim": (with_tensor((4, 0)), "dimension 1 of tensor 't' is 0"),
    "negative_dim": (with_tensor((2**64 - 4,)), "size of tensor 't' overflows"),
    "overflow_row": (with_tensor((2**63, 1), F16), "size of tensor 't' overflows"),
    "overflow_product": (with_tensor((2**32, 2**32)), "size of tensor 't' overflows"),
    "overflow_to_small": (with_tensor((2**62 + 4,)), "size of tensor 't' overflows"),
    "overflow_q8": (with_tensor((2**63, 2**5), Q8_0), "size of tensor 't' overflows"),
    "overflow_end": (
        with_tensor((2**61,), offset=2**64 - 32),
        "begins at offset 18446744073709551584",
    ),
    "beyond": (with_tensor((17, 1)), "truncated: tensor 't' needs 68 bytes from byte 96 \\+ 0"),
    "type_q4_k": (with_tensor((256,), Q4_K), "is ggml type 12; known are f32 \\(0\\), f16 \\(1\\)"),
    "type_q4_1": (with_tensor((32,), Q4_1), "type of tensor 't' is ggml type 3;"),
    "type_negative": (with_tensor((4,), 2**32 - 1), "is ggml type 4294967295"),
    "q8_row": (with_tensor((16, 2), Q8_0), "row length of tensor 't' is 16; q8_0 needs"),
    "q4_row": (with_tensor((48, 2), Q4_0), "row length of tensor 't' is 48; q4_0 needs"),
    "offset_unaligned": (with_tensor((4,), offset=4), "is 4, not a multiple of the alignment 32"),
    "offset_gap": (with_tensor((4,), offset=32), "after a gap that belongs to no tensor"),
    "overlap": (
        RawGguf(tensors=[Tensor("a", (16,), bytes(64)), Tensor("b", (8,), bytes(64), offset=32)]),
        "tensor 'b' begins at offset 32, inside the tensor before it: expected 64",
    ),
    "same_offset": (
        RawGguf(tensors=[Tensor("a", (8,), bytes(32)), Tensor("b", (8,), bytes(32), offset=0)]),
        "tensor 'b' begins at offset 0, inside the tensor before it",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case: str) -> None:
    raw, message = HOSTILE[case]
    with pytest.raises(FormatError, match=message) as caught:
        read(raw)
    assert str(caught.value).startswith("file.gguf: ")


def opened_model(data: bytes) -> Any:
    return _core.Model(data=data, name="file.gguf")


@pytest.mark.parametrize("open_file", [_core.GgufReader, opened_model])
def test_a_file_cut_anywhere(open_file: Callable[..., Any]) -> None:
    """Every byte of the header and of the tensors; only padding after the last may be missing."""
    raw = small_llama()
    whole = raw.bytes()
    open_file(data=whole)
    end_of_data = len(whole) - (-len(raw.tensors[-1].data) % raw.alignment)
    for size in range(end_of_data):
        with pytest.raises(FormatError, match=r"truncated: .*\b(at byte|ends at byte) \d+"):
            open_file(data=whole[:size])
    open_file(data=whole[:end_of_data])


def test_every_byte_of_the_header_changed() -> None:
    """Each becomes 0, 255, one more and one less: an error of ours or a file that is fine."""
    raw = small_llama()
    whole = bytearray(raw.bytes())
    n_data = sum(len(t.data) + -len(t.data) % raw.alignment for t in raw.tensors)
    outcomes = {"accepted": 0, "refused": 0}
    for at in range(len(whole) - n_data):
        original = whole[at]
        for changed in {0, 255, (original + 1) % 256, (original - 1) % 256} - {original}:
            whole[at] = changed
            try:
                opened_model(bytes(whole))
                outcomes["accepted"] += 1
            except TinyllamaError:
                outcomes["refused"] += 1
        whole[at] = original
    assert min(outcomes.values()) > 100


# --- hyperparameters ----------------------------------------------------------------------------


def config_of(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = opened_model(small_llama(**changes).bytes()).config
    return config


def test_config_as_stored() -> None:
    config = config_of()
    expected = {"dim": 4, "hidden_dim": 6, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
    expected |= {"head_dim": 2, "vocab_size": 6, "max_seq_len": 16, "rope_theta": 10000.0}
    assert config == expected | {
        "norm_eps": pytest.approx(1e-5),
        "tie_embeddings": True,
        "rope_factors": [1.0],
    }


@pytest.mark.parametrize(
    ("changes", "field", "content"),
    [
        ({"attention.head_count_kv": (ARRAY, (I32, [1]))}, "n_kv_heads", 1),
        ({"context_length": (U64, 2**20)}, "max_seq_len", 2**20),
        ({"vocab_size": None}, "vocab_size", 6),
        ({"rope.dimension_count": None}, "head_dim", 2),
        ({"rope.freq_base": (F32, 5e5)}, "rope_theta", 5e5),
        ({"rope.scaling.type": (STRING, "none")}, "rope_factors", [1.0]),
        ({"rope.scaling.factor": (F32, 4.0)}, "rope_factors", [4.0]),
        ({"rope.scale_linear": (F32, 2.0)}, "rope_factors", [2.0]),
    ],
)
def test_config_that_is_optional(changes: dict[str, Any], field: str, content: Any) -> None:
    assert config_of(**changes)[field] == content


def test_a_tensor_of_rope_factors() -> None:
    raw = small_llama(**{"rope.scaling.factor": (F32, 2.0)})
    raw.metadata["llama.rope.scaling.type"] = (STRING, "linear")
    raw.tensors.append(Tensor("rope_freqs.weight", (1,), struct.pack("<f", 8.0)))
    assert opened_model(raw.bytes()).config["rope_factors"] == [16.0]
    for data, message in [
        (struct.pack("<f", 0.0), "item 0 of tensor 'rope_freqs.weight' is 0"),
        (struct.pack("<f", float("nan")), "item 0 of tensor 'rope_freqs.weight' is -?nan"),
    ]:
        raw.tensors[-1].data = data
        with pytest.raises(ConfigError, match=message):
            opened_model(raw.bytes())
    raw.tensors[-1] = Tensor("rope_freqs.weight", (2,), bytes(8))
    with pytest.raises(ConfigError, match=r"'rope_freqs.weight' is f32 1 x 2; it must be"):
        opened_model(raw.bytes())


def int32(number: int) -> tuple[int, int]:
    return (I32, number)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architecture": (STRING, "gpt2")}, ConfigError, "general.architecture is 'gpt2'"),
        ({"architecture": None}, FormatError, "'general.architecture' is missing"),
        ({"embedding_length": None}, FormatError, "'llama.embedding_length' is missing"),
        ({"block_count": (F32, 1.0)}, FormatError, "'llama.block_count' is not an integer"),
        ({"embedding_length": int32(0)}, ConfigError, "llama.embedding_length is 0"),
        ({"embedding_length": int32(-4)}, ConfigError, "llama.embedding_length is -4"),
        (
            {"embedding_length": (I64, 2**40)},
            ConfigError,
            "llama.embedding_length is 1099511627776",
        ),
        ({"block_count": int32(0)}, ConfigError, "llama.block_count is 0"),
        ({"block_count": int32(2**31 - 1)}, ConfigError, "llama.block_count is 2147483647"),
        ({"feed_forward_length": int32(0)}, ConfigError, "hidden_dim is 0"),
        ({"tinyllama.hidden_dim": int32(7)}, ConfigError, r"tinyllama\.hidden_dim is 7"),
        ({"context_length": int32(-1)}, ConfigError, "max_seq_len is -1"),
        ({"attention.head_count": int32(0)}, ConfigError, "llama.attention.head_count is 0"),
        (
            {"attention.head_count": int32(3)},
            ConfigError,
            r"embedding_length \(4\) is not divisible",
        ),
        ({"attention.head_count_kv": int32(0)}, ConfigError, "n_kv_heads is 0"),
        ({"attention.head_count_kv": int32(3)}, ConfigError, r"n_heads \(2\) is not divisible by"),
        ({"attention.head_count_kv": (ARRAY, (I32, []))}, ConfigError, "has 0 items, but"),
        ({"attention.head_count_kv": (ARRAY, (I32, [0]))}, ConfigError, "head_count_kv is 0"),
        (
            {"attention.head_count_kv": (ARRAY, (I32, [1, 2])), "block_count": int32(2)},
            ConfigError,
            "differs between layers",
        ),
        ({"attention.key_length": int32(3)}, ConfigError, "it must be the head dimension 3"),
        ({"attention.value_length": int32(4)}, ConfigError, "value_length is 4; it must be"),
        ({"rope.dimension_count": int32(4)}, ConfigError, "rope.dimension_count is 4"),
        (
            {"attention.head_count": int32(4), "rope.dimension_count": int32(1)},
            ConfigError,
            "head_dim is 1; rotary embedding needs an even one",
        ),
        ({"layer_norm_rms_epsilon": (F32, 0.0)}, ConfigError, "norm_eps is 0"),
        ({"layer_norm_rms_epsilon": (F32, float("nan"))}, ConfigError, "norm_eps is -?nan"),
        ({"rope.freq_base": (F32, -1.0)}, ConfigError, "rope_theta is -1"),
        ({"rope.freq_base": (F32, float("inf"))}, ConfigError, "rope_theta is inf"),
        ({"rope.scaling.type": (STRING, "yarn")}, ConfigError, "rope.scaling.type is 'yarn'"),
        ({"rope.scaling.type": (STRING, "linear")}, FormatError, "scaling.factor' is missing"),
        ({"rope.scaling.factor": (F32, 0.5)}, ConfigError, "rope.scaling.factor is 0.5"),
        ({"rope.scaling.factor": (F64, 1e300)}, ConfigError, "a rope factor is inf"),
        ({"vocab_size": int32(7)}, ConfigError, "llama.vocab_size is 7, but tensor 'token_embd"),
        ({"expert_count": int32(8)}, ConfigError, "llama.expert_count is 8"),
    ],
)
def test_a_bad_config(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        config_of(**changes)
    assert str(caught.value).startswith("file.gguf: ")


def test_no_embeddings() -> None:
    raw = small_llama()
    del raw.tensors[0]
    with pytest.raises(FormatError, match=r"tensor 'token_embd.weight' is missing"):
        opened_model(raw.bytes())
