"""What a run shows of itself: its metrics, its speed, its energy, its page, and runs compared."""

from __future__ import annotations

import copy
import dataclasses
import html
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentencepiece")
pytest.importorskip("tqdm")

import torch.nn.functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from tiny_training import CONFIG, RECIPE, as_toml, learned, write_tokens  # noqa: E402
from tinyllama.cli import main  # noqa: E402
from tinyllama.config import Config  # noqa: E402
from tinyllama.errors import ArgumentError, ConfigError, FormatError  # noqa: E402
from tinyllama.train.batches import Split, TokenFolder  # noqa: E402
from tinyllama.train.compare import Comparison  # noqa: E402
from tinyllama.train.metrics import read_records, series  # noqa: E402
from tinyllama.train.model import Llama  # noqa: E402
from tinyllama.train.page import run_page, smoothed  # noqa: E402
from tinyllama.train.peak import flops_per_token, measure_peak  # noqa: E402
from tinyllama.train.progress import Progress  # noqa: E402
from tinyllama.train.trainer import Trainer  # noqa: E402
from tinyllama.train.validate import validate  # noqa: E402

RECIPE = dataclasses.replace(RECIPE, steps=12, every_eval=4, every_save=5, every_sample=6)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


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


def test_the_records_of_a_run(run: Path) -> None:
    records = read_records(run)
    beginning, *rest = records
    assert beginning["recipe"] == json.loads(json.dumps(RECIPE.to_dict()))
    assert beginning["n_parameters"] == CONFIG.n_parameters and beginning["n_documents"] == 50
    assert all(r["tokens"] == r["step"] * 64 for r in records)
    seconds = [r["seconds"] for r in records]
    assert seconds == sorted(seconds)
    kinds = [("train_nats", [10, 12]), ("valid_nats", [4, 8, 12]), ("sample", [6] * 3 + [12] * 3)]
    for field, steps in kinds:
        assert [r["step"] for r in rest if field in r] == steps
    assert len(rest) == 2 + 3 + 6
    training = next(r for r in records if r.get("train_nats"))
    done = 1 - (9 - 2) / (12 - 2)  # the tenth step is made at the rate of nine steps done
    fraction = 0.5 - 0.5 * math.cos(math.pi * done)
    assert training["learning_rate"] == pytest.approx(1e-2 * fraction)
    assert training["muon_learning_rate"] == pytest.approx(1e-2 * fraction)
    peak_share = training["tok_per_s"] * flops_per_token(CONFIG, 16) / beginning["peak_flop_per_s"]
    assert training["peak_share"] == pytest.approx(peak_share, abs=1e-4)


def test_the_learning_rate_recorded_is_the_optimizers(tokens: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, learning_rate=3e-3, muon_learning_rate=7e-3)
    trainer = Trainer(recipe, tokens, tmp_path)
    trainer.step()
    used = {kind: o.param_groups[0]["lr"] for kind, o in trainer.optimizers.items()}
    assert used == {
        "adamw": trainer.rates["learning_rate"],
        "muon": trainer.rates["muon_learning_rate"],
    }
    assert used == pytest.approx({"adamw": 1.5e-3, "muon": 3.5e-3})


def test_what_a_crash_undid_is_forgotten_and_recorded_anew(tokens: Path, tmp_path: Path) -> None:
    straight = Trainer(RECIPE, tokens, tmp_path / "straight")
    straight.train()
    trainer = Trainer(RECIPE, tokens, tmp_path / "run")
    for _ in range(5):
        trainer.step()
        if trainer.state.step == 4:
            trainer.evaluate()
    trainer.save()
    for _ in range(3):
        trainer.step()
    trainer.evaluate()
    trainer.sample()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "val')  # killed while it wrote
    assert [r["step"] for r in read_records(tmp_path / "run")] == [4, 8, 8, 8, 8]
    resumed = Trainer(RECIPE, tokens, tmp_path / "run")
    assert [r["step"] for r in read_records(tmp_path / "run")] == [4]
    resumed.train()
    assert learned(read_records(tmp_path / "run")) == learned(straight.metrics.records)


