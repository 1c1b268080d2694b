"""The adapter for lm-evaluation-harness: the numbers of its own model ``hf``, same weights."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

import jinja2
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from random_models import tiny_checkpoint
from tinyllama import load
from tinyllama.cli import main
from tinyllama.errors import ArgumentError
from tinyllama.evaluate.harness import TinyLlamaLM, _task_manager, evaluate
from tinyllama.formats.hf import save_hf

CONTEXT = 320  # more than one pass reads
TASK = """\
task: pets
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
output_type: multiple_choice
validation_split: validation
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[good, bad]}}"
num_fewshot: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    save_hf(tiny_checkpoint(max_seq_len=CONTEXT, vocab_size=200), path)
    return str(path)


@pytest.fixture(scope="module")
def ours(folder):
    return TinyLlamaLM(load(folder, n_threads=1))


@pytest.fixture(scope="module")
def theirs(folder):
    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=3)


def requests(kind, arguments):
    return [Instance(kind, {}, one, 0) for one in arguments]


def sentences(n, seed=0):
    random = np.random.default_rng(seed)
    words = ["the", "cat", "sat", "on", "it", "so", "they", "ran", "far", "down"]
    return [" ".join(random.choice(words, random.integers(1, 30))) for _ in range(n)]


def test_likelihoods_are_those_of_hf(ours, theirs):
    texts = sentences(39)  # hf mixes up requests that join to the same text
    pairs = [(text[:9], text[9:] or "x") for text in texts[:13]]
    pairs += [("", text) for text in texts[13:26]]  # nothing before it
    pairs += [(text + " ", "and so on") for text in texts[26:]]  # its space counts as scored
    pairs += [(" ".join(texts), "the end of a long story")]  # more than the context
    mine = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    other = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    np.testing.assert_allclose([a[0] for a in mine], [b[0] for b in other], atol=1e-3)
    assert [a[1] for a in mine] == [bool(b[1]) for b in other]


def test_rolling_likelihoods_are_those_of_hf(ours, theirs):
    texts = [(text,) for text in [*sentences(5), " ".join(sentences(40, seed=1))]]
    assert len(ours.tok_encode(texts[-1][0])) > 2 * CONTEXT
    mine = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    other = theirs.loglikelihood_rolling(
        requests("loglikelihood_rolling", texts), disable_tqdm=True
    )
    np.testing.assert_allclose(mine, other, atol=1e-3)


def test_texts_that_go_on_are_those_of_hf(ours, theirs):
    options = [
        {"until": ["e"], "max_gen_toks": 20},
        {"until": [], "max_gen_toks": 12, "do_sample": False},
        {"until": "t", "max_gen_toks": 7},
    ]
    arguments = [(text, one) for text in sentences(4) for one in options]
    mine = ours.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    other = theirs.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert mine == other and len(set(mine)) > 4


def test_what_does_not_fit_is_refused(ours):
    long = ("a", "the cat " * CONTEXT)
    with pytest.raises(ArgumentError, match=f"do not fit into the context of {CONTEXT}: 'the cat"):
        ours.loglikelihood(requests("loglikelihood", [long]), disable_tqdm=True)
    with pytest.raises(ArgumentError, match="max_gen_toks is 999"):
        ours.generate_until(
            requests("generate_until", [("a", {"until": [], "max_gen_toks": 999})]),
            disable_tqdm=True,
        )


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A folder with a task of 20 questions, read without a cache that others share."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = zip(sentences(20), sentences(20, seed=2), strict=True)
    questions = [json.dumps({"good": good, "bad": bad}) + "\n" for good, bad in lines]
    (tmp_path / "pets.jsonl").write_text("".join(questions))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "pets.yaml").write_text(TASK.replace("FILE", str(tmp_path / "pets.jsonl")))
    return str(folder)


