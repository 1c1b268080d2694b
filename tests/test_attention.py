"""Attention over a cache in blocks: against float64, bit against bit, and blind to what it may not
see. kernel_attend fills every byte that no position was stored in with 0xff, which is NaN."""

import numpy as np
import numpy.typing as npt
import pytest

from tinyllama import _core

EPS = float(np.finfo(np.float32).eps)
KV_DTYPES = ["f32", "bf16", "int8"]
F32 = npt.NDArray[np.float32]


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def normal(rng: np.random.Generator, *shape: int) -> F32:
    return rng.standard_normal(shape, dtype=np.float32)


def attend(isa: str, kv_dtype: str, q: F32, n_positions: npt.ArrayLike, k: F32, v: F32) -> F32:
    return _core.kernel_attend(isa, kv_dtype, q, np.asarray(n_positions, np.int32), k, v)


def as_bf16(x: F32) -> F32:
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def scale_of_bytes(x: F32) -> F32:
    scale: F32 = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    return scale


def as_bytes(x: F32) -> npt.NDArray[np.float64]:
    return np.round(x * (np.float32(1) / scale_of_bytes(x))).astype(np.float64)


def as_stored(x: F32, kv_dtype: str) -> npt.NDArray[np.float64]:
    """What the cache holds of rows x: rounded to nearest even, int8 by a scale of each row."""
    if kv_dtype == "f32":
        return x.astype(np.float64)
    if kv_dtype == "bf16":
        return as_bf16(x).astype(np.float64)
    return as_bytes(x) * scale_of_bytes(x)


