"""The dtypes weights are stored in: f32, f16, bf16, and q8_0 and q4_0 as ggml lays them out."""

from __future__ import annotations

import numpy as np

from ..errors import NonFiniteError

BLOCK = 32  # values of a row that share a scale in q8_0 and q4_0
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18}


def encode_tensor(tensor: np.ndarray, dtype: str, what: str) -> memoryview:
    """float32 -> the bytes of a tensor of that dtype, little-endian. Raises NonFiniteError."""
    if not np.isfinite(tensor).all():
        raise NonFiniteError(f"{what} holds NaN or infinity")
    if dtype == "f32":
        data = np.ascontiguousarray(tensor, "<f4")
    elif dtype == "f16":
        with np.errstate(over="ignore"):
            data = np.ascontiguousarray(tensor, "<f2")
        if not np.isfinite(data).all():
            raise NonFiniteError(f"{what} holds values beyond f16's 65504; use bf16 or f32")
    elif dtype == "bf16":
        data = to_bf16(tensor)
        if (data & 0x7F80 == 0x7F80).any():
            raise NonFiniteError(f"{what} holds values beyond bf16's 3.39e38; use f32")
    else:
        data = quantize_q4_0(tensor) if dtype == "q4_0" else quantize_q8_0(tensor)
        if not np.isfinite(data["scale"]).all():
            raise NonFiniteError(f"{what} holds values too large for {dtype}'s f16 scales")
    return data.reshape(-1).view(np.uint8).data


def decode_tensor(data: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of a tensor of that dtype -> its values as float32, flat, a copy of its own."""
    if dtype == "f32":
        return np.array(data.view("<f4"), np.float32)
    if dtype == "f16":
        return data.view("<f2").astype(np.float32)
    if dtype == "bf16":
        return from_bf16(data.view("<u2"))
    return dequantize_q4_0(data) if dtype == "q4_0" else dequantize_q8_0(data)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> the uint16 bits of bfloat16, rounded to nearest, ties to even. Finite values."""
    bits = np.ascontiguousarray(x, "<f4").view("<u4")
    upper: np.ndarray = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return upper.astype("<u2")


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 -> float32, exactly."""
    values: np.ndarray = (bits.astype("<u4") << 16).view("<f4")
    return values


_Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", BLOCK)])


def quantize_q8_0(x: np.ndarray) -> np.ndarray:
    """float32 -> records of a float16 scale and 32 int8, as ggml's reference quantiser does it:
    scale = max|x| / 127, value = x / scale rounded to nearest, ties away from zero."""
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    scaled = blocks * inverse
    records = np.empty(len(blocks), _Q8_0)
    with np.errstate(over="ignore"):
        records["scale"] = scale[:, 0]
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    records["values"] = np.sign(scaled) * (whole + (magnitude - whole >= 0.5))
    return records


def dequantize_q8_0(data: np.ndarray) -> np.ndarray:
    """The bytes of q8_0 blocks -> float32, flat."""
    records = np.ascontiguousarray(data).view(_Q8_0)
    scales = records["scale"].astype(np.float32)
    values: np.ndarray = records["values"] * scales[:, None]
    return values.reshape(-1)


_Q4_0 = np.dtype([("scale", "<f2"), ("values", "u1", BLOCK // 2)])


def quantize_q4_0(x: np.ndarray) -> np.ndarray:
    """float32 -> records of a float16 scale and 16 bytes, as ggml's reference quantiser does it.

    The value of largest magnitude, the first of several, becomes -8: scale = that / -8, and
    value = floor(x / scale + 8.5), at most 15, stands for scale · (value - 8). The low half of
    byte j is value j, the high half value j + 16.
    """
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, BLOCK)
    largest = np.abs(blocks).argmax(axis=1)[:, None]
    scale = np.take_along_axis(blocks, largest, axis=1) / np.float32(-8)
    has_inverse = np.abs(scale) > 2.0**-128
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=has_inverse)
    values = np.minimum(np.floor(blocks * inverse + np.float32(8.5)), 15).astype(np.uint8)
    records = np.empty(len(blocks), _Q4_0)
    with np.errstate(over="ignore"):
        records["scale"] = scale[:, 0]
    records["values"] = values[:, : BLOCK // 2] | values[:, BLOCK // 2 :] << 4
    return records


def dequantize_q4_0(data: np.ndarray) -> np.ndarray:
    """The bytes of q4_0 blocks -> float32, flat."""
    records = np.ascontiguousarray(data).view(_Q4_0)
    scales = records["scale"].astype(np.float32)
    packed = records["values"]
    whole = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.int8) - np.int8(8)
    values: np.ndarray = whole * scales[:, None]
    return values.reshape(-1)
