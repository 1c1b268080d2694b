"""Texts of a certain form: choices, regular expressions, JSON schemas, grammars."""

import dataclasses
import gc
import json
import math
import re
import signal
import sys
import time
import weakref

import jsonschema
import numpy as np
import pytest

import tinyllama
from random_models import tiny_checkpoint, tiny_model
from tinyllama import SamplingParams
from tinyllama.errors import ArgumentError, ContextFullError, MissingExtraError
from tinyllama.formats.gguf import gguf_bytes
from tinyllama.reference import forward

PROMPT = "the rain"
ACTIONS = [" attack", " attack the gate", " flee", " wait", " wave"]


@pytest.fixture(scope="module")
def model():
    """Random weights: whatever a form allows, this one will try."""
    return tiny_model(max_seq_len=300)


@pytest.fixture(scope="module")
def storyteller():
    return tinyllama.load(n_threads=1)


def finish(scheduler):
    while scheduler.stats()["n_live"]:
        scheduler.step()


# --- choices


@pytest.mark.parametrize(
    "choices",
    [
        ACTIONS,
        ["yes", "no"],
        [" an", " ant", " anthem", " and"],
        ["é", "è", "日本", "日", "🙂"],
        ["\n", "\t", "  "],
        [" only one"],
        ["x" * 200, "y"],
        ["\u2581", " a\u2581b"],
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e3])
def test_the_text_is_one_of_the_choices(model, choices, temperature):
    texts = model.generate([PROMPT] * 50, choices=choices, temperature=temperature, seed=1)
    assert set(texts) <= set(choices)
    if temperature == 1e3:
        assert set(texts) == set(choices)
    completion = model.complete(PROMPT, choices=choices, temperature=temperature, seed=1)
    assert completion.text == texts[0]
    assert completion.finish_reason == "stop"


def test_choices_at_the_beginning_of_a_text(storyteller):
    choices = ["Once upon a time", "The dog"]
    session = storyteller.session(seed=1)
    text = "".join(session.generate(choices=choices, temperature=0))
    assert text == "Once upon a time"
    assert session.text == text
    # With the space that a tokenizer puts before the first word: as the model has learnt it.
    assert session.tokens == storyteller.tokenizer.encode(text)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_choices_are_drawn_as_likely_as_the_model_says(storyteller, temperature):
    """As whole texts, of one token or of many, the one beginning the other or not."""
    prompt = "The cat saw the dog. She was"
    choices = [" happy.", " angry.", " afraid.", " a", " so very happy that she jumped.", " sad."]
    scored = storyteller.complete(prompt, choices=choices, seed=1).choices
    assert [choice.text for choice in scored] == choices
    assert len({len(choice.tokens) for choice in scored}) > 2
    assert sum(choice.probability for choice in scored) == pytest.approx(1)
    weights = [choice.probability ** (1 / temperature) for choice in scored]
    n = 3000
    texts = storyteller.generate(
        [prompt] * n, choices=choices, temperature=temperature, top_p=1.0, seed=3
    )
    for choice, weight in zip(scored, weights, strict=True):
        expected = weight / sum(weights)
        spread = 4 * math.sqrt(expected * (1 - expected) / n) + 1 / n
        assert texts.count(choice.text) / n == pytest.approx(expected, abs=spread)


def test_biases_and_bans_hold_for_choices(storyteller):
    prompt, choices = "Once upon a time there was a boy named", [" Tom", " Tim", " Zoe the brave"]
    tokens = {c.text: c.tokens for c in storyteller.score_choices(prompt, choices)}
    options = {"choices": choices, "temperature": 0}
    likeliest = storyteller.generate(prompt, **options)
    ban = {tokens[likeliest][-1]: -math.inf}
    assert storyteller.generate(prompt, logit_bias=ban, **options) != likeliest
    brave = {tokens[" Zoe the brave"][-1]: 100.0}
    assert storyteller.generate(prompt, logit_bias=brave, **options) == " Zoe the brave"


