"""What is measured of stories without a judge, against other implementations and by hand."""

import itertools
import json
import random
import tracemalloc

import numpy as np
import pytest

import tinyllama
from random_models import tiny_model
from tinyllama.errors import ArgumentError, FormatError
from tinyllama.evaluate import cloze, intervals, prompts, stories
from tinyllama.evaluate.overlap import overlaps
from tinyllama.generation import Completion, Usage

pytest.importorskip("sacrebleu", reason="story measures need the extra eval")
pytest.importorskip("rapidfuzz", reason="story measures need the extra eval")


def story(text, finish_reason="stop"):
    return Completion(text, (), None, finish_reason, Usage(1, 1), 0)


def random_texts(n, n_words, vocabulary=8, seed=0):
    chance = random.Random(seed)
    return [
        " ".join(f"w{chance.randrange(vocabulary)}" for _ in range(chance.randint(1, n_words)))
        for _ in range(n)
    ]


# --- measures -------------------------------------------------------------------------------------


def test_words():
    text = "Don't STOP, she said: 3 caf\u00e9s_x!"
    assert stories.words(text) == ["don", "t", "stop", "she", "said", "3", "caf\u00e9s", "x"]
    assert stories.words("\u732b\u5403\u4e86 2 fish") == ["\u732b", "\u5403", "\u4e86", "2", "fish"]
    assert stories.words("...") == []


@pytest.mark.parametrize(
    ("text", "reason", "proper"),
    [
        ("They went home.", "stop", True),
        ('"Good night!" ', "stop", True),
        ("\u5b8c\u4e86\u3002\u300d", "stop", True),
        ("They went home", "stop", False),
        ("They went home.", "length", False),
        ("", "stop", False),
    ],
)
def test_ends_properly(text, reason, proper):
    assert stories.ends_properly(story(text, reason)) is proper


def test_repetition_and_distinct_by_hand():
    text = list("abcdabcd")  # 4-grams: abcd bcda cdab dabc abcd
    assert stories.repetition(text) == pytest.approx(1 / 5)
    assert stories.repetition(list("abc")) == 0
    texts = [text, list("ab"), []]
    assert stories.distinct(texts, 1) == pytest.approx(4 / 10)
    assert stories.distinct(texts, 2) == pytest.approx(4 / 8)  # ab bc cd da; 7 + 1 of them
    assert stories.distinct([[]], 1) == 0


def test_self_bleu_is_that_of_nltk():
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    texts = [text.split() for text in random_texts(12, 60, vocabulary=3)]
    texts = [text for text in texts if len(text) > 20]  # 4-grams are shared: nothing is smoothed
    expected = [
        bleu.sentence_bleu(texts[:i] + texts[i + 1 :], text) for i, text in enumerate(texts)
    ]
    assert stories.self_bleu(texts) == pytest.approx(np.mean(expected), rel=1e-6)
    assert stories.self_bleu([texts[0]] * 3) == pytest.approx(1)
    assert stories.self_bleu(texts[:1]) is None


def test_self_bleu_of_very_many_takes_some_at_even_distances():
    texts = [text.split() for text in random_texts(250, 12)]
    assert stories.self_bleu(texts) == stories.self_bleu(texts[::3])


def test_measures_are_means_over_prompts():
    groups = [[story("a b c d a b c d."), story("a b")], [story("One two three four five.")]]
    measures = stories.measure(groups)
    assert measures.ends.mean == pytest.approx((0.5 + 1) / 2)
    assert measures.words.mean == pytest.approx((5 + 5) / 2)
    assert measures.repetition.mean == pytest.approx((1 / 5 + 0) / 2)
    assert measures.distinct[0] == pytest.approx(9 / 15)


def test_tell_makes_the_same_stories_again():
    model = tiny_model(max_seq_len=32)
    params = tinyllama.SamplingParams(seed=3, num_return_sequences=2)
    groups = stories.tell(model, ["a cat", "the dog"], params)
    assert [len(group) for group in groups] == [2, 2]
    assert groups == stories.tell(model, ["a cat", "the dog"], params)
    one = stories.tell(model, ["a cat"], tinyllama.SamplingParams(seed=3))
    assert one == [groups[0][:1]]


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson(right, n, low, high):
    """The last is the example of Newcombe (1998), the others follow from the closed form."""
    share = intervals.of_share(right, n)
    assert (share.mean, share.low, share.high) == pytest.approx((right / n, low, high), abs=1e-4)


