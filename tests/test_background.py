"""A scheduler on a thread of its own, and asyncio: the same texts, nobody's way blocked."""

import asyncio
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from random_models import tiny_model
from tinyllama import SamplingParams
from tinyllama.errors import ArgumentError, BusyError, ContextFullError

BIAS = {1: -math.inf, 2: -math.inf}
STORY = SamplingParams(temperature=1.2, top_p=0.95, logit_bias=BIAS)
ENDLESS = SamplingParams(logit_bias=BIAS, on_overflow="shift")


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_seq_len=200)


def prompt_of(i):
    return [1, *range(5, 6 + 5 * i)]


def collect(scheduler):
    texts, ended = {}, []
    while scheduler.stats()["n_live"]:
        for event in scheduler.step():
            texts[event.request] = texts.get(event.request, "") + event.text
            ended += [event.request] * event.done
    assert scheduler.step(0) == []
    return texts, ended


def test_texts_are_those_made_alone(model):
    with model.scheduler(max_sessions=4, background=True) as scheduler:
        requests = [
            scheduler.submit(prompt_of(i), params=STORY, seed=i, max_new_tokens=20)
            for i in range(12)
        ]
        texts, ended = collect(scheduler)
    assert set(ended) == set(requests)
    for i, request in enumerate(requests):
        alone = model.complete(prompt_of(i), params=STORY, seed=i, max_new_tokens=20)
        assert texts[request] == request.text == alone.text
        assert tuple(request.tokens) == alone.tokens
        assert request.finish_reason == alone.finish_reason


def test_a_session_is_busy_until_its_request_has_ended(model):
    with model.scheduler(background=True) as scheduler:
        session = model.session(seed=1)
        session.append([1, 5])
        request = scheduler.submit(session, params=ENDLESS)
        for use in (
            lambda: session.tokens,
            lambda: session.rewind(1),
            lambda: session.feed([5]),
            lambda: session.fork(),
            lambda: list(session.generate(max_new_tokens=1)),
            lambda: scheduler.submit(session, params=STORY),
            lambda: model.scheduler(background=True).submit(session, params=STORY),
        ):
            with pytest.raises(BusyError, match="in use by another thread"):
                use()
        while len(request.tokens) < 3:
            scheduler.step()
        request.cancel()
        while not request.done:
            scheduler.step()
        assert session.tokens[-3:] == request.tokens[-3:]
        session.feed([5])
        assert session._core.logits().tobytes() == model.logits(session.tokens)[-1].tobytes()


def test_pause_resume_save_and_deadline(model):
    with model.scheduler(background=True) as scheduler:
        long = {"params": ENDLESS, "seed": 4, "max_new_tokens": 5000}
        request = scheduler.submit([1, 5, 6], **long)
        while len(request.tokens) < 5:
            scheduler.step()
        request.pause()
        time.sleep(0.05)
        n = len(request.tokens)
        blob = request.save(cache=True)
        time.sleep(0.05)
        assert len(request.tokens) == n < 5000
        request.resume()
        late = scheduler.submit([1, 5], params=ENDLESS, deadline_ms=30)
        resting = scheduler.submit([1, 5], params=ENDLESS, deadline_ms=60)
        resting.pause()
        collect(scheduler)
        assert late.finish_reason == resting.finish_reason == "deadline"
        expected = model.complete([1, 5, 6], **long)
        assert request.text == expected.text
        again = scheduler.restore(blob)
        assert again.paused
        again.resume()
        collect(scheduler)
        assert again.text == expected.text


def test_leaving_cancels_and_frees(model):
    session = model.session(seed=1)
    session.append([1, 5])
    with model.scheduler(background=True) as scheduler:
        request = scheduler.submit(session, params=ENDLESS)
        queued = [scheduler.submit([1, 5], params=ENDLESS) for _ in range(3)]
    for one in [request, *queued]:
        assert one.finish_reason == "cancelled"
    session.feed([7])
    with pytest.raises(ArgumentError, match="the scheduler is closed"):
        scheduler.submit([1, 5])
    foreground = model.scheduler()
    request = foreground.submit([1, 5], params=ENDLESS)
    foreground.close()
    assert request.finish_reason == "cancelled"


def test_without_a_reference_it_stops(model):
    n_threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
    scheduler = model.scheduler(background=True)
    request = scheduler.submit([1, 5], params=ENDLESS)
    del scheduler
    assert request.finish_reason == "cancelled"
    if n_threads:
        assert len(os.listdir("/proc/self/task")) == n_threads


def test_an_error_is_its_own(model):
    with model.scheduler(background=True) as scheduler:
        bad = scheduler.submit(prompt_of(1), params=STORY, on_overflow="error", seed=1)
        worse = scheduler.submit(
            prompt_of(1), regex="[ab]+", logit_bias=dict.fromkeys(range(300), 5.0)
        )
        good = scheduler.submit(prompt_of(1), params=STORY, seed=2, max_new_tokens=9)
        collect(scheduler)
    assert isinstance(bad.error, ContextFullError)
    assert worse.done
    assert good.text == model.generate(prompt_of(1), params=STORY, seed=2, max_new_tokens=9)


