"""SamplingParams and the native sampler, held against the same steps in NumPy."""

import dataclasses
import math

import numpy as np
import pytest

from random_models import tiny_checkpoint, tiny_model
from tinyllama import SamplingParams, _core, load
from tinyllama.errors import ArgumentError
from tinyllama.formats.gguf import gguf_bytes

N_DRAWS = 6000
PROMPT = [1, 40, 41, 41, 42]
GENERATED = [43, 43, 44]


@pytest.fixture(scope="module")
def session():
    model = tiny_model(seed=5)
    session = _core.Session(model._core, 11)
    _core.forward([session], [PROMPT + GENERATED])
    return session


def expected_probabilities(logits, p):
    """What the documented steps leave of softmax(logits), in float64."""
    x = logits.astype(np.float64).copy()
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    for token in set(PROMPT + GENERATED):
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        )
    for token in set(GENERATED):
        x[token] -= p.presence_penalty + p.frequency_penalty * GENERATED.count(token)
    if p.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    probabilities = np.exp((x - x.max()) / p.temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    if p.top_k:
        probabilities[order[p.top_k :]] = 0
        probabilities /= probabilities.sum()
    if p.top_p < 1:
        n_kept = int(np.searchsorted(np.cumsum(probabilities[order]), p.top_p)) + 1
        probabilities[order[n_kept:]] = 0
    probabilities[probabilities < p.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1.0},
        {"top_p": 1.0, "temperature": 0.5},
        {"top_p": 1.0, "temperature": 1.7},
        {"top_p": 1.0, "top_k": 7},
        {"top_p": 0.6},
        {"top_p": 1.0, "min_p": 0.2},
        {"top_p": 0.8, "top_k": 30, "min_p": 0.1, "temperature": 1.3},
        {"top_p": 0.5, "repetition_penalty": 3.0},
        {"top_p": 0.7, "presence_penalty": 1.5, "frequency_penalty": -2.0},
        {"top_p": 0.7, "logit_bias": {40: 4.0, 50: -3.0, 60: -math.inf}},
        {"temperature": 0.0},
        {"temperature": 0.0, "logit_bias": {77: 100.0}},
        {"top_p": 0.0},
        {"top_p": 1.0, "min_p": 1.0},
    ],
    ids=str,
)
def test_draws_follow_the_documented_distribution(session, options):
    params = SamplingParams(**options)
    expected = expected_probabilities(session.logits(), params)
    core = params.for_core(300)
    core.n_prompt_tokens = len(PROMPT)
    drawn = np.array([_core.sample(session, core) for _ in range(N_DRAWS)])
    counts = np.bincount(drawn, minlength=300)
    assert counts[expected == 0].sum() == 0  # nothing that the filters drop is ever drawn
    likely = expected * N_DRAWS >= 5
    chi_square = ((counts - expected * N_DRAWS)[likely] ** 2 / (expected * N_DRAWS)[likely]).sum()
    degrees = max(1, int(likely.sum()) - 1)
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_logprob_is_that_of_the_unmodified_distribution(session):
    logits = session.logits().astype(np.float64)
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    for token in range(0, 300, 7):
        assert _core.logprob(session, token) == pytest.approx(expected[token], abs=1e-6)
    for token in (-1, 300):
        with pytest.raises(ArgumentError, match=f"token {token} is outside the 300 tokens"):
            _core.logprob(session, token)
    top = _core.top_logprobs(session, 5)
    assert [t for t, _ in top] == np.argsort(-expected, kind="stable")[:5].tolist()
    np.testing.assert_allclose([p for _, p in top], np.sort(expected)[::-1][:5], atol=1e-6)


N_TOKENS = 937  # no multiple of a block of tokens


@pytest.fixture(scope="module")
def blank():
    """A session whose logits are all 0, so that logit_bias sets them to the bit."""
    checkpoint = tiny_checkpoint(vocab_size=N_TOKENS)
    checkpoint.tensors["tok_embed"][:] = 0
    session = _core.Session(load(gguf_bytes(checkpoint))._core, 4)
    _core.forward([session], [[1]])
    assert not session.logits().any()
    return session


def drawn_from(blank, logits, n_draws, **options):
    bias = {token: float(logit) for token, logit in enumerate(logits)}
    params = SamplingParams(logit_bias=bias, **options).for_core(N_TOKENS)
    return np.array([_core.sample(blank, params) for _ in range(n_draws)])


