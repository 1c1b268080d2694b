"""The published greedy text of stories260K, to the letter, on every kernel set of this machine."""

import re

import pytest

import tinyllama

WEIGHTS = ("stories260K.bin", "stories260K_v1.bin")


@pytest.fixture(scope="module")
def golden(shared):
    readme = (shared / "data" / "README.md").read_text(encoding="utf-8")
    quoted = re.search(r"Golden text of `stories260K\.bin`.*?\n\n((?:>.*\n?)+)", readme, re.DOTALL)
    return "\n".join(line[1:].removeprefix(" ") for line in quoted[1].rstrip("\n").split("\n"))


@pytest.mark.parametrize("isa", tinyllama.supported_isas())
@pytest.mark.parametrize("name", WEIGHTS)
def test_greedy_text_is_the_published_one(shared, golden, name, isa):
    folder = shared / "weights" / "stories260k"
    model = tinyllama.load(folder / name, tokenizer=folder / "tok512.bin", isa=isa)
    assert model.info()["isa"] == isa
    completion = model.complete("", temperature=0, max_new_tokens=200)
    assert completion.usage.completion_tokens == 200
    assert completion.text == golden
