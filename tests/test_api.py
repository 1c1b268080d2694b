"""The other calls of a Model, and every wrong argument by name."""

import math
import threading

import numpy as np
import pytest

import tinyllama
from random_models import tiny_checkpoint, tiny_model
from tinyllama import SamplingParams, _core
from tinyllama.errors import ArgumentError, ContextFullError
from tinyllama.formats.checkpoint import Checkpoint
from tinyllama.formats.gguf import gguf_bytes, write_gguf
from tinyllama.reference import forward

PROMPT = "the rain"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_logprobs_are_the_models_own(model):
    completion = model.complete(PROMPT, 4, seed=1, temperature=0.7, max_new_tokens=10)
    prompt = model.tokenizer.encode(PROMPT)
    logits = forward(tiny_checkpoint(), prompt + list(completion.tokens), dtype=np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, entry in enumerate(completion.logprobs):
        row = logprobs[len(prompt) - 1 + i]
        assert entry.token == completion.tokens[i]
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-4)
        assert [t for t, _ in entry.top] == np.argsort(-row)[:4].tolist()
        np.testing.assert_allclose([p for _, p in entry.top], np.sort(row)[::-1][:4], atol=1e-4)


def test_logprobs_of_the_whole_vocabulary_sum_to_one(model):
    completion = model.complete(PROMPT, logprobs=300, seed=1, max_new_tokens=3)
    for entry in completion.logprobs:
        assert sum(math.exp(p) for _, p in entry.top) == pytest.approx(1.0)
    assert model.complete(PROMPT, logprobs=0, seed=1, max_new_tokens=3).logprobs[0].top == ()
    assert model.complete(PROMPT, seed=1, max_new_tokens=3).logprobs is None


def test_logits(model):
    tokens = model.tokenizer.encode(PROMPT)
    logits = model.logits(tokens)
    assert logits.dtype == np.float32
    assert logits.shape == (len(tokens), 300)
    np.testing.assert_allclose(logits, forward(tiny_checkpoint(), tokens), atol=1e-4)
    np.testing.assert_array_equal(model.logits(PROMPT), logits)
    np.testing.assert_array_equal(model.logits(np.array(tokens, np.uint16)), logits)


def test_tokenizer(model):
    tokenizer = model.tokenizer
    tokens = tokenizer.encode("the r\u00e9", bos=True, eos=True)
    assert (tokens[0], tokens[-1]) == (1, 2)
    assert tokenizer.encode("the r\u00e9", bos=False) == tokens[1:-1]
    assert tokenizer.decode(tokens) == "the r\u00e9"
    assert tokenizer.decode(np.array(tokens)) == "the r\u00e9"
    assert tokenizer.decode([3 + 0xC3]) == "\ufffd"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (300, 1, 2)
    with pytest.raises(ArgumentError, match="text is 3"):
        tokenizer.encode(3)
    with pytest.raises(ArgumentError, match="surrogate"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ArgumentError, match=r"tokens\[1\] is 300"):
        tokenizer.decode([1, 300])


def test_info_and_config(model):
    info = model.info()
    assert info["dtype"] == "f32"
    assert info["isa"] in tinyllama.supported_isas()
    assert info["n_threads"] == 1
    assert info["parameters"] == tiny_checkpoint().config.n_parameters
    assert info["bytes"] == 4 * info["parameters"]
    # Two layers, two key heads: a key of 8, and a value of 8 filled up to 16.
    assert info["kv_bytes_per_token"] == 4 * 2 * 2 * (8 + 16)
    assert model.config == tiny_checkpoint().config
    assert "tinyllama.Model" in repr(model)


@pytest.mark.parametrize("kind", [None, "linear", "llama3"])
def test_config_of_scaled_rotary(kind, tmp_path):
    scaling = kind and tinyllama.RopeScaling(kind, 4.0, 1.0, 4.0, 32)
    if kind == "linear":
        scaling = tinyllama.RopeScaling("linear", 4.0)
    checkpoint = tiny_checkpoint(rope_scaling=scaling)
    write_gguf(checkpoint, tmp_path / "model.gguf")
    assert tinyllama.load(tmp_path / "model.gguf").config == checkpoint.config


def test_params_can_be_kept_and_overridden(model):
    params = SamplingParams(temperature=0, max_new_tokens=9)
    assert model.generate(PROMPT, params=params) == model.generate(
        PROMPT, temperature=0, max_new_tokens=9
    )
    assert len(model.complete(PROMPT, params=params, max_new_tokens=4).tokens) <= 4


