"""``tinyllama eval --stories``: all it measures at once, its report, and what it refuses."""

import json
import re
import sys

import pytest

from random_models import tiny_checkpoint
from test_judge import MARKS, asked, endpoint
from tinyllama.cli import main
from tinyllama.evaluate import perplexity, stories
from tinyllama.evaluate.judge import INSTRUCTION
from tinyllama.formats.gguf import write_gguf

pytest.importorskip("sacrebleu", reason="story measures need the extra eval")
pytest.importorskip("rapidfuzz", reason="story measures need the extra eval")

JUDGE = ["--judge", "u", "--judge-model", "m"]
PROMPTS = ["Once upon a time", "The cat <saw> a fish", "Tom said"]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_gguf(tiny_checkpoint(max_seq_len=320), path)  # the questions by likelihood fit
    return str(path)


@pytest.fixture
def command(model_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    (tmp_path / "train.txt").write_text("one\n<|endoftext|>\ntwo words\n<|endoftext|>\n")
    options = ["--stories", "--prompts", "prompts.json", "--completions", "2", "--threads", "1"]
    (tmp_path / "bad.json").write_text("[\n")
    return ["eval", model_file, *options]


def test_everything_at_once(command, tmp_path, capsys):
    command += ["--text", "train.txt", "--train-text", "train.txt", "--report", "report.html"]
    with endpoint(lambda *_: MARKS) as (url, requests):
        command += ["--judge", url, "--judge-model", "m", "--price-in", "1", "--price-out", "2"]
        assert main([*command, "--json"]) == 0
        results = json.loads(capsys.readouterr().out)
        assert main(command) == 0  # the answers are there already
        printed = capsys.readouterr().out
        assert len(requests) == 6 and set(asked(requests).values()) == {1}
    found = results["stories"]
    assert results["text"]["documents"] == 2
    assert found["prompts"] == PROMPTS
    assert [len(group) for group in found["completions"]] == [2] * 3
    assert found["overlap"]["documents"] == 2
    assert found["judge"]["scores"]["grammar"]["mean"] == 7
    assert found["judge"]["n_asked_now"] == 6
    assert found["judge"]["estimated_cost"] == pytest.approx((600 + 2 * 120) / 1e6)
    assert found["judge"]["instruction"] == INSTRUCTION
    for title in ("Text: train.txt", "Stories", "Choices by likelihood", "Judge: m"):
        assert f"{title}\n" in printed
    assert re.search(r"grammar +7\.00", printed)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The cat &lt;saw&gt; a fish" in page and "You mark a writing exercise" in page
    assert page.count("<pre>") == 1 + len(PROMPTS)
    assert (tmp_path / "judge.jsonl").read_text().count("\n") == 6


def test_the_same_seed_gives_the_same_figures(command, capsys):
    found = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--seed", seed, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["stories"])
    assert found[0] == found[1]
    assert found[0]["completions"] != found[2]["completions"]


def test_documents_instead_of_prompts(command, tmp_path, capsys):
    text = " ".join("abcdefghijklmnopqrstuvwx")
    (tmp_path / "documents.txt").write_text("\n<|endoftext|>\n".join([text] * 5))
    command[command.index("--prompts") : command.index("--completions")] = [
        *("--cut", "documents.txt", "--max-prompts", "2")
    ]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["stories"]
    assert len(found["prompts"]) == 2 and all(text.startswith(p) for p in found["prompts"])
    assert "40 to 60 %" in found["rule"] and "2 of 5" in found["rule"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to measure"),
        (JUDGE, "nothing to measure"),
        (["--text", "train.txt", "--judge", "u"], "--judge needs --stories"),
        (["--text", "train.txt", "--cut", "train.txt"], "--cut needs --stories"),
        (["--text", "train.txt", "--max-prompts", "2"], "--max-prompts needs --stories"),
        (["--text", "train.txt", "--limit", "2"], "--limit needs --tasks"),
        (["--stories", "--price-in", "1", "--price-out", "1"], "--price-in needs --judge"),
        (["--stories", "--judge", "u"], "belong together"),
        (["--stories", "--judge-model", "m"], "--judge-model needs --judge"),
        (["--stories", *JUDGE, "--price-in", "1"], "belong together"),
        (["--stories", "--completions", "0"], "--completions is 0"),
        (["--stories", "--report", "no/where.html"], "no/where.html: the folder"),
        (["--stories", *JUDGE, "--answers", "no/a"], "no/a: the"),
        (["--stories", "--prompts", "no.txt", "--text", "train.txt"], "No such file"),
        (["--stories", "--temperature", "-1", "--text", "train.txt"], "temperature is -1"),
        (["--stories", "--prompts", "bad.json", "--train-text", "no.txt"], "no.txt: no such file"),
        (["--stories", *JUDGE, "--answers", "bad.json"], "bad.json: line 1: not an answer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_named(model_file, command, options, message, capsys, monkeypatch):
    monkeypatch.setattr(stories, "tell", None)
    monkeypatch.setattr(perplexity, "of_documents", None)
    assert main(["eval", model_file, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("package", ["sacrebleu", "rapidfuzz", "openai"])
def test_a_missing_package_is_named_before_stories_are_told(command, package, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(stories, "tell", None)
    assert main([*command, "--train-text", "train.txt", *JUDGE]) == 2
    assert f"this needs the package '{package}'" in capsys.readouterr().err