def test_the_likeliest_choice_is_taken_at_temperature_0(model):
    for prompt in ("the rain", "a b c", "so"):
        scored = model.score_choices(prompt, ACTIONS)
        best = max(scored, key=lambda choice: choice.logprob).text
        assert model.generate(prompt, choices=ACTIONS, temperature=0) == best


def test_a_choice_costs_rows_not_passes(model):
    """Scouts of all who decide are read together, and are no requests of the user's."""
    scheduler = model.scheduler()
    sessions = [model.session(seed=i) for i in range(8)]
    for session in sessions:
        session.append(PROMPT)
    requests = [scheduler.submit(session, choices=ACTIONS) for session in sessions]
    n_steps, events = 0, []
    while not all(request.done for request in requests):
        events += scheduler.step(0.05)
        stats = scheduler.stats()
        assert stats["n_live"] == sum(not request.done for request in requests)
        n_steps += 1
    assert {event.request for event in events} == set(requests)
    assert n_steps > 8, "a budget is kept"
    assert stats["tokens_drawn"] == sum(len(request.tokens) for request in requests)
    scored = model.score_choices(PROMPT, ACTIONS)
    # So short a beginning is read by every scout; of a choice's own tokens, all but the last.
    n_before = len(model.tokenizer.encode(PROMPT))
    n_read = n_before + sum(n_before + len(c.tokens) - 1 for c in scored if len(c.tokens) > 1)
    assert stats["tokens_read"] == 8 * n_read
    for session, request in zip(sessions, requests, strict=True):
        alone = model.session(seed=session.seed)
        alone.append(PROMPT)
        assert "".join(alone.generate(choices=ACTIONS)) == request.text
        assert session.tokens == alone.tokens


def test_choices_in_a_nearly_full_context(model):
    """Longer ones are scored as far as they fit; what shifts makes room first, once."""
    context = model.config.max_seq_len
    choices = [" a", " b", " go and see the sea"]
    options = {"choices": choices, "temperature": 1e3, "seed": 1}
    for n_free in (1, 2, 5):
        prompt = [5] * (context - n_free)
        assert model.generate(prompt, on_overflow="shift", **options) in choices
        for policy in ("stop", "error"):
            ban = {model.tokenizer._core.encode(" go", False, False, at_start=False)[-1]: -1e4}
            likeliest = {"choices": [" a", " go and see the sea"], "temperature": 0}
            text = model.generate(prompt, on_overflow=policy, logit_bias=ban, **likeliest)
            assert text in (" a", " "), (n_free, policy)


@pytest.mark.parametrize("policy", ["stop", "shift", "error"])
def test_somebody_fills_the_context_before_a_choice(model, policy):
    scheduler, session = model.scheduler(), model.session(seed=1)
    session.append(PROMPT)
    request = scheduler.submit(session, choices=ACTIONS, on_overflow=policy)
    session.append([5] * session.room)
    finish(scheduler)
    expected = {"stop": "length", "shift": "stop", "error": "error"}[policy]
    assert request.finish_reason == expected
    if policy == "error":
        assert isinstance(request.error, ContextFullError)
    assert (request.text in ACTIONS) == (policy == "shift")


def test_a_session_that_changes_while_it_chooses(model):
    """The election begins anew, and scouts of the old one end."""
    choices = [f" {a}{b}{c}" for a in "abcd" for b in "efgh" for c in "ijk"]
    scheduler, session = model.scheduler(), model.session(seed=3)
    session.append(PROMPT)
    request = scheduler.submit(session, choices=choices)
    for _ in range(10):
        scheduler.step(0.02)
        session.append(" so")
    other = model.session(seed=3)
    other.append(session.tokens)
    finish(scheduler)
    assert "".join(other.generate(choices=choices)) == request.text
    empty = model.session(seed=1)
    empty.append(PROMPT)
    request = scheduler.submit(empty, choices=ACTIONS)
    empty.rewind(0)
    finish(scheduler)
    assert request.finish_reason == "error"
    assert "empty" in str(request.error)