def test_threads_share_a_model():
    model = tiny_model()
    expected = [model.generate(PROMPT, seed=i, max_new_tokens=20) for i in range(8)]
    found = [None] * 8

    def work(i):
        found[i] = model.generate(PROMPT, seed=i, max_new_tokens=20)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, 300], r"tokens\[1\] is 300; the model has 300 tokens"),
        ([1, -1], r"tokens\[1\] is -1"),
        ([1, 2.5], r"tokens\[1\] is 2.5"),
        ([1, "a"], r"tokens\[1\] is 'a'"),
        ([[]], "no tokens"),
        (b"bytes", "prompt is b'bytes'"),
        (None, "prompt is None"),
        (3, "prompt is 3"),
        (["a", 3], "tokens is 3"),
        ("a\udfff", "surrogate"),
        ({"a": 1}, "prompt is {'a': 1}"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["generate", "complete", "stream"])
def test_a_bad_prompt_is_named(model, method, prompt, message):
    if method == "stream" and isinstance(prompt, list) and not isinstance(prompt[0], int):
        message = "one prompt"
    with pytest.raises(ArgumentError, match=message):
        getattr(model, method)(prompt)


@pytest.mark.parametrize("method", ["generate", "complete", "stream"])
def test_a_prompt_longer_than_the_context_is_refused(model, method):
    with pytest.raises(ContextFullError, match="the prompt has 65 tokens; the context holds 64"):
        getattr(model, method)([5] * 65)


@pytest.mark.parametrize("method", ["generate", "complete", "stream"])
@pytest.mark.parametrize(
    "option",
    [{"temperature": math.nan}, {"top_p": 2}, {"seed": -1}, {"logit_bias": {300: 1.0}}],
    ids=str,
)
def test_a_bad_option_is_named_before_any_work(model, method, option):
    with pytest.raises(ArgumentError, match=next(iter(option))):
        getattr(model, method)(PROMPT, **option)


def test_other_bad_arguments(model):
    with pytest.raises(ArgumentError, match="logprobs is 301"):
        model.complete(PROMPT, 301)
    with pytest.raises(ArgumentError, match="logprobs is -1"):
        model.complete(PROMPT, -1)
    with pytest.raises(ArgumentError, match="params is"):
        model.generate(PROMPT, params={"temperature": 1})
    with pytest.raises(ArgumentError, match="num_return_sequences is 2"):
        model.stream(PROMPT, num_return_sequences=2)
    with pytest.raises(ArgumentError, match="seed"):
        model.session(seed=-1)
    with pytest.raises(ArgumentError, match="n_tokens"):
        model.session().rewind(-1)
    with pytest.raises(ArgumentError):
        model.session().rewind(1)
    with pytest.raises(TypeError, match="temprature"):
        model.generate(PROMPT, temprature=1)


def test_a_model_without_a_begin_token_needs_a_prompt():
    checkpoint = tiny_checkpoint()
    vocabulary = type(checkpoint.vocabulary)(
        checkpoint.vocabulary.pieces,
        checkpoint.vocabulary.scores,
        checkpoint.vocabulary.types,
        bos_id=None,
        eos_id=None,
        add_bos=False,
    )
    data = gguf_bytes(Checkpoint(checkpoint.config, checkpoint.tensors, vocabulary))
    model = tinyllama.load(data, n_threads=1)
    assert len(model.complete("a", max_new_tokens=3, min_new_tokens=3).tokens) == 3
    with pytest.raises(ArgumentError, match="no tokens"):
        model.generate("")
    with pytest.raises(ArgumentError, match="no tokens"):
        next(model.session().generate())


def test_a_busy_session_raises(model):
    session = model.session(seed=1)
    session.feed(PROMPT)
    errors, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            try:
                session.rewind(1)
                session.feed([5] * 60)
            except tinyllama.errors.BusyError as error:
                errors.append(error)
                stop.set()
            except tinyllama.TinyllamaError:
                pass  # the other thread was in between

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    stop.wait(30)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors


def test_help_shows_every_option():
    import inspect

    for function in (tinyllama.generate, tinyllama.stream, tinyllama.Model.generate):
        shown = inspect.signature(function).parameters
        assert shown["top_p"].default == 0.9
        assert shown["max_new_tokens"].default is None
        assert "sampling" not in shown


def test_an_unknown_option_names_the_nearest():
    model = tiny_model()
    for call in (model.generate, model.complete, model.stream, model.session().generate):
        with pytest.raises(TypeError, match="unknown option 'temprature'; did you mean 'temperat"):
            call(temprature=1.0)


def test_core_version_is_the_packages():
    assert tinyllama.__version__ == _core.__version__
