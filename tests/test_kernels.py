"""Every kernel of every instruction set this CPU has: against float64, and bit against bit."""

import numpy as np
import numpy.typing as npt
import pytest

from tinyllama import _core

EPS = float(np.finfo(np.float32).eps)
GROUP = 1024  # columns that share a scale (kernel_table.h)
F32 = npt.NDArray[np.float32]

Weights = tuple[npt.NDArray[np.generic], npt.NDArray[np.float64]]  # as stored, and their values


dtypes = pytest.mark.parametrize("dtype", ["f32", "bf16", "q8_0", "q4_0"])


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def normal(rng: np.random.Generator, *shape: int) -> F32:
    return rng.standard_normal(shape, dtype=np.float32)


def from_bf16(upper: npt.NDArray[np.uint16]) -> F32:
    return (upper.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: F32) -> npt.NDArray[np.uint16]:
    """To nearest even, in integers."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def blocks(scale: npt.NDArray[np.generic], q: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Rows of a file: an f16 scale (rows, n, 1) and the bytes (rows, n, 32 or 16) after it."""
    return np.concatenate([scale.view(np.uint8), q.view(np.uint8)], axis=2).reshape(len(q), -1)


def make_weights(rng: np.random.Generator, dtype: str, rows: int, cols: int) -> Weights:
    if dtype == "f32":
        w = normal(rng, rows, cols)
        return w, w.astype(np.float64)
    if dtype == "bf16":
        upper = to_bf16(normal(rng, rows, cols))
        return upper, from_bf16(upper).astype(np.float64)
    n = cols // 32
    scale = rng.uniform(-0.02, 0.02, (rows, n, 1)).astype(np.float16)
    if dtype == "q4_0":
        packed = rng.integers(0, 256, (rows, n, 16), dtype=np.uint8)
        q = np.concatenate([packed & 15, packed >> 4], axis=2).astype(np.int8) - 8
        return blocks(scale, packed), (scale.astype(np.float64) * q).reshape(rows, cols)
    # Every byte occurs, -128 too, which our own writer never makes.
    q = rng.integers(-128, 128, (rows, n, 32), dtype=np.int8)
    return blocks(scale, q), (scale.astype(np.float64) * q).reshape(rows, cols)


def random_cols(rng: np.random.Generator, dtype: str) -> int:
    if dtype.startswith("q"):
        return 32 * int(rng.choice([1, 2, 9, 24, 31, 32, 33, 47, 64, 70]))
    return int(rng.choice([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 172, 288, 513, 2268]))


def matmul(isa: str, dtype: str, w: npt.NDArray[np.generic], x: F32, rows: int) -> F32:
    """(n_tokens, rows); the places beyond the last row must stay as they were."""
    y = _core.kernel_matmul(isa, dtype, w, rows, x.shape[1], x)
    assert np.isnan(y[:, rows:]).all(), "wrote beyond the last row"
    return np.ascontiguousarray(y[:, :rows])


def dequantized(isa: str, x: F32) -> npt.NDArray[np.float64]:
    def row(values: F32) -> npt.NDArray[np.float64]:
        q, scales, _ = _core.kernel_quantize_q8(isa, values)
        n = len(values)
        return q[:n] * np.repeat(scales, GROUP)[:n].astype(np.float64)

    return np.array([row(values) for values in x.reshape(-1, x.shape[-1])]).reshape(x.shape)


def regrouped(isa: str, stored: npt.NDArray[np.generic], w: F32) -> npt.NDArray[np.float64]:
    """The values of q8_0 weights as kernels see them."""
    return _core.kernel_unpack(isa, "q8_0", stored, *w.shape).astype(np.float64)


