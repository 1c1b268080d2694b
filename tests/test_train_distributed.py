"""Training in several processes: what comes of it is what one process makes of the same recipe."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentencepiece")
from safetensors.torch import load_file  # noqa: E402

from tiny_training import RECIPE, VOCAB, as_toml, learned, same, weights  # noqa: E402
from tinyllama.config import Config  # noqa: E402
from tinyllama.errors import ConfigError  # noqa: E402
from tinyllama.formats.hf import load_hf  # noqa: E402
from tinyllama.train.checkpoint import find_checkpoint  # noqa: E402
from tinyllama.train.distributed import Ranks  # noqa: E402
from tinyllama.train.metrics import read_records  # noqa: E402
from tinyllama.train.model import Llama  # noqa: E402
from tinyllama.train.recipe import Recipe  # noqa: E402
from tinyllama.train.trainer import Trainer  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# Four windows a step, in passes of two at most; the model's odd sizes cannot be shared evenly.
ODD = Config(dim=18, n_layers=2, n_heads=3, vocab_size=VOCAB, max_seq_len=32, hidden_dim=29)
RECIPE = dataclasses.replace(
    RECIPE, model=ODD, steps=40, dropout=0.0, every_eval=10, every_save=16, every_sample=40
)


@pytest.fixture(scope="module")
def alone(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trainer]:
    trainers = {}
    for optimizer in ("muon", "adamw"):
        recipe = dataclasses.replace(RECIPE, optimizer=optimizer)
        trainers[optimizer] = Trainer(recipe, tokens, tmp_path_factory.mktemp("alone"))
        trainers[optimizer].train()
    return trainers


def torchrun(n: int, recipe: Recipe, data: Path, run: Path, **changes: object) -> str:
    """Train as the documentation says, in ``n`` processes: what they said."""
    config = run.with_suffix(".toml")
    config.write_text(as_toml(dataclasses.replace(recipe, **changes)))
    arguments = ["--config", str(config), "--data", str(data), "--out", str(run)]
    return in_processes(n, "-m", "tinyllama.train", *arguments)


def in_processes(n: int, *program: str, ends: bool = True) -> str:
    """Run it by torchrun in ``n`` processes, which come to a good end or not: what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n), *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode == 0) == ends, done.stderr[-3000:]
    return done.stdout + done.stderr


def curve(run: Path, field: str) -> dict[int, float]:
    return {r["step"]: r[field] for r in read_records(run) if field in r}


def check_equal(run: Path, expected: Trainer) -> None:
    """The same losses, scores and weights, each record written once.

    Muon's Newton-Schulz steps are in bf16: summed by shares they round differently.
    """
    within = 1e-3 if expected.recipe.optimizer == "muon" else 1e-4
    for field in ("train_nats", "valid_nats", "standard_error", "bits_per_byte", "grad_norm"):
        wanted, found = curve(expected.run, field), curve(run, field)
        assert list(found) == list(wanted)
        np.testing.assert_allclose(list(found.values()), list(wanted.values()), atol=within)
    assert len(learned(read_records(run))) == len(learned(expected.metrics.records))
    tensors = load_hf(find_checkpoint(run)).tensors
    for name, value in weights(expected).items():
        assert np.linalg.norm(tensors[name] - value) < 50 * within * np.linalg.norm(value)