@pytest.mark.parametrize("n_kept", [1, 2, 15, 16, 17, 63, 64, 65, 501, 936])
def test_of_equals_the_lowest_ids_are_kept(blank, n_kept):
    lowest = set(range(n_kept))
    for options in ({"top_p": (n_kept - 0.5) / N_TOKENS}, {"top_k": n_kept, "top_p": 1.0}):
        drawn = drawn_from(blank, np.zeros(N_TOKENS), 3000, **options)
        assert set(drawn.tolist()) <= lowest
        if n_kept < 100:  # then 3000 draws meet them all
            assert set(drawn.tolist()) == lowest


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9},
        {"top_p": 0.05},
        {"top_p": 0.999},
        {"top_p": 1.0, "top_k": 100},
        {"top_p": 0.7, "top_k": 600, "min_p": 0.02},
        {"top_p": 0.5, "min_p": 0.4},
        {"top_p": 0.9, "temperature": 0.3},
        {"top_p": 0.9, "temperature": 1e-9},
        {"top_p": 0.9, "temperature": 1e5},
    ],
    ids=str,
)
def test_large_vocabularies_with_many_ties(blank, options, spread):
    logits = np.round(np.random.default_rng(8).normal(0, spread, N_TOKENS) * 16) / 16
    p = SamplingParams(**options)
    expected = expected_probabilities(logits, p)
    counts = np.bincount(drawn_from(blank, logits, N_DRAWS, **options), minlength=N_TOKENS)
    assert counts[expected == 0].sum() == 0
    # Tokens with one probability together, as alone they are too seldom drawn to be counted.
    _, group = np.unique(expected.round(12), return_inverse=True)
    counts, likely = np.bincount(group, counts), np.bincount(group, expected) * N_DRAWS
    counts, likely = counts[likely >= 5], likely[likely >= 5]
    degrees = max(1, len(likely) - 1)
    assert ((counts - likely) ** 2 / likely).sum() < degrees + 5 * math.sqrt(2 * degrees)


def test_a_seed_gives_the_same_draws():
    model = tiny_model()
    params = SamplingParams(top_p=1.0).for_core(300)

    def draws(seed):
        session = _core.Session(model._core, seed)
        _core.forward([session], [[1, 5]])
        return [_core.sample(session, params) for _ in range(50)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(2**64 - 1) == draws(2**64 - 1)


def test_everything_banned_is_refused(session):
    with pytest.raises(ArgumentError, match="ban every token"):
        SamplingParams(logit_bias=dict.fromkeys(range(300), -math.inf)).for_core(300)


def test_every_option_has_help():
    for option in dataclasses.fields(SamplingParams):
        assert option.metadata["help"], option.name


def test_defaults_are_the_published_ones():
    assert dataclasses.asdict(SamplingParams()) == {
        "max_new_tokens": None,
        "min_new_tokens": 0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": None,
        "choices": None,
        "regex": None,
        "json_schema": None,
        "grammar": None,
        "on_overflow": "stop",
        "n_keep": 1,
        "seed": None,
        "num_return_sequences": 1,
        "logit_bias": None,
        "return_full_text": False,
    }


def test_numpy_numbers_are_numbers():
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint64(2**64 - 1), top_p=1
    )
    assert (params.temperature, params.top_k, params.seed) == (0.5, 3, 2**64 - 1)
    assert type(params.top_p) is float
    assert type(params.top_k) is int


NAN, INF = math.nan, math.inf
BAD = [
    *(("temperature", value) for value in (-0.1, NAN, INF, "hot", None, True)),
    *(("top_p", value) for value in (-0.1, 1.1, NAN, INF, "most")),
    *(("min_p", value) for value in (-0.1, 1.1, NAN)),
    *(("top_k", value) for value in (-1, 2.5, NAN, "many", 2**31, None)),
    *(("repetition_penalty", value) for value in (0.0, -1.0, NAN, INF)),
    *(("presence_penalty", value) for value in (NAN, INF, -INF, 101.0)),
    *(("frequency_penalty", value) for value in (NAN, INF, -101.0)),
    *(("max_new_tokens", value) for value in (0, -1, 1.5, "all", NAN, True)),
    *(("min_new_tokens", value) for value in (-1, 0.5, None)),
    *(("num_return_sequences", value) for value in (0, -1, 1.5, None)),
    *(("seed", value) for value in (-1, 2**64, 0.5, "lucky")),
    *(("stop", value) for value in ("", ["a", ""], [3], 3, b"a")),
    *(
        ("logit_bias", value)
        for value in ([1], {1: NAN}, {1: INF}, {-1: 0.0}, {"a": 1.0}, {1: "x"})
    ),
    *(("return_full_text", value) for value in (1, None, "yes")),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value))
def test_a_bad_option_is_named(name, value):
    with pytest.raises(ArgumentError, match=name):
        SamplingParams(**{name: value})


def test_the_value_is_named_too():
    with pytest.raises(ArgumentError, match=r"temperature is nan; it must be in \[0, 1e\+06\]"):
        SamplingParams(temperature=NAN)
    with pytest.raises(ArgumentError, match="seed is 18446744073709551616; it must be below 2"):
        SamplingParams(seed=2**64)


def test_contradictions_are_named():
    with pytest.raises(ArgumentError, match=r"min_new_tokens \(5\) is above max_new_tokens \(4\)"):
        SamplingParams(min_new_tokens=5, max_new_tokens=4)
    with pytest.raises(ArgumentError, match="logit_bias names token 300; the model has 300 tokens"):
        SamplingParams(logit_bias={300: 1.0}).for_core(300)
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)