@dtypes
def test_packing_keeps_every_value(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        rows, cols = int(rng.integers(1, 50)), random_cols(rng, dtype)
        stored, w = make_weights(rng, dtype, rows, cols)
        y = _core.kernel_unpack(isa, dtype, stored, rows, cols)
        if dtype == "q8_0":
            for begin in range(0, cols, GROUP):  # a group shares a scale: half a step each
                group = slice(begin, begin + GROUP)
                step = np.abs(w[:, group]).max(axis=1, keepdims=True) / 127
                error = np.abs(y[:, group] - w[:, group])
                assert np.all(error <= step * (0.5 + 128 * EPS))
            assert (
                y.tobytes() == _core.kernel_unpack("generic", dtype, stored, rows, cols).tobytes()
            )
        else:
            np.testing.assert_array_equal(y, w.astype(np.float32))
        shifted = np.empty(stored.nbytes + 1, np.uint8)[1:]  # not aligned
        shifted[:] = stored.reshape(-1).view(np.uint8)
        assert _core.kernel_unpack(isa, dtype, shifted, rows, cols).tobytes() == y.tobytes()


def test_q8_0_of_equal_blocks_is_kept(isa: str) -> None:
    """Where the blocks of a group already share a scale and reach 127, nothing is rounded."""
    rng = np.random.default_rng(9)
    q = rng.integers(-127, 128, (17, 34, 32), dtype=np.int8)
    q[:, :, 7] = 127
    scale = np.full((17, 34, 1), 0.5, np.float16)
    y = _core.kernel_unpack(isa, "q8_0", blocks(scale, q), 17, 34 * 32)
    np.testing.assert_array_equal(y, q.reshape(17, -1) * np.float32(0.5))


@dtypes
def test_matmul_equals_float64(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        rows, n_tokens = int(rng.integers(1, 120)), int(rng.integers(1, 31))
        cols = random_cols(rng, dtype)
        stored, w = make_weights(rng, dtype, rows, cols)
        x = normal(rng, n_tokens, cols) * np.float32(10.0 ** rng.integers(-3, 4))
        y = matmul(isa, dtype, stored, x, rows)
        seen: npt.NDArray[np.float64] = x.astype(np.float64)
        if dtype == "bf16":
            seen = from_bf16(to_bf16(x)).astype(np.float64)
        elif dtype != "f32":
            seen = dequantized(isa, x)
        if dtype == "q8_0":
            w = regrouped(isa, stored, w)
        # The additions that follow one another, each rounding by half a unit.
        chain = {"f32": cols, "bf16": 18 + cols / 32, "q8_0": 1 + cols / GROUP}.get(
            dtype, 17 + cols / GROUP
        )
        bound = (4 + chain / 2) * EPS * (np.abs(seen) @ np.abs(w).T) + 1e-37
        assert np.all(np.abs(y - seen @ w.T) <= bound), (rows, cols, n_tokens)


@dtypes
def test_matmul_is_the_same_for_every_split_and_set(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(30):
        rows, n_tokens = int(rng.integers(2, 150)), int(rng.integers(1, 40))
        cols = random_cols(rng, dtype)
        stored, _ = make_weights(rng, dtype, rows, cols)
        x = normal(rng, n_tokens, cols)
        whole = matmul(isa, dtype, stored, x, rows)
        assert whole.tobytes() == matmul("generic", dtype, stored, x, rows).tobytes()

        panels = (rows + 15) // 16
        begin, end = sorted(int(i) for i in rng.integers(0, panels + 1, 2))
        part = _core.kernel_matmul(isa, dtype, stored, rows, cols, x, begin, end)
        first, last = 16 * begin, min(16 * end, rows)
        assert part[:, first:last].tobytes() == whole[:, first:last].tobytes()
        assert np.isnan(part[:, :first]).all() and np.isnan(part[:, last:]).all()

        cut = int(rng.integers(0, n_tokens + 1))
        pieces = [matmul(isa, dtype, stored, p, rows) for p in (x[:cut], x[cut:]) if len(p)]
        assert np.concatenate(pieces).tobytes() == whole.tobytes()
        singly = [matmul(isa, dtype, stored, x[t : t + 1], rows) for t in range(n_tokens)]
        assert np.concatenate(singly).tobytes() == whole.tobytes()
        added = _core.kernel_matmul(isa, dtype, stored, rows, cols, x, add=True)
        assert added[:, :rows].tobytes() == (whole + np.float32(1)).tobytes()
        assert (added[:, rows:] == 1).all()


@dtypes
def test_many_tokens_are_as_one(isa: str, dtype: str) -> None:
    """More tokens than stay in the near cache, in a matrix of one panel and a bit."""
    rng = np.random.default_rng(3)
    rows, cols, n_tokens = 17, 2048, 330
    stored, _ = make_weights(rng, dtype, rows, cols)
    x = normal(rng, n_tokens, cols)
    whole = matmul(isa, dtype, stored, x, rows)
    for t in (0, 95, 96, 329):
        assert matmul(isa, dtype, stored, x[t : t + 1], rows).tobytes() == whole[t].tobytes()


def test_nothing_from_nothing(isa: str) -> None:
    w = np.ones((3, 5), np.float32)
    assert _core.kernel_matmul(isa, "f32", w, 3, 5, np.zeros((0, 5), np.float32)).shape == (0, 16)
    empty = _core.kernel_matmul(isa, "f32", w[:, :0], 3, 0, np.zeros((2, 0), np.float32))
    assert (empty[:, :3] == 0).all() and np.isnan(empty[:, 3:]).all()
    y = _core.kernel_matmul(isa, "f32", w, 3, 5, np.ones((1, 5), np.float32), 1, 1)
    assert np.isnan(y).all()


@pytest.mark.parametrize("weight", [-128, -127, 127])
@pytest.mark.parametrize("sign", [-1, 1])
def test_q8_0_integer_sums_are_exact(isa: str, weight: int, sign: int) -> None:
    """The largest byte products of both signs: any saturation would show as a wrong integer."""
    cols = GROUP
    n = cols // 32
    stored = blocks(np.ones((1, n, 1), np.float16), np.full((1, n, 32), weight, np.int8))
    x = np.full((1, cols), 127.0 * sign, np.float32)
    # -128 becomes -127 times a scale of 128 / 127.
    expected = weight * 127.0 * sign * cols
    assert abs(matmul(isa, "q8_0", stored, x, 1)[0, 0] / expected - 1) <= (weight == -128) * EPS


@pytest.mark.parametrize("nibble", [0, 15])
@pytest.mark.parametrize("sign", [-1, 1])
def test_q4_0_integer_sums_are_exact(isa: str, nibble: int, sign: int) -> None:
    cols = 96
    stored = blocks(np.ones((1, 3, 1), np.float16), np.full((1, 3, 16), 17 * nibble, np.uint8))
    x = np.full((1, cols), 127.0 * sign, np.float32)
    assert matmul(isa, "q4_0", stored, x, 1)[0, 0] == (nibble - 8) * 127 * sign * cols


def test_q8_0_reads_every_f16_scale(isa: str) -> None:
    bits = np.arange(65536, dtype=np.uint16).reshape(-1, 1, 1)
    q = np.zeros((65536, 1, 32), np.int8)
    q[:, 0, 5] = 1
    x = np.zeros((1, 32), np.float32)
    x[0, 5] = 127.0  # so the block's scale is 1
    with np.errstate(all="ignore"):
        expected = bits.reshape(-1).view(np.float16).astype(np.float32) * np.float32(127.0)
    y = matmul(isa, "q8_0", blocks(bits, q), x, 65536)[0]
    finite = np.isfinite(expected)
    np.testing.assert_allclose(y[finite], expected[finite], rtol=2 * EPS)
    assert not np.isfinite(y[~finite]).any()
    unpacked = _core.kernel_unpack(isa, "q8_0", blocks(bits, q), 65536, 32)[:, 5]
    np.testing.assert_allclose(unpacked[finite], expected[finite] / 127, rtol=2 * EPS)


def test_bf16_takes_subnormal_numbers_as_zero(isa: str) -> None:
    """As AMX does: operands, and sums too."""
    tiny, smallest = np.float32(1e-39), np.float32(2.0**-126)
    one = np.ones((1, 1), np.float32)

    def product(w: npt.ArrayLike, x: npt.ArrayLike) -> float:
        weights, values = np.array([w], np.float32), np.array([x], np.float32)
        return float(matmul(isa, "bf16", to_bf16(weights), values, 1)[0, 0])

    assert product([tiny], [1e9]) == 0 and product([1e9], [tiny]) == 0
    assert product([smallest], [0.5]) == 0 and product([smallest], [1.0]) == smallest
    # The two of a pair go to different sums: 2 - 1.5 times the smallest is subnormal.
    assert product([smallest, smallest], [2.0, -1.5]) == 0
    assert matmul(isa, "f32", one * tiny, one, 1)[0, 0] == tiny, "the mode is put back"


def test_round_bf16(isa: str) -> None:
    rng = np.random.default_rng(4)
    bits = rng.integers(0, 0x7F800000, 1000, dtype=np.uint32)
    for n in (0, 1, 15, 16, 17, 31, 32, 33, 1000):
        x = bits[:n].view(np.float32)
        y = _core.kernel_round_bf16(isa, x)
        assert len(y) == (n + 31) // 32 * 32 and not y[n:].any()
        np.testing.assert_array_equal(y[:n], to_bf16(x))
    ties = np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF])
    y = _core.kernel_round_bf16(isa, ties.astype(np.uint32).view(np.float32))
    assert list(y[:4]) == [0x3F80, 0x3F82, 0xBF80, 0x7F80]
    assert np.isnan(from_bf16(y[4:6])).all(), "NaN must not round to infinity"


def test_quantize_is_nearest_and_the_same_everywhere(isa: str) -> None:
    rng = np.random.default_rng(5)
    x = normal(rng, 65 * 32) * np.repeat(10.0 ** rng.uniform(-30, 30, 65), 32).astype(np.float32)
    q, scales, sums = _core.kernel_quantize_q8(isa, x)
    assert len(q) == 66 * 32 and (q[len(x) :] == 0).all(), "zeros up to whole lines of 64"
    groups = [np.abs(x[i : i + GROUP]).max() / np.float32(127) for i in range(0, len(x), GROUP)]
    y = q[: len(x)] * np.repeat(scales, GROUP)[: len(x)].astype(np.float64)
    step = np.repeat(groups, GROUP)[: len(x)]
    assert np.all(np.abs(y - x.astype(np.float64)) <= step * (0.5 + 128 * EPS))
    np.testing.assert_array_equal(sums, q[: len(x)].reshape(-1, 32).sum(axis=1, dtype=np.int32))
    for ours, plain in zip((q, scales, sums), _core.kernel_quantize_q8("generic", x), strict=True):
        assert ours.tobytes() == plain.tobytes()
    ties = np.arange(-16, 16, dtype=np.float32) + np.float32(0.5)
    ties[0] = 127.0
    expected = np.round(ties)  # half to even
    np.testing.assert_array_equal(_core.kernel_quantize_q8(isa, ties)[0][:32], expected)


def test_quantize_extremes(isa: str) -> None:
    def quantize(values: list[float]) -> npt.NDArray[np.float64]:
        x = np.zeros((1, 32), np.float32)
        x[0, : len(values)] = values
        return dequantized(isa, x)[0]

    assert not quantize([]).any()
    assert not quantize([1e-40, -1e-44]).any(), "a block of subnormal numbers counts as zero"
    assert np.allclose(quantize([3e38, -3e38])[:2], [3e38, -3e38], rtol=1e-6)
    for bad in (np.inf, -np.inf, np.nan):
        for place in (0, 9, 31):
            values = [1.0] * 32
            values[place] = bad
            assert np.isnan(quantize(values)).all(), "what is not finite must not vanish"


@dtypes
def test_matmul_keeps_nan_to_its_own_token(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(6)
    rows, cols, n_tokens = 13, 96, 5
    stored, _ = make_weights(rng, dtype, rows, cols)
    x = normal(rng, n_tokens, cols)
    x[2, 70] = np.nan
    y = matmul(isa, dtype, stored, x, rows)
    assert np.isnan(y[2]).all()
    assert np.isfinite(np.delete(y, 2, axis=0)).all()


Q24_ISAS = [isa for isa in _core.supported_isas() if isa == "avx512amx"]
q24 = pytest.mark.skipif(not Q24_ISAS, reason="no set of this CPU has matmul_q24")


def digits(x: F32) -> tuple[npt.NDArray[np.float64], F32]:
    """Rows of one group as three digits of base 256 (3, n, cols), and their scales (n, 1)."""
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    whole = np.rint(x * (np.float32(1) / scale) * np.float32(65536)).astype(np.int64)
    found = []
    for _ in range(2):
        found.append((whole + 128) % 256 - 128)
        whole = (whole - found[-1]) // 256
    return np.array([whole, *found[::-1]], np.float64), scale


@q24
def test_q24_is_what_it_says_and_as_exact_as_f32() -> None:
    rng = np.random.default_rng(8)
    for _ in range(60):
        rows, n_tokens = int(rng.integers(1, 120)), int(rng.integers(1, 70))
        cols = random_cols(rng, "f32")
        w = normal(rng, rows, cols)
        x = normal(rng, n_tokens, cols) * np.float32(10.0 ** rng.integers(-3, 4))
        y = matmul(Q24_ISAS[0], "q24", w, x, rows)
        expected = np.zeros_like(y)
        for begin in range(0, cols, GROUP):
            (w_digits, w_scale), (x_digits, x_scale) = (
                digits(values[:, begin : begin + GROUP]) for values in (w, x)
            )

            def total(*pairs: tuple[int, int]) -> npt.NDArray[np.float64]:
                products = sum(x_digits[i] @ w_digits[k].T for i, k in pairs)  # noqa: B023
                return np.float64(np.float32(products))

            # A sum of two floats of which one was divided by 256 is exact in float64.
            low = np.float32(total((0, 2), (1, 1), (2, 0)) / 256 + total((0, 1), (1, 0)))
            whole = np.float32(low.astype(np.float64) / 256 + total((0, 0)))
            part = whole * w_scale.T * x_scale
            expected = part if begin == 0 else expected + part
        assert y.tobytes() == expected.tobytes(), (rows, cols, n_tokens)

        exact = x.astype(np.float64) @ w.T.astype(np.float64)
        by_float = matmul(Q24_ISAS[0], "f32", w, x, rows)
        rounded = np.abs(x).astype(np.float64) @ np.abs(w.T) * 4 * EPS
        left_out = 2.0**-22 * cols * np.abs(x).max(axis=1, keepdims=True) * np.abs(w).max(axis=1)
        assert np.all(np.abs(y - exact) <= rounded + left_out)
        if cols >= 172:
            assert np.square(y - exact).mean() <= 2 * np.square(by_float - exact).mean()


@q24
def test_q24_extremes() -> None:
    isa, w = Q24_ISAS[0], np.ones((1, 40), np.float32)
    assert matmul(isa, "q24", w * np.float32(1e-40), w, 1) == 0, "subnormal numbers count as zero"
    assert matmul(isa, "q24", w * np.float32(0), w, 1) == 0
    assert matmul(isa, "q24", w * np.float32(1e30), w, 1) == pytest.approx(4e31)
    assert (
        matmul(isa, "q24", np.full((1, GROUP), -1, np.float32), np.ones((1, GROUP), np.float32), 1)
        == -GROUP
    )
    for bad in (np.inf, -np.inf, np.nan):
        x = np.ones((3, 40), np.float32)
        x[1, 33] = bad
        assert np.isnan(matmul(isa, "q24", w, x, 1)).tolist() == [[False], [True], [False]]


def test_rms_norm(isa: str) -> None:
    rng = np.random.default_rng(5)
    for n in (1, 2, 7, 8, 17, 64, 288, 4095):
        for magnitude in (1e-30, 1e-3, 1.0, 1e25):
            x = normal(rng, n) * np.float32(magnitude)
            weight = normal(rng, n)
            y = _core.kernel_unary(isa, "rms_norm", x, weight, scalar=1e-5)
            wide = x.astype(np.float64)
            exact = wide / np.sqrt(np.mean(wide**2) + float(np.float32(1e-5))) * weight
            assert np.all(np.abs(y - exact) <= 3 * EPS * np.abs(exact) + 1e-44)
            assert (
                y.tobytes()
                == _core.kernel_unary("generic", "rms_norm", x, weight, scalar=1e-5).tobytes()
            )


def test_rope(isa: str) -> None:
    rng = np.random.default_rng(6)
    for head_dim in (2, 4, 6, 18, 48, 64, 130):
        x = normal(rng, 3, head_dim)
        angle = rng.uniform(-100, 100, head_dim // 2)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        turn = np.repeat(cos, 2), np.stack([-sin, sin], axis=1).reshape(-1)
        y = _core.kernel_unary(isa, "rope", x, *turn)
        z = (x[:, 0::2] + 1j * x[:, 1::2].astype(np.float64)) * (cos + 1j * sin.astype(np.float64))
        assert np.all(
            np.abs(y[:, 0::2] + 1j * y[:, 1::2].astype(np.float64) - z) <= 3 * EPS * np.abs(z)
        )
        assert y.tobytes() == _core.kernel_unary("generic", "rope", x, *turn).tobytes()


def silu(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))


def test_swiglu(isa: str) -> None:
    rng = np.random.default_rng(8)
    for n in (1, 5, 8, 16, 31, 768):
        gate, up = normal(rng, n) * np.float32(5), normal(rng, n)
        exact = silu(gate.astype(np.float64)) * up
        y = _core.kernel_unary(isa, "swiglu", gate, up)
        assert np.all(np.abs(y - exact) <= 4 * EPS * np.abs(exact))
        assert y.tobytes() == _core.kernel_unary("generic", "swiglu", gate, up).tobytes()
    # One element does not depend on those beside it.
    gate, up = normal(rng, 41), normal(rng, 41)
    whole = _core.kernel_unary(isa, "swiglu", gate, up)
    for i in range(41):
        assert _core.kernel_unary(isa, "swiglu", gate[i : i + 1], up[i : i + 1])[0] == whole[i]


def test_silu_over_all_magnitudes(isa: str) -> None:
    """A float of every exponent and many mantissas, both signs, and the ends of the exponential."""
    bits = np.arange(0, 0x7F800000, 4099, dtype=np.uint32).view(np.float32)
    edges = np.linspace(85, 106, 20001, dtype=np.float32)
    gate = np.concatenate([bits, -bits, edges, -edges])
    y = _core.kernel_unary(isa, "swiglu", gate, np.ones_like(gate))
    exact = silu(gate.astype(np.float64))
    # Where the exponential overflows (beyond 88.7) the result is zero, as in torch: off by less
    # than 1e-36, which is what the absolute part is for.
    assert np.all(np.abs(y - exact) <= 3 * EPS * np.abs(exact) + 1e-36)
    ends = np.array([-1e4, 1e4, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(
        _core.kernel_unary(isa, "swiglu", ends, np.ones_like(ends)), [0.0, 1e4, np.inf, np.nan]
    )


def test_sets_are_listed_best_first_and_unknown_names_refused() -> None:
    names = _core.supported_isas()
    assert names[-1] == "generic" and len(set(names)) == len(names)
    order = ["avx512amx", "avx512vnni", "avx512", "avxvnni", "avx2"]
    order += ["neondotprod", "neon", "generic"]
    assert names == [name for name in order if name in names]
    x = np.zeros((1, 4), np.float32)
    with pytest.raises(Exception, match="generic"):
        _core.kernel_matmul("sse9", "f32", np.zeros((1, 4), np.float32), 1, 4, x)


def test_weigh(isa: str) -> None:
    rng = np.random.default_rng(9)
    for n_blocks in (0, 1, 2, 7, 500):
        for scale in (1e-3, 1.0, 1.442695, 20.0, 3e38):
            x = normal(rng, 64 * n_blocks) * np.float32(10)
            x[3::50] = -np.inf
            x[5::50] = np.float32(-3e38)
            best = np.max(x, initial=np.float32(1))
            weights, sums = _core.kernel_weigh(isa, x, best, scale)
            with np.errstate(over="ignore"):
                less = x - best
            power = less.astype(np.float64) * np.float64(np.float32(scale))
            kept = less >= np.float32(-125) / np.float32(scale)
            exact = np.where(kept, np.exp2(np.maximum(power, -126)), 0.0)
            assert np.all(np.abs(weights - exact) <= 2e-7 * exact)
            assert (weights[x == best] == 1).all() and not weights[3::50].any()
            # Four lanes of a block, then 16 by halves.
            lanes = weights.reshape(n_blocks, 4, 16)
            sum_of = ((lanes[:, 0] + lanes[:, 1]) + lanes[:, 2]) + lanes[:, 3]
            while sum_of.shape[1] > 1:
                half = sum_of.shape[1] // 2
                sum_of = sum_of[:, :half] + sum_of[:, half:]
            assert sums.tobytes() == sum_of.tobytes()
            plain = _core.kernel_weigh("generic", x, best, scale)
            assert [a.tobytes() for a in plain] == [weights.tobytes(), sums.tobytes()]


def test_weigh_at_the_ends(isa: str) -> None:
    """Around every power of two, and where weights end."""
    x = np.concatenate([np.arange(-128, 0.25, 0.25), np.linspace(-125.5, -124.5, 64 * 400 - 513)])
    x = x.astype(np.float32)
    weights, _ = _core.kernel_weigh(isa, x, 0.0, 1.0)
    assert not weights[x < -125].any()
    kept = x >= -125
    exact = np.exp2(x[kept].astype(np.float64))
    assert np.all(np.abs(weights[kept] - exact) <= 2e-7 * exact)
    whole = kept & (x == np.round(x))
    np.testing.assert_array_equal(weights[whole], np.exp2(x[whole]))
    assert weights.tobytes() == _core.kernel_weigh("generic", x, 0.0, 1.0)[0].tobytes()


def test_hand_out(isa: str) -> None:
    rng = np.random.default_rng(10)
    for n in (1, 15, 16, 17, 63, 64, 65, 79, 128, 333):
        x = normal(rng, n) - np.float32(20)  # all below zero: what is filled up must not win
        copy, maxima, bits = _core.kernel_hand_out(isa, x)
        np.testing.assert_array_equal(copy, x)
        np.testing.assert_array_equal(maxima, [x[i : i + 64].max() for i in range(0, n, 64)])
        assert bits == int(np.abs(x).max().view(np.uint32))
        for bad in (np.inf, -np.inf, np.nan):
            x[rng.integers(n)] = bad
            assert _core.kernel_hand_out(isa, x)[2] >= 0x7F800000