def test_the_same_choice_twice_is_one(model):
    session, other = model.session(seed=1), model.session(seed=1)
    for one in (session, other):
        one.append(PROMPT)
    assert list(session.generate(choices=[" x", " x"])) == [" x"]
    assert list(other.generate(choices=[" x"])) == [" x"]
    assert list(session.generate(max_new_tokens=5)) == list(other.generate(max_new_tokens=5))


@pytest.mark.parametrize("what", ["cancel", "pause", "save", "drop", "close"])
def test_a_choice_is_stopped_in_the_middle(model, what):
    choices = [f" {a}{b}{c}" for a in "abcd" for b in "efgh" for c in "ijk"]
    scheduler = model.scheduler()
    session = model.session(seed=3)
    session.append(PROMPT)
    before = session.tokens
    request = scheduler.submit(session, choices=choices, temperature=1e3)
    while scheduler.stats()["tokens_read"] < 2 * len(before):
        scheduler.step(0.01)
    assert not request.done
    assert session.tokens == before
    if what == "cancel":
        request.cancel()
        scheduler.step()
        assert request.finish_reason == "cancelled"
        n_read = scheduler.stats()["tokens_read"]
        scheduler.step(5.0)
        assert scheduler.stats()["tokens_read"] == n_read
        assert scheduler.stats()["n_live"] == 0
        request = scheduler.submit(session, choices=choices, temperature=1e3)
    elif what == "pause":
        request.pause()
        n_read = scheduler.stats()["tokens_read"]
        scheduler.step(5.0)
        assert scheduler.stats()["tokens_read"] == n_read
        request.resume()
    elif what == "save":
        scheduler, blob = model.scheduler(), request.save()
        request = scheduler.restore(blob)
    elif what == "drop":
        session.drop_cache()
    elif what == "close":
        alive = weakref.ref(request)
        del request, session, scheduler
        gc.collect()
        assert alive() is None
        return
    finish(scheduler)
    other = model.session(seed=3)
    other.append(PROMPT)
    assert "".join(other.generate(choices=choices, temperature=1e3)) == request.text


def test_probabilities_are_those_of_complete_with_logprobs(model):
    choices = [*ACTIONS, "é", "abc", "aa"]
    for scored in model.score_choices(PROMPT, choices):
        alone = model.complete(PROMPT, choices=[scored.text], logprobs=0)
        assert alone.tokens == scored.tokens
        assert sum(token.logprob for token in alone.logprobs) == scored.logprob
        assert alone.choices[0].logprob == scored.logprob


def test_probabilities_are_right(model):
    """Against float64, and many more than fit into one pass."""
    checkpoint = tiny_checkpoint(max_seq_len=300)
    choices = [a + b * 3 for a in "abcdefghij" for b in "klmnopqrstu"]
    prompt = model.tokenizer.encode(PROMPT)
    scored = model.score_choices(PROMPT, choices)
    assert sum(len(choice.tokens) - 1 for choice in scored) > 256
    for choice in scored[::10]:
        logits = forward(checkpoint, [*prompt, *choice.tokens], dtype=np.float64)
        logits = logits[len(prompt) - 1 : -1]
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected = sum(logprobs[i, token] for i, token in enumerate(choice.tokens))
        assert choice.logprob == pytest.approx(expected, abs=1e-4)
    total = sum(math.exp(choice.logprob) for choice in scored)
    for choice in scored:
        assert choice.probability == pytest.approx(math.exp(choice.logprob) / total, rel=1e-9)


def test_scoring_leaves_the_session_as_it_is(model):
    session = model.session(seed=1)
    session.append(PROMPT)
    before = session.save()
    session.score_choices(ACTIONS)
    assert session.save() == before
    assert [c.text for c in session.score_choices(iter(["a", "b"]))] == ["a", "b"]


def test_masks_come_before_the_samplers_that_drop(model):
    """What is allowed need not be among the likeliest of all tokens."""
    for options in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"temperature": 0.01}):
        assert model.generate(PROMPT, choices=[" zq", " qz"], seed=2, **options) in {" zq", " qz"}


