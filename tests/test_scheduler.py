"""The scheduler: many texts stepped together, each as if it were alone."""

import math
import threading

import numpy as np
import pytest

from random_models import tiny_checkpoint, tiny_model
from tinyllama import SamplingParams, _core, load
from tinyllama.errors import ArgumentError, BusyError, ContextFullError, NonFiniteError
from tinyllama.formats.gguf import gguf_bytes
from tinyllama.generation import request_arguments

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
    return _core.Request(*request_arguments(model, session, prompt, options, decoder, n_top=2))


def made(request):
    return request.text, request.tokens, request.logprobs, request.finish_reason


def alone(model, seed):
    scheduler = _core.Scheduler(model)
    scheduler.submit(request_of(model, seed))
    (request,) = scheduler.run()
    return made(request)


def test_texts_that_join_at_any_time_are_as_alone(model):
    scheduler = _core.Scheduler(model)
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
    scheduler = _core.Scheduler(model)
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
    scheduler = _core.Scheduler(model)
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


def test_text_comes_once(model):
    scheduler = _core.Scheduler(model)
    request = request_of(model, 3)
    scheduler.submit(request)
    pieces = []
    while request.finish_reason is None:
        pieces += [event.text for event in scheduler.step()]
        assert request.text == "".join(pieces)


def test_what_cannot_be_continued_is_refused_at_once(model):
    session = _core.Session(model, 1)
    scheduler = _core.Scheduler(model)
    with pytest.raises(ArgumentError, match="token 300"):
        scheduler.submit(request_of(model, 1, prompt=[1, 300], session=session))
    assert session.tokens == []
    with pytest.raises(ArgumentError, match="the session is empty"):
        scheduler.submit(request_of(model, 1, prompt=[], session=session))
    with pytest.raises(ContextFullError, match="do not fit"):
        scheduler.submit(request_of(model, 1, prompt=[1] * 1000, session=session))
    assert scheduler.run() == []
    other = tiny_model()._core
    with pytest.raises(ArgumentError, match="another model"):
        _core.Scheduler(model).submit(request_of(other, 1))


def test_logits_that_are_not_finite_stop_all():
    checkpoint = tiny_checkpoint()
    checkpoint.tensors["final_norm"][:] = np.float32(3e38)
    broken = load(gguf_bytes(checkpoint), n_threads=1)
    with pytest.raises(NonFiniteError, match="position"):
        broken.complete([[1, 2, 3], [1, 5]], max_new_tokens=5)


def test_an_error_of_one_text_is_its_own(model):
    none = _core.SamplingParams()
    none.banned = list(range(model.tokenizer.vocab_size))
    decoder = _core.StreamDecoder(model.tokenizer, True)
    scheduler = _core.Scheduler(model)
    good = request_of(model, 7)
    bad = _core.Request(_core.Session(model, 8), PROMPT, decoder, none)
    scheduler.submit(good)
    scheduler.submit(bad)
    assert scheduler.run() == [bad]
    assert bad.finish_reason == "error"
    with pytest.raises(ArgumentError, match="no token is left"):
        bad.rethrow()
    assert scheduler.run() == [good]
    good.rethrow()
    assert made(good) == alone(model, 7)


# The public scheduler, under budgets.

STORY = SamplingParams(temperature=1.2, top_p=0.95, logit_bias={1: -math.inf, 2: -math.inf})


@pytest.fixture(scope="module")
def stories():
    return tiny_model()


def told_alone(model, prompt, seed, n):
    session = model.session(seed)
    session.feed(prompt)
    text = "".join(session.generate(params=STORY, max_new_tokens=n))
    return text, session.tokens, session._core.logits().tobytes()


def told(request):
    return request.text, request.session.tokens, request.session._core.logits().tobytes()


def test_a_text_under_budgets_is_the_text_alone(stories):
    scheduler = stories.scheduler()
    prompts = [[1, *range(5, 5 + 10 * i)] for i in range(1, 5)]
    requests = [
        scheduler.submit(prompt, params=STORY, seed=i, max_new_tokens=15)
        for i, prompt in enumerate(prompts)
    ]
    texts = dict.fromkeys(requests, "")
    ended = []
    while len(ended) < len(requests):
        for event in scheduler.step(budget_ms=0.05):
            texts[event.request] += event.text
            if event.done:
                ended.append(event.request)
    for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        assert request.finish_reason == "length"
        assert texts[request] == request.text
        assert told(request) == told_alone(stories, prompt, i, 15)
    assert scheduler.stats()["n_live"] == 0
    assert scheduler.stats()["tokens_drawn"] == 60


def test_budget_0_only_delivers(stories):
    scheduler = stories.scheduler()
    request = scheduler.submit([1, 5, 6], params=STORY, max_new_tokens=3)
    late = scheduler.submit([1, 5, 6], params=STORY, deadline_ms=0)
    for _ in range(5):
        events = scheduler.step(0)
        assert not request.tokens
        assert [e.request for e in events if e.done] == ([late] if late.done and events else [])
    assert late.finish_reason == "deadline"
    request.cancel()
    ((event),) = scheduler.step(0)
    assert (event.request, event.done, request.finish_reason) == (request, True, "cancelled")
    assert scheduler.step(1.0) == []