def test_intervals_are_over_prompts():
    values = np.random.default_rng(0).normal(5, 2, 200)
    estimate = intervals.of_prompts([[v] for v in values])
    error = 1.96 * values.std(ddof=1) / 200**0.5
    assert estimate.mean == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx(
        (values.mean() - error, values.mean() + error), abs=0.05
    )
    # To grade every story ten times more tells nothing of other prompts.
    assert intervals.of_prompts([[v] * 10 for v in values]) == estimate
    assert intervals.of_prompts([[1.0, 2.0], []]) == intervals.Estimate(1.5, None, None)
    assert intervals.of_prompts([[], []]) is None


def test_the_memory_of_an_interval_does_not_grow_with_its_prompts(monkeypatch):
    monkeypatch.setattr(intervals, "N_RESAMPLES", 300)
    groups = [[float(i % 7)] for i in range(20_000)]
    tracemalloc.start()
    estimate = intervals.of_prompts(groups)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6  # all draws and their values at once would be 96 MB, of 10,000 3.2 GB
    means = np.array([group[0] for group in groups])
    draws = np.random.default_rng(0).integers(len(means), size=(300, len(means)))
    low, high = np.quantile(means[draws].mean(axis=1), [0.025, 0.975])
    assert (estimate.low, estimate.high) == (low, high)


# --- overlap --------------------------------------------------------------------------------------


def test_a_planted_copy_is_found():
    copied = "the small red fox ran over seven white bridges"
    documents = [
        ("a.txt: line 1", "A long time ago there was a queen who had a garden."),
        ("b.txt: line 7", f"One day, {copied.upper()}, and then it rested."),
        ("b.txt: line 9", "The small red fox ran over the hill."),
    ]
    text = f"Then, suddenly: {copied.replace(' ran', ', ran')}... but sang."
    found, other = overlaps([text, "no such words anywhere at all"], iter(documents))
    assert (found.copied, found.copied_text, found.copied_from) == (9, copied, "b.txt: line 7")
    assert found.rouge_2_from == found.rouge_l_from == "b.txt: line 7"
    assert (other.copied, other.copied_from) == (other.rouge_2, other.rouge_2_from) == (0, "")
    (end,) = overlaps([copied], [("c.txt", f"It was {copied}"), ("d.txt", copied)])
    assert (end.copied, end.copied_from, end.rouge_l_from) == (9, "c.txt", "c.txt")


