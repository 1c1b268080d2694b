"""Sessions: timelines that are fed, continued, rewound and forked."""

import math

import pytest

from random_models import tiny_model
from tinyllama.errors import ArgumentError, ContextFullError

PROMPT = "the rain"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_session_says_what_generate_says(model):
    session = model.session(seed=7)
    session.feed(PROMPT)
    text = "".join(session.generate(max_new_tokens=30))
    assert text == model.generate(PROMPT, seed=7, max_new_tokens=30)
    assert session.finish_reason == "length"
    assert session.seed == 7
    assert len(session.tokens) == len(model.tokenizer.encode(PROMPT)) + 30


def test_an_empty_session_starts_from_the_begin_token(model):
    session = model.session(seed=7)
    text = "".join(session.generate(max_new_tokens=5))
    assert session.tokens[0] == 1
    assert text == model.generate(seed=7, max_new_tokens=5)


def test_text_fed_later_continues_what_is_there(model):
    session = model.session()
    session.feed("the rain")
    session.feed(", he said")
    session.feed("ing")
    session.feed("")
    session.feed(" too")
    assert session.text == "the rain, he saiding too"
    assert session.tokens.count(1) == 1
    session.feed([40, 41])
    assert session.tokens[-2:] == [40, 41]


def test_an_end_token_is_not_in_the_timeline(model):
    session = model.session()
    session.feed(PROMPT)
    n = len(session.tokens)
    assert list(session.generate(logit_bias={2: 1000.0})) == []
    assert (len(session.tokens), session.finish_reason) == (n, "stop")


def test_every_piece_is_in_the_timeline_when_it_is_handed_out(model):
    session = model.session(seed=2)
    session.feed(PROMPT)
    said = PROMPT
    for piece in session.generate(max_new_tokens=20, temperature=0.8, logit_bias=ascii_only()):
        said += piece
        assert session.text == said


def ascii_only():
    """Bias that leaves printable bytes and letters."""
    return {t: -math.inf for t in range(259) if not 35 <= t < 130}


def test_leaving_a_stream_stops_the_work(model):
    session = model.session(seed=2)
    session.feed(PROMPT)
    n = len(session.tokens)
    stream = session.generate(logit_bias=ascii_only())
    next(stream)
    stream.close()
    assert len(session.tokens) == n + 1
    session.feed(" and on")
    assert session.text.endswith(" and on")


def test_rewind_and_fork(model):
    session = model.session(seed=1)
    session.feed(PROMPT)
    n = len(session.tokens)
    fork = session.fork(seed=9)
    first = "".join(session.generate(max_new_tokens=10, temperature=0))
    assert len(fork.tokens) == n
    assert "".join(fork.generate(max_new_tokens=10, temperature=0)) == first
    session.rewind(n)
    assert session.tokens == model.tokenizer.encode(PROMPT)
    assert "".join(session.generate(max_new_tokens=10, temperature=0)) == first
    session.rewind(0)
    assert session.tokens == []
    session.feed(PROMPT)
    assert session.text == PROMPT


def test_forks_draw_for_themselves(model):
    session = model.session(seed=1)
    session.feed(PROMPT)
    texts = ["".join(session.fork(seed=s).generate(max_new_tokens=20)) for s in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_a_session_that_overflows_is_unchanged(model):
    session = model.session()
    session.feed(PROMPT)
    tokens = session.tokens
    with pytest.raises(ContextFullError):
        session.feed([5] * 64)
    with pytest.raises(ArgumentError):
        session.feed([5, 5, 300])
    assert session.tokens == tokens


def test_penalties_count_from_where_a_session_goes_on(model):
    session = model.session(seed=4)
    session.feed([1, 40, 40, 40])
    bias = {40: 30.0}
    assert "".join(session.generate(max_new_tokens=1, logit_bias=bias, presence_penalty=100)) != ""
    assert session.tokens[-1] == 40  # it was not generated before
    list(session.generate(max_new_tokens=2, logit_bias=bias, presence_penalty=100))
    assert session.tokens[-2:-1] == [40]
    assert session.tokens[-1] != 40


@pytest.mark.parametrize(
    "option", [{"seed": 1}, {"num_return_sequences": 2}, {"return_full_text": True}], ids=str
)
def test_options_that_are_not_a_sessions(model, option):
    with pytest.raises(ArgumentError, match=next(iter(option))):
        model.session().generate(**option)


def test_a_session_shows_its_length_and_room():
    session = tiny_model().session()
    session.feed([1, 5, 6])
    assert (session.n_tokens, session.room) == (3, 61)
    assert repr(session) == "<tinyllama.Session: 3 tokens, room for 61>"
    assert repr(session.model.tokenizer) == "<tinyllama.Tokenizer: 300 tokens>"


def test_appended_text_is_read_when_it_is_needed(model):
    fed, appended = model.session(seed=4), model.session(seed=4)
    fed.feed("Once upon")
    fed.feed(" a time")
    appended.append("Once upon")
    appended.append(" a time")
    assert appended.tokens == fed.tokens
    assert appended._core.n_unread == len(fed.tokens)
    fork = appended.fork(seed=4)  # nothing of it is read either
    assert "".join(appended.generate(max_new_tokens=8)) == "".join(fed.generate(max_new_tokens=8))
    assert fork._core.logits().tobytes() == model.logits(fork.tokens)[-1].tobytes()
    appended.rewind(3)
    assert appended._core.logits().tobytes() == model.logits(appended.tokens)[-1].tobytes()
    with pytest.raises(ContextFullError, match="do not fit"):
        appended.append([1] * 62)
    assert len(appended.tokens) == 3


def test_a_dropped_cache_is_built_again(model):
    session = model.session(seed=5)
    session.feed([1, *range(5, 25)])
    expected = model.session(seed=5)
    expected.feed([1, *range(5, 25)])
    session.drop_cache()
    assert session.tokens == expected.tokens
    assert session._core.n_unread == 21
    assert session._core.logits().tobytes() == expected._core.logits().tobytes()
    session.drop_cache()
    assert list(session.generate(max_new_tokens=8)) == list(expected.generate(max_new_tokens=8))
    model.session().drop_cache()


def test_memory_of_a_dropped_cache_is_given_back():
    model = tiny_model()
    scheduler = model.scheduler()
    sessions = [model.session() for _ in range(3)]
    for session in sessions:
        session.feed([1, *range(5, 60)])
    block = 32 * model.info()["kv_bytes_per_token"]
    assert scheduler.stats()["kv_bytes"] == 3 * 2 * block
    sessions[0].drop_cache()
    assert scheduler.stats()["kv_bytes"] == 2 * 2 * block
    del sessions, session
    assert scheduler.stats()["kv_bytes"] == 0