def all_asleep(threads):
    states = [Path(f"/proc/self/task/{thread}/stat").read_text() for thread in threads]
    return all(state.rpartition(")")[2].split()[0] == "S" for state in states)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_it_sleeps_when_there_is_nothing_to_do(model):
    threads = set(os.listdir("/proc/self/task"))
    with model.scheduler(background=True) as scheduler:
        request = scheduler.submit([1, 5], params=STORY, max_new_tokens=3)
        collect(scheduler)
        assert request.done
        paused = scheduler.submit([1, 5], params=ENDLESS)
        paused.pause()
        new = set(os.listdir("/proc/self/task")) - threads
        assert new
        deadline = time.monotonic() + 20  # on a busy machine it may be long on its way to bed
        while not all_asleep(new):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for _ in range(20):
            assert all_asleep(new)
            time.sleep(0.002)
        assert not paused.done


def test_many_threads_at_once(model):
    """Submitting, looking, cancelling and taking events, all at once."""
    errors, n_done, lock = [], 0, threading.Lock()
    expected = {
        i: model.generate(prompt_of(i), params=STORY, seed=i, max_new_tokens=8) for i in range(8)
    }
    with model.scheduler(max_sessions=6, background=True) as scheduler:

        def work(i):
            nonlocal n_done
            try:
                for k in range(15):
                    request = scheduler.submit(prompt_of(i), params=STORY, seed=i, max_new_tokens=8)
                    if k % 3 == 0:
                        request.cancel()
                    while not request.done:
                        scheduler.step(0)
                        assert expected[i].startswith(request.text)
                        request.save()
                    if request.finish_reason == "length":
                        assert request.text == expected[i]
                    with lock:
                        n_done += 1
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert n_done == 8 * 15


RUNS = {
    "the interpreter ends while it works": (
        "s = model.scheduler(background=True)\n"
        "r = s.submit([1, 5], logit_bias={1: -math.inf, 2: -math.inf}, on_overflow='shift')\n"
        "s.step()\n"
    ),
    "the interpreter ends while a grammar needs it": (
        "s = model.scheduler(background=True)\n"
        "r = s.submit([1, 5], regex='[a-z]*', on_overflow='shift', logit_bias={2: -math.inf})\n"
        "s.step()\n"
    ),
    "a fork gets an error": (
        "s = model.scheduler(background=True)\n"
        "r = s.submit([1, 5], max_new_tokens=5)\n"
        "while s.stats()['n_live']: s.step()\n"
        "if os.fork() == 0:\n"
        "    try: s.submit([1, 5])\n"
        "    except tinyllama.errors.BusyError as e: assert 'forked' in str(e)\n"
        "    else: raise SystemExit(3)\n"
        "    model.generate([1, 5], max_new_tokens=3)\n"
        "    del s, r\n"
        "    raise SystemExit(0)\n"
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 0\n"
    ),
    "coroutines are left behind": (
        "async def main():\n"
        "    async for piece in model.astream([1, 5], logit_bias={1: -math.inf, 2: -math.inf}, "
        "on_overflow='shift'): break\n"
        "import asyncio; asyncio.run(main())\n"
    ),
}


@pytest.mark.parametrize("what", RUNS)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_end(what):
    code = (
        f"import sys, os, math; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "import tinyllama; from random_models import tiny_model\n"
        "model = tiny_model()\n" + RUNS[what]
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_asyncio_streams_go_on_together(model):
    async def tell(i):
        options = {"params": STORY, "seed": i, "max_new_tokens": 30}
        return "".join([piece async for piece in model.astream(prompt_of(i % 5), **options)])

    async def tell_all():
        return await asyncio.gather(*(tell(i) for i in range(80)))

    for _ in range(2):  # two loops, one after the other
        texts = asyncio.run(tell_all())
        for i, text in enumerate(texts):
            options = {"params": STORY, "seed": i, "max_new_tokens": 30}
            assert text == model.generate(prompt_of(i % 5), **options)


def test_asyncio_leaving_a_text_cancels_it(model):
    async def leave():
        pieces = model.astream([1, 5], params=ENDLESS)
        async for piece in pieces:
            assert piece
            break
        await pieces.aclose()
        task = asyncio.create_task(anext(model.astream([1, 5], params=ENDLESS)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    deadline = time.monotonic() + 20
    while model._streams._scheduler.stats()["n_live"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert model._streams._scheduler.stats()["n_live"] == 0


def test_asyncio_errors(model):
    async def fail():
        async for _ in model.astream([1, 5], params=STORY, on_overflow="error"):
            pass

    with pytest.raises(ContextFullError, match="is full"):
        asyncio.run(fail())
    with pytest.raises(ArgumentError, match="astream takes one prompt"):
        model.astream(["a", "b"])
    with pytest.raises(ArgumentError, match="num_return_sequences is 2; astream makes one"):
        model.astream("a", num_return_sequences=2)


def test_asyncio_full_text(model):
    async def tell():
        options = {"seed": 1, "max_new_tokens": 5, "return_full_text": True}
        return "".join([piece async for piece in model.astream("the rain", **options)])

    options = {"seed": 1, "max_new_tokens": 5, "return_full_text": True}
    assert asyncio.run(tell()) == model.generate("the rain", **options)
