"""Saved sessions and requests: they go on where they were, or are refused with the reason."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from random_models import byte_vocabulary, tiny_checkpoint, tiny_model
from tinyllama import SamplingParams, _core, load
from tinyllama.errors import ArgumentError, ContextFullError, FormatError, TinyllamaError
from tinyllama.formats.gguf import gguf_bytes

BIAS = {1: -math.inf, 2: -math.inf}
STORY = SamplingParams(temperature=1.2, top_p=0.95, logit_bias=BIAS)
HEADER = 16  # "TLSAVE", a version, a checksum


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def many_threads():
    """The same model on two threads."""
    return load(gguf_bytes(tiny_checkpoint()), n_threads=2)


def restored_elsewhere(blob, path, n):
    """The next n tokens of a saved session, drawn by a new process."""
    code = (
        "import sys, tinyllama\n"
        "session = tinyllama.load(sys.argv[1], n_threads=1).restore(sys.stdin.buffer.read())\n"
        f"text = ''.join(session.generate(temperature=1.2, max_new_tokens={n}))\n"
        "print(session.tokens, session._core.logits().tobytes().hex(), ascii(text))"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, input=blob, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().strip()


@pytest.mark.parametrize("cache", [False, True])
def test_a_session_goes_on_in_another_process(tmp_path, cache):
    """256 tokens take 1,200 bytes at most, and the next are the same bit for bit."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(tiny_checkpoint(max_seq_len=300)))
    session = load(path, n_threads=1).session(seed=2**63 + 7)
    options = {"temperature": 1.2, "logit_bias": BIAS}
    session.feed([1, *range(3, 40)])
    list(session.generate(max_new_tokens=256 - session.n_tokens, **options))
    assert session.n_tokens == 256
    blob = session.save(cache)
    if not cache:
        assert len(blob) <= 1200
        print(f"a session of 256 tokens: {len(blob)} bytes")
    found = restored_elsewhere(blob, path, 20)
    text = "".join(session.generate(temperature=1.2, max_new_tokens=20))
    expected = f"{session.tokens} {session._core.logits().tobytes().hex()} {text!a}"
    assert found == expected


def test_a_cache_is_not_read_again(model, many_threads):
    session = model.session(seed=1)
    session.feed([1, *range(5, 54)])
    blob = session.save(cache=True)
    kept = 32 * model.info()["kv_bytes_per_token"]
    assert 0 <= len(blob) - len(session.save()) - kept < 100
    again = many_threads.restore(blob)
    assert again._core.n_unread == 50 - 32
    assert again._core.logits().tobytes() == session._core.logits().tobytes()
    assert list(again.generate(max_new_tokens=5)) == list(session.generate(max_new_tokens=5))


def test_a_whole_cache_still_gives_logits(model):
    session = model.session(seed=1)
    session.feed([1, *range(5, 36)])  # one block exactly
    again = model.restore(session.save(cache=True))
    assert again._core.n_unread == 1
    assert again._core.logits().tobytes() == session._core.logits().tobytes()


@pytest.mark.parametrize("changes", [{"kv_dtype": "int8"}, {"isa": "generic"}])
def test_a_cache_of_another_kind_is_read_again(model, changes):
    session = model.session(seed=1)
    session.feed([1, *range(5, 54)])
    other = load(gguf_bytes(tiny_checkpoint()), n_threads=1, **changes)
    again = other.restore(session.save(cache=True))
    if other.info()["isa"] != model.info()["isa"] or "kv_dtype" in changes:
        assert again._core.n_unread == 50
    assert again._core.logits().tobytes() == other.logits(session.tokens)[-1].tobytes()


def test_an_empty_session_and_a_fresh_one(model):
    assert model.restore(model.session(seed=3).save(cache=True)).tokens == []
    session = model.session(seed=3)
    session.append([1, 5, 6])
    again = model.restore(session.save(cache=True))
    assert again.seed == 3
    assert list(again.generate(max_new_tokens=9)) == list(session.generate(max_new_tokens=9))


