"""The page of a run, ended or under way, and runs compared, against the metrics and by hand."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentencepiece")
pytest.importorskip("tqdm")


from tiny_training import CONFIG, RECIPE, as_toml  # noqa: E402
from tinyllama import load  # noqa: E402
from tinyllama.cli import main  # noqa: E402
from tinyllama.errors import ArgumentError, FormatError  # noqa: E402
from tinyllama.train.card import model_card  # noqa: E402
from tinyllama.train.compare import Comparison  # noqa: E402
from tinyllama.train.metrics import read_records, series  # noqa: E402
from tinyllama.train.page import energy_text, mass_text, run_page, smoothed  # noqa: E402
from tinyllama.train.record import Statement, read_run  # noqa: E402
from tinyllama.train.trainer import Trainer  # noqa: E402

RECIPE = dataclasses.replace(RECIPE, steps=12, every_eval=4, every_save=5, every_sample=6)


@pytest.fixture(scope="module")
def run(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a <run>"
    Trainer(RECIPE, tokens, run).train()
    return run


class FakeMeter:
    """Energy that goes up by a kilowatt hour each time it is read, at 250 g of CO2."""

    source = "nobody; <constant>"

    def __init__(self, country: str) -> None:
        self.country, self.kwh, self.running = country, 0.0, False

    def __enter__(self) -> FakeMeter:
        self.running = True
        return self

    def __exit__(self, *error: object) -> None:
        self.running = False

    def read(self) -> tuple[float, float]:
        self.kwh += 1.0
        return self.kwh, self.kwh / 4


@pytest.fixture
def fake_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "tinyllama.train.energy", SimpleNamespace(EnergyMeter=FakeMeter)
    )


def train_five_steps(trainer: Trainer) -> None:
    """Until a signal comes in the fifth."""
    one_step = trainer.step

    def step_then_stop() -> float:
        if trainer.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return one_step()

    trainer.step = step_then_stop  # type: ignore[method-assign]
    trainer.train()


@pytest.mark.usefixtures("fake_meter")
def test_energy_is_read_where_the_run_is_judged_and_goes_on(tokens: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, energy="BRA", every_save=0)
    first = Trainer(recipe, tokens, tmp_path)
    train_five_steps(first)
    page = (tmp_path / "report.html").read_text()
    assert "stopped after step 5; the same command goes on" in page and "under way" not in page
    used = series(first.metrics.records, "step", "kwh", "kg_co2eq")
    np.testing.assert_array_equal(used, [[4, 5], [1, 2], [0.25, 0.5]])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "tokens": 384, "seconds": 1.0, "kwh": 2.5, "kg_co2eq": 0.5}\n')
    Trainer(recipe, tokens, tmp_path).train()
    records = read_records(tmp_path)
    used = series(records, "step", "kwh", "kg_co2eq")
    np.testing.assert_array_equal(used[:2], [[4, 5, 8, 12, 12], [1, 2, 3.5, 4.5, 5.5]])
    np.testing.assert_array_equal(used[2], [0.25, 0.5, 0.75, 1, 1.25])
    cells = table_rows(tmp_path / "report.html")
    rows = [row for row in cells if row[0] in ("4", "8", "12") and len(row) == 9]
    assert [row[-2:] for row in rows] == [
        ["1 kWh", "250 g"],
        ["3.5 kWh", "750 g"],
        ["5.5 kWh", "1.25 kg"],
    ]
    page = html.unescape((tmp_path / "report.html").read_text())
    assert re.search(r"<td>gone on with</td><td>20\d\d-.*, from step 5</td>", page)
    assert "estimates, of the whole machine, by nobody; <constant>" in page
    assert "energy (estimated)" in page and "In all 5.5 kWh and 1.25 kg" in page


@pytest.mark.usefixtures("fake_meter")
@pytest.mark.parametrize("metered_first", [True, False])
def test_energy_of_a_part_is_not_told_as_that_of_the_whole(
    tokens: Path, tmp_path: Path, metered_first: bool
) -> None:
    recipe = dataclasses.replace(RECIPE, every_save=0)
    with_meter = dataclasses.replace(recipe, energy="BRA")
    first, second = (with_meter, recipe) if metered_first else (recipe, with_meter)
    part = Trainer(first, tokens, tmp_path)
    train_five_steps(part)
    folder = Trainer(second, tokens, tmp_path).train()
    kwh, steps = (2, 5) if metered_first else (3, 7)
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert f"Of {steps} of the 12 steps, metered, {kwh} kWh" in page and "In all" not in page
    run = read_run(folder)
    assert run is not None and run.metered_steps == steps
    card = model_card(load(folder), run, Statement(samples=0), "m", "f32")
    assert f"Estimated: {kwh} kWh, " in card and f" for {steps} of the 12 steps" in card
    assert "co2_eq_emissions" not in card


def table_rows(page: Path) -> list[list[str]]:
    text = page.read_text(encoding="utf-8")
    rows = re.findall("<tr>(.*?)</tr>", text, re.DOTALL)
    return [
        [html.unescape(cell) for cell in re.findall("<td[^>]*>(.*?)</td>", row, re.DOTALL)] or [""]
        for row in rows
    ]


def test_the_page_shows_what_the_metrics_hold_and_loads_nothing(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "Training of a &lt;run&gt;" in text and "<run>" not in text
    assert not re.search(r"<(script|link|img)|url\((?!#)|@import", text)
    assert all(a.startswith("#") for a in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert "Wh" not in text  # nobody measured
    rows = table_rows(run / "report.html")
    records = read_records(run)
    for r in records:
        if "valid_nats" in r:
            half = 1.96 * r["standard_error"]
            assert [
                *(str(r["step"]), f"{r['tokens']:,}", rows[4][1]),
                *(f"{r['valid_nats']:.4f}", f"{half:.4f}"),
                f"{math.exp(r['valid_nats']):.3f}",
                f"{r['bits_per_byte']:.4f}",
            ] in [[*row[:2], rows[4][1], *row[3:]] for row in rows]
        if "sample" in r:
            step, sample = r["step"], html.escape(r["sample"])
            assert f"<p>step {step}</p>\n<pre>{sample}</pre>" in text
    assert ["parameters", f"{CONFIG.n_parameters:,}"] in rows
    assert ["muon_learning_rate", "0.01"] in rows and ["model.dim", "16"] in rows


def test_a_page_of_a_run_under_way(run: Path, tmp_path: Path, capsys: Any) -> None:
    """Made by another process, from however much is there."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    then = time.mktime((2001, 9, 8, 10, 20, 0, 0, 0, -1))
    for n in range(1, next(i for i, line in enumerate(lines) if '"step": 12' in line)):
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:n]) + lines[n][:20])
        os.utime(tmp_path / "metrics.jsonl", (then, then))
        assert main(["train", "report", str(tmp_path)]) == 0
        text = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "under way at its last record, 10:20 on 2001-09-08" in text and "Recipe" in text
        assert ("left to train" in text) == any("train_nats" in line for line in lines[:n])
    (tmp_path / "metrics.jsonl").write_text("{}}\n" + lines[0])
    assert main(["train", "report", str(tmp_path)]) == 2
    assert "metrics.jsonl: line 1 is not JSON" in capsys.readouterr().err
    for damaged in (b"3\n", b'{"tokens": 3}\n'):
        (tmp_path / "metrics.jsonl").write_bytes(lines[0].encode() + damaged)
        with pytest.raises(FormatError, match=r"metrics\.jsonl: line 2 is no record"):
            run_page(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n" + lines[0].encode())
    with pytest.raises(FormatError, match=r"metrics\.jsonl: line 1 is not JSON"):
        run_page(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(lines[-1])
    with pytest.raises(FormatError, match="no record has 'recipe'"):
        run_page(tmp_path)


def test_a_loss_whose_perplexity_no_float_holds(tmp_path: Path) -> None:
    """A run that diverges goes on, and its page is written."""
    write_run(tmp_path / "run", [(100, 10.0, 500.0), (200, 20.0, 1.5)])  # 1,000 and 3 nats
    records = read_records(tmp_path / "run")
    more = {"n_documents": 1, "n_tokens": 9, "device": "cpu"}
    records[0] |= more
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    run_page(tmp_path / "run").write(tmp_path / "page.html")
    assert [row[5] for row in table_rows(tmp_path / "page.html") if len(row) == 7] == [
        "inf",
        f"{math.exp(3.0):.3f}",
    ]


def test_smoothing_is_an_average_that_forgets() -> None:
    np.testing.assert_allclose(smoothed(np.full(7, 3.25)), 3.25)
    keep = 1 - 1 / 4
    x = np.random.default_rng(0).normal(size=200)
    i = 123
    weights = keep ** np.arange(i, -1, -1)
    assert smoothed(x)[i] == pytest.approx((weights * x[: i + 1]).sum() / weights.sum())


def write_run(folder: Path, points: list[tuple[int, float, float]], valid_bytes: int = 5) -> str:
    """A run of only metrics: (tokens, seconds, bits per byte) of its validations."""
    folder.mkdir()
    recipe = {**RECIPE.to_dict(), "steps": 9}
    head = {"recipe": recipe, "n_parameters": 7, "valid_bytes": valid_bytes}
    records: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "seconds": 0.0, **head}]
    for step, (tokens, seconds, bits) in enumerate(points, 1):
        at = {"step": step, "tokens": tokens, "seconds": seconds}
        records.append({**at, "train_nats": 2 * bits})
        score = {"valid_nats": 2 * bits, "standard_error": 0.1, "bits_per_byte": bits}
        records.append({**at, **score})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return str(folder)