@pytest.mark.parametrize("vocabulary", [4, 12])
def test_overlaps_against_other_implementations(vocabulary):
    """Longest runs by trying all; ROUGE by the package rouge-score, on every pair."""
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rouge2", "rougeL"])
    texts = [*random_texts(20, 40, vocabulary), ""]
    documents = [
        (str(i), text) for i, text in enumerate(random_texts(50, 60, vocabulary + 1, seed=1))
    ]
    for text, found in zip(texts, overlaps(texts, documents), strict=True):
        scores = [scorer.score(document, text) for _, document in documents]
        for name, key in (("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
            best = max(score[key].precision for score in scores)
            assert getattr(found, name) == pytest.approx(best)
            if best:
                where = int(getattr(found, f"{name}_from"))
                assert scores[where][key].precision == pytest.approx(best)
        words = text.split()
        runs = [
            (" ".join(words[i:j]), where)
            for i, j in itertools.combinations(range(len(words) + 1), 2)
            for where, document in documents
            if j - i >= 4 and f" {' '.join(words[i:j])} " in f" {document} "
        ]
        longest = max((run.count(" ") + 1 for run, _ in runs), default=0)
        assert found.copied == longest
        if longest:
            assert (found.copied_text, found.copied_from) in runs


# --- choices --------------------------------------------------------------------------------------


class Alphabetical:
    """Likes the choice that comes first in the alphabet, whatever the prompt."""

    def score_choices(self, prompt, choices):
        return [
            tinyllama.generation.Choice(c, (), -float(sorted(choices).index(c)), 0.5)
            for c in choices
        ]


def test_a_model_that_does_not_read_gets_half_of_the_twins():
    for score in cloze.cloze(Alphabetical()).values():
        assert score.accuracy.mean == score.chance == 0.5
        assert len(score.wrong) == score.n / 2 == 9


def test_who_cannot_tell_is_not_right():
    class Indifferent:
        def score_choices(self, prompt, choices):
            return [tinyllama.generation.Choice(c, (), -1.0, 0.5) for c in choices]

    assert {score.accuracy.mean for score in cloze.cloze(Indifferent()).values()} == {0}


def test_twins_differ_in_the_prompt_alone():
    kinds = json.loads(cloze.QUESTIONS.read_text(encoding="utf-8"))
    assert list(kinds) == ["factual", "reasoning", "context"]
    for questions in kinds.values():
        for one, other in zip(questions[::2], questions[1::2], strict=True):
            assert one["choices"] == other["choices"][::-1]
            assert one["prompt"] != other["prompt"]
            assert not one["prompt"].endswith(" ") and one["choices"][0].startswith(" ")


def test_the_model_that_ships_knows_some_facts():
    assert cloze.cloze(tinyllama.load())["factual"].accuracy.mean > 0.6


# --- prompts --------------------------------------------------------------------------------------


def test_the_prompts_that_ship():
    shipped = prompts.shipped()
    assert len(set(shipped.texts)) == 40
    shipped.check(tinyllama.load())
    some = shipped.some(5, seed=1)
    assert len(some.texts) == 5 and set(some.texts) < set(shipped.texts)
    assert some == shipped.some(5, seed=1) != shipped.some(5, seed=2)
    assert "5 of 40" in some.rule and shipped.some(40, seed=1) is shipped


def test_prompts_from_files(tmp_path):
    pytest.importorskip("yaml", reason="needs the extra eval")
    (tmp_path / "p.txt").write_text("One day \n\nTwo cats\n")
    (tmp_path / "p.yaml").write_text("- |-\n  One day\n- Two cats\n")
    (tmp_path / "p.json").write_text('{"a": ["One day"], "b": ["Two cats"]}')
    for name in ("p.txt", "p.yaml", "p.json"):
        assert prompts.read_prompts(tmp_path / name).texts == ("One day", "Two cats")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n", "holds no prompts"),
        ("p.json", "3", "neither a list"),
        ("p.json", "[", "p.json: "),
        ("p.json", '["a", 3]', "prompt 2 is 3"),
        ("p.yaml", "a: [", "not YAML"),
        ("p.txt", b"\xff", "utf-8"),
    ],
)
def test_bad_files_of_prompts(tmp_path, name, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError, match=message):
        prompts.read_prompts(tmp_path / name)


def test_documents_are_cut_in_their_middle():
    model = tiny_model(max_seq_len=400)
    text = "  one two\nthree ".join(f"w{i}" for i in range(12))
    documents = [(str(i), text) for i in range(40)]
    documents += [("short", "too short"), ("long", "word " * 400)]
    cut = prompts.cut_documents(model, documents, seed=5)
    assert len(cut.texts) == 40 and "seed 5" in cut.rule
    shares = [len(beginning.split()) / len(text.split()) for beginning in cut.texts]
    assert all(text.startswith(beginning) for beginning in cut.texts)
    assert 0.38 < min(shares) < 0.44 and 0.56 < max(shares) < 0.62
    assert cut == prompts.cut_documents(model, documents, seed=5)
    with pytest.raises(ArgumentError, match="no document has at least 20 words"):
        prompts.cut_documents(model, documents[40:], seed=5)


def test_chinese_documents_are_cut_between_characters():
    text = "从前有一只小猫，它住在村子里，每天都很高兴。"
    cut = prompts.cut_documents(tiny_model(max_seq_len=400), [("a", text)] * 20, seed=1)
    lengths = {len(beginning) for beginning in cut.texts}
    assert all(text.startswith(beginning) for beginning in cut.texts)
    assert min(lengths) >= 8 and max(lengths) <= 15 and len(lengths) > 2


def test_a_prompt_that_fills_the_context_is_named():
    model = tiny_model()
    with pytest.raises(ArgumentError, match=r"prompt 2 has .* the context holds 64"):
        prompts.Prompts(("a", "x" * 80), "").check(model)
