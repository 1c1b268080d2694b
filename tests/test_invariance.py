"""One session's logits are bitwise the same in any batch, for any split of its prompt, on any
number of threads, after rewind and fork: for every kernel set and weight format."""

import itertools

import numpy as np
import pytest

import tinyllama
from random_models import tiny_checkpoint
from tinyllama import _core
from tinyllama.formats.gguf import gguf_bytes

DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
N_TOKENS = 40
# Sizes that are no multiples of any vector's or block's width, except dim, which q8_0 asks for.
CHANGES = {"dim": 96, "head_dim": 10, "n_heads": 6, "n_kv_heads": 2, "hidden_dim": 172}


@pytest.fixture(
    scope="module",
    params=[(i, d) for i in tinyllama.supported_isas() for d in DTYPES],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def models(request):
    """The same model for 1 to 4 threads."""
    isa, dtype = request.param
    data = gguf_bytes(tiny_checkpoint(3, **CHANGES), dtype)
    return {n: tinyllama.load(data, isa=isa, n_threads=n)._core for n in (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 300, N_TOKENS).tolist()


@pytest.fixture(scope="module")
def alone(models, tokens):
    """Logits at every position, the session alone, the prompt whole, on one thread."""
    return _core.forward([_core.Session(models[1], 0)], [tokens], all_logits=True)[0]


def assert_same_bits(a, b):
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_token_by_token(models, tokens, alone):
    session = _core.Session(models[1], 0)
    for i, token in enumerate(tokens):
        _core.forward([session], [[token]])
        assert_same_bits(session.logits(), alone[i])


@pytest.mark.parametrize("n_threads", [1, 2, 3, 4])
def test_threads(models, tokens, alone, n_threads):
    session = _core.Session(models[n_threads], 0)
    assert_same_bits(_core.forward([session], [tokens], all_logits=True)[0], alone)


def test_every_split_in_two(models, tokens, alone):
    for at in range(1, N_TOKENS):
        session = _core.Session(models[1], 0)
        first = _core.forward([session], [tokens[:at]], all_logits=True)[0]
        second = _core.forward([session], [tokens[at:]], all_logits=True)[0]
        assert_same_bits(np.concatenate([first, second]), alone)


def test_random_splits(models, tokens, alone):
    rng = np.random.default_rng(2)
    for _ in range(20):
        cuts = [0, *np.flatnonzero(rng.random(N_TOKENS - 1) < rng.random()) + 1, N_TOKENS]
        session = _core.Session(models[1], 0)
        parts = [
            _core.forward([session], [tokens[a:b]], all_logits=True)[0]
            for a, b in itertools.pairwise(cuts)
        ]
        assert_same_bits(np.concatenate(parts), alone)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 13, 16, 31, 32, 33, 64])
def test_batches(models, tokens, alone, size):
    """Among others of other lengths and pasts, at any place of the batch, prompts cut at random."""
    rng = np.random.default_rng(size)
    model = models[1 + size % 4]
    sessions = [_core.Session(model, i) for i in range(size)]
    place = int(rng.integers(size))
    seen, done = [], 0
    for _ in range(6):
        fed = [rng.integers(0, 300, int(rng.integers(1, 9))).tolist() for _ in range(size)]
        fed[place] = tokens[done : done + int(rng.integers(1, 9))]
        if not fed[place]:
            break
        done += len(fed[place])
        order = rng.permutation(size)
        results = _core.forward(
            [sessions[i] for i in order], [fed[i] for i in order], all_logits=True
        )
        seen.append(results[int(np.flatnonzero(order == place)[0])])
    assert_same_bits(np.concatenate(seen), alone[:done])
    assert_same_bits(sessions[place].logits(), alone[done - 1])


def test_rewind_and_fork(models, tokens, alone):
    session = _core.Session(models[1], 0)
    _core.forward([session], [tokens])
    session.rewind(25)
    fork = session.fork(1)
    assert_same_bits(session.logits(), alone[24])
    _core.forward([fork], [[9, 9, 9]])  # a fork's future is its own
    again = _core.forward([session], [tokens[25:]], all_logits=True)[0]
    assert_same_bits(again, alone[25:])
    fork.rewind(20)
    assert_same_bits(_core.forward([fork], [tokens[20:]], all_logits=True)[0], alone[20:])


def test_texts_do_not_depend_on_who_runs_beside_them():
    model = tinyllama.load(gguf_bytes(tiny_checkpoint(3, **CHANGES)), n_threads=2)
    prompts = [f"the {'rain ' * (i % 5)}{i}" for i in range(70)]
    together = model.complete(prompts, seed=5, max_new_tokens=12, num_return_sequences=2)
    for group in (together[0], together[33], together[69]):
        for completion in group:
            i = together.index(group)
            one = model.complete(prompts[i], seed=completion.seed, max_new_tokens=12)
            assert one == completion


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_set_gives_the_same_bits(tokens, dtype):
    data = gguf_bytes(tiny_checkpoint(3, **{**CHANGES, "head_dim": 16}), dtype)
    for isa in tinyllama.supported_isas():
        model = tinyllama.load(data, isa=isa, n_threads=1)
        logits = _core.forward([_core.Session(model._core, 0)], [tokens], all_logits=True)[0]
        if isa == tinyllama.supported_isas()[0]:
            expected = logits
        assert_same_bits(logits, expected)


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "int8"])
def test_forks_and_rewinds_across_blocks_of_the_cache(kv_dtype):
    """A block holds 32 positions; whole ones are shared until one side writes into them."""
    model = tinyllama.load(gguf_bytes(tiny_checkpoint(max_seq_len=128)), kv_dtype=kv_dtype)._core
    rng = np.random.default_rng(7)
    first = _core.Session(model, 0)
    sessions, timelines = [first], [[]]
    for _ in range(150):
        i = int(rng.integers(len(sessions)))
        action = rng.random()
        if action < 0.2 and timelines[i] and len(sessions) < 6:
            sessions.append(sessions[i].fork(0))
            timelines.append(list(timelines[i]))
        elif action < 0.4 and timelines[i]:
            n = int(rng.integers(1, len(timelines[i]) + 1))
            sessions[i].rewind(n)
            del timelines[i][n:]
        else:
            new = rng.integers(3, 300, int(rng.integers(1, 40))).tolist()[: 128 - len(timelines[i])]
            if new:
                _core.forward([sessions[i]], [new])
                timelines[i] += new
        j = int(rng.integers(len(sessions)))
        if timelines[j]:
            alone = _core.Session(model, 0)
            _core.forward([alone], [timelines[j]])
            assert_same_bits(sessions[j].logits(), alone.logits())
