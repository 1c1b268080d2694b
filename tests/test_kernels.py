"""Every kernel of every instruction set this CPU has: against float64, and bit against bit."""

import numpy as np
import numpy.typing as npt
import pytest

from tinyllama import _core

EPS = float(np.finfo(np.float32).eps)
F32 = npt.NDArray[np.float32]

Weights = tuple[npt.NDArray[np.generic], npt.NDArray[np.float64]]  # as stored, and their values


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def normal(rng: np.random.Generator, *shape: int) -> F32:
    return rng.standard_normal(shape, dtype=np.float32)


def make_weights(rng: np.random.Generator, dtype: str, rows: int, cols: int) -> Weights:
    if dtype == "f32":
        w = normal(rng, rows, cols)
        return w, w.astype(np.float64)
    if dtype == "bf16":
        upper = (normal(rng, rows, cols).view(np.uint32) >> 16).astype(np.uint16)
        return upper, (upper.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    # Every byte occurs, -128 too, which our own writer never makes.
    scale = rng.uniform(-0.02, 0.02, (rows, cols // 32, 1)).astype(np.float16)
    q = rng.integers(-128, 128, (rows, cols // 32, 32), dtype=np.int8)
    blocks = np.concatenate([scale.view(np.uint8), q.view(np.uint8)], axis=2)
    return blocks.reshape(rows, -1), (scale.astype(np.float64) * q).reshape(rows, cols)


def random_cols(rng: np.random.Generator, dtype: str) -> int:
    if dtype == "q8_0":
        return 32 * int(rng.integers(1, 24))
    return int(rng.choice([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 172, 288, 513, 2268]))


def matmul(isa: str, dtype: str, w: npt.NDArray[np.generic], x: F32, rows: int) -> F32:
    return _core.kernel_matmul(isa, dtype, w, rows, x.shape[1], x)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8_0"])
def test_matmul_equals_float64(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(120):
        rows, n_tokens = int(rng.integers(1, 71)), int(rng.integers(1, 18))
        cols = random_cols(rng, dtype)
        stored, w = make_weights(rng, dtype, rows, cols)
        x = normal(rng, n_tokens, cols) * np.float32(10.0 ** rng.integers(-3, 4))
        y = matmul(isa, dtype, stored, x, rows)
        if dtype == "q8_0":
            x = _core.kernel_unary(isa, "quantize_q8", x)
        # At most cols / 8 additions follow one another, and each rounds by half a unit.
        bound = (8 + cols / 16) * EPS * (np.abs(x.astype(np.float64)) @ np.abs(w).T)
        assert np.all(np.abs(y - x.astype(np.float64) @ w.T) <= bound), (rows, cols, n_tokens)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8_0"])
def test_matmul_is_the_same_for_every_split(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(60):
        rows, n_tokens = int(rng.integers(2, 71)), int(rng.integers(1, 18))
        cols = random_cols(rng, dtype)
        stored, _ = make_weights(rng, dtype, rows, cols)
        x = normal(rng, n_tokens, cols)
        whole = matmul(isa, dtype, stored, x, rows)

        begin, end = sorted(int(i) for i in rng.integers(0, rows + 1, 2))
        part = _core.kernel_matmul(isa, dtype, stored, rows, cols, x, begin, end)
        assert part[:, begin:end].tobytes() == whole[:, begin:end].tobytes()
        assert not part[:, :begin].any() and not part[:, end:].any(), "wrote outside the range"

        cut = int(rng.integers(0, n_tokens + 1))
        pieces = [matmul(isa, dtype, stored, p, rows) for p in (x[:cut], x[cut:]) if len(p)]
        assert np.concatenate(pieces).tobytes() == whole.tobytes()
        singly = [matmul(isa, dtype, stored, x[t : t + 1], rows) for t in range(n_tokens)]
        assert np.concatenate(singly).tobytes() == whole.tobytes()


def test_q8_0_integer_sums_are_exact(isa: str) -> None:
    """The largest byte products of both signs: any saturation would show as a wrong integer."""
    cols = 96
    scale = np.ones((1, cols // 32, 1), np.float16)
    for weight in (-128, -127, 127):
        q = np.full((1, cols // 32, 32), weight, np.int8)
        blocks = np.concatenate([scale.view(np.uint8), q.view(np.uint8)], axis=2)
        for sign in (-1, 1):
            x = np.full((1, cols), 127.0 * sign, np.float32)
            assert matmul(isa, "q8_0", blocks, x, 1)[0, 0] == weight * 127 * sign * cols


def test_q8_0_reads_every_f16_scale(isa: str) -> None:
    bits = np.arange(65536, dtype=np.uint16).reshape(-1, 1, 1)
    q = np.zeros((65536, 1, 32), np.int8)
    q[:, 0, 5] = 1
    blocks = np.concatenate([bits.view(np.uint8), q.view(np.uint8)], axis=2)
    x = np.zeros((1, 32), np.float32)
    x[0, 5] = 127.0  # so the block's scale is 1
    with np.errstate(all="ignore"):
        expected = bits.reshape(-1).view(np.float16).astype(np.float32) * np.float32(127.0)
    y = matmul(isa, "q8_0", blocks, x, 65536)[0]
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(y[finite], expected[finite])
    assert not np.isfinite(y[~finite]).any()


def test_quantize_is_nearest_and_the_same_everywhere(isa: str) -> None:
    rng = np.random.default_rng(3)
    x = normal(rng, 64 * 32) * np.repeat(10.0 ** rng.uniform(-30, 30, 64), 32).astype(np.float32)
    y = _core.kernel_unary(isa, "quantize_q8", x)
    scale = np.repeat(np.abs(x.reshape(-1, 32)).max(axis=1) / np.float32(127), 32)
    assert np.all(np.abs(y - x.astype(np.float64)) <= scale * (0.5 + 128 * EPS))
    assert y.tobytes() == _core.kernel_unary("generic", "quantize_q8", x).tobytes()
    ties = np.arange(-16, 16, dtype=np.float32) + np.float32(0.5)
    ties[0] = 127.0
    expected = np.round(ties)  # half to even
    np.testing.assert_array_equal(_core.kernel_unary(isa, "quantize_q8", ties), expected)


def test_quantize_extremes(isa: str) -> None:
    def quantize(values: list[float]) -> F32:
        x = np.zeros(32, np.float32)
        x[: len(values)] = values
        return _core.kernel_unary(isa, "quantize_q8", x)

    assert not quantize([]).any()
    assert not quantize([1e-40, -1e-44]).any(), "a block of subnormal numbers counts as zero"
    assert np.allclose(quantize([3e38, -3e38])[:2], [3e38, -3e38], rtol=1e-6)
    for bad in (np.inf, -np.inf, np.nan):
        for place in (0, 9, 31):
            values = [1.0] * 32
            values[place] = bad
            assert np.isnan(quantize(values)).all(), "what is not finite must not vanish"


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8_0"])
def test_matmul_keeps_nan_to_its_own_token(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(4)
    rows, cols, n_tokens = 13, 96, 5
    stored, _ = make_weights(rng, dtype, rows, cols)
    x = normal(rng, n_tokens, cols)
    x[2, 70] = np.nan
    y = matmul(isa, dtype, stored, x, rows)
    assert np.isnan(y[2]).all()
    assert np.isfinite(np.delete(y, 2, axis=0)).all()


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
        y = _core.kernel_unary(isa, "rope", x, cos, sin)
        z = (x[:, 0::2] + 1j * x[:, 1::2].astype(np.float64)) * (cos + 1j * sin.astype(np.float64))
        assert np.all(
            np.abs(y[:, 0::2] + 1j * y[:, 1::2].astype(np.float64) - z) <= 3 * EPS * np.abs(z)
        )
        assert y.tobytes() == _core.kernel_unary("generic", "rope", x, cos, sin).tobytes()


def test_add(isa: str) -> None:
    rng = np.random.default_rng(7)
    for n in (1, 15, 16, 33, 288):
        x, y = normal(rng, n), normal(rng, n)
        np.testing.assert_array_equal(_core.kernel_unary(isa, "add", x, y), x + y)


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


def test_exponential_is_good_to_one_unit(isa: str) -> None:
    """Through softmax over two positions whose values are 1 and 0: e^x / (1 + e^x), x <= 0."""
    worst = 0.0
    k = np.zeros((2, 2), np.float32)
    v = np.array([[0.0, 1.0], [1.0, 0.0]], np.float32)
    for x in np.linspace(-100, 0, 3001, dtype=np.float32):
        k[1, 0] = x
        q = np.array([1.0, 0.0], np.float32)
        y = _core.kernel_unary(isa, "attend", q, k, v)
        scaled = float(np.float32(x * np.float32(1.0 / np.sqrt(np.float32(2.0)))))
        exact = np.exp(scaled) / (1.0 + np.exp(scaled))
        worst = max(worst, abs(float(y[0]) - exact) / exact)
    assert worst <= 2.5 * EPS  # the exponential, the sum and the division, each rounded


def attend_exactly(q: F32, k: F32, v: F32) -> npt.NDArray[np.float64]:
    scores = k.astype(np.float64) @ q.astype(np.float64) / np.sqrt(len(q))
    weights = np.exp(scores - scores.max())
    return weights @ v.astype(np.float64) / weights.sum()


def test_attend(isa: str) -> None:
    rng = np.random.default_rng(9)
    for head_dim in (2, 4, 6, 8, 10, 16, 18, 32, 34, 48, 50, 64, 80, 96, 128, 130):
        for n in (1, 2, 3, 4, 5, 8, 15, 17, 33, 100, 257):
            q, k, v = normal(rng, head_dim), normal(rng, n, head_dim), normal(rng, n, head_dim)
            y = _core.kernel_unary(isa, "attend", q, k, v)
            # An error of a score is a relative error of its weight; then a sum over positions.
            score_error = head_dim * EPS * np.max(np.abs(k) @ np.abs(q)) / np.sqrt(head_dim)
            bound = (score_error + (8 + n / 2) * EPS) * 2 * np.abs(v).max()
            assert np.all(np.abs(y - attend_exactly(q, k, v)) <= bound), (head_dim, n)


def test_attend_extremes(isa: str) -> None:
    rng = np.random.default_rng(10)
    n, head_dim = 37, 18
    v = normal(rng, n, head_dim)
    q = np.ones(head_dim, np.float32)
    k = np.full((n, head_dim), -1e6, np.float32)  # all far below zero: nothing may vanish
    np.testing.assert_allclose(
        _core.kernel_unary(isa, "attend", q, k, v), v.mean(axis=0, dtype=np.float64), atol=1e-6
    )
    k[n - 1] = 1e6  # one position, in the tail of the vectors, takes all
    np.testing.assert_array_equal(_core.kernel_unary(isa, "attend", q, k, v), v[n - 1])
    k[3, 0] = np.nan
    assert np.isnan(_core.kernel_unary(isa, "attend", q, k, v)).all()


def test_sets_are_listed_best_first_and_unknown_names_refused() -> None:
    names = _core.supported_isas()
    assert names[-1] == "generic" and len(set(names)) == len(names)
    order = ["avx512vnni", "avx512", "avx2", "generic"]
    assert names == [name for name in order if name in names]
    x = np.zeros((1, 4), np.float32)
    with pytest.raises(Exception, match="generic"):
        _core.kernel_matmul("sse9", "f32", np.zeros((1, 4), np.float32), 1, 4, x)