@pytest.mark.parametrize(
    "n, parallel, optimizer",
    [(2, "ddp", "muon"), (2, "fsdp", "muon"), (4, "ddp", "adamw"), (4, "fsdp", "adamw")],
)
def test_several_processes_learn_what_one_does(
    n: int, parallel: str, optimizer: str, tokens: Path, tmp_path: Path, alone: dict[str, Trainer]
) -> None:
    said = torchrun(n, RECIPE, tokens, tmp_path / "run", parallel=parallel, optimizer=optimizer)
    assert f"{n} × cpu ({parallel})" in said
    assert said.count("parameters on") == 1
    check_equal(tmp_path / "run", alone[optimizer])
    samples = [r for r in read_records(tmp_path / "run") if "sample" in r]
    assert [r["prompt"] for r in samples] == alone[optimizer].prompts
    assert "FutureWarning" not in said


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_are_put_together_once_a_step(
    parallel: str, tokens: Path, tmp_path: Path
) -> None:
    """After all but the last pass of a step each rank has kept its own."""
    recipe = dataclasses.replace(
        RECIPE, steps=1, batch_size=1, grad_accum=4, every_eval=0, parallel=parallel
    )
    said = script(
        2,
        recipe,
        tokens,
        tmp_path / "run",
        "import contextlib, os, torch",
        "gradients, one_step, seen = trainer.ranks.gradients, trainer.step, []",
        "@contextlib.contextmanager",
        "def watched(network, complete):",
        "    with gradients(network, complete):",
        "        yield",
        "    mine = trainer.model.final_norm.grad",
        "    together = hasattr(mine, 'full_tensor')",  # of FSDP there is none until then
        "    if isinstance(mine, torch.Tensor) and not together:",
        "        parts = [torch.zeros_like(mine) for _ in range(2)]",
        "        torch.distributed.all_gather(parts, mine)",
        "        together = torch.equal(*parts)",
        "    seen.append((complete, together))",
        "def step():",
        "    nats = one_step()",
        "    os.write(1, f'{trainer.ranks.rank} {seen}\\n'.encode())",  # all of it at once
        "    return nats",
        "trainer.ranks.gradients, trainer.step = watched, step",
    )
    for rank in (0, 1):
        assert f"{rank} [(False, False), (True, True)]" in said


def test_a_checkpoint_of_four_goes_on_in_two_and_in_one(
    tokens: Path, tmp_path: Path, alone: dict[str, Trainer]
) -> None:
    run = tmp_path / "run"
    first = dataclasses.replace(RECIPE, parallel="fsdp")
    stop_at(13, 4, first, tokens, run)
    shares = sorted(find_checkpoint(run).glob("trainer*.safetensors"))
    assert [file.name for file in shares] == [
        f"trainer-0000{i}-of-00004.safetensors" for i in "1234"
    ]
    n_rows = [len(load_file(file)["muon/layers.0.w_up/momentum_buffer"]) for file in shares]
    assert n_rows == [8, 8, 8, 5]  # of hidden_dim
    stop_at(27, 2, first, tokens, run)
    assert find_checkpoint(run).name == "step-00000027"
    assert len(list(find_checkpoint(run).glob("trainer-*-of-00002.safetensors"))) == 2
    Trainer(RECIPE, tokens, run).train()
    assert (find_checkpoint(run) / "trainer.safetensors").is_file()
    check_equal(run, alone["muon"])


def stop_at(step: int, n: int, recipe: Recipe, data: Path, run: Path) -> None:
    """Train in ``n`` processes, of which the last gets a signal after ``step`` steps."""
    script(
        n,
        recipe,
        data,
        run,
        "import os, signal",
        "one_step = trainer.step",
        "def step():",
        "    nats = one_step()",
        f"    if trainer.state.step == {step} and trainer.ranks.rank == trainer.ranks.count - 1:",
        "        os.kill(os.getpid(), signal.SIGTERM)",
        "    return nats",
        "trainer.step = step",
    )


def script(n: int, recipe: Recipe, data: Path, run: Path, *lines: str, ends: bool = True) -> str:
    """Train in ``n`` processes, which do ``lines`` before they begin: what they said."""
    file, config = run.with_suffix(".py"), run.with_suffix(".toml")
    begin = [
        "import sys",
        "from tinyllama.train import distributed, saving",
        "from tinyllama.train.recipe import load_recipe",
        "from tinyllama.train.trainer import Trainer",
        "trainer = Trainer(load_recipe(sys.argv[1]), sys.argv[2], sys.argv[3])",
    ]
    file.write_text("\n".join([*begin, *lines, "trainer.train()", "distributed.leave()"]))
    config.write_text(as_toml(recipe))
    return in_processes(n, str(file), str(config), str(data), str(run), ends=ends)


def test_a_last_save_that_fails_on_the_first_rank_is_done_again_by_all(
    tokens: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, steps=2, every_save=2, every_sample=0, parallel="fsdp")
    said = script(
        2,
        recipe,
        tokens,
        tmp_path / "run",
        "write, failed = saving.write_checkpoint, []",
        "def fail_once(*arguments):",
        "    if not failed:",
        "        failed.append(True)",
        "        raise OSError('disk full')",
        "    return write(*arguments)",
        "saving.write_checkpoint = fail_once",
    )
    assert "step 2 could not be saved, others stay: disk full" in said
    assert find_checkpoint(tmp_path / "run").name == "step-00000002"


