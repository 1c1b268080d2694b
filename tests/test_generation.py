"""What is generated: seeds, ends, whole characters, stop strings, several texts at once."""

import math
import signal

import numpy as np
import pytest

import tinyllama
from random_models import forced_model, tiny_checkpoint, tiny_model
from tinyllama import Completion
from tinyllama.errors import ArgumentError
from tinyllama.generation import MAX_LIVE, sequence_seed
from tinyllama.reference import forward

PROMPT = "the rain"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_same_seed_same_text(model):
    texts = [model.generate(PROMPT, seed=7, max_new_tokens=30) for _ in range(3)]
    assert len(set(texts)) == 1
    assert model.generate(PROMPT, seed=8, max_new_tokens=30) != texts[0]


def test_without_a_seed_each_run_differs(model):
    assert len({model.generate(PROMPT, max_new_tokens=30) for _ in range(5)}) == 5


@pytest.mark.parametrize("seed", range(20))
def test_stream_joined_is_generate(model, seed):
    options = {"seed": seed, "temperature": 1.5, "top_p": 1.0}
    pieces = list(model.stream(PROMPT, **options))
    assert "".join(pieces) == model.generate(PROMPT, **options)
    assert all(pieces)
    whole = "".join(model.stream(PROMPT, **options, return_full_text=True))
    assert whole == PROMPT + "".join(pieces)
    assert whole == model.generate(PROMPT, **options, return_full_text=True)


def test_greedy_is_the_likeliest_token_each_time(model):
    checkpoint = tiny_checkpoint()
    tokens = model.tokenizer.encode(PROMPT)
    not_ascii = range(3 + 0x80, 3 + 0x100)  # of those, what may come next depends on the last
    expected = []
    while len(expected) < 20:
        logits = forward(checkpoint, tokens + expected, dtype=np.float64)[-1]
        logits[not_ascii] = -math.inf
        expected.append(int(logits.argmax()))
    assert not {1, 2} & set(expected)
    bias = dict.fromkeys(not_ascii, -math.inf)
    completion = model.complete(PROMPT, temperature=0, max_new_tokens=20, logit_bias=bias)
    assert list(completion.tokens) == expected


def test_generation_goes_on_until_the_context_is_full(model):
    completion = model.complete(PROMPT, temperature=0, logit_bias={1: -math.inf, 2: -math.inf})
    assert completion.finish_reason == "length"
    assert completion.usage.total_tokens == model.config.max_seq_len


@pytest.mark.parametrize("end", [1, 2], ids=["bos", "eos"])
def test_generation_ends_at_the_end_tokens(model, end):
    completion = model.complete(PROMPT, logit_bias={end: 1000.0})
    assert (completion.text, completion.tokens, completion.finish_reason) == ("", (), "stop")
    assert completion.usage == tinyllama.Usage(len(model.tokenizer.encode(PROMPT)), 0)


def test_min_new_tokens_keeps_the_end_away(model):
    bias = dict.fromkeys(range(3 + 0x80, 3 + 0x100), -math.inf)  # no character of several tokens
    bias |= {1: 1000.0, 2: 1000.0}
    completion = model.complete(PROMPT, logit_bias=bias, min_new_tokens=9)
    assert len(completion.tokens) == 9
    assert completion.finish_reason == "stop"


def test_max_new_tokens(model):
    completion = model.complete(PROMPT, max_new_tokens=5, seed=1)
    assert len(completion.tokens) == 5
    assert completion.finish_reason == "length"


def test_a_prompt_that_fills_the_context_has_no_continuation(model):
    completion = model.complete([1] * 64)
    assert (completion.text, completion.finish_reason) == ("", "length")
    assert list(model.stream([1] * 64)) == []


def test_what_was_forced_is_said():
    model = forced_model(b"Once up")
    completion = model.complete(temperature=0)
    assert completion.text == "Once up"
    assert completion.finish_reason == "stop"
    assert model.generate("O", temperature=0) == "nce up"
    assert model.generate("O", temperature=0, return_full_text=True) == "Once up"


