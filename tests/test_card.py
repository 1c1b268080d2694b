"""The model card of an export: what is known stands there as it was, what is not is not claimed."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllama
from random_models import tiny_checkpoint
from tinyllama.cli import main
from tinyllama.errors import ArgumentError, ConfigError, FormatError
from tinyllama.formats import read_checkpoint
from tinyllama.formats.gguf import write_gguf
from tinyllama.train.card import model_card
from tinyllama.train.export import export
from tinyllama.train.record import Run, Statement, read_run, read_statement

hub = pytest.importorskip("huggingface_hub", reason="needs the extra convert")
pytest.importorskip("safetensors", reason="needs the extra convert")

STATEMENT = """
name = "Contos: pequenos"
description = "Tells *tiny* stories."
languages = ["pt", "en"]
license = "mit"
datasets = ["someone/stories"]
authors = ["Ana Souza", "R. & D."]
year = 2026
url = "https://example.org/contos_1"
limits = "Knows fourteen words."
prompts = ["the cat", ""]
samples = 2
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, all checkpoints kept, validated at steps 3 and 6."""
    pytest.importorskip("torch", reason="training needs the extra train")
    from tiny_training import RECIPE, write_tokens
    from tinyllama.train.trainer import Trainer

    folder = tmp_path_factory.mktemp("run")
    (folder / "tokens").mkdir()
    write_tokens(folder / "tokens")
    recipe = dataclasses.replace(RECIPE, keep_checkpoints=0, weights={"text": 2.0})
    Trainer(recipe, folder / "tokens", folder / "run").train()
    return folder / "run"


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter as huggingface_hub reads it, and the text below."""
    card = hub.ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


def rows(text: str, section: str) -> list[list[str]]:
    """The cells of a section's table, below its head."""
    part = re.split(r"^## ", text, flags=re.MULTILINE)
    body = next(p for p in part if p.startswith(section))
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_run_as_it_was(run: Path, tmp_path: Path) -> None:
    (tmp_path / "card.toml").write_text(STATEMENT, encoding="utf-8")
    report = export(run, tmp_path / "contos", "hf", card=tmp_path / "card.toml", checkpoints=[2, 6])
    data, text = read_card(tmp_path / "contos")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: r for r in records if "valid_nats" in r}
    state = json.loads((Path(read_checkpoint(run).source) / "trainer.json").read_text())

    assert {key: data[key] for key in ("language", "license", "datasets", "library_name")} == {
        "language": ["pt", "en"], "license": "mit", "datasets": ["someone/stories"],
        "library_name": "transformers",
    }  # fmt: skip
    assert data["pipeline_tag"] == "text-generation"
    (model,) = data["model-index"]
    assert model["name"] == "Contos: pequenos"
    found = {metric["type"]: metric["value"] for metric in model["results"][0]["metrics"]}
    best = scores[state["step"]]
    assert found["bits_per_byte"] == pytest.approx(best["bits_per_byte"], abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(best["valid_nats"]), abs=1e-4)

    # batch_size 2 × grad_accum 2 × seq_len 16
    want = [
        [
            str(step),
            str(step * 64),
            f"{math.exp(r['valid_nats']):.3f}",
            f"{r['bits_per_byte']:.4f}"
            f" ± {1.96 * r['standard_error'] / r['valid_nats'] * r['bits_per_byte']:.4f}",
        ]
        for step, r in scores.items()
        if step <= state["step"]
    ]
    assert rows(text, "Scores") == want
    recipe = dict(rows(text, "Training"))
    assert (recipe["`learning_rate`"], recipe["`optimizer`"]) == ("0.01", "muon")
    assert "`every_eval`" not in recipe
    assert rows(text, "Text it was trained on")[-1][:2] == ["all", "50"]
    assert "Held out of it: 10 documents" in text
    assert "| context | 32 tokens, trained in windows of 16 |" in text
    assert "Not measured." in text
    for part in ("Tells *tiny* stories.", "Knows fourteen words.", "title = {Contos: pequenos}"):
        assert part in text
    assert r"author = {Ana Souza and R. \& D.}" in text
    assert "url = {https://example.org/contos_1}" in text
    files = [file for file in (tmp_path / "contos").rglob("*") if file.is_file()]
    assert report.n_bytes == sum(file.stat().st_size for file in files)


