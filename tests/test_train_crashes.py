"""Training that is killed anywhere, or runs out of disk, loses nothing that was saved.

A few kills by default; three hundred with TINYLLAMA_FULL_TESTS=1.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentencepiece")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

import safetensors.torch  # noqa: E402
import tqdm  # noqa: E402

from tiny_training import RECIPE, learned, same, weights  # noqa: E402
from tinyllama.errors import FormatError  # noqa: E402
from tinyllama.formats import hf  # noqa: E402
from tinyllama.train import saving  # noqa: E402
from tinyllama.train import trainer as training  # noqa: E402
from tinyllama.train.checkpoint import (  # noqa: E402
    best_checkpoint,
    check_files,
    find_checkpoint,
    load_state,
    read_start,
)
from tinyllama.train.export import export  # noqa: E402
from tinyllama.train.metrics import read_records  # noqa: E402
from tinyllama.train.trainer import Trainer  # noqa: E402
from tinyllama.train.validate import Validation  # noqa: E402

FULL = bool(os.environ.get("TINYLLAMA_FULL_TESTS"))
N_KILLS = 300 if FULL else 10
# Its own lock is shared between processes, and who is killed with it keeps it.
tqdm.tqdm.set_lock(threading.RLock())
tqdm.tqdm.monitor_interval = 0
if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def in_a_child(work: Callable[[], None], seconds: float | None = None) -> int | None:
    """Do it in a process of its own, killed after so many seconds: its status, None if killed."""
    child = os.fork()
    if child == 0:
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def die_at_file_operation(n: int, run: Path) -> None:
    """Kill this process before its n-th operation on files below ``run``, from 1."""
    count = 0

    def one() -> bool:
        nonlocal count
        count += 1
        return count == n

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10)

    def hook(event: str, args: tuple[object, ...]) -> None:
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        if event == "open":
            changes = isinstance(args[1], str) and args[1][:1] in ("w", "a", "x")
        below = isinstance(args[0], (str, Path)) and str(run) in str(args[0]) if args else False
        inside = event in ("os.remove", "os.rmdir")  # shutil.rmtree names files by folder
        if changes and (below or inside) and one():
            die()

    sync, save = os.fsync, safetensors.torch.save_file

    def fsync(descriptor: int) -> None:
        if one():
            die()
        sync(descriptor)

    def save_half(tensors: dict[str, torch.Tensor], file: Path, *args: object) -> None:
        save(tensors, file, *args)
        if one():  # under the name that safetensors has for what it has not finished
            os.truncate(file, os.path.getsize(file) // 2)
            os.rename(file, file.with_name(".tmpAbCdEf"))
            die()

    os.fsync = fsync
    safetensors.torch.save_file = save_half
    sys.addaudithook(hook)


@pytest.fixture(scope="module")
def straight(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = Trainer(RECIPE, tokens, tmp_path_factory.mktemp("straight"))
    trainer.train()
    return trainer


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("saved", [0, 1, 3])
def test_killed_at_every_file_operation_of_a_save(
    tokens: Path,
    tmp_path: Path,
    straight: Trainer,
    saved: int,
) -> None:
    """The first save, a second, and one that removes old checkpoints."""
    before = tmp_path / "before"
    trainer = Trainer(RECIPE, tokens, before)
    for _ in range(saved):
        trainer.step()
        trainer.evaluate()
        trainer.save()
    _, best = best_checkpoint(before) or (None, None)
    status, n = None, 0
    while status is None:
        n += 1
        run = tmp_path / str(n)
        shutil.copytree(before, run)

        def save_the_next(run: Path = run, n: int = n) -> None:
            trainer = Trainer(RECIPE, tokens, run)
            trainer.step()
            trainer.evaluate()
            die_at_file_operation(n, run)
            trainer.save()

        status = in_a_child(save_the_next)
        assert status in (None, 0)
        if saved == 0 and not (run / "LATEST").exists():
            with pytest.raises(FileNotFoundError):
                find_checkpoint(run)
        else:
            folder = find_checkpoint(run)
            check_files(folder)
            assert load_state(folder).step in (saved, saved + 1)
        if not FULL and n % 7:
            continue
        resumed = Trainer(RECIPE, tokens, run)
        assert resumed.state.step in (saved, saved + 1)
        if resumed.state.step:
            pointed = find_checkpoint(run, "BEST").name
            assert resumed.state.step > saved or pointed == best.name
            assert load_state(run / pointed).bits_per_byte == resumed.state.best_bits_per_byte
        resumed.train()
        assert same(weights(resumed), weights(straight))
        left = {path.name for path in run.iterdir() if path.name.startswith(".")} - {".lock"}
        assert not left, "what the killed process left is cleared up"
    assert n > 20


@pytest.mark.timeout(1800)
def test_killed_at_random(tokens: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=40, every_eval=7, grad_accum=3)
    straight = Trainer(recipe, tokens, tmp_path / "straight")
    started = time.monotonic()
    straight.train()
    seconds = time.monotonic() - started
    n_kills, rng = 0, random.Random(1)
    for i in range(10 * N_KILLS):
        run = tmp_path / str(i)
        while n_kills < N_KILLS:
            status = in_a_child(
                lambda run=run: Trainer(recipe, tokens, run).train() and None,
                rng.uniform(0, seconds),
            )
            if status is not None:
                break
            n_kills += 1
        resumed = Trainer(recipe, tokens, run)
        resumed.train()
        assert same(weights(resumed), weights(straight))
        assert learned(resumed.metrics.records) == learned(straight.metrics.records)
        shutil.rmtree(run)
        if n_kills == N_KILLS:
            return
    raise AssertionError(f"only {n_kills} kills hit")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_files_that_cannot_grow(
    tokens: Path,
    tmp_path: Path,
    straight: Trainer,
    share: float,
    capfd,
) -> None:
    """Short writes: no file may be larger than a share of the largest of a checkpoint."""
    largest = max(f.stat().st_size for f in find_checkpoint(straight.run).iterdir())
    run = tmp_path / "run"

    def begin() -> None:
        trainer = Trainer(RECIPE, tokens, run)
        trainer.step()
        trainer.save()

    assert in_a_child(begin) == 0

    def go_on() -> None:
        trainer = Trainer(RECIPE, tokens, run)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), resource.RLIM_INFINITY))
        try:
            trainer.train()
        except OSError:
            assert trainer.state.step == RECIPE.steps or share <= 0.01  # metrics.jsonl
            os._exit(7)

    assert in_a_child(go_on) == 7
    check_files(find_checkpoint(run))
    assert load_state(find_checkpoint(run)).step == 1
    resumed = Trainer(RECIPE, tokens, run)
    resumed.train()
    assert same(weights(resumed), weights(straight))


def test_a_damaged_checkpoint_is_named_with_the_one_before(
    tokens: Path,
    tmp_path: Path,
) -> None:
    trainer = Trainer(RECIPE, tokens, tmp_path)
    for _ in range(2):
        trainer.step()
        trainer.save()
    file = find_checkpoint(tmp_path) / "trainer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(Exception, match=r"trainer.safetensors: is damaged.*step-00000001"):
        Trainer(RECIPE, tokens, tmp_path)
    read_start(str(tmp_path))  # which needs the weights alone
    (tmp_path / "BEST").write_text("step-00000002\n")
    export(tmp_path, tmp_path / "m.gguf")
    (tmp_path / "m.gguf").unlink()
    file = file.with_name("model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for use in (lambda: export(tmp_path, tmp_path / "m.gguf"), lambda: read_start(str(tmp_path))):
        with pytest.raises(FormatError, match=r"model.safetensors: is damaged .* trainer.json\)$"):
            use()
    assert not (tmp_path / "m.gguf").exists()
    (tmp_path / "LATEST").write_text("step-00000001\n")
    assert Trainer(RECIPE, tokens, tmp_path).state.step == 1


# --- the best is whichever is there -------------------------------------------------------------


class Judged:
    """A trainer whose validations give the scores that are asked for, by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scores: dict[int, float]) -> None:
        self.trainer: Trainer | None = None

        def validate(*_: object) -> Validation:
            assert self.trainer is not None
            return Validation(1.0, None, scores[self.trainer.state.step], 1)

        monkeypatch.setattr(training, "validate", validate)

    def train(self, tokens: Path, run: Path, **settings: object) -> Trainer:
        recipe = dataclasses.replace(RECIPE, every_eval=2, every_save=2, **settings)
        self.trainer = Trainer(recipe, tokens, run)
        self.trainer.train()
        return self.trainer