def test_the_likeliest_allowed_token_is_chosen_at_temperature_0(model):
    logits = model.logits(PROMPT)[-1]
    choices = [chr(ord("a") + i) for i in range(26)]
    tokens = [model.tokenizer._core.encode(c, False, False, at_start=False)[0] for c in choices]
    expected = choices[int(np.argmax(logits[tokens]))]
    # Bytes can spell letters too: without them.
    bias = {3 + ord(c): -math.inf for c in choices}
    assert model.generate(PROMPT, choices=choices, temperature=0, logit_bias=bias) == expected


def test_allowed_tokens_are_exactly_those_that_fit(model):
    """Every token that a choice begins with is drawn sooner or later, and no other."""
    choice, others = " ate the tea", ["#" * n for n in range(1, 65)]  # too many to score
    core = model.tokenizer._core
    fitting = {
        token
        for token in range(model.tokenizer.vocab_size)
        if core.token_bytes(token) and choice.encode().startswith(core.token_bytes(token))
    }
    scheduler = model.scheduler()
    options = {"choices": [choice, *others], "temperature": 1e3}
    requests = [scheduler.submit(PROMPT, seed=i, **options) for i in range(500)]
    finish(scheduler)
    first = {request.tokens[0] for request in requests if request.text == choice}
    assert first == fitting
    assert len(fitting) == 3  # the byte, the letter, and two letters


# --- what all forms share


def test_no_legal_token_is_an_error_of_that_request_alone(model):
    scheduler = model.scheduler()
    bans = dict.fromkeys(range(3, 300), -math.inf)
    bad = scheduler.submit(PROMPT, choices=ACTIONS, logit_bias=bans)
    good = scheduler.submit(PROMPT, choices=ACTIONS, seed=1)
    while not (bad.done and good.done):
        scheduler.step()
    assert bad.finish_reason == "error"
    assert "no token is left to draw" in str(bad.error)
    assert good.text in ACTIONS
    with pytest.raises(ArgumentError, match="no token is left"):
        model.generate(PROMPT, choices=ACTIONS, logit_bias=bans)


def test_what_can_only_follow_in_one_way_is_not_drawn(model):
    """It is read in one piece, and takes no random number."""
    text = " and the rain went on and on"
    session, other = model.session(seed=7), model.session(seed=7)
    scheduler = model.scheduler()
    session.append(PROMPT)
    request = scheduler.submit(session, choices=[text])
    (event,) = scheduler.step()
    assert (event.text, event.done, request.finish_reason) == (text, True, "stop")
    assert list(event.tokens) == request.tokens
    other.feed(PROMPT + text)
    assert session.tokens == other.tokens
    options = {"temperature": 1.5, "max_new_tokens": 10}
    assert list(session.generate(**options)) == list(other.generate(**options))