def test_runs_compared_by_hand(tmp_path: Path, capsys: Any) -> None:
    """The worst run's best is 1.5: b comes to it halfway from its first to its second validation,
    c has it before its first."""
    a = write_run(tmp_path / "a", [(100, 10.0, 3.0), (200, 20.0, 1.5), (300, 30.0, 1.75)])
    b = write_run(
        tmp_path / "b", [(100, 50.0, 1.75), (200, 90.0, 1.25), (300, 99.0, 0.75), (400, 120.0, 1.0)]
    )
    c = write_run(tmp_path / "c", [(100, 7.0, 1.25)])
    found = Comparison([a, b, c])
    assert found.goal == 1.5 and found.same_text
    assert [(s.final, s.best, s.tokens, s.seconds, s.before) for s in found.standings] == [
        (1.75, 1.5, 200.0, 20.0, False),
        (1.0, 0.75, 150.0, 70.0, False),
        (1.25, 1.25, 100.0, 7.0, True),
    ]
    page = tmp_path / "compare.html"
    assert main(["train", "compare", a, b, c, "--out", str(page)]) == 0
    said = capsys.readouterr().out
    interval = f"{1.96 * 0.1 / 2:.4f}"  # of bits, which are half of these nats
    rows = [
        [a, "7", f"1.7500 ± {interval}", "1.5000", "200", "0:00:20"],
        [b, "7", f"1.0000 ± {interval}", "0.7500", "150", "0:01:10"],
        [c, "7", f"1.2500 ± {interval}", "1.2500", "≤ 100", "≤ 0:00:07"],
    ]
    assert table_rows(page)[1:4] == rows
    for row in rows:
        assert re.search(r"\s{2,}".join(map(re.escape, row)), said)
    assert page.read_text().count("<svg") == 4 and "different text" not in said
    assert "Their recipes are the same." in said