def weights_of(q: npt.NDArray[np.floating], k: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    scores = k @ q.astype(np.float64) / np.sqrt(len(q))
    weights: npt.NDArray[np.float64] = np.exp(scores - scores.max())
    return weights / weights.sum()


def lost_in_steps(
    weights: npt.NDArray[np.float64], scale: F32, bytes_: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """By how much 127 steps of the weights of each 128 positions can change the result."""
    lost = np.zeros(bytes_.shape[1])
    for begin in range(0, len(weights), 128):
        part = slice(begin, begin + 128)
        step = (weights[part] * scale[part, 0]).max() / 127
        lost += 0.5001 * step * np.abs(bytes_[part]).sum(axis=0)
    return lost


def random_case(rng: np.random.Generator) -> tuple[F32, npt.NDArray[np.int32], F32, F32]:
    """Queries of a group, or of successive tokens, or of anywhere."""
    head_dim = int(rng.choice([2, 4, 6, 10, 16, 18, 30, 48, 64, 80, 96, 128, 130, 200, 256]))
    n = int(rng.choice([1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 257, int(rng.integers(1, 701))]))
    n_queries = int(rng.integers(1, 9))
    kind = rng.integers(3)
    if kind == 0:
        n_positions = np.full(n_queries, n, np.int32)
    elif kind == 1:
        n_positions = np.maximum(1, n - np.arange(n_queries, dtype=np.int32)[::-1])
    else:
        n_positions = rng.integers(1, n + 1, n_queries, dtype=np.int32)
    q = normal(rng, n_queries, head_dim) * np.float32(rng.choice([0.3, 1.0, 8.0]))
    return q, n_positions, normal(rng, n, head_dim), normal(rng, n, head_dim)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_attend_equals_float64(isa: str, kv_dtype: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        q, n_positions, k, v = random_case(rng)
        y = attend(isa, kv_dtype, q, n_positions, k, v)
        stored_k, stored_v = as_stored(k, kv_dtype), as_stored(v, kv_dtype)
        head_dim = q.shape[1]
        near_q = as_stored(q, kv_dtype)  # as keys are, so are queries
        for i, n in enumerate(n_positions):
            # The error of a score is a relative error of its weight; so is that of the largest
            # score, which all share. Then a sum over positions, and the rest rounded a few times.
            largest = np.max(np.abs(stored_k[:n]) @ np.abs(q[i])) / np.sqrt(head_dim)
            bound = 2 * EPS * ((head_dim + 4) * largest + n / 2 + 16)
            bound += 2.0**-8 if kv_dtype == "bf16" else 0  # weights are rounded as well
            weights = weights_of(near_q[i], stored_k[:n])
            error = np.abs(y[i] - weights @ stored_v[:n])
            limit = bound * np.abs(stored_v[:n]).max()
            if kv_dtype == "int8":
                limit += lost_in_steps(weights, scale_of_bytes(v[:n]), as_bytes(v[:n]))
            assert np.all(error <= limit), (q.shape, n)


def test_types_are_as_exact_as_they_say(isa: str) -> None:
    """Against what was given, not what was stored: half a unit of 8 bits, of 1 / 127 of a row."""
    rng = np.random.default_rng(2)
    head_dim, n = 64, 300
    q, k, v = normal(rng, 1, head_dim), normal(rng, n, head_dim), normal(rng, n, head_dim)
    weights = weights_of(q[0], k.astype(np.float64))
    y = weights @ v
    for kv_dtype, unit in [("bf16", 2.0**-8), ("int8", 0.5 / 127)]:
        row = np.abs(k).max(axis=1, keepdims=True) if kv_dtype == "int8" else np.abs(k)
        of_score = 2 * unit * float(np.max(row.mean(axis=1))) * head_dim * np.abs(q).max()
        of_weights = unit if kv_dtype == "bf16" else unit * n * weights.max()
        bound = (unit + of_weights + np.expm1(2 * of_score / np.sqrt(head_dim))) * np.abs(v).max()
        error = np.abs(attend(isa, kv_dtype, q, [n], k, v)[0] - y).max()
        assert 0 < error <= min(bound, 0.05)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_one_position_is_its_value(isa: str, kv_dtype: str) -> None:
    rng = np.random.default_rng(3)
    for head_dim in (2, 6, 16, 48, 130):
        k, v = normal(rng, 1, head_dim), normal(rng, 1, head_dim)
        y = attend(isa, kv_dtype, normal(rng, 1, head_dim), [1], k, v)
        stored = as_stored(v, kv_dtype).astype(np.float32)
        # With int8 its weight is 127 times a 127th.
        np.testing.assert_allclose(y, stored, rtol=2 * EPS if kv_dtype == "int8" else 0)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_any_grouping_and_every_set_give_the_same_bits(isa: str, kv_dtype: str) -> None:
    rng = np.random.default_rng(4)
    for _ in range(25):
        q, n_positions, k, v = random_case(rng)
        together = attend(isa, kv_dtype, q, n_positions, k, v)
        for i, n in enumerate(n_positions):
            alone = attend(isa, kv_dtype, q[i : i + 1], [n], k[:n], v[:n])
            assert alone.tobytes() == together[i : i + 1].tobytes(), (q.shape, n_positions, i)
        assert together.tobytes() == attend("generic", kv_dtype, q, n_positions, k, v).tobytes()

        order = rng.permutation(np.repeat(np.arange(len(q)), 9))  # more than one pass, in any order
        shuffled = attend(isa, kv_dtype, q[order], n_positions[order], k, v)
        assert shuffled.tobytes() == together[order].tobytes()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_comes_later_is_not_looked_at(isa: str, kv_dtype: str) -> None:
    """Stored positions beyond a query's end that are NaN, beside those never stored."""
    rng = np.random.default_rng(5)
    for n in (1, 5, 16, 31, 32, 100, 128, 129, 200):
        q, k, v = normal(rng, 5, 18), normal(rng, n + 40, 18), normal(rng, n + 40, 18)
        y = attend(isa, kv_dtype, q, [n] * 5, k[:n], v[:n])
        k[n:], v[n:] = np.nan, np.nan
        later = attend(isa, kv_dtype, q, [n] * 4 + [n + 40], k, v)
        assert later[:4].tobytes() == y[:4].tobytes()
        assert np.isfinite(y).all() and np.isnan(later[4]).all()


def test_large_scores(isa: str) -> None:
    rng = np.random.default_rng(6)
    n, head_dim = 300, 18
    q, v = np.ones((1, head_dim), np.float32), normal(rng, n, head_dim)
    k = np.full((n, head_dim), -1e4, np.float32)  # all far below zero: nothing may vanish
    y = attend(isa, "f32", q, [n], k, v)
    np.testing.assert_allclose(y[0], v.mean(axis=0, dtype=np.float64), atol=1e-6)
    for top in (0, 31, 130, 299):  # the largest in the first span, or growing in a later one
        k[top] = 1e4
        np.testing.assert_array_equal(attend(isa, "f32", q, [n], k, v)[0], v[top])
        k[top] = -1e4
    rising = np.linspace(-1e4, 1e4, n, dtype=np.float32)[:, None].repeat(head_dim, axis=1)
    np.testing.assert_array_equal(attend(isa, "f32", q, [n], rising, v)[0], v[n - 1])
    np.testing.assert_array_equal(attend(isa, "f32", q, [n], rising[::-1], v)[0], v[0])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_nan_and_infinity_show(isa: str, kv_dtype: str) -> None:
    rng = np.random.default_rng(7)
    q = normal(rng, 1, 18)
    for bad in (np.nan, np.inf):
        for place in (0, 40, 199):
            k, v = normal(rng, 200, 18), normal(rng, 200, 18)
            k[place, 3] = np.nan
            assert np.isnan(attend(isa, kv_dtype, q, [200], k, v)).all()
            k[place, 3], v[place, 3] = 0.0, bad
            assert not np.isfinite(attend(isa, kv_dtype, q, [200], k, v)[0, 3])


def test_rows_of_zeros_and_of_subnormal_numbers(isa: str) -> None:
    q = np.ones((1, 6), np.float32)
    k, v = np.zeros((40, 6), np.float32), np.zeros((40, 6), np.float32)
    v[7] = 1e-40
    assert not attend(isa, "int8", q, [40], k, v).any()
    assert not attend(isa, "bf16", q, [40], k, 0 * v).any()


def test_an_unknown_type_is_refused() -> None:
    x = np.zeros((1, 2), np.float32)
    with pytest.raises(Exception, match="f32, bf16 or int8"):
        attend("generic", "int4", x, [1], x, x)