def test_a_task_on_the_command_line(folder, theirs, task, tmp_path, capsys):
    manager = TaskManager(include_path=task, include_defaults=False)
    expected = lm_eval.simple_evaluate(theirs, tasks=["pets"], task_manager=manager, limit=15)
    expected = expected["results"]["pets"]
    assert 0 < expected["acc,none"] < 1
    capsys.readouterr()
    page = str(tmp_path / "page.html")
    arguments = ["--tasks", "pets", "--task-folder", task, "--limit", "15", "--json"]
    assert main(["eval", folder, *arguments, "--report", page]) == 0
    assert f"{expected['acc,none']:.4f}" in Path(page).read_text(encoding="utf-8")
    found = json.loads(capsys.readouterr().out)["tasks"]["pets"]
    metrics = {"acc": expected["acc,none"], "acc_stderr": expected["acc_stderr,none"]}
    assert found == {"questions": 15, "of": 20, "shots": 0, "metrics": metrics}
    assert "15 of 20" in Path(page).read_text(encoding="utf-8")


@pytest.mark.parametrize("own, given", [("", None), ("", 2), ("3", None), ("3", 2), ("0", 2)])
def test_examples_are_those_of_the_harness(ours, task, own, given):
    """Drawn at random from the questions, as many as the task or the caller says."""
    text = TASK.replace("num_fewshot: 0\n", f"num_fewshot: {own}\n" if own else "")
    text = text.replace('doc_to_text: ""', 'doc_to_text: "{{good[:9]}}:"')
    file = Path(task) / "pets.yaml"
    file.write_text(text.replace("FILE", str(Path(task).parent / "pets.jsonl")))
    manager = TaskManager(include_path=task, include_defaults=False)
    expected = lm_eval.simple_evaluate(ours, tasks=["pets"], task_manager=manager, limit=4,
                                       num_fewshot=given)  # fmt: skip
    found = evaluate(ours.model, ["pets"], folder=task, num_fewshot=given, limit=4)
    asked = [
        [sample["arguments"] for sample in one["samples"]["pets"]] for one in (expected, found)
    ]
    assert asked[0] == asked[1] and len(asked[0]) == 4
    assert found["results"] == expected["results"]
    examples = own or given
    assert (str(asked[0]).count(":") > 8) == bool(int(examples or 0) and own != "0")


def test_torch_is_not_loaded(folder, task):
    """Nor transformers: together they take longer to load than a small task to answer."""
    script = f"""
import sys
from tinyllama.cli import main
assert main(["eval", {folder!r}, "--tasks", "pets", "--task-folder", {task!r}]) == 0
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_what_the_harness_does_over_and_over_is_done_once(folder, task, monkeypatch):
    assert _task_manager(["pets"], task).all_tasks == ["pets"]  # not the thousands of its own
    compiled = []
    compile_template = jinja2.Environment.compile
    monkeypatch.setattr(
        jinja2.Environment,
        "compile",
        lambda *args, **options: compiled.append(args[1]) or compile_template(*args, **options),
    )
    evaluate(load(folder, n_threads=1), ["pets"], folder=task)
    assert len(compiled) == len(set(compiled)) < 20
    assert "from_string" not in vars(lm_eval.utils.env)


@pytest.mark.parametrize(
    "field, other, told",
    [("[good", "[godo", "ValueError"), ("multiple_choice", "multiple_guess", "multiple_guess")],
)
def test_a_task_that_the_harness_cannot_load(folder, task, capsys, field, other, told):
    file = Path(task) / "pets.yaml"
    text = file.read_text()
    assert field in text
    file.write_text(text.replace(field, other))
    assert main(["eval", folder, "--tasks", "pets", "--task-folder", task]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "error: the harness cannot load pets: " in message and told in message


def test_a_task_that_does_not_exist(folder, task, capsys):
    assert main(["eval", folder, "--tasks", "cats", "--task-folder", task]) == 2
    assert "no task is called 'cats'" in capsys.readouterr().err
    (Path(task) / "cats.yaml").write_text("task: cats\n  metric: [\n")
    assert main(["eval", folder, "--tasks", "cats", "--task-folder", task]) == 2
    assert re.search("cats.yaml: not YAML: .* line 2", capsys.readouterr().err)
    assert main(["eval", folder, "--tasks", "pets", "--task-folder", task + "s"]) == 2
    assert "taskss: there is no such folder" in capsys.readouterr().err
    assert main(["eval", folder, "--tasks", "pets", "--report", "model.gguf"]) == 2
    assert "model.gguf: the name of a page ends in .html" in capsys.readouterr().err
    assert main(["eval", folder]) == 2
    assert "give --text, --stories or --tasks" in capsys.readouterr().err