def test_a_character_cut_in_two_is_saved(model):
    session = model.session(seed=1)
    session.feed([1, 5, 6])
    first = 3 + "é".encode()[0]
    assert "".join(session.generate(max_new_tokens=1, logit_bias={first: 1e4})) == ""
    again = model.restore(session.save())
    texts = ["".join(s.generate(max_new_tokens=4, temperature=0)) for s in (session, again)]
    assert texts[0] == texts[1]
    assert "\ufffd" not in texts[0]


def finish(scheduler):
    while scheduler.stats()["n_live"]:
        scheduler.step()


@pytest.mark.parametrize("seed", range(12))
def test_a_request_goes_on_from_any_moment(model, many_threads, seed):
    """Also in the middle of its prompt, of a pass, and of what may become a stop string."""
    rng = np.random.default_rng(seed)
    options = {
        "params": STORY,
        "max_new_tokens": int(rng.integers(1, 90)),
        "min_new_tokens": 1,
        "seed": seed,
        "stop": ["zz", "ab", "\n\n"],
        "frequency_penalty": 0.5,
        "on_overflow": str(rng.choice(["stop", "shift"])),
        "n_keep": 3,
    }
    prompt = [1, *rng.integers(3, 290, 30).tolist()]
    scheduler = model.scheduler()
    alone = scheduler.submit(prompt, **options)
    finish(scheduler)
    first = model.scheduler()
    request = first.submit(prompt, **options)
    delivered = ""
    for _ in range(rng.integers(0, 30)):
        delivered += "".join(event.text for event in first.step(0.02))
    blob = request.save(cache=bool(rng.integers(2)))
    assert blob[:6] == b"TLSAVE"
    assert len(blob) < 1000 or first.stats()["n_live"] == 0 or len(blob) > 8000
    second = many_threads.scheduler()
    again = second.restore(blob)
    assert (again.text, again.tokens) == (request.text, request.tokens)
    while not again.done or second.stats()["n_live"]:
        delivered += "".join(event.text for event in second.step(0.1))
    assert delivered == again.text == alone.text
    assert again.tokens == alone.tokens
    assert again.finish_reason == alone.finish_reason
    assert again.session.tokens == alone.session.tokens
    assert again.session._core.logits().tobytes() == alone.session._core.logits().tobytes()
    assert model.restore(blob).tokens == request.session.tokens


def test_what_was_asked_of_a_request_is_saved(model):
    scheduler = model.scheduler()
    request = scheduler.submit([1, 5, 6], params=STORY, priority=3, deadline_ms=1e7)
    request.pause()
    again = scheduler.restore(request.save())
    assert again.paused
    late = scheduler.submit([1, 5], params=STORY, deadline_ms=0)
    scheduler.step(0)
    assert scheduler.restore(late.save()).finish_reason == "deadline"
    soon = scheduler.submit([1, 5], params=STORY, deadline_ms=0)
    assert scheduler.restore(soon.save()).finish_reason is None
    scheduler.step(0)
    cancelled = scheduler.submit([1, 5], params=STORY)
    cancelled.cancel()
    scheduler.step(0)
    ended = scheduler.restore(cancelled.save())
    assert ended.finish_reason == "cancelled"
    assert [event.request for event in scheduler.step(0)] == [ended]


def test_events_go_on_where_they_were(model):
    """Tokens that nobody has heard of when a request is saved come with the restored one."""
    scheduler = model.scheduler()
    request = scheduler.submit("the rain", choices=["abc one", "abc two"])
    for saved_early in (request, scheduler.submit("the rain", choices=["only one"])):
        again = model.scheduler()
        restored = again.restore(saved_early.save())
        tokens = []
        while not restored.done or again.stats()["n_live"]:
            tokens += [token for event in again.step() for token in event.tokens]
        assert tokens == restored.tokens


def test_a_wish_is_saved(model):
    scheduler = model.scheduler()
    request = scheduler.submit([1, 5], params=STORY)
    request.cancel()
    again = scheduler.restore(request.save())
    scheduler.step(0)
    assert again.finish_reason == "cancelled"