def test_the_standard_error_is_that_of_resampled_documents(tokens: Path) -> None:
    """The bootstrap over documents is the reference: it knows no formula."""
    torch.manual_seed(0)
    split = TokenFolder(tokens).split("valid")
    model = Llama(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
    score = validate(model, split)
    rng = np.random.default_rng(0)
    nats, n = [], split.length - 1
    for i in range(len(split)):
        alone = validate(model, only(split, i))
        assert alone.standard_error is None
        nats.append(alone.nats_per_token * alone.n_tokens)
    nats = np.array(nats)
    assert score.nats_per_token == pytest.approx(nats.sum() / n.sum())
    chosen = rng.integers(len(n), size=(20_000, len(n)))
    spread = (nats[chosen].sum(1) / n[chosen].sum(1)).std()
    # Documents drawn again and again spread by n in place of n - 1; they are ten.
    assert score.standard_error == pytest.approx(spread * math.sqrt(10 / 9), rel=0.03)
    short = Llama(dataclasses.replace(CONFIG, max_seq_len=12))
    whole = validate(short, split)
    parts = [validate(short, only(split, i)) for i in range(len(split))]
    mean = sum(part.nats_per_token * part.n_tokens for part in parts) / whole.n_tokens
    assert whole.nats_per_token == pytest.approx(mean)


def only(split: Split, i: int) -> Split:
    """The split of one document."""
    one = copy.copy(split)
    one.shard, one.start, one.length = (
        a[i : i + 1] for a in (split.shard, split.start, split.length)
    )
    return one


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_flops_are_those_of_every_matrix_product(tie_embeddings: bool) -> None:
    """Counted by torch while it multiplies, forward and backward."""
    config = Config(
        dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, vocab_size=50, max_seq_len=16,
        hidden_dim=40, tie_embeddings=tie_embeddings,
    )  # fmt: skip
    model = Llama(config)
    tokens = torch.arange(17)[None]
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert counter.get_total_flops() == 16 * flops_per_token(config, 16)


def test_measuring_the_peak_multiplies_in_the_training_dtype_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    with FlopCounterMode(display=False):
        for autocast in (nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)):
            assert measure_peak(torch.device("cpu"), autocast) > 1e6
    assert torch.equal(before, torch.get_rng_state())


def test_speed_is_that_of_the_latest_steps() -> None:
    progress = Progress(RECIPE, 3, peak=1e9, shown=False)
    progress.add(10.0, 5.0, 0.1)  # it has compiled
    assert progress.speed()["tok_per_s"] == 6.4
    progress.add(0.03, 5.0, 0.1)
    progress.add(0.05, 5.0, 0.1)
    assert progress.speed() == {
        "tok_per_s": 1600.0,
        "peak_share": round(1600 * flops_per_token(CONFIG, 16) / 1e9, 4),
    }


def test_the_bar_says_loss_rate_speed_time_left_and_share(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress(RECIPE, 3, peak=1e9, shown=True)
    progress.add(0.04, 5.125, 0.01)
    progress.bar.refresh()
    progress.bar.close()
    share = 1600 * flops_per_token(CONFIG, 16) / 1e9
    said = capsys.readouterr().err
    assert f"loss=5.125, lr=0.01, mfu={share:.0%}" in said
    assert re.search(r"256/768 \[\d\d:\d\d<[\d?:]+, .*tok/s", said)


@pytest.fixture
def fake_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "tinyllama.train.energy", SimpleNamespace(EnergyMeter=FakeMeter)
    )


