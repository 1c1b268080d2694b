"""The scheduler: many texts stepped together, each as if it were alone."""

import math

import numpy as np
import pytest

from random_models import tiny_checkpoint, tiny_model
from tinyllama import SamplingParams, _core, load
from tinyllama.errors import ArgumentError, NonFiniteError
from tinyllama.formats.gguf import gguf_bytes
from tinyllama.generation import new_request

PROMPT = [1, 40, 50, 60]
OPTIONS = SamplingParams(
    max_new_tokens=12, temperature=1.5, top_p=1.0, logit_bias={1: -math.inf, 2: -math.inf}
)


@pytest.fixture(scope="module")
def model():
    return tiny_model()._core


def request_of(model, seed, prompt=PROMPT, options=OPTIONS, session=None):
    session = session or _core.Session(model, seed)
    decoder = _core.StreamDecoder(model.tokenizer, True)
    return new_request(model, session, prompt, options, decoder, n_top=2)


def made(request):
    return request.text, request.tokens, request.logprobs, request.finish_reason


def alone(model, seed):
    scheduler = _core.Scheduler()
    scheduler.submit(request_of(model, seed))
    (request,) = scheduler.run()
    return made(request)


def test_texts_that_join_at_any_time_are_as_alone(model):
    scheduler = _core.Scheduler()
    requests = []
    for seed in range(6):
        requests.append(request_of(model, seed))
        scheduler.submit(requests[-1])
        for _ in range(seed):
            scheduler.step()
    while any(request.finish_reason is None for request in requests):
        scheduler.run()
    assert scheduler.run() == [], "nothing is left to do"
    assert [made(request) for request in requests] == [alone(model, seed) for seed in range(6)]
    assert len({request.text for request in requests}) == 6


def test_run_returns_those_that_ended_in_their_order(model):
    scheduler = _core.Scheduler()
    lengths = [3, 5, 3, 8]
    requests = []
    for seed, n in enumerate(lengths):
        options = SamplingParams(max_new_tokens=n, logit_bias=OPTIONS.logit_bias)
        requests.append(request_of(model, seed, options=options))
        scheduler.submit(requests[-1])
    a, b, c, d = requests
    assert [scheduler.run() for _ in range(4)] == [[a, c], [b], [d], []]
    assert [len(request.tokens) for request in requests] == lengths


def test_after_a_step_every_session_holds_its_token(model):
    scheduler = _core.Scheduler()
    sessions = [_core.Session(model, seed) for seed in range(3)]
    requests = [request_of(model, 0, session=session) for session in sessions]
    for request in requests:
        scheduler.submit(request)
    for n in range(1, 13):
        scheduler.step()
        for session, request in zip(sessions, requests, strict=True):
            assert session.tokens == PROMPT + request.tokens
            assert len(request.tokens) == n
            fork = session.fork(0)
            fork.rewind(fork.n_tokens - 1)
            _core.forward([fork], [request.tokens[-1:]])
            assert session.logits().tobytes() == fork.logits().tobytes()


def test_text_is_taken_once(model):
    scheduler = _core.Scheduler()
    request = request_of(model, 3)
    scheduler.submit(request)
    pieces = []
    while request.finish_reason is None:
        scheduler.step()
        pieces.append(request.take_text())
        assert request.take_text() == ""
        assert request.text == "".join(pieces)


def test_an_error_leaves_every_session_after_its_last_pass(model):
    """Of two texts, one is asked to read a token that does not exist."""
    scheduler = _core.Scheduler()
    good, bad = _core.Session(model, 0), _core.Session(model, 1)
    request = request_of(model, 0, session=good)
    scheduler.submit(request)
    scheduler.step()
    before = good.tokens
    scheduler.submit(request_of(model, 1, prompt=[1, 300], session=bad))
    with pytest.raises(Exception, match="token 300"):
        scheduler.step()
    assert (good.tokens, bad.tokens) == (before, [])
    again = _core.Scheduler()
    again.submit(request)
    again.run()
    assert made(request) == alone(model, 0)


def test_logits_that_are_not_finite_stop_all():
    checkpoint = tiny_checkpoint()
    checkpoint.tensors["final_norm"][:] = np.float32(3e38)
    broken = load(gguf_bytes(checkpoint), n_threads=1)
    with pytest.raises(NonFiniteError, match="position"):
        broken.complete([[1, 2, 3], [1, 5]], max_new_tokens=5)


def test_an_error_of_one_text_leaves_the_random_state_of_the_others(model):
    """What was drawn beside it is lost, and drawn again the same."""
    session = _core.Session(model, 7)
    none = _core.SamplingParams()
    none.banned = list(range(model.tokenizer.vocab_size))
    decoder = _core.StreamDecoder(model.tokenizer, True)
    scheduler = _core.Scheduler()
    scheduler.submit(request_of(model, 7, session=session))
    scheduler.submit(_core.Request(_core.Session(model, 8), PROMPT, decoder, none))
    with pytest.raises(ArgumentError, match="no token is left"):
        scheduler.run()
    again = _core.Scheduler()
    again.submit(request_of(model, 7, prompt=[], session=session))
    (request,) = again.run()
    assert made(request) == alone(model, 7)