FORMS = {
    "choices": {"choices": ACTIONS},
    "regex": {"regex": "(a[bc]{1,5}|xyz+)*[.!]"},
    "json_schema": {
        "json_schema": {
            "type": "object",
            "properties": {"who": {"enum": ["Tom", "Lily"]}, "n": {"type": "integer"}},
            "required": ["who", "n"],
            "additionalProperties": False,
        }
    },
    "grammar": {"grammar": 'start: "go " WHERE (" and " WHERE)*\nWHERE: /[nesw]{1,2}/'},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_changes_nothing_of_how_texts_are_made(model, form):
    """Streams, logprobs, sessions, schedulers under a budget: the same text."""
    options = {"temperature": 1.5, "max_new_tokens": 60, **FORMS[form]}
    for seed in range(10):
        completion = model.complete(PROMPT, seed=seed, **options)
        assert "".join(model.stream(PROMPT, seed=seed, **options)) == completion.text
        assert model.complete(PROMPT, seed=seed, logprobs=2, **options).tokens == completion.tokens
        session = model.session(seed=seed)
        session.feed(PROMPT)
        assert "".join(session.generate(**options)) == completion.text
        scheduler = model.scheduler()
        request = scheduler.submit(PROMPT, seed=seed, **options)
        texts, tokens = "", []
        while not request.done or scheduler.stats()["n_live"]:
            for event in scheduler.step(0.05):
                texts, tokens = texts + event.text, tokens + list(event.tokens)
        assert (texts, tuple(tokens)) == (completion.text, completion.tokens)
        assert request.finish_reason == completion.finish_reason


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_saved_and_restored(model, form):
    rng = np.random.default_rng(3)
    options = {"temperature": 1.5, "max_new_tokens": 60, **FORMS[form]}
    for seed in range(10):
        alone = model.complete(PROMPT, seed=seed, **options)
        scheduler = model.scheduler()
        request = scheduler.submit(PROMPT, seed=seed, **options)
        for _ in range(rng.integers(0, 12)):
            scheduler.step(0.02)
        again = model.scheduler()
        restored = again.restore(request.save())
        assert restored.text == request.text
        while not restored.done:
            again.step()
        assert (restored.text, tuple(restored.tokens)) == (alone.text, alone.tokens)
        assert restored.finish_reason == alone.finish_reason


def test_limits_hold_within_a_form(model):
    completion = model.complete(PROMPT, regex="[ab]{20}", max_new_tokens=4)
    assert (completion.finish_reason, len(completion.tokens)) == ("length", 4)
    completion = model.complete(PROMPT, choices=[" go and see the sea"], max_new_tokens=2)
    assert (completion.finish_reason, len(completion.tokens)) == ("length", 2)
    assert " go and see the sea".startswith(completion.text)
    assert list(model.stream(PROMPT, choices=["abXcd"], stop="X")) == ["ab"]
    completion = model.complete(PROMPT, choices=["abXcd"], stop="X")
    assert (completion.text, completion.finish_reason) == ("ab", "stop")
    assert model.generate(PROMPT, regex="[ab]{3,9}", min_new_tokens=9).count("") == 10


def test_a_form_may_outgrow_the_context(model):
    session = model.session(seed=1)
    session.append([1] * 298)
    with pytest.raises(ContextFullError, match="do not fit"):
        session.score_choices([" a long way to go home"])
    assert " a long way home".startswith("".join(session.generate(choices=[" a long way home"])))
    assert session.room == 0
    assert session.finish_reason == "length"
    text = model.generate([1] * 298, choices=[" a long way home"], on_overflow="shift")
    assert text == " a long way home"


def test_an_error_of_a_grammar_is_kept_as_a_message_only(model):
    """A Python exception would hold on to the request that it ended, and all its memory."""
    scheduler = model.scheduler()
    # Too many items for llguidance, once it is under way.
    request = scheduler.submit(PROMPT, grammar='start: "a" start', max_new_tokens=100)
    finish(scheduler)
    assert request.finish_reason == "error"
    assert isinstance(request.error, ArgumentError)
    assert str(request.error) == str(request.error)
    gone = weakref.ref(request)
    del request
    gc.collect()
    assert gone() is None
    assert scheduler.stats()["kv_bytes"] == 0


def test_an_interrupt_in_a_grammar_is_not_lost(model):
    scheduler = model.scheduler()
    handlers = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGALRM, signal.SIGINT)
    }
    try:
        for _ in range(5):
            request = scheduler.submit(PROMPT, regex="[ab]{2500}", on_overflow="shift")
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(KeyboardInterrupt):
                while not request.done:
                    scheduler.step(5)
                time.sleep(1)
            request.cancel()
            scheduler.step(0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert model.generate(PROMPT, regex="[ab]{2}", seed=1) != ""


def model_with(**changes):
    checkpoint = tiny_checkpoint(max_seq_len=300)
    vocabulary = dataclasses.replace(checkpoint.vocabulary, **changes)
    return tinyllama.load(gguf_bytes(dataclasses.replace(checkpoint, vocabulary=vocabulary)))


@pytest.mark.parametrize("prompt", ["", PROMPT])
@pytest.mark.parametrize("text", ["a\u2581b", "a  b", " a", "a ", "x"])
@pytest.mark.parametrize("spaces", [False, True])
def test_every_byte_of_a_form_is_kept(prompt, text, spaces):
    """Also those that the tokenizer would write otherwise."""
    model = model_with(remove_extra_whitespaces=spaces)
    assert model.generate(prompt, choices=[text]) == text
    assert model.generate(prompt, choices=[text, "#"], logit_bias={3 + ord("#"): -1e4}) == text
    assert model.generate(prompt, regex=text + "!?") in (text, text + "!")
    for temperature in (1.0, 100.0):
        texts = model.generate([prompt] * 30, choices=[text, "two"], temperature=temperature)
        assert set(texts) <= {text, "two"}


def test_a_vocabulary_without_an_end_token():
    pieces = ("z", *tiny_checkpoint().vocabulary.pieces[1:])
    types = tiny_checkpoint().vocabulary.types.copy()
    types[0] = types[-1]
    model = model_with(eos_id=None, unk_id=None, pieces=pieces, types=types)
    for text in model.generate([PROMPT] * 30, regex="[ab]{1,9}", temperature=3.0):
        assert re.fullmatch("[ab]{1,9}", text)
    for text in model.generate([PROMPT] * 30, regex="z[ab]z", temperature=3.0):
        assert re.fullmatch("z[ab]z", text)


def test_what_can_only_follow_in_one_way_meets_no_ban(model):
    """With log-probabilities as without."""
    options = {"choices": [" only one"], "logit_bias": dict.fromkeys(range(3, 300), -math.inf)}
    assert model.generate(PROMPT, **options) == " only one"
    assert model.complete(PROMPT, logprobs=0, **options).text == " only one"
    assert model.generate(PROMPT, choices=[" go", " go"], seed=1) == " go"


def test_a_request_that_is_refused_leaves_its_session(model):
    session = model.session(seed=1)
    session.append(PROMPT)
    scheduler = model.scheduler()
    scheduler.submit(session, max_new_tokens=5)
    before = session.save()
    for options in ({"choices": [" only one"]}, {"on_overflow": "truncate", "max_new_tokens": 295}):
        with pytest.raises(ArgumentError, match="in this scheduler already"):
            scheduler.submit(session, **options)
    with pytest.raises(ArgumentError, match="another model"):
        tiny_model().scheduler().submit(session, choices=[" only one"])
    with pytest.raises(ArgumentError, match="n_keep is 1000"):
        scheduler.submit(session, regex="[ab]", on_overflow="shift", n_keep=1000)
    assert session.save() == before


def test_text_after_a_form_is_shown_as_ever(storyteller):
    session = storyteller.session(seed=1)
    assert "".join(session.generate(regex="(abc)?", logit_bias={2: 1e4})) == ""
    text = "".join(session.generate(max_new_tokens=5, temperature=0))
    assert text == session.text


def test_a_form_begins_with_whole_characters(model):
    first = 3 + "é".encode()[0]
    for options in ({"choices": [" go"]}, {"regex": " go"}):
        session = model.session(seed=1)
        session.append(PROMPT)
        assert "".join(session.generate(max_new_tokens=1, logit_bias={first: 1e4})) == ""
        assert "".join(session.generate(**options)) == " go"


# --- 1,000 generations, all valid

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "brave": {"type": "boolean"},
    },
    "required": ["name", "age", "brave"],
    "additionalProperties": False,
}
SCHEMAS = [
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, 2.5, None, True, "x", [1], {"a": 1}]},
    {"const": {"go": "north"}},
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer", "minimum": -5, "maximum": 300},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "integer", "minimum": 0, "maximum": 60, "multipleOf": 5},
    {"type": "string", "maxLength": 10},
    {"type": "string", "minLength": 3, "maxLength": 6, "pattern": "^[a-z]+$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 4},
    {"type": "array", "items": {"enum": ["n", "s"]}, "minItems": 2, "maxItems": 5},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": [1, 2]}], "items": False},
    {"anyOf": [{"const": "wait"}, {"type": "integer", "minimum": 1, "maximum": 3}]},
    {"oneOf": [{"type": "null"}, PERSON]},
    {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 7}]},
    PERSON,
    {"$ref": "#/$defs/p", "$defs": {"p": PERSON}},
    {
        "type": "object",
        "properties": {"to": {"enum": ["gate", "inn"]}, "with": PERSON},
        "required": ["to"],
        "additionalProperties": False,
    },
]
REGEXES = [
    "a|b|cd",
    "[0-9]{3}-[0-9]{4}",
    r"(north|south)( (east|west))?",
    r"\d{1,3}(\.\d{1,2})?",
    "[A-Z][a-z]{2,7}( [A-Z][a-z]{2,7})?",
    "x{0,5}y",
    "(?:ab){2,4}c?",
    "[^a-z\n]{1,6}",
    "(a|é|日本){1,6}",
    ".{1,12}",
]