@pytest.mark.usefixtures("fake_meter")
def test_energy_is_read_where_the_run_is_judged_and_goes_on(tokens: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, energy="BRA", every_save=0)
    first = Trainer(recipe, tokens, tmp_path)
    one_step = first.step

    def step_then_stop() -> float:
        if first.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return one_step()

    first.step = step_then_stop  # type: ignore[method-assign]
    first.train()
    used = series(first.metrics.records, "step", "kwh", "kg_co2eq")
    np.testing.assert_array_equal(used, [[4, 5], [1, 2], [0.25, 0.5]])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "tokens": 384, "seconds": 1.0, "kwh": 70.0, "kg_co2eq": 7.0}\n')
    Trainer(recipe, tokens, tmp_path).train()
    records = read_records(tmp_path)
    used = series(records, "step", "kwh", "kg_co2eq")
    np.testing.assert_array_equal(used[:2], [[4, 5, 8, 12, 12], [1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(used[2], used[1] / 4)
    cells = table_rows(tmp_path / "report.html")
    rows = [row for row in cells if row[0] in ("4", "8", "12") and len(row) == 9]
    assert [row[-2:] for row in rows] == [["1", "0.25"], ["3", "0.75"], ["5", "1.25"]]
    page = html.unescape((tmp_path / "report.html").read_text())
    assert "estimates, of the whole machine, by nobody; <constant>" in page
    assert "kWh (estimated)" in page


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
    assert "kWh" not in text  # nobody measured
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
            assert [str(r["step"]), r["sample"]] in rows
    assert ["parameters", f"{CONFIG.n_parameters:,}"] in rows
    assert ["muon_learning_rate", "0.01"] in rows and ["model.dim", "16"] in rows


def test_a_page_of_a_run_under_way(run: Path, tmp_path: Path, capsys: Any) -> None:
    """Made by another process, from however much is there."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for n in range(1, next(i for i, line in enumerate(lines) if '"step": 12' in line)):
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:n]) + lines[n][:20])
        assert main(["train", "report", str(tmp_path)]) == 0
        text = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "under way" in text and "Recipe" in text
        assert ("time left" in text) == any("train_nats" in line for line in lines[:n])
    (tmp_path / "metrics.jsonl").write_text("{}}\n" + lines[0])
    assert main(["train", "report", str(tmp_path)]) == 2
    assert "metrics.jsonl: line 1 is not JSON" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text(lines[-1])
    with pytest.raises(FormatError, match="no record has 'recipe'"):
        run_page(tmp_path)


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


def test_a_comparison_that_says_nothing_says_so(tmp_path: Path, capsys: Any) -> None:
    a = write_run(tmp_path / "a", [(100, 10.0, 3.0)])
    b = write_run(tmp_path / "b", [(100, 10.0, 2.0)], valid_bytes=6)
    assert main(["train", "compare", a, b]) == 0
    assert "validated on different text" in capsys.readouterr().out
    c = write_run(tmp_path / "c", [])
    for runs, error, message in (
        ([a], ArgumentError, "two runs or more"),
        ([a, b, a], ArgumentError, "named twice"),
        ([a, c], FormatError, "c.metrics.jsonl: no record has 'bits_per_byte'"),
        ([a, tmp_path / "d"], OSError, "d.metrics.jsonl"),
    ):
        with pytest.raises(error, match=message):
            Comparison(runs)


def test_the_verbs_leave_training_as_it_was(tokens: Path, tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "recipe.toml"
    config.write_text(as_toml(dataclasses.replace(RECIPE, steps=1)))
    arguments = ["--config", str(config), "--data", str(tokens), "--out", str(tmp_path / "run")]
    for missing, message in ((0, "one of --preset"), (2, "--data and --out"), (4, "--data and")):
        shorter = arguments[:missing] + arguments[missing + 2 :]
        assert main(["train", *shorter]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", *arguments, "--set", 'prompts=["the cat"]']) == 0
    samples = [r for r in read_records(tmp_path / "run") if "sample" in r]
    assert [(r["step"], r["prompt"]) for r in samples] == [(1, "the cat")]
    assert samples[0]["sample"].startswith("the cat")


def test_samples_are_drawn_alike_every_time(tokens: Path, tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, tokens, tmp_path)
    trainer.sample()
    trainer.sample()
    texts = [r["sample"] for r in trainer.metrics.records]
    assert texts[:3] == texts[3:] and len(set(texts)) == 3


def test_tensorboard_has_the_same_numbers_and_goes_on(tokens: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = dataclasses.replace(RECIPE, tensorboard=True)
    trainer = Trainer(recipe, tokens, tmp_path)
    for _ in range(5):
        trainer.step()
    trainer.save()
    for _ in range(3):
        trainer.step()
    trainer.evaluate()  # undone by the crash that comes now
    del trainer
    Trainer(recipe, tokens, tmp_path).train()
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    records = read_records(tmp_path)
    for field in ("train_nats", "valid_nats", "learning_rate", "grad_norm", "tok_per_s"):
        steps, values = series(records, "step", field)
        events = board.Scalars(field)
        assert [event.step for event in events] == list(steps)
        np.testing.assert_allclose([event.value for event in events], values, rtol=1e-6)
    samples = [r["sample"] for r in records if r.get("prompt") == RECIPE.prompts[0]]
    tag = next(tag for tag in board.Tags()["tensors"] if tag.startswith("Once"))
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors(tag)]
    assert texts == samples


def test_energy_by_codecarbon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    pytest.importorskip("codecarbon")
    from tinyllama.train.energy import EnergyMeter

    def offline(*args: object) -> None:
        raise AssertionError("looked for the network")

    monkeypatch.setattr("socket.getaddrinfo", offline)
    monkeypatch.setattr("socket.socket.connect", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="energy is 'Brazil'; it must be a country's three"):
        EnergyMeter("Brazil")
    intensity = {}
    for country in ("BRA", "POL", "world"):
        with EnergyMeter(country) as meter:
            time.sleep(0.1)
        kwh, kg = meter.read()
        assert 0 < kwh < 1e-3
        intensity[country] = kg / kwh
        assert re.match(rf"codecarbon \d.*CPU.*; electricity of {country}", meter.source)
    # Rivers there, coal here, and in between what codecarbon says the world has.
    assert intensity["world"] == pytest.approx(0.475)
    assert intensity["BRA"] < 0.2 and intensity["POL"] > 0.475
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting", [{"prompts": "one"}, {"prompts": [1]}, {"tensorboard": 1}, {"energy": 3}]
)
def test_a_setting_of_the_wrong_kind_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} is"):
        dataclasses.replace(RECIPE, **setting)
