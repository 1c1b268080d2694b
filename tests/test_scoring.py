"""Many texts scored at once: each as if it were alone, and what they have in common read once."""

import math

import numpy as np
import pytest

from random_models import tiny_checkpoint, tiny_model
from tinyllama import _core, load
from tinyllama.errors import ArgumentError, ContextFullError, NonFiniteError
from tinyllama.formats.gguf import gguf_bytes

CONTEXT = 320  # more than one pass reads


def score(model, texts, n_given, progress=lambda n: None):
    return _core.score_texts(model._core, texts, n_given, progress)


def kv_bytes(model):
    return model.scheduler().stats()["kv_bytes"]


def alone(model, text, n_given):
    """ln of the probability of a text from token n_given on, by a session of its own."""
    core = model.session()._core
    logprobs = [*_core.score(core, text[:-1]), _core.logprob(core, text[-1])] if text[1:] else []
    total = 0.0
    for logprob in logprobs[n_given:]:
        total += logprob
    return total


def related_texts(random, n):
    """Texts that begin as others do, or end where others go on, or are the same."""
    texts = [random.integers(3, 300, CONTEXT + 1).tolist()]
    while len(texts) < n:
        other = texts[random.integers(len(texts))]
        begin = other[: random.integers(len(other) + 1)]
        n_words = random.choice([2, 5, 290])  # of few, whole passes are in common
        new = random.integers(3, 3 + n_words, random.choice([0, 1, 2, 9, 70, 400])).tolist()
        if begin + new:
            texts.append((begin + new)[: CONTEXT + 1])
    return texts


def test_many_texts_score_as_their_logits_say():
    model, random = tiny_model(max_seq_len=CONTEXT), np.random.default_rng(0)
    lengths = [*random.integers(2, 40, 30), CONTEXT + 1, 257, 2, 1, CONTEXT]
    texts = [random.integers(3, 300, n).tolist() for n in lengths]
    n_given = [int(random.integers(1, len(text) + 1)) for text in texts]
    found = score(model, texts, n_given)
    for text, given, (logprob, greedy) in zip(texts, n_given, found, strict=True):
        logits = model.logits(text[:-1]).astype(np.float64) if len(text) > 1 else np.zeros((0, 300))
        rows = logits[given - 1 :]
        chosen = rows[np.arange(len(rows)), text[given:]]
        expected = (chosen - np.log(np.exp(rows).sum(axis=1))).sum()
        assert math.isclose(logprob, expected, abs_tol=1e-4)
        assert greedy == all(chosen == rows.max(axis=1))


@pytest.mark.parametrize("dtype, n_threads", [("f32", 1), ("f32", 3), ("q8_0", 2)])
@pytest.mark.parametrize("seed", range(3))
def test_texts_that_begin_alike_score_as_each_does_alone(seed, dtype, n_threads):
    model = load(gguf_bytes(tiny_checkpoint(max_seq_len=CONTEXT), dtype), n_threads=n_threads)
    random = np.random.default_rng(seed)
    texts = related_texts(random, 120)
    n_given = [
        int(random.choice([1, len(text), random.integers(1, len(text) + 1)])) for text in texts
    ]
    told = []
    found = score(model, texts, n_given, told.append)
    for text, given, one in zip(texts, n_given, found, strict=True):
        if dtype == "f32" and model.info()["isa"] == "avx512amx":  # as whole numbers of 24 bits
            assert math.isclose(one[0], alone(model, text, given), rel_tol=1e-6, abs_tol=1e-5)
        else:
            assert one[0] == alone(model, text, given)  # to the last bit
        assert [one] == score(model, [text], [given])
    assert len(told) > 1 and min(told) > 0 and sum(told) == len(texts)
    assert kv_bytes(model) == 0


def test_what_texts_have_in_common_is_read_once():
    model, prefix = tiny_model(max_seq_len=CONTEXT), list(range(3, 253))
    told = []  # how many texts were done, after each pass in which one was
    score(model, [[*prefix, i] for i in range(50, 150)], [len(prefix)] * 100, told.append)
    assert told == [100]
    told.clear()
    score(model, [[*prefix, i, 7] for i in range(50, 150)], [len(prefix)] * 100, told.append)
    assert told == [100]
    told.clear()
    score(model, [[*prefix, i, i, 7] for i in range(50, 250)], [1] * 200, told.append)
    assert len(told) == 2 and sum(told) == 200  # 400 rows


def test_what_waits_takes_little_memory():
    model, random = tiny_model(max_seq_len=CONTEXT), np.random.default_rng(0)
    texts = [[1, i, *random.integers(3, 300, 198).tolist()] for i in range(40)]
    taken = []
    score(model, texts, [1] * 40, lambda n: taken.append(kv_bytes(model)))
    blocks_of_a_text = -(-len(texts[0]) // 32)
    most = 3 * blocks_of_a_text * 32 * model.info()["kv_bytes_per_token"]
    assert len(taken) > 10 and max(taken) <= most


def test_greedy_is_said_of_what_the_model_itself_would_say():
    model = tiny_model(vocab_size=200)
    prompt = model.tokenizer.encode("the cat")
    said = list(model.complete(prompt, temperature=0, max_new_tokens=9).tokens)
    other = [*said[:-1], (said[-1] + 1) % 200]
    found = score(model, [prompt + said, prompt + other], [len(prompt)] * 2)
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.parametrize(
    "texts, n_given, error, message",
    [
        ([[1, 2]], [0], ArgumentError, "text 0 has 2 tokens; 0 cannot be given"),
        ([[1, 2], []], [1, 1], ArgumentError, "text 1 has 0 tokens"),
        ([[1, 2]], [3], ArgumentError, "3 cannot be given"),
        ([[1, 2]], [1, 1], ArgumentError, "n_given"),
        ([[1, 2], [1, 300]], [1, 1], ArgumentError, "token 300"),
        ([[1, 2], [-1, 2]], [1, 2], ArgumentError, "token -1"),
        ([[1, 2], [1] * 66], [1, 1], ContextFullError, "65 tokens do not fit"),
    ],
)
def test_texts_that_cannot_be_scored(texts, n_given, error, message):
    told = []
    with pytest.raises(error, match=message):
        score(tiny_model(), texts, n_given, told.append)
    assert told == []  # nothing was read


def test_no_texts():
    assert score(tiny_model(), [], []) == []
    assert score(tiny_model(), [[5], [5, 6]], [1, 2]) == [(0.0, True)] * 2  # nothing is asked


def test_a_stop_in_between_leaves_nothing_behind():
    model, random = tiny_model(max_seq_len=CONTEXT), np.random.default_rng(0)
    texts = related_texts(random, 60)
    expected = score(model, texts, [1] * 60)

    def stop(n):
        told.append(n)
        if len(told) == n_passes:
            raise KeyboardInterrupt

    for n_passes in range(1, 4):
        told = []
        with pytest.raises(KeyboardInterrupt):
            score(model, texts, [1] * 60, stop)
        assert len(told) == n_passes and sum(told) < 60
        assert kv_bytes(model) == 0
    assert score(model, texts, [1] * 60) == expected


def test_logits_that_are_not_finite_leave_nothing_behind():
    checkpoint = tiny_checkpoint()
    checkpoint.tensors["final_norm"][:] = np.float32(3e38)
    model = load(gguf_bytes(checkpoint), n_threads=1)
    texts = [[1, 5, 6, 7, 9], [1, 5, 8, 9]]
    with pytest.raises(NonFiniteError, match=r"at position [23]"):  # in the second pass
        score(model, texts, [4, 3])
    assert kv_bytes(model) == 0