@pytest.mark.parametrize("rank, part", [(1, "_write_share"), (0, "_write_share"), (0, "_complete")])
def test_a_share_that_cannot_be_written_costs_only_its_checkpoint(
    rank: int, part: str, tokens: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(
        RECIPE, steps=3, every_eval=0, every_save=1, every_sample=0, parallel="fsdp"
    )
    said = script(
        2,
        recipe,
        tokens,
        tmp_path / "run",
        f"do, calls = saving.{part}, []",
        "def second_fails(*arguments):",
        "    do(*arguments)",
        "    calls.append(1)",
        f"    if len(calls) == 2 and trainer.ranks.rank == {rank}:",
        "        raise OSError('disk full')",
        f"saving.{part} = second_fails",
    )
    who = f"rank {rank}: " if rank else ""
    assert f"step 2 could not be saved, others stay: {who}disk full" in said
    assert find_checkpoint(tmp_path / "run").name == "step-00000003"
    hidden = {path.name for path in (tmp_path / "run").glob(".*")}
    assert hidden == {".lock"}


def test_a_rank_killed_in_a_save_leaves_the_checkpoint_before(
    tokens: Path, tmp_path: Path, alone: dict[str, Trainer]
) -> None:
    run = tmp_path / "run"
    recipe = dataclasses.replace(RECIPE, parallel="fsdp", every_eval=10, every_save=5)
    said = script(
        2,
        recipe,
        tokens,
        run,
        "import os, signal",
        "write = saving._write_share",
        "def write_and_die(file, tensors):",
        "    write(file, tensors)",
        "    if trainer.ranks.rank == 1 and 'step-00000015' in str(file):",
        "        os.kill(os.getpid(), signal.SIGKILL)",
        "saving._write_share = write_and_die",
        ends=False,
    )
    assert "SIGKILL" in said
    assert find_checkpoint(run).name == "step-00000010"
    assert list(run.glob(".step-00000015.trainer/*"))
    torchrun(2, recipe, tokens, run)
    check_equal(run, alone["muon"])
    assert {path.name for path in run.glob(".*")} == {".lock"}


def test_the_ranks_share_every_window_once() -> None:
    def share(count: int, rank: int, n: int) -> range:
        ranks = Ranks(torch.device("cpu"))
        ranks.count, ranks.rank = count, rank
        return ranks.share(n)

    for count in (1, 2, 3, 6):
        shares = [share(count, rank, 12) for rank in range(count)]
        assert [window for one in shares for window in one] == list(range(12))
        assert len({len(one) for one in shares}) == 1
    with pytest.raises(ConfigError, match="is 12, which 5 processes cannot share evenly"):
        share(5, 0, 12)


def test_no_two_ranks_or_steps_drop_the_same() -> None:
    ranks = Ranks(torch.device("cpu"))
    seeds = set()
    for rank in range(4):
        ranks.rank = rank
        seeds |= {ranks.seed(seed, step) for seed in range(5) for step in range(100)}
    assert len(seeds) == 2000


def test_a_share_is_read_in_passes_of_the_batch_size(tokens: Path, tmp_path: Path) -> None:
    """5 windows in passes of 2, 2 and 1 give the gradients of 5 at once."""
    recipe = dataclasses.replace(RECIPE, grad_accum=1, batch_size=5)
    trainers = [Trainer(recipe, tokens, tmp_path / name) for name in ("parts", "whole")]
    trainers[0].recipe = dataclasses.replace(recipe, batch_size=2)
    seen = []
    loss = trainers[0].loss
    trainers[0].loss = lambda x, y: (seen.append(len(x)), loss(x, y))[1]
    losses = [trainer.step() for trainer in trainers]
    assert seen == [2, 2, 1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    for a, b in zip(weights(trainers[0]).values(), weights(trainers[1]).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_recomputed_activations_change_no_bit(tokens: Path, tmp_path: Path) -> None:
    runs = []
    for recompute in (False, True):
        recipe = dataclasses.replace(
            RECIPE, dropout=0.2, activation_checkpointing=recompute, grad_accum=1
        )
        trainer = Trainer(recipe, tokens, tmp_path / str(recompute))
        trainer.step()
        trainer.step()
        runs.append(weights(trainer))
    assert same(*runs)


def test_recomputing_keeps_less(tokens: Path) -> None:
    """Counted: the numbers autograd keeps for a backward pass."""
    kept = []
    for recompute in (False, True):
        model = Llama(RECIPE.model, 0.0, recompute)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            model(torch.zeros(2, 16, dtype=torch.long)).sum()
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2