def test_what_ended_in_error_and_what_is_no_request_is_refused(model):
    scheduler = model.scheduler()
    request = scheduler.submit([1] * 60, params=STORY, on_overflow="error")
    finish(scheduler)
    with pytest.raises(ArgumentError, match="ended with an error"):
        request.save()
    with pytest.raises(ArgumentError, match="a session was saved, not a request"):
        scheduler.restore(request.session.save())
    for wrong in ("TLSAVE", np.zeros(64, np.uint8)[::2]):
        with pytest.raises(ArgumentError, match=r"blob is .*; it must be bytes"):
            model.restore(wrong)


def saved(model):
    session = model.session(seed=1)
    session.feed([1, 5, 6, 7])
    return session.save()


def test_another_model_tokenizer_or_version_is_refused(model):
    blob = saved(model)
    others = [
        tiny_model(seed=1),
        tiny_model(dtype="q8_0"),
        tiny_model(rope_theta=500.0),
        tiny_model(norm_eps=1e-6),
    ]
    for other in others:
        with pytest.raises(FormatError, match="another model than model"):
            other.restore(blob)
    checkpoint = tiny_checkpoint()
    words = byte_vocabulary(300)
    words = replace(words, pieces=(*words.pieces[:-1], "hello"))
    checkpoint = replace(checkpoint, vocabulary=words)
    with pytest.raises(FormatError, match="another tokenizer"):
        load(gguf_bytes(checkpoint)).restore(blob)
    with pytest.raises(FormatError, match="is of version 3; this tinyllama reads version 2"):
        model.restore(blob[:6] + b"\3\0" + blob[8:])
    short = load(gguf_bytes(tiny_checkpoint()), max_seq_len=3)
    with pytest.raises(ContextFullError, match="4 tokens do not fit"):
        short.restore(blob)
    assert load(gguf_bytes(tiny_checkpoint()), max_seq_len=4).restore(blob).tokens == [1, 5, 6, 7]


def test_every_wrong_bit_and_every_cut_is_refused(model):
    blob = saved(model)
    for i in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[i // 8] ^= 1 << (i % 8)
        with pytest.raises(FormatError, match=r"does not begin|version|damaged"):
            model.restore(bytes(damaged))
    for n in range(len(blob)):
        with pytest.raises(FormatError, match=r"does not begin|damaged"):
            model.restore(blob[:n])
    with pytest.raises(FormatError, match="damaged"):
        model.restore(blob + b"\0")


def sealed(blob):
    """With a checksum that fits, as somebody who means it would make."""
    return blob[:8] + _core.hash64(blob[HEADER:]).to_bytes(8, "little") + blob[HEADER:]


def test_what_contradicts_itself_is_refused_or_harmless(model):
    """No bytes, however made, do worse than an error."""
    rng = np.random.default_rng(5)
    scheduler = model.scheduler()
    request = scheduler.submit(
        [1, *range(5, 50)],
        params=STORY,
        seed=1,
        stop=["qq"],
        max_new_tokens=30,
        on_overflow="shift",
    )
    for _ in range(40):
        scheduler.step(0.05)
    blobs = [request.save(), request.save(cache=True), request.session.save(cache=True)]
    n_restored = n_refused = 0
    for _ in range(3000):
        blob = bytearray(blobs[rng.integers(3)])
        most = min(len(blob), 700)  # what lies behind are numbers of the cache
        for _ in range(rng.integers(1, 4)):
            blob[rng.integers(HEADER + 16, most)] = rng.choice([0, 1, 2, 127, 255])
        if rng.random() < 0.2:
            blob = blob[: rng.integers(HEADER, len(blob))]
        try:
            again = scheduler.restore(sealed(bytes(blob)))
        except (TinyllamaError, MemoryError):
            n_refused += 1
            continue
        n_restored += 1
        for _ in range(3):
            scheduler.step(0.1)
        again.cancel()
        scheduler.step(0)
    assert n_restored > 100
    assert n_refused > 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
)
def test_hash_is_xxh64(text, expected):
    assert _core.hash64(text) == expected