def test_the_more_urgent_come_first(stories):
    scheduler = stories.scheduler(max_sessions=1)
    first = scheduler.submit([1, 5], params=STORY, max_new_tokens=2)
    low = scheduler.submit([1, 5], params=STORY, max_new_tokens=2)
    soon = scheduler.submit([1, 5], params=STORY, max_new_tokens=2, deadline_ms=1e6)
    high = scheduler.submit([1, 5], params=STORY, max_new_tokens=2, priority=1)
    order = []
    while scheduler.stats()["n_live"]:
        order += [event.request for event in scheduler.step() if event.done]
    assert order == [high, soon, first, low]


def test_two_threads_get_an_error(stories):
    scheduler = stories.scheduler()
    for seed in range(8):
        scheduler.submit([1, 5], params=STORY, seed=seed, max_new_tokens=200)
    errors, n_done = [], 0
    start = threading.Barrier(2)

    def work():
        nonlocal n_done
        start.wait()
        while scheduler._core.stats["n_live"] if not errors else False:
            scheduler._core.step(1.0)

    def guarded():
        try:
            work()
        except BusyError as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("in use by another thread" in str(error) for error in errors)
    while scheduler._core.stats["n_live"]:
        scheduler._core.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_ms": -1}, "budget_ms is -1; it must be 0 or more"),
        ({"budget_ms": math.nan}, "budget_ms is nan"),
    ],
)
def test_bad_budgets_are_named(stories, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        stories.scheduler().step(**arguments)


def test_bad_requests_are_named(stories):
    scheduler = stories.scheduler()
    with pytest.raises(ArgumentError, match="deadline_ms is -5"):
        scheduler.submit("a", deadline_ms=-5)
    with pytest.raises(ArgumentError, match="num_return_sequences is 2"):
        scheduler.submit("a", num_return_sequences=2)
    with pytest.raises(ArgumentError, match="the session is empty"):
        scheduler.submit(stories.session())
    with pytest.raises(ArgumentError, match="another model"):
        session = tiny_model().session()
        session.append([1, 2])
        scheduler.submit(session)


def test_an_event_keeps_its_request(stories):
    """Also where nobody else does."""
    scheduler = stories.scheduler()
    scheduler.submit([1, 5], params=STORY, max_new_tokens=1)
    (event,) = scheduler.step()
    assert event.done
    assert event.request.done
    assert event.request.session.tokens == [1, 5, *event.tokens]


def test_memory_that_is_not_there_is_an_error(stories):
    for n in (2**40, 2**62):
        with pytest.raises(MemoryError):
            stories.scheduler(reserve_tokens=n)
    request = stories.scheduler(max_sessions=2).submit([1, 5], deadline_ms=1e300)
    assert not request.done


def test_a_session_has_one_request_at_a_time(stories):
    scheduler = stories.scheduler()
    session = stories.session(seed=3)
    session.append([1, 5, 6])
    request = scheduler.submit(session, params=STORY, max_new_tokens=2)
    with pytest.raises(ArgumentError, match="already"):
        scheduler.submit(session, params=STORY)
    while not request.done:
        scheduler.step()
    scheduler.submit(session, params=STORY, max_new_tokens=1)
    (event,) = scheduler.step()
    assert event.done
    assert told_alone(stories, [1, 5, 6], 3, 3)[1] == session.tokens


def test_a_session_may_go_from_one_scheduler_to_another(stories):
    """In the middle of a pass too; and outlive both."""
    session = stories.session(seed=3)
    session.append([1, *range(5, 40)])
    first, second = stories.scheduler(), stories.scheduler()
    one = first.submit(session, params=STORY, max_new_tokens=4)
    first.step(0.01)
    one.pause()
    other = second.submit(session, params=STORY, max_new_tokens=4 - len(one.tokens))
    while not other.done:
        first.step(0.01)
        second.step(0.01)
    assert session.tokens == told_alone(stories, [1, *range(5, 40)], 3, 4)[1]
    session.append([7])
    third = stories.scheduler()
    third.submit(session, params=STORY)
    third.step(0.01)
    del first, second, third, one, other
    assert session._core.logits().tobytes() == stories.logits(session.tokens)[-1].tobytes()


def test_what_left_a_pass_is_not_written_by_it(stories):
    """A session taken out of a suspended pass, and given another past, keeps that past."""
    n_suspended = 0
    for attempt in range(20):
        scheduler = stories.scheduler()
        leaver, stayer = stories.session(seed=1), stories.session(seed=2)
        for session in (leaver, stayer):
            session.append([1, *range(5, 35)])
        left = scheduler.submit(leaver, params=STORY)
        stays = scheduler.submit(stayer, params=STORY, max_new_tokens=2)
        for _ in range(1 + attempt % 3):
            scheduler.step(0.005 + 0.002 * attempt)
        n_suspended += scheduler.stats()["next_piece_ms"] > 0
        left.cancel()
        leaver.rewind(3)
        leaver.feed(range(60, 90))
        while not stays.done:
            scheduler.step()
        leaver.append([7])
        logits = stories.logits(leaver.tokens)[-1]
        assert leaver._core.logits().tobytes() == logits.tobytes()
        assert stayer.tokens == told_alone(stories, [1, *range(5, 35)], 2, 2)[1]
    assert n_suspended > 0


PERSONA = [1, *(3 + (7 * i) % 280 for i in range(99))]  # 100 tokens


@pytest.fixture(scope="module")
def long_stories():
    return tiny_model(max_seq_len=160)


@pytest.mark.parametrize("budget_ms", [None, 0.1])
def test_a_common_beginning_is_read_once(long_stories, budget_ms):
    scheduler = long_stories.scheduler()
    prompts = [[*PERSONA, 5 + i, 6 + i] for i in range(20)]
    requests = [
        scheduler.submit(prompt, params=STORY, seed=i, max_new_tokens=4)
        for i, prompt in enumerate(prompts)
    ]
    while scheduler.stats()["n_live"]:
        scheduler.step(budget_ms)
    stats = scheduler.stats()
    assert stats["tokens_shared"] == 19 * len(PERSONA)
    # What was drawn is read too, but for the last of it.
    assert stats["tokens_read"] == len(PERSONA) + 20 * (2 + 3)
    block = 32 * long_stories.info()["kv_bytes_per_token"]
    # Three blocks and a bit: the bit is everybody's own.
    assert stats["kv_bytes"] == (3 + 20) * block
    for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        assert told(request) == told_alone(long_stories, prompt, i, 4)


def test_the_longest_beginning_is_found(long_stories):
    scheduler = long_stories.scheduler()
    short = scheduler.submit(PERSONA[:40], params=STORY, max_new_tokens=1)
    long = scheduler.submit(PERSONA, params=STORY, max_new_tokens=1)
    while not (short.done and long.done):
        scheduler.step()
    before = scheduler.stats()
    assert before["tokens_read"] + before["tokens_shared"] == 40 + 100
    # Ended, but held. The same timeline still needs the logits of its last token.
    again = scheduler.submit(PERSONA, params=STORY, max_new_tokens=1)
    while not again.done:
        scheduler.step()
    after = scheduler.stats()
    assert after["tokens_shared"] - before["tokens_shared"] == len(PERSONA) - 1
    assert after["tokens_read"] - before["tokens_read"] == 1
    # Nobody holds them any more.
    del short, long, again
    scheduler.submit(PERSONA, params=STORY, max_new_tokens=1)
    while scheduler.stats()["n_live"]:
        scheduler.step()
    assert scheduler.stats()["tokens_shared"] == after["tokens_shared"]


@pytest.mark.parametrize("how", ["cancel", "pause", "rewind", "change"])
def test_who_waits_for_a_beginning_goes_on_without(long_stories, how):
    scheduler = long_stories.scheduler()
    requests = [scheduler.submit([*PERSONA, 7], params=STORY, seed=i) for i in range(3)]
    scheduler.step(0.03)
    first = requests[0]
    if how in {"cancel", "pause"}:
        getattr(first, how)()
    else:
        first.session.rewind(20)
        first.session.append([9] if how == "rewind" else [5] * 90)
    others = [
        scheduler.submit([*PERSONA, 8], params=STORY, seed=i, max_new_tokens=3) for i in (3, 4)
    ]
    requests[1].cancel()
    while not all(other.done for other in others):
        scheduler.step(0.1)
    for i, other in enumerate(others):
        assert told(other) == told_alone(long_stories, [*PERSONA, 8], 3 + i, 3)
    assert scheduler.stats()["tokens_shared"] > 0


def test_nobody_waits_for_himself(long_stories):
    """Not even where two have each read what the other was about to."""
    for i in range(300):
        scheduler = long_stories.scheduler()
        z = scheduler.submit(PERSONA[:60], params=STORY, seed=1)
        a = scheduler.submit(PERSONA[:80], params=STORY, seed=2)
        b = scheduler.submit(PERSONA, params=STORY, seed=3)
        b.session._core.logits()
        z.cancel()
        scheduler.step(0.002 * (i % 20))
        b.session.rewind(1)
        b.session.append(PERSONA[1:])
        scheduler.step(0.2)
        a.cancel()
        b.cancel()


def test_a_more_urgent_request_does_not_wait_for_a_place_of_its_source(long_stories):
    scheduler = long_stories.scheduler(max_sessions=1)
    first = scheduler.submit(PERSONA, params=STORY, seed=1, max_new_tokens=2)
    second = scheduler.submit([*PERSONA, 5], params=STORY, seed=2, max_new_tokens=2, priority=1)
    order = []
    while scheduler.stats()["n_live"]:
        order += [event.request for event in scheduler.step(0.1) if event.done]
    assert order == [second, first]
    assert told(second) == told_alone(long_stories, [*PERSONA, 5], 2, 2)
