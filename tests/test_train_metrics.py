"""What a run records of itself: losses, their uncertainty, speed, samples, energy."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentencepiece")
pytest.importorskip("tqdm")

import torch.nn.functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from tiny_training import CONFIG, RECIPE, as_toml, learned  # noqa: E402
from tinyllama.cli import main  # noqa: E402
from tinyllama.config import Config  # noqa: E402
from tinyllama.errors import ConfigError  # noqa: E402
from tinyllama.train.batches import Split, TokenFolder  # noqa: E402
from tinyllama.train.metrics import read_records, series  # noqa: E402
from tinyllama.train.model import Llama  # noqa: E402
from tinyllama.train.peak import flops_per_token, measure_peak  # noqa: E402
from tinyllama.train.progress import Progress  # noqa: E402
from tinyllama.train.trainer import Trainer  # noqa: E402
from tinyllama.train.validate import validate  # noqa: E402

RECIPE = dataclasses.replace(RECIPE, steps=12, every_eval=4, every_save=5, every_sample=6)


@pytest.fixture(scope="module")
def run(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a <run>"
    Trainer(RECIPE, tokens, run).train()
    return run


def test_two_trainings_of_one_run_do_not_mix(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(dataclasses.replace(RECIPE, steps=4), tokens, tmp_path / "run").train()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}

    def locked(folder: Path) -> None:
        raise BlockingIOError(f"{folder}: another process is at work there")

    monkeypatch.setattr("tinyllama.train.metrics.lock_folder", locked)
    with pytest.raises(BlockingIOError, match="run: another process"):
        Trainer(dataclasses.replace(RECIPE, steps=4), tokens, tmp_path / "run")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()} == before


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


def test_what_is_switched_off_is_not_done_at_the_end_either(tokens: Path, tmp_path: Path) -> None:
    off = {"steps": 2, "every_eval": 0, "every_sample": 0, "every_save": 0}
    checkpoint = Trainer(dataclasses.replace(RECIPE, **off), tokens, tmp_path).train()
    assert checkpoint.name == "step-00000002"
    fields = {field for record in read_records(tmp_path) for field in record}
    assert "train_nats" in fields and not fields & {"valid_nats", "sample"}


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


def test_a_validation_takes_no_more_room_than_it_is_given(tokens: Path) -> None:
    split, model = TokenFolder(tokens).split("valid"), Llama(CONFIG)
    taken: list[int] = []

    def forward(batch: torch.Tensor) -> torch.Tensor:
        taken.append(batch.numel())
        return model(batch)

    score = validate(model, split, forward)
    assert max(taken) > 100
    taken.clear()
    in_parts = validate(model, split, forward, room=100)
    assert 50 < max(taken) <= 100
    assert in_parts.nats_per_token == pytest.approx(score.nats_per_token, rel=1e-5)
    taken.clear()
    validate(model, split, forward, room=1)  # a window at a time is the least
    assert max(taken) <= CONFIG.max_seq_len and len(taken) >= len(split)


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
    one.shard, one.start, one.length, one.prompt = (
        a[i : i + 1] for a in (split.shard, split.start, split.length, split.prompt)
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
    progress.add(10.0, 5.0, 0.1)  # a slow one, told of already
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
    prompts = trainer.prompts
    del trainer
    config = tmp_path / "recipe.toml"
    config.write_text(as_toml(RECIPE))
    arguments = ["--config", str(config), "--data", str(tokens), "--out", str(tmp_path)]
    assert main(["train", *arguments, "--tensorboard"]) == 0
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    records = read_records(tmp_path)
    for field in ("train_nats", "valid_nats", "learning_rate", "grad_norm", "tok_per_s"):
        steps, values = series(records, "step", field)
        events = board.Scalars(field)
        assert [event.step for event in events] == list(steps)
        np.testing.assert_allclose([event.value for event in events], values, rtol=1e-6)
    assert "n_parameters" not in board.Tags()["scalars"]  # a number that never moves is no curve
    beginning = next(tag for tag in board.Tags()["tensors"] if tag.startswith("beginning"))
    started = board.Tensors(beginning)[-1].tensor_proto.string_val[0].decode()
    assert json.loads(started)["recipe"]["steps"] == recipe.steps
    samples = [r["sample"] for r in records if r.get("prompt") == prompts[0]]
    first_word = prompts[0].split()[0]
    tag = next(tag for tag in board.Tags()["tensors"] if tag.startswith(first_word))
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
