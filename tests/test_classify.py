"""examples/classify.py: what it reads, what the classifier sees, and that it learns."""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="needs the extra finetune")
pytest.importorskip("sklearn", reason="needs the extra finetune")
pytest.importorskip("tqdm")

from random_models import tiny_checkpoint  # noqa: E402
from tinyllama.formats.hf import save_hf  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "classify.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    save_hf(tiny_checkpoint(), folder)
    return folder


def test_reads_csv_with_and_without_names_and_xml(tmp_path: Path, script: dict[str, Any]) -> None:
    read = script["read"]
    plain, named, pairs = tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "c.xml"
    plain.write_text('"3","A title"," The text, long"\n"1","B","C"\n')
    named.write_text("text,kind\nhello,greeting\n2,number\n")
    pairs.write_text(
        '<?xml version="1.0"?><entailment-corpus><pair entailment="None" id="1"><t>Um gato</t>'
        '<h> Um cão </h></pair><pair entailment="Entailment" id="2"><t>É</t><h/></pair>'
        "</entailment-corpus>"
    )
    expected = [(("A title", "The text, long"), "3"), (("B", "C"), "1")]
    assert read(str(plain), ["2", "3"], "1") == expected
    assert read(str(named), ["text"], "kind") == [(("hello",), "greeting"), (("2",), "number")]
    expected = [(("Um gato", "Um cão"), "None"), (("É", ""), "Entailment")]
    assert read(str(pairs), ["t", "h"], "entailment") == expected
    for path, name in ((plain, "4"), (named, "label"), (pairs, "similarity")):
        with pytest.raises(SystemExit, match=f"{path.name}: example 1 has no column '{name}'"):
            read(str(path), ["t" if path is pairs else name], name)
    for text, problem in (
        ("", "there are no examples"),
        ("text,kind\n", "there are no examples"),
        ("text,kind\nhello,greeting\n\na, b,c\n", "example 2 has 3 columns, not 2"),
    ):
        named.write_text(text)
        with pytest.raises(SystemExit, match=f"b.csv: {problem}"):
            read(str(named), ["text"], "kind")
    pairs.write_text("<a><pair k='1'><t>x</t></pair><pair k='1'/></a>")
    with pytest.raises(SystemExit, match="example 2 has no column 't'"):
        read(str(pairs), ["t"], "k")


def test_the_classifier_reads_the_last_token_whatever_is_padded(
    model: Path, script: dict[str, Any]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    examples = [(("eta", "shrdlu eta"), "a"), (("o",), "b"), (("eta " * 40,), "a")]
    rows = script["encode"](tokenizer, examples, 20)
    letters = tokenizer("eta", add_special_tokens=False)["input_ids"]
    assert rows[0][:5] == [1, *letters, 2][:5] and rows[0].count(2) == 2
    assert [row[-1] for row in rows] == [2, 2, 2] and len(rows[2]) == 20
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=3, pad_token_id=script["PAD"], dtype=torch.float32
    ).eval()
    with torch.no_grad():
        together = classifier(script["pad"](rows, torch.device("cpu"))).logits
        for row, logits in zip(rows, together, strict=True):
            hidden = classifier.model(torch.tensor([row])).last_hidden_state[0, -1]
            assert torch.allclose(classifier.score(hidden), logits, atol=1e-5)
    said = script["predict"](classifier, rows, 2)
    assert said == together.argmax(1).tolist()


def test_an_epoch_has_every_example_in_batches_of_like_lengths(script: dict[str, Any]) -> None:
    rows = [[0] * n for n in np.random.default_rng(0).integers(1, 100, 650)]
    batches = script["shuffled"](rows, 8, np.random.default_rng(1))
    assert batches.shape == (81, 8) and len(set(batches.ravel())) == 648
    longest = sum(8 * max(len(rows[i]) for i in batch) for batch in batches)
    assert longest < 1.15 * sum(len(rows[i]) for i in batches.ravel())


def test_fewer_examples_than_a_batch_are_learned_all_the_same(
    model: Path, script: dict[str, Any]
) -> None:
    args = argparse.Namespace(model=model, batch_size=32, epochs=12, learning_rate=3e-3)
    rows = [[1, 40, 2], [1, 50, 2]] * 4
    for labels in ([0, 1] * 4, [1, 0] * 4):  # what has learned nothing cannot say both
        classifier = script["fine_tune"](args, rows, labels, 2, seed=0)
        assert script["predict"](classifier, rows, 32) == labels


@pytest.mark.parametrize(
    "labels, message",
    [(["e"] * 9, "all 9 examples have the label 'e'"), (["e"] * 9 + ["o"], "'o' has 1 examples")],
)
def test_labels_that_cannot_be_learned(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, labels: list[str], message: str
) -> None:
    (tmp_path / "data.csv").write_text("\n".join(["text,kind", *(f"a,{x}" for x in labels)]))
    arguments = ["--train", tmp_path / "data.csv", "--text", "text", "--label", "kind"]
    monkeypatch.setattr("sys.argv", list(map(str, [SCRIPT, model, *arguments])))
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_it_learns_and_stands_beside_the_baselines(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three texts are of one class; the class is the letter that begins a text."""
    random = np.random.default_rng(0)
    lines = [
        f"{begin}{''.join(random.choice(list('tain'), 5))},{begin}"
        for begin in random.permutation(["e"] * 80 + ["o"] * 40)
    ]
    (tmp_path / "data.csv").write_text("\n".join(["text,kind", *lines]))
    arguments = ["--train", tmp_path / "data.csv", "--text", "text", "--label", "kind"]
    arguments += ["--seeds", 2, "--epochs", 6, "--batch-size", 8, "--out", tmp_path / "out.json"]
    monkeypatch.setattr("sys.argv", list(map(str, [SCRIPT, model, *arguments])))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "96 examples to learn, 24 to be judged by; e, o" in printed
    assert "| majority class | 66.7 | 40.0 |" in printed
    assert " ± " in printed.splitlines()[-1]
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert list(results) == ["majority class", "TF-IDF, logistic regression", str(model)]
    assert [run["accuracy"] > 0.9 for run in results[str(model)]] == [True, True]
