"""What the native core says of files whose tensors are not those of the model they describe."""

import struct

import pytest

import tinyllama
from raw_gguf import ARRAY, F32, I32, STRING, Tensor, small_llama
from tinyllama import _core
from tinyllama.errors import FormatError, NonFiniteError

F32_TYPE, Q8_0_TYPE, BF16_TYPE = 0, 8, 30


def refused(file, error, message) -> None:
    with pytest.raises(error, match=message):
        _core.Model(data=file.bytes(), name="file.gguf")


def index(file, name: str) -> int:
    return next(i for i, tensor in enumerate(file.tensors) if tensor.name == name)


def test_the_file_is_sound_to_begin_with() -> None:
    model = tinyllama.load(small_llama().bytes())
    assert model.logits([1, 4]).shape == (2, 6)


@pytest.mark.parametrize("tensor", [tensor.name for tensor in small_llama().tensors])
def test_a_missing_tensor(tensor: str) -> None:
    file = small_llama()
    del file.tensors[index(file, tensor)]
    refused(file, FormatError, rf"'?{tensor}'? is missing")


def test_a_tensor_of_the_wrong_shape() -> None:
    file = small_llama()
    file.tensors[index(file, "blk.0.ffn_up.weight")].dims = (6, 4)
    refused(file, FormatError, r"blk\.0\.ffn_up\.weight has shape \(4, 6\), expected \(6, 4\)")


def test_a_tensor_nobody_knows() -> None:
    file = small_llama()
    file.tensors.append(Tensor("blk.1.attn_q.weight", (4, 4), bytes(64)))
    refused(file, FormatError, r"file\.gguf: unknown tensor blk\.1\.attn_q\.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.0.ffn_norm.weight"])
def test_a_weight_that_is_not_finite(tensor: str, value: float) -> None:
    file = small_llama()
    bad = file.tensors[index(file, tensor)]
    bad.data = bad.data[:8] + struct.pack("<f", value) + bad.data[12:]
    refused(file, NonFiniteError, rf"{tensor} holds NaN or infinity at element 2")


def test_a_bf16_weight_that_is_not_finite() -> None:
    file = small_llama()
    bad = file.tensors[index(file, "blk.0.attn_q.weight")]
    bad.kind, bad.data = BF16_TYPE, bytes(30) + struct.pack("<H", 0x7F80)
    refused(file, NonFiniteError, r"attn_q\.weight holds NaN or infinity at element 15")


def test_a_norm_that_is_quantised() -> None:
    changes = {"embedding_length": 32, "attention.head_count": 16}
    file = small_llama(**{key: (5, value) for key, value in changes.items()})
    for tensor in file.tensors:
        tensor.dims = tuple(32 if n == 4 else n for n in tensor.dims)
    by_name = {tensor.name: tensor for tensor in file.tensors}
    by_name["blk.0.attn_k.weight"].dims = by_name["blk.0.attn_v.weight"].dims = (32, 2)
    for tensor in file.tensors:
        size = tensor.dims[0] * (tensor.dims[1] if len(tensor.dims) > 1 else 1)
        tensor.data = bytes(4 * size)
    norm = by_name["blk.0.attn_norm.weight"]
    norm.kind, norm.data = Q8_0_TYPE, bytes(34)
    refused(file, FormatError, r"attn_norm\.weight is q8_0; a vector must be f32")


def test_a_tokenizer_of_another_size() -> None:
    file = small_llama(
        tokens=(ARRAY, (STRING, ["<unk>", "<s>", "</s>", "a", "b"])),
        scores=(ARRAY, (F32, [0.0] * 5)),
        token_type=(ARRAY, (I32, [2, 3, 3, 1, 1])),
    )
    refused(file, FormatError, r"the tokenizer has 5 tokens, the model's vocab_size is 6")
