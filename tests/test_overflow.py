"""What happens when the context is full: stop, shift, truncate or error."""

import math

import pytest

from random_models import tiny_model
from tinyllama import SamplingParams
from tinyllama.errors import ArgumentError, ContextFullError

CONTEXT = 64
# A text of letters that never ends by itself; bytes beyond ASCII would hang on those before them.
BIAS = dict.fromkeys([1, 2, *range(3 + 0x80, 3 + 0x100)], -math.inf)
STORY = SamplingParams(temperature=1.2, top_p=1.0, logit_bias=BIAS)
LONG = [1, *range(5, 90)]  # 86 tokens


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def shifted(model, prompt, seed, n, n_keep):
    """What shift is to make, from sessions alone: each time the context is full, a new one."""
    session = model.session(seed=seed)
    timeline, drawn = list(prompt), []
    half = n_keep + (CONTEXT - n_keep) // 2
    session.append([prompt[0]])
    while len(drawn) < n:
        if len(timeline) >= CONTEXT:
            timeline = timeline[:n_keep] + timeline[len(timeline) - (half - n_keep) :]
        session.rewind(0)
        session.append(timeline)
        options = SamplingParams(temperature=1.2, top_p=1.0, logit_bias=BIAS)
        list(session.generate(params=options, max_new_tokens=1))
        drawn.append(session.tokens[-1])
        timeline.append(drawn[-1])
    return drawn, timeline


@pytest.mark.parametrize("n_keep", [0, 1, 9, 62])
@pytest.mark.parametrize("prompt", [LONG[:5], LONG[:63], LONG[:64], LONG])
def test_shift_goes_on_as_if_the_rest_had_been_given_to_a_new_session(model, prompt, n_keep):
    drawn, timeline = shifted(model, prompt, 3, 100, n_keep)
    options = {"params": STORY, "on_overflow": "shift", "n_keep": n_keep}
    completion = model.complete(prompt, seed=3, max_new_tokens=100, **options)
    assert list(completion.tokens) == drawn
    assert completion.finish_reason == "length"
    assert completion.usage.prompt_tokens == len(prompt)
    scheduler = model.scheduler()
    request = scheduler.submit(prompt, seed=3, max_new_tokens=100, **options)
    while not request.done:
        scheduler.step(0.05)
    assert request.tokens == drawn
    assert request.text == completion.text
    end = timeline if len(timeline) < CONTEXT else None
    if end is not None:
        assert request.session.tokens == end
    assert "".join(model.stream(prompt, seed=3, max_new_tokens=100, **options)) == completion.text


def test_shift_counts_penalties_from_where_the_generated_part_begins(model):
    prompt = LONG[:40]
    options = {"temperature": 0, "on_overflow": "shift", "n_keep": 4, "logit_bias": BIAS}
    free = model.complete(prompt, max_new_tokens=60, **options)
    bound = model.complete(prompt, max_new_tokens=60, frequency_penalty=100.0, **options)
    assert len(set(free.tokens)) < 60
    # Half of the context is 34 tokens: nothing comes back while it is among those.
    for i in range(len(bound.tokens)):
        assert bound.tokens[i] not in bound.tokens[max(0, i - 29) : i]


def test_stop_refuses_a_long_prompt_and_ends_a_long_text(model):
    with pytest.raises(ContextFullError, match="86 tokens; the context holds 64"):
        model.generate(LONG)
    completion = model.complete(LONG[:60], params=STORY, seed=1)
    assert (completion.finish_reason, len(completion.tokens)) == ("length", 4)


@pytest.mark.parametrize(
    ("n", "max_new_tokens", "kept", "drawn"),
    [
        (86, 10, 54, 10),  # as much is dropped as makes room
        (60, 10, 54, 10),
        (50, 10, 50, 10),  # it fits
        (86, 100, 6, 58),  # it never will: one token and the first n_keep stay
        (86, None, 34, 30),  # half of the context
        (60, None, 60, 4),
    ],
)
def test_truncate_cuts_the_prompt_to_make_room(model, n, max_new_tokens, kept, drawn):
    options = {"params": STORY, "max_new_tokens": max_new_tokens, "seed": 3}
    prompt = LONG[:n]
    cut = prompt if kept == n else prompt[:5] + prompt[n - (kept - 5) :]
    completion = model.complete(prompt, on_overflow="truncate", n_keep=5, **options)
    assert len(completion.tokens) == drawn
    assert completion.finish_reason == "length"
    assert completion.tokens == model.complete(cut, **options).tokens


def test_error_ends_the_text_with_one(model):
    options = {"params": STORY, "on_overflow": "error", "seed": 1}
    with pytest.raises(ContextFullError, match="context of 64 tokens is full"):
        model.generate(LONG[:60], **options)
    assert len(model.complete(LONG[:60], max_new_tokens=3, **options).tokens) == 3
    scheduler = model.scheduler()
    request = scheduler.submit(LONG[:60], **options)
    texts, done = "", False
    while not done:
        (event,) = scheduler.step()
        texts, done = texts + event.text, event.done
    assert (request.finish_reason, len(request.tokens)) == ("error", 4)
    assert isinstance(request.error, ContextFullError)
    assert texts == request.text


@pytest.mark.parametrize("policy", ["stop", "shift", "error"])
def test_a_session_filled_by_somebody_else_in_between(model, policy):
    scheduler = model.scheduler()
    session = model.session(seed=2)
    session.append(LONG[:10])
    request = scheduler.submit(session, params=STORY, on_overflow=policy, max_new_tokens=20)
    while len(request.tokens) < 3:
        scheduler.step()
    session.append(range(5, 5 + session.room))
    while not request.done:
        scheduler.step()
    reasons = {"stop": ("length", 3), "shift": ("length", 20), "error": ("error", 3)}
    assert (request.finish_reason, len(request.tokens)) == reasons[policy]


def test_wrong_values_are_named(model):
    with pytest.raises(ArgumentError, match="on_overflow is 'half'; it must be stop, shift, trunc"):
        SamplingParams(on_overflow="half")
    with pytest.raises(ArgumentError, match="on_overflow is None"):
        model.generate(LONG, on_overflow=None)
    with pytest.raises(ArgumentError, match="n_keep is 63; with a context of 64 it must be in"):
        model.generate(LONG, on_overflow="shift", n_keep=63)
    with pytest.raises(ArgumentError, match="n_keep is -1"):
        SamplingParams(n_keep=-1)