def test_characters_of_several_bytes_come_whole():
    text = "\u6c34\u00e9\U0001f600!"
    model = forced_model(text.encode())
    assert model.generate(temperature=0) == text
    assert list(model.stream(temperature=0)) == list(text)


def test_a_character_cut_by_the_limit_is_left_out():
    model = forced_model("a\u6c34".encode())
    assert model.generate(temperature=0, max_new_tokens=3) == "a"
    assert list(model.stream(temperature=0, max_new_tokens=3)) == ["a"]
    session = model.session()
    assert list(session.generate(temperature=0, max_new_tokens=3)) == ["a"]
    assert list(session.generate(temperature=0)) == ["\u6c34"]  # and is not lost


def test_no_character_is_ever_broken(model):
    """Where the model is all noise and most of its tokens are bytes."""
    options = {"temperature": 1e6, "top_p": 1.0, "logit_bias": {2: -math.inf}}
    characters = set()
    for seed in range(200):
        text = model.generate(PROMPT, seed=seed, **options)
        assert "\ufffd" not in text
        assert text == "".join(model.stream(PROMPT, seed=seed, **options))
        characters.update(map(len, map(str.encode, text)))
    assert characters == {1, 2, 3, 4}


def test_a_model_that_would_leave_a_character_unfinished_has_to_go_on():
    model = forced_model("a\u6c34".encode()[:3])  # both bytes, then the end
    completion = model.complete(temperature=0, max_new_tokens=4)
    assert completion.text[0] == "a"
    assert len(completion.text) == 2
    assert "\u6c00" <= completion.text[1] <= "\u6cff"


def test_an_unfinished_character_shows_where_nothing_else_may_be_drawn():
    model = forced_model("a\u6c34".encode()[:3])
    middle = {3 + byte: -math.inf for byte in range(0x80, 0xC0)}
    del middle[3 + 0xB0]  # the second byte of the character
    assert model.generate(temperature=0, logit_bias=middle) == "a\u6c30"
    session = model.session()
    session.feed([1, 3 + ord("a"), 3 + 0xE6, 3 + 0xB0])
    middle[3 + 0xB0] = -math.inf
    start = {"temperature": 0, "max_new_tokens": 1, "logit_bias": {3 + 0xE6: 1000.0}}
    assert list(session.generate(**start)) == []
    assert list(session.generate(temperature=0, logit_bias={**middle, 2: 1e4})) == ["\ufffd"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("c", "ab"),
        ("cd", "ab"),
        ("abcdefg", ""),
        ("gX", "abcdefg"),
        (["f", "de"], "abc"),
        (["zzz"], "abcdefg"),
        ((), "abcdefg"),
    ],
)
def test_stop_strings_end_the_text_before_them(stop, expected):
    model = forced_model(b"abcdefg")
    completion = model.complete(temperature=0, stop=stop)
    assert completion.text == expected
    assert completion.finish_reason == "stop"
    assert "".join(model.stream(temperature=0, stop=stop)) == expected


def test_streams_hold_back_only_what_may_become_a_stop_string():
    model = forced_model(b"abcdefg")
    assert list(model.stream(temperature=0, stop="cdX")) == ["a", "b", "cde", "f", "g"]
    assert list(model.stream(temperature=0, stop="fgX")) == ["a", "b", "c", "d", "e", "fg"]
    assert list(model.stream(temperature=0, stop="fgX", max_new_tokens=6))[-1] == "f"


def test_stop_strings_are_not_sought_in_the_prompt():
    model = forced_model(b"ABCDEFG")
    assert model.generate("ABC", temperature=0, stop="B") == "DEFG"


