"""Sources mixed by weight: each document as often as promised, a pure function of the seed."""

import json
from pathlib import Path

import numpy as np
import pytest

from tinyllama import tokenizer
from tinyllama.data import prepare
from tinyllama.errors import ConfigError, FormatError
from tinyllama.train.batches import TokenFolder, Windows, mixture

pytest.importorskip("sentencepiece")

SIZES = {"a": 10, "b": 7, "c": 25}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, n in SIZES.items():
        stories = [f"{name} story {i} of {i * i} cats and a dog" * (i % 3 + 1) for i in range(n)]
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(stories))
    tokenizer.train(folder, folder / "tokenizer.model", 290)
    return folder


@pytest.fixture(scope="module")
def tokens(texts) -> Path:
    inputs = [f"{name}={texts / name}.txt" for name in SIZES]
    prepare(inputs, texts, texts / "tokens", valid_fraction=0)
    return texts / "tokens"


@pytest.fixture
def split(tokens):
    return TokenFolder(tokens).split("train")


def times(split, weights, seed=3):
    """How often an epoch has each document, source by source."""
    counts = np.bincount(mixture(split, weights, seed), minlength=len(split))
    return dict(zip(SIZES, np.split(counts, np.cumsum(list(SIZES.values()))[:-1]), strict=True))


def test_documents_are_there_as_often_as_the_weight_says(split):
    counts = times(split, {"a": 2.5, "b": 0.4, "c": 3})
    assert sorted(counts["a"]) == [2] * 5 + [3] * 5
    length, _ = np.split(split.length[10:], [7])
    seen, rest = length[counts["b"] == 1], length[counts["b"] == 0]
    assert abs(seen.sum() - 0.4 * length.sum()) <= max(rest.min(), seen.max()) / 2
    assert list(counts["c"]) == [3] * 25
    counts = times(split, {"b": 0})
    assert [counts[name].tolist() for name in SIZES] == [[1] * 10, [0] * 7, [1] * 25]


def test_a_part_that_the_documents_are_too_few_for_is_refused(split):
    split.sources = {"one": 1, "rest": len(split) - 1}
    for weight, seen in ((0.5, "0"), (1.5, "1"), (0.1, "0")):
        with pytest.raises(ConfigError, match=rf"one is {weight}: .* nearer to that than {seen} "):
            mixture(split, {"one": weight}, 3)
    assert np.bincount(mixture(split, {"one": 9.1}, 3))[0] == 9


def test_a_part_is_of_the_tokens_not_of_the_documents(split):
    split.length[3] = 2 * (split.length[:10].sum() - split.length[3])
    parts = []
    for seed in range(20):
        try:
            counts = times(split, {"a": 0.66}, seed)["a"]
        except ConfigError:
            continue  # the long one comes late among those that are chosen from
        parts.append((counts * split.length[:10]).sum() / split.length[:10].sum())
    assert len(parts) > 5 and max(abs(np.array(parts) - 0.66)) <= 0.66 / 4


def test_the_seed_chooses_and_a_larger_weight_keeps_the_choice(split):
    half = times(split, {"a": 0.5, "c": 0.5})
    assert np.array_equal(half["c"], times(split, {"a": 1.5, "c": 0.5})["c"])
    assert np.array_equal(half["a"], times(split, {"a": 2.5})["a"] - 2)
    assert (times(split, {"c": 0.6})["c"] >= half["c"]).all()
    assert not np.array_equal(half["c"], times(split, {"c": 0.5}, seed=4)["c"])


def test_weights_are_what_copies_of_the_files_would_be(texts, split, tmp_path):
    for i in range(3):
        (tmp_path / f"copy{i}.txt").write_bytes((texts / "a.txt").read_bytes())
    inputs = [tmp_path, texts / "b.txt", texts / "c.txt"]
    prepare(inputs, texts, tmp_path / "copied", valid_fraction=0)
    copied = Windows(TokenFolder(tmp_path / "copied").split("train"), 16, seed=1)
    mixed = Windows(split, 16, seed=1, weights={"a": 3})
    assert (mixed.n_tokens, mixed.n_documents) == (copied.n_tokens, copied.n_documents)

    def documents(windows):
        return sorted(windows.split.document(i).tolist() for i in windows._documents)

    mixed.batch(0, 1), copied.batch(0, 1)
    assert documents(mixed) == documents(copied)


def test_windows_of_a_mixture_need_no_state(split):
    windows = Windows(split, 16, seed=1, weights={"a": 2.5, "b": 0})
    n = windows.windows_per_epoch
    straight, targets = windows.batch(0, 3 * n)
    for first in (2 * n + 3, n - 1, 0):
        fresh = Windows(split, 16, seed=1, weights={"a": 2.5, "b": 0})
        assert np.array_equal(fresh.batch(first, 4)[0], straight[first : first + 4])
    targets = np.bincount(targets[:n].ravel(), minlength=290)
    chosen = [split.document(i) for i in mixture(split, {"a": 2.5, "b": 0}, 1)]
    total = np.bincount(np.concatenate(chosen), minlength=290)
    assert (targets <= total).all() and targets.sum() >= total.sum() - 2 * 16


def test_weights_of_one_change_nothing(split):
    plain = Windows(split, 16, seed=1)
    ones = Windows(split, 16, seed=1, weights=dict.fromkeys(SIZES, 1))
    assert np.array_equal(plain.batch(0, 50), ones.batch(0, 50))


def test_what_cannot_be_mixed(split):
    with pytest.raises(
        ConfigError, match=r"weights\.d: .*tokens, split train, has no source 'd', on"
    ):
        Windows(split, 16, seed=1, weights={"d": 2})
    with pytest.raises(ConfigError, match="0 tokens are fewer than one window"):
        Windows(split, 16, seed=1, weights=dict.fromkeys(SIZES, 0))


def test_folders_without_sources_have_one(tokens, tmp_path):
    for file in tokens.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tokens / "manifest.json").read_text())
    sources = manifest["splits"]["train"].pop("sources")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    split = TokenFolder(tmp_path).split("train")
    assert split.sources == {"text": 42}
    assert len(mixture(split, {"text": 2}, 0)) == 84
    manifest["splits"]["train"]["sources"] = sources[:2]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="its sources have 17 documents, its shards 42"):
        TokenFolder(tmp_path).split("train")


@pytest.mark.parametrize("name", ["a.txt", "folder", "nothing"])
def test_what_is_no_folder_of_tokens_is_named(tmp_path, name):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{name}: no folder of prepared tokens: make one"):
        TokenFolder(tmp_path / name)
