"""Near duplicates, against an exact comparison of every pair."""

import io
import random
import sys

import pytest

from tinyllama.data import check
from tinyllama.data.near import NearDuplicates, bands, shingles
from tinyllama.errors import ArgumentError, MissingExtraError

rensa = pytest.importorskip("rensa")

ENGLISH = [f"word{i}" for i in range(400)]
CHINESE = [chr(0x4E00 + i) for i in range(400)]


def documents_with_copies(words: list[str], n: int = 150, seed: int = 1) -> list[list[str]]:
    """Random documents, and copies and copies of copies with some words replaced, in any order."""
    rng = random.Random(seed)
    originals = [rng.choices(words, k=rng.randrange(20, 120)) for _ in range(n)]
    copies = []
    for original in originals:
        copy = original
        for _ in range(3):
            copy = list(copy)
            for _ in range(rng.randrange(4)):
                copy[rng.randrange(len(copy))] = rng.choice(words)
            copies.append(copy)
    return originals + rng.sample(copies, len(copies))


def runs_of(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def exact(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    """What Broder (1997) calls resemblance."""
    return len(a & b) / len(a | b)


@pytest.mark.parametrize(("words", "space"), [(ENGLISH, " "), (CHINESE, "")])
@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_found_is_what_an_exact_comparison_finds(words, space, threshold):
    documents = documents_with_copies(words)
    finder = NearDuplicates(threshold, io.BytesIO())
    kept: dict[str, set[tuple[str, ...]]] = {}
    n_found = n_missed = 0
    for i, document in enumerate(documents):
        found = finder.find(str(i), space.join(document))
        runs = runs_of(document)
        likeness = {where: exact(runs, other) for where, other in kept.items()}
        if found:
            assert found.jaccard == likeness[found.where] >= threshold
            n_found += 1
        else:
            n_missed += max(likeness.values(), default=0) >= threshold
            kept[str(i)] = runs
    assert n_found > 80
    assert n_missed <= 0.01 * n_found


def test_case_punctuation_and_line_breaks_do_not_count():
    finder = NearDuplicates(1.0, io.BytesIO())
    texts = ["Tom sat. He said: “Now, I eat!”", "No.", "?!", "从前有一只猫，它叫咪咪。", "", "猫"]
    assert [finder.find(str(i), text) for i, text in enumerate(texts)] == [None] * 6
    again = ["tom sat he said\n\nnow i eat", "no", "?!", "从前有一只猫 它叫咪咪", " ", "猫。"]
    found = [finder.find("again", text) for text in again]
    assert [likeness and likeness.where for likeness in found] == ["0", "1", None, "3", None, "5"]
    assert finder.find("x", "Tom sat. He said: “Now, I ate!”") is None


def test_scripts_without_spaces_are_taken_by_character():
    assert shingles("我们吃苹果派") == {"我 们 吃 苹 果", "们 吃 苹 果 派"}
    assert shingles("the iPhone手机 is 好") == {"the iphone 手 机 is", "iphone 手 机 is 好"}
    assert len(shingles("ひらがなカタカナ")) == 4 and len(shingles("ภาษาไทยง่าย")) == 7
    assert shingles("não é açúcar") == {"não é açúcar"}


def test_the_order_of_runs_does_not_matter():
    runs = sorted(shingles(" ".join(ENGLISH)))
    digests = []
    for order in (runs, runs[::-1], random.Random(1).sample(runs, len(runs))):
        sketch = rensa.RMinHash(126, 1)
        sketch.update(order)
        digests.append(list(sketch.digest()))
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.75, 0.8, 0.9, 0.99, 1.0])
def test_bands_are_as_long_as_they_may_be(threshold):
    def missed(n_bands, n_rows):
        return (1 - threshold**n_rows) ** n_bands

    n_bands, n_rows = bands(threshold)
    assert n_bands * n_rows <= 128 and missed(n_bands, n_rows) <= 0.01
    assert n_rows == 128 or missed(128 // (n_rows + 1), n_rows + 1) > 0.01


def test_a_check_drops_the_later_one_and_shows_both(tmp_path):
    story = "One day a small cat went to the sea and saw a big ship with a red sail on it. "
    texts = [story * 2 + "It swam home.", "Another story.", story * 2 + "It ran home."]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts))
    (tmp_path / "b.txt").write_text(story * 2 + "It swam to its home.")
    assert "near" not in check(tmp_path / "a.txt").total.findings
    inputs = [f"first={tmp_path}/b.txt", f"second={tmp_path}/a.txt"]
    report = check(inputs, near=0.7, repair=tmp_path / "clean")
    assert (tmp_path / "clean/first.txt").read_text().startswith(story)
    assert (tmp_path / "clean/second.txt").read_text() == "Another story.\n<|endoftext|>\n"
    assert report.sources["first"].findings["near"].count == 0
    found = report.sources["second"].findings["near"]
    assert found.count == 2
    a, b = (
        runs_of(text.lower().replace(".", "").split())
        for text in (texts[0], story * 2 + "It swam to its home.")
    )
    assert found.examples[0].startswith(
        f"{tmp_path}/a.txt: line 1: {exact(a, b):.2f} like {tmp_path}/b.txt: line 1: 'One day"
    )


def test_what_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    for near in (0.4, 1.1, float("nan")):
        with pytest.raises(ArgumentError, match=r"near is .*, expected 0\.5 up to 1"):
            check(tmp_path / "a.txt", near=near, repair=tmp_path / "out.txt")
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(MissingExtraError, match="the extra 'data'"):
        check(tmp_path / "a.txt", near=0.8, repair=tmp_path / "out.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