def test_stop_strings_equal_search_in_the_whole(model):
    """A text of two letters and one character of three bytes, cut where any search would cut it."""
    rng = np.random.default_rng(0)
    letters = [*"ab", "\u6c34"]
    bytes_of = {3 + byte for byte in "".join(letters).encode()}
    options = {"max_new_tokens": 12, "temperature": 100.0, "top_p": 1.0}
    options["logit_bias"] = {t: -math.inf for t in range(300) if t not in bytes_of}
    n_cut = 0
    for seed in range(500):
        text = model.generate(PROMPT, seed=seed, **options)
        stops = ["".join(rng.choice(letters, n)) for n in rng.integers(1, 5, 2)]
        # Character by character, the match that ends first wins; among these the longest.
        ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        expected = text[: min(ends)[1]] if ends else text
        n_cut += bool(ends)
        completion = model.complete(PROMPT, seed=seed, stop=stops, **options)
        assert completion.text == expected, (text, stops)
        assert completion.finish_reason == ("stop" if ends else "length")
        assert "".join(model.stream(PROMPT, seed=seed, stop=stops, **options)) == expected
    assert 100 < n_cut < 450


def test_no_text_holds_half_a_surrogate():
    model = forced_model(b"abc")
    assert model.generate(temperature=0, stop=["\ud800", "c\ud800"]) == "abc"


def test_min_new_tokens_that_leave_nothing_to_draw_are_refused_at_once(model):
    bias = dict.fromkeys(set(range(300)) - {1, 2}, -math.inf)
    assert model.complete(PROMPT, logit_bias=bias).finish_reason == "stop"
    with pytest.raises(ArgumentError, match="min_new_tokens together ban every token"):
        model.complete([], logit_bias=bias, min_new_tokens=1)


def test_shapes(model):
    few = {"max_new_tokens": 3, "seed": 1}
    assert isinstance(model.generate(PROMPT, **few), str)
    assert isinstance(model.generate([1, 2, 3], **few), str)
    assert isinstance(model.generate(np.array([1, 2, 3]), **few), str)
    assert [type(x) for x in model.generate([PROMPT, "a"], **few)] == [str, str]
    assert [type(x) for x in model.generate([[1, 2], PROMPT], **few)] == [str, str]
    assert [type(x) for x in model.generate(np.ones((2, 3), int), **few)] == [str, str]
    assert model.generate([], **few) == []
    several = model.generate([PROMPT, "a"], num_return_sequences=3, **few)
    assert [len(group) for group in several] == [3, 3]
    assert len(model.generate(PROMPT, num_return_sequences=3, **few)) == 3
    assert isinstance(model.complete(PROMPT, **few), Completion)
    assert isinstance(model.complete([PROMPT], num_return_sequences=2, **few)[0][1], Completion)


def test_sequences_of_one_prompt_differ_and_can_be_had_alone(model):
    several = model.complete(PROMPT, num_return_sequences=5, seed=3, max_new_tokens=20)
    assert len({c.text for c in several}) == 5
    assert [c.seed for c in several] == [sequence_seed(3, i) for i in range(5)]
    assert several[0].seed == 3
    for c in several:
        assert model.complete(PROMPT, seed=c.seed, max_new_tokens=20) == c


def test_seeds_go_on_over_prompts(model):
    groups = model.complete([PROMPT] * 2, num_return_sequences=2, seed=3, max_new_tokens=8)
    assert [c.seed for g in groups for c in g] == [sequence_seed(3, i) for i in range(4)]


def test_more_prompts_than_run_at_once(model):
    prompts = [[1, 3 + i % 250, 40] for i in range(MAX_LIVE * 2 + 5)]
    texts = model.generate(prompts, temperature=0, max_new_tokens=1 + 5)
    assert len(texts) == len(prompts)
    for i in (0, MAX_LIVE, len(prompts) - 1):
        assert texts[i] == model.generate(prompts[i], temperature=0, max_new_tokens=6)
    many = model.generate(PROMPT, num_return_sequences=MAX_LIVE + 3, seed=0, max_new_tokens=2)
    assert len(many) == MAX_LIVE + 3


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer signal")
@pytest.mark.parametrize("n_prompt", [1, 100_000], ids=["while generating", "while reading"])
def test_an_interrupt_stops_the_work(n_prompt):
    """As Ctrl-C does: the work would go on for a minute and more."""
    model = tiny_model(max_seq_len=200_000)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            model.generate([5] * n_prompt, logit_bias={1: -math.inf, 2: -math.inf})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(model.generate(PROMPT, max_new_tokens=3, temperature=0)) > 0