@pytest.mark.parametrize("which", ["model", "storyteller"])
def test_a_thousand_texts_are_all_valid(which, request):
    """Half of them by random weights, half by the model that ships."""
    model = request.getfixturevalue(which)
    n_valid = 0
    n = math.ceil(500 / (len(SCHEMAS) + len(REGEXES)))
    for i, schema in enumerate(SCHEMAS):
        checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        options = {"temperature": 1.5, "top_p": 1.0, "seed": i, "max_new_tokens": 250}
        for completion in model.complete([PROMPT] * n, json_schema=schema, **options):
            assert completion.finish_reason == "stop", schema
            checker.validate(json.loads(completion.text))
            n_valid += 1
    for i, regex in enumerate(REGEXES):
        for completion in model.complete([PROMPT] * n, regex=regex, temperature=1.5, seed=i):
            assert completion.finish_reason == "stop", regex
            assert re.fullmatch(regex, completion.text), (regex, completion.text)
            n_valid += 1
    assert n_valid >= 500


def test_a_grammar_with_nesting(model):
    grammar = 'start: list\nlist: "[" item ("," item)* "]" | "[]"\nitem: "a" | "b"'
    for text in model.generate([PROMPT] * 30, grammar=grammar, seed=1, max_new_tokens=200):
        assert re.fullmatch(r"\[([ab](,[ab])*)?\]?|\[[ab,]*", text)