def test_samples_are_what_the_folder_says(run: Path, tmp_path: Path) -> None:
    (tmp_path / "card.toml").write_text(STATEMENT, encoding="utf-8")
    export(run, tmp_path / "contos", "hf", "bf16", card=tmp_path / "card.toml")
    _, text = read_card(tmp_path / "contos")
    model = tinyllama.load(tmp_path / "contos")
    options = {"num_return_sequences": 2, "seed": 1, "max_new_tokens": 200}
    told = [
        text
        for prompt in ("the cat", "")
        for text in model.generate(prompt, return_full_text=True, **options)
    ]
    assert re.findall(r"^`{3,}text\n(.*?)\n`{3,}$", text, re.M | re.S) == told


def test_checkpoints_on_request(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "all", "hf", checkpoints="all")
    names = [f"step-{step:08d}" for step in range(1, 7)]
    assert sorted(path.name for path in (tmp_path / "all").glob("step-*")) == names
    for name in names:
        found = read_checkpoint(tmp_path / "all" / name).tensors
        for key, tensor in read_checkpoint(run / name).tensors.items():
            np.testing.assert_array_equal(found[key], tensor)
        assert not (tmp_path / "all" / name / "trainer.json").exists()
    assert names[3] in read_card(tmp_path / "all")[1]
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "all", subfolder=names[2])
    assert loaded.num_parameters() == read_checkpoint(run).config.n_parameters


def test_one_checkpoint_knows_only_what_was_before_it(run: Path, tmp_path: Path) -> None:
    export(run / "step-00000004", tmp_path / "four", "hf")
    data, text = read_card(tmp_path / "four")
    assert "model-index" not in data
    assert "This checkpoint, of step 4, was not scored itself." in text
    assert [row[0] for row in rows(text, "Scores")] == ["3"]
    assert "4 steps of 64 tokens, 256 in all" in text
    assert "of a recipe of 6 steps" in text
    assert "did better" not in text


def test_a_checkpoint_that_was_the_best_for_a_while(run: Path) -> None:
    """What came after it is not on its record: whether it stayed the best, it cannot say."""
    states = [read_run(run / f"step-0000000{step}") for step in (3, 6)]
    scores = [state.score["bits_per_byte"] for state in states if state and state.score]
    assert scores[0] > scores[1]
    model = tinyllama.load(run / "step-00000003")
    text = model_card(model, states[0], Statement(samples=0), "m", "f32")
    assert "No checkpoint before it did better" in text
    assert "did best" not in text