def test_a_best_that_could_not_be_saved_is_none(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_hf = hf.save_hf

    def failing(checkpoint: Any, folder: Path) -> None:
        if checkpoint.source == "step 4":
            raise OSError(errno.ENOSPC, "no space left")
        save_hf(checkpoint, folder)

    monkeypatch.setattr(hf, "save_hf", failing)
    judged = Judged(monkeypatch, {2: 2.0, 4: 1.0, 6: 1.01, 8: 1.02})
    trainer = judged.train(tokens, tmp_path, steps=8)
    assert find_checkpoint(tmp_path, "BEST").name == "step-00000006"
    assert trainer.state.best_bits_per_byte == 1.01


@pytest.mark.parametrize(("killed", "best"), [(4, 4), (8, 8)])
def test_a_best_that_was_saved_is_the_best_wherever_the_process_was_killed(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int, best: int
) -> None:
    """Between LATEST and BEST, that is; at the last step, too, after which nothing is saved."""
    scores = {2: 2.0, 4: 1.5, 6: 1.6, 8: 1.7}
    scores[killed] = 1.0
    judged = Judged(monkeypatch, scores)

    def until_killed() -> None:
        point = saving._point

        def die_between(pointer: Path, name: str) -> None:
            if pointer.name == "BEST" and name == f"step-{killed:08d}":
                os.kill(os.getpid(), signal.SIGKILL)
            point(pointer, name)

        saving._point = die_between  # type: ignore[assignment]
        judged.train(tokens, tmp_path, steps=8, keep_checkpoints=1)

    assert in_a_child(until_killed) is None
    assert find_checkpoint(tmp_path).name == f"step-{killed:08d}"
    assert find_checkpoint(tmp_path, "BEST").name != f"step-{killed:08d}"
    judged.train(tokens, tmp_path, steps=8, keep_checkpoints=1)
    assert find_checkpoint(tmp_path).name == "step-00000008"
    assert find_checkpoint(tmp_path, "BEST").name == f"step-{best:08d}"


def test_a_damaged_checkpoint_is_not_the_best(tmp_path: Path) -> None:
    for step, score in ((1, 2.0), (2, 1.0), (3, 1.0), (4, math.nan), (5, None)):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        values = {"format": "tinyllama-trainer", "version": 1, "files": {}, "bits_per_byte": score}
        (folder / "trainer.json").write_text(json.dumps(values))
    assert best_checkpoint(tmp_path) is None
    (tmp_path / "LATEST").write_text("step-00000005\n")
    best = best_checkpoint(tmp_path)
    assert best == (1.0, tmp_path / "step-00000002")
    (tmp_path / "step-00000002" / "trainer.json").write_text("{")
    saving.point_to_best(tmp_path)
    assert (tmp_path / "BEST").read_text() == "step-00000003\n"


def test_what_cannot_be_recorded_is_recorded_later_and_ends_no_training(
    tokens: Path, tmp_path: Path, straight: Trainer
) -> None:
    """Short writes to metrics.jsonl, before there is any checkpoint."""

    def train() -> None:
        trainer, said = Trainer(RECIPE, tokens, tmp_path), list[str]()
        trainer._say = lambda line: said.append(line.partition(":")[0])  # type: ignore[method-assign]
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        step = trainer.step

        def limited() -> float:
            if trainer.state.step == 0:  # the file ends within the first record of a step
                size = (tmp_path / "metrics.jsonl").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
            if trainer.state.step == RECIPE.steps - 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            return step()

        trainer.step = limited  # type: ignore[method-assign]
        trainer.train()

        said = [line for line in said if "recorded" in line]
        assert said == ["step 3 could not be recorded, which is tried again"]

    assert in_a_child(train) == 0
    assert learned(read_records(tmp_path)) == learned(straight.metrics.records)