# --- what is wrong is named


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": []}, "choices is empty"),
        ({"choices": "abc"}, "choices is 'abc'; it must be several strings"),
        ({"choices": ["a", ""]}, "choices holds ''"),
        ({"choices": ["a", 5]}, "choices holds 5"),
        ({"choices": ["\ud800"]}, "half a surrogate pair"),
        ({"choices": ["a"], "regex": "a"}, "choices and regex exclude each other"),
        ({"regex": 5}, "regex is 5; it must be a string"),
        ({"regex": "("}, "regex: .*unclosed group"),
        ({"json_schema": "{"}, "json_schema is '{'"),
        ({"json_schema": [1]}, "json_schema is .*a schema is an object"),
        ({"json_schema": {"type": "foo"}}, "json_schema: .*foo"),
        ({"grammar": "start: nothing"}, "grammar: .*nothing"),
    ],
)
def test_wrong_forms_are_named(model, options, message):
    session = model.session()
    session.append(PROMPT)
    before = session.tokens
    with pytest.raises(ArgumentError, match="(?s)" + message):
        list(session.generate(**options))
    assert session.tokens == before


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    model = tiny_model()
    with pytest.raises(MissingExtraError, match=r'pip install "\.\[grammar\]"'):
        model.generate(PROMPT, regex="a")
    assert model.generate(PROMPT, choices=["a"]) == "a"


def test_a_schema_may_be_json_text():
    assert SamplingParams(json_schema={"type": "null"}).json_schema == '{"type": "null"}'
    assert SamplingParams(json_schema=' {"type": "null"}').form()[0] == "json_schema"