@pytest.mark.parametrize(
    ("checkpoints", "message"),
    [([7], "has no step 7; it has: 1, 2, 3, 4, 5, 6"), ([2, 99], "has no step 99")],
)
def test_checkpoints_that_are_not_there(
    run: Path, tmp_path: Path, checkpoints: list[int], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        export(run, tmp_path / "out", "hf", checkpoints=checkpoints)
    with pytest.raises(ArgumentError, match="no training run's folder"):
        export(run / "step-00000002", tmp_path / "out", "hf", checkpoints="all")
    with pytest.raises(ArgumentError, match="are for a Hugging Face folder; to is 'gguf'"):
        export(run, tmp_path / "out.gguf", checkpoints="all")
    assert not any(tmp_path.iterdir())


def test_energy_is_called_an_estimate(run: Path) -> None:
    known = read_run(run / "step-00000006")
    assert known is not None
    records = [r | {"device": "Some CPU"} if "device" in r else r for r in known.records]
    used = {"kwh": 0.0125, "kg_co2eq": 0.00432, "estimated_by": "meter 1: CPU"}
    records += [{"step": 6, **used}]  # after the validation of the same step
    model = tinyllama.load(run / "step-00000006")
    statement = Statement(samples=0)
    text = model_card(model, Run(known.state, records), statement, "m", "f32")
    assert hub.ModelCard(text).data.to_dict()["co2_eq_emissions"] == {
        "emissions": 4.32, "source": "meter 1: CPU", "training_type": "pre-training",
        "hardware_used": "Some CPU",
    }  # fmt: skip
    assert "Estimated: 0.0125 kWh, 0.00432 kg CO2 equivalent (meter 1: CPU)." in text
    assert [row[4:] for row in rows(text, "Scores")] == [["", ""], ["0.0125", "0.00432"]]
    assert "seconds on Some CPU" in text


def test_text_by_source(foreign: Path) -> None:
    sources = [
        {"name": "stories", "documents": 30, "tokens": 3000, "bytes": 9000},
        {"name": "books|old", "documents": 2, "tokens": 1000, "bytes": 4000},
    ]
    train = {"documents": 32, "tokens": 4000, "bytes": 13000, "sources": sources}
    recipe = {
        "batch_size": 10,
        "grad_accum": 2,
        "seq_len": 50,
        "steps": 7,
        "init_from": "/home/me/x",
    }
    recipe["weights"] = {"books|old": 0.5}
    run = Run({"recipe": recipe, "step": 7, "data": {"train": train}, "seconds": 900.0}, [])
    text = model_card(tinyllama.load(foreign), run, Statement(samples=0), "f", "f32")
    assert "| stories | 30 | 3,000 | 9,000 | 1 |" in text
    assert "| books\\|old | 2 | 1,000 | 4,000 | 0.5 |" in text
    assert "7 steps of 1,000 tokens, 7,000 in all or 2.0 epochs; 15.0 minutes." in text
    assert "| `init_from` | x |" in text
    assert "/home/me" not in text
    assert "| made from | x |" in text and "This training went on from x, whose own text" in text
    assert Statement().missing(run)[-1] == "base_model"
    assert "base_model" not in Statement(base_model="me/x").missing(run)
    assert "prompt and completion" not in text
    train["pairs"] = 32
    records = [{"step": step, "valid_nats": 1.0, "bits_per_byte": 0.5} for step in (0, 7)]
    text = model_card(
        tinyllama.load(foreign), Run(run.state, records), Statement(samples=0), "f", "f32"
    )
    assert "Pairs of prompt and completion" in text and "Step 0 is the model that it" in text
    assert "Its training went on" not in text and "An epoch has" not in text
    facts = {"n_documents": 31, "n_tokens": 3400, "began": "2026-11-29 20:00", "version": "0.1"}
    records.append({"step": 0, **facts, "device": "cpu", "dtype": "bf16", "compiled": True})
    later = [{"step": 8, "bits_per_byte": 0.7}, {"step": 9, "bits_per_byte": 0.6}]
    text = model_card(
        tinyllama.load(foreign), Run(run.state, records, later), Statement(samples=0), "f", "f32"
    )
    assert "An epoch has 31 documents of it with 3,400 tokens, " in text
    assert " on cpu, bf16, compiled; begun 2026-11-29 20:00 with tinyllama 0.1." in text
    assert "went on to step 9, where that text took 0.6000 bits per byte (0.7000 at most)" in text
    assert "name: completions held out of the training" in text
    assert Statement().missing(run)[-1] == "prompts"


def test_a_long_table_keeps_its_ends(run: Path) -> None:
    known = read_run(run / "step-00000006")
    assert known is not None
    records = [
        {"step": step, "valid_nats": 5.0, "bits_per_byte": 2.0 + 1 / step} for step in range(1, 500)
    ]
    model = tinyllama.load(run / "step-00000006")
    text = model_card(model, Run(known.state, records), Statement(samples=0), "m", "f32")
    steps = [int(row[0]) for row in rows(text, "Scores")]
    assert (len(steps), steps[0], steps[-1]) == (20, 1, 499)
    assert steps == sorted(set(steps))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A model that comes without a history."""
    write_gguf(tiny_checkpoint(), tmp_path / "foreign.gguf")
    return tmp_path / "foreign.gguf"


def test_nothing_is_invented(foreign: Path, tmp_path: Path) -> None:
    export(foreign, tmp_path / "out", "hf")
    data, text = read_card(tmp_path / "out")
    assert data == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["llama", "tinyllama"],
    }  # fmt: skip
    assert "# out\n" in text
    assert text.count("not stated") == 3  # languages, licence, authors
    for section, says in {
        "Text it was trained on": "Not stated.",
        "Training": "Not on record.",
        "Scores": "None are on record.",
        "Energy": "Not measured.",
        "Citation": "Not stated.",
    }.items():
        assert f"## {section}\n\n{says}" in text
    assert len(re.findall(r"^\d+\.", text, re.M)) == 10


NASTY = [
    "---",
    "yes",
    "null",
    "a: b",
    "{}",
    "#x",
    "1e5",
    "'\"",
    "é😀\u3000李",
    "@",
    "x\ty",
    "\\",
    "|",
]


@pytest.mark.parametrize("text", NASTY)
def test_front_matter_is_valid_under_any_text(foreign: Path, text: str) -> None:
    statement = Statement(
        name=text, languages=["no"], license=text, datasets=[text], tags=[text], base_model=text,
        authors=[text], year=2026, samples=0,
    )  # fmt: skip
    run = Run(
        {"recipe": {"batch_size": 1, "grad_accum": 1, "seq_len": 2, "steps": 1}, "step": 1},
        [{"step": 1, "valid_nats": 1.0, "bits_per_byte": 1.0, "kg_co2eq": 1.0, "device": text}],
    )
    card = hub.ModelCard(model_card(tinyllama.load(foreign), run, statement, "f", "f32"))
    data = card.data.to_dict()
    assert (data["language"], data["license"], data["datasets"]) == (["no"], text, [text])
    assert (data["base_model"], data["tags"][-1]) == (text, text)
    assert data["co2_eq_emissions"]["hardware_used"] == text
    name = " ".join(text.split())
    assert data["model-index"][0]["name"] == name
    assert card.text.lstrip().startswith(f"# {name}\n")


def test_a_sample_does_not_end_its_fence(foreign: Path) -> None:
    prompt = "```\n# not a title"
    statement = Statement(prompts=[prompt], samples=1)
    text = model_card(tinyllama.load(foreign), None, statement, "f", "f32")
    assert f"````text\n{prompt}" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('licence = "mit"', r"card\.toml: unknown key 'licence'; did you mean 'license'"),
        ("year = '2026'", r"card\.toml: year is '2026'; it must be a whole number"),
        ("languages = 'en'", r"card\.toml: languages is 'en'; it must be a list of texts"),
        (
            "languages = ['en', 'Tupi']",
            r"card\.toml: languages has 'Tupi'; expected codes of ISO 639",
        ),
        ("authors = [1]", r"card\.toml: authors is \[1\]; it must be a list of texts"),
        ("name = 3", r"card\.toml: name is 3; it must be text"),
        ("samples = -1", r"card\.toml: samples is -1; it must be a whole number from 0"),
        ("name = ", r"card\.toml is not TOML"),
    ],
)
def test_statements_that_are_wrong(foreign: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "card.toml").write_text(line)
    with pytest.raises(ConfigError, match=message):
        read_statement(tmp_path / "card.toml")
    with pytest.raises(ConfigError, match=message):
        export(foreign, tmp_path / "out", "hf", card=tmp_path / "card.toml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.toml", "foreign.gguf"]


def test_a_damaged_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text('{"step": 1}')
    with pytest.raises(FormatError, match=r"trainer\.json: damaged"):
        read_run(tmp_path)


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "card.toml").write_text('license = "mit"\nsamples = 0')
    out = str(tmp_path / "out")
    command = ["export", str(run), "--to", "hf", out, "--card", str(tmp_path / "card.toml")]
    assert main([*command, "--checkpoints", "1,3"]) == 0
    printed = capsys.readouterr().out
    assert "does not state: description, languages, datasets, authors, year, limits" in printed
    assert len(list((tmp_path / "out").glob("step-*"))) == 2
    with pytest.raises(SystemExit):
        main([*command, "--checkpoints", "some"])
    assert "neither all nor steps" in capsys.readouterr().err


def test_the_page_is_true(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statement and the commands of docs/publishing.md, on a smaller run."""
    page = (Path(__file__).parents[1] / "docs" / "publishing.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "run")
    (statement,) = re.findall(r"^```toml\n(.*?)^```", page, re.M | re.S)
    Path("card.toml").write_text(statement + "samples = 1\n", encoding="utf-8")
    commands = "".join(re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)).splitlines()
    assert len(commands) == 4
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    assert not read_statement("card.toml").missing(None)
    written = {path.name for path in Path("my-model").iterdir()}
    assert written == set(re.findall(r"`(\w+\.\w+)`", page[: page.index("## Checkpoints")])) - {
        "card.toml"
    }
    assert len(list(Path("my-model-and-others").glob("step-*"))) == 6