def test_what_a_fine_tuning_began_with_is_not_its_best(tmp_path: Path) -> None:
    runs = []
    for name, after in (("worse", 3.0), ("better", 1.5)):
        runs.append(write_run(tmp_path / name, [(100, 10.0, 2.0), (200, 20.0, after)]))
        metrics = tmp_path / name / "metrics.jsonl"
        records = read_records(tmp_path / name)
        records[0] |= {"n_documents": 1, "n_tokens": 9, "device": "cpu"}
        for record in records[1:3]:
            record |= {"step": 0, "tokens": 0, "seconds": 0.0}
        metrics.write_text("\n".join(map(json.dumps, records)))
    found = Comparison(runs)
    assert found.goal == 3.0
    assert [(s.best, s.tokens, s.before) for s in found.standings] == [
        (3.0, 200.0, True),
        (1.5, 200.0, True),
    ]
    run_page(Path(runs[0])).write(tmp_path / "page.html")
    assert "the best" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_runs_compared_say_what_their_recipes_differ_in(tmp_path: Path, capsys: Any) -> None:
    a, b = (write_run(tmp_path / name, [(100, 10.0, 3.0)]) for name in "ab")
    metrics = tmp_path / "b" / "metrics.jsonl"
    text = metrics.read_text().replace('"dropout": 0.1', '"dropout": 0.25')
    metrics.write_text(text.replace('"dim": 16', '"dim": 24'))
    found = Comparison([a, b])
    header, rows = found.differences()
    assert header == ["setting", a, b]
    assert sorted(rows) == [["dropout", "0.1", "0.25"], ["model.dim", "16", "24"]]
    assert main(["train", "compare", a, b, "--out", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"dropout\s+0.1\s+0.25\n", said) and "are the same" not in said
    assert "tokens to 3.0000" in said
    assert ["model.dim", "16", "24"] in table_rows(tmp_path / "page.html")


def test_a_comparison_that_says_nothing_says_so(tmp_path: Path, capsys: Any) -> None:
    a = write_run(tmp_path / "a", [(100, 10.0, 3.0)])
    b = write_run(tmp_path / "b", [(100, 10.0, 2.0)], valid_bytes=6)
    assert main(["train", "compare", a, b]) == 0
    said = capsys.readouterr().out
    assert "validated on different text" in said and "tokens to" not in said
    c = write_run(tmp_path / "c", [])
    for runs, error, message in (
        ([a], ArgumentError, "two runs or more"),
        ([a, b, a], ArgumentError, "named twice"),
        ([a, c], ArgumentError, "c has no validation yet"),
        ([a, tmp_path / "d"], OSError, "d: no training run: it has no metrics.jsonl"),
    ):
        with pytest.raises(error, match=message):
            Comparison(runs)


def test_a_page_tells_the_sources_and_how_often_an_epoch_has_them(
    tokens: Path, tmp_path: Path
) -> None:
    trainer = Trainer(dataclasses.replace(RECIPE, steps=1), tokens, tmp_path)
    trainer.train()
    assert "text: " not in (tmp_path / "report.html").read_text()  # there is one
    first, *others = trainer.metrics.records
    first["sources"] = [
        {"name": "wiki", "documents": 1200, "tokens": 34567},
        {"name": "novels", "documents": 3, "tokens": 8000},
    ]
    first["recipe"]["weights"] = {"novels": 2.5}
    lines = "".join(json.dumps(record) + "\n" for record in (first, *others))
    (tmp_path / "metrics.jsonl").write_text(lines)
    run_page(tmp_path).write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for cells in (
        "<td>text: wiki</td><td>1,200 documents, 34,567 tokens, 1 times an epoch</td>",
        "<td>text: novels</td><td>3 documents, 8,000 tokens, 2.5 times an epoch</td>",
    ):
        assert cells in page


@pytest.mark.usefixtures("fake_meter")
def test_the_verbs_leave_training_as_it_was(tokens: Path, tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "recipe.toml"
    config.write_text(as_toml(dataclasses.replace(RECIPE, steps=1)))
    arguments = ["--config", str(config), "--data", str(tokens), "--out", str(tmp_path / "run")]
    for missing, message in ((0, "one of --preset"), (2, "--data and --out"), (4, "--data and")):
        shorter = arguments[:missing] + arguments[missing + 2 :]
        assert main(["train", *shorter]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    more = ["--set", 'prompts=["the cat"]', "--energy", "BRA"]
    assert main(["train", *arguments, *more]) == 0
    records = read_records(tmp_path / "run")
    assert records[0]["recipe"]["energy"] == "BRA" and "kwh" in records[-1]
    samples = [r for r in records if "sample" in r]
    assert [(r["step"], r["prompt"]) for r in samples] == [(1, "the cat")]
    assert samples[0]["sample"].startswith("the cat")
    said = capsys.readouterr().err
    assert f"next: tinyllama export {tmp_path / 'run'} --out model.gguf" in said
    typed = html.escape(f"--config {config} --set 'prompts=[\"the cat\"]'")
    assert f"<td>{typed}</td>" in (tmp_path / "run" / "report.html").read_text()
    before = read_records(tmp_path / "run")
    assert main(["train", *arguments, *more]) == 0
    said = capsys.readouterr().err
    assert "already finished: all 1 steps are made" in said and "next: tinyllama export" in said
    assert read_records(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("kwh", "kg", "texts"),
    [
        (15.5, 5.0, ("15.5 kWh", "5 kg")),
        (0.0625, 0.25, ("62.5 Wh", "250 g")),
        (2.5e-5, 4.5e-6, ("0.025 Wh", "4.5 mg")),
    ],
)
def test_small_energies_can_be_read(kwh: float, kg: float, texts: tuple[str, str]) -> None:
    assert (energy_text(kwh), mass_text(kg)) == texts
