"""The trainer: resuming, shuffling, scoring, saving, and every refusal."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

from tiny_training import CONFIG, RECIPE, VOCAB, learned, same, weights  # noqa: E402
from tinyllama.cli import main  # noqa: E402
from tinyllama.data.shards import prepare  # noqa: E402
from tinyllama.errors import ConfigError, FormatError, NonFiniteError  # noqa: E402
from tinyllama.formats import read_checkpoint  # noqa: E402
from tinyllama.train import saving  # noqa: E402
from tinyllama.train.batches import TokenFolder, Windows  # noqa: E402
from tinyllama.train.checkpoint import find_checkpoint, load_state, load_weights  # noqa: E402
from tinyllama.train.model import Llama, drop  # noqa: E402
from tinyllama.train.optimizers import make_optimizers  # noqa: E402
from tinyllama.train.recipe import Recipe  # noqa: E402
from tinyllama.train.trainer import Trainer  # noqa: E402
from tinyllama.train.validate import Validation, validate  # noqa: E402


def in_parts(recipe: Recipe, data: Path, run: Path, stops: list[int]) -> Trainer:
    """Train in several processes' stead: a new Trainer for every part, from its checkpoint."""
    for stop in stops:
        trainer = Trainer(recipe, data, run)
        while trainer.state.step < stop:
            trainer.step()
        trainer.save()
    trainer = Trainer(recipe, data, run)
    trainer.train()
    return trainer


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_interrupted_three_times_is_bitwise_the_same(
    tokens: Path, tmp_path: Path, optimizer: str
) -> None:
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer)
    straight = Trainer(recipe, tokens, tmp_path / "straight")
    straight.train()
    parts = in_parts(recipe, tokens, tmp_path / "parts", [1, 3, 4])
    assert same(weights(straight), weights(parts))
    last = learned(straight.metrics.records)[-1]
    assert learned(parts.metrics.records)[-1] == last


@pytest.mark.parametrize("lost", ["optimizer", "step", "seed", "dropout"])
def test_losing_any_part_of_the_state_is_noticed(
    tokens: Path, tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = Trainer(RECIPE, tokens, tmp_path / "straight")
    straight.train()
    part = Trainer(RECIPE, tokens, tmp_path / "part")
    for _ in range(3):
        part.step()
    part.evaluate()
    part.save()
    saved = part.state
    if lost == "optimizer":
        monkeypatch.setattr("tinyllama.train.trainer.load_optimizers", lambda *_: None)
    part = Trainer(RECIPE, tokens, tmp_path / "part")
    assert part.state == saved and None not in dataclasses.astuple(saved)
    if lost == "step":  # position in the text and in the schedule
        part.state = dataclasses.replace(part.state, step=2)
    if lost == "seed":
        part.windows.seed += 1
        part.windows._epoch = -1
    if lost == "dropout":
        manual_seed = torch.manual_seed
        monkeypatch.setattr(torch, "manual_seed", lambda seed: manual_seed(seed + 1))
    for _ in range(3):
        part.step()
    assert not same(weights(straight), weights(part))


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_on_two_threads_the_same_run_gives_the_same_bits(
    tokens: Path, tmp_path: Path
) -> None:
    """Compiled code sums the embedding's gradient in the order threads come, unless told not to."""
    wide = dataclasses.replace(CONFIG, max_seq_len=256)
    recipe = dataclasses.replace(
        RECIPE, model=wide, batch_size=16, seq_len=256, compile="yes", n_threads=2
    )
    runs = []
    for i in range(3):
        trainer = Trainer(recipe, tokens, tmp_path / str(i))
        trainer.step()
        trainer.step()
        runs.append(weights(trainer))
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


def test_signal_saves_and_the_same_call_goes_on(tokens: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, every_save=0)
    straight = Trainer(recipe, tokens, tmp_path / "straight")
    straight.train()
    trainer = Trainer(recipe, tokens, tmp_path / "run")
    one_step = trainer.step

    def step_then_signal() -> float:
        nats = one_step()
        if trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return nats

    trainer.step = step_then_signal  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell started us in the background
    assert trainer.train().name == "step-00000002"
    assert signal.getsignal(signal.SIGINT) is before
    resumed = Trainer(recipe, tokens, tmp_path / "run")
    assert resumed.state.step == 2
    resumed.train()
    assert same(weights(straight), weights(resumed))


def test_a_run_stopped_before_its_first_step_goes_on(tokens: Path, tmp_path: Path) -> None:
    straight = Trainer(RECIPE, tokens, tmp_path / "straight")
    straight.train()
    Trainer(RECIPE, tokens, tmp_path / "run").save()
    resumed = Trainer(RECIPE, tokens, tmp_path / "run")
    resumed.train()
    assert same(weights(straight), weights(resumed))


def test_every_epoch_sees_every_document_in_an_order_of_its_own(tokens: Path) -> None:
    split = TokenFolder(tokens).split("train")
    windows = Windows(split, 16, seed=7)
    epochs = []
    for epoch in range(2):
        first = epoch * windows.windows_per_epoch
        batch, targets = windows.batch(first, windows.windows_per_epoch)
        assert batch.shape == (windows.windows_per_epoch, 16)
        assert np.array_equal(batch[:, 1:], targets[:, :-1])
        epochs.append(batch)
        starts = {tuple(split.document(i, 0, 5)) for i in range(len(split))}
        joined = {tuple(row[i : i + 5]) for row in batch for i in np.flatnonzero(row[:12] == 1)}
        # Documents that begin in a window's last four tokens are found in part only.
        assert len(starts & joined) > 0.6 * len(starts) and joined <= starts
        counts = np.bincount(targets.ravel(), minlength=VOCAB)
        total = sum(np.bincount(split.document(i), minlength=VOCAB) for i in range(len(split)))
        assert (counts <= total).all() and counts.sum() >= total.sum() - 2 * 16
    assert not np.array_equal(*epochs)
    again = Windows(split, 16, seed=7)
    assert np.array_equal(again.batch(windows.windows_per_epoch, 3)[0], epochs[1][:3])
    other = Windows(split, 16, seed=8)
    assert not np.array_equal(other.batch(0, 3)[0], epochs[0][:3])


def test_the_recipe_mixes_training_text_and_nothing_else(tokens: Path, tmp_path: Path) -> None:
    plain = Trainer(RECIPE, tokens, tmp_path / "plain")
    recipe = dataclasses.replace(RECIPE, weights={"text": 2.5}, steps=1)
    trainer = Trainer(recipe, tokens, tmp_path / "run")
    assert trainer.windows.n_documents == 2.5 * plain.windows.n_documents
    assert trainer.valid is not None and plain.valid is not None
    assert len(trainer.valid) == len(plain.valid)
    trainer.train()
    with pytest.raises(ConfigError, match=r"weights was \{'text': 2\.5\}, now \{\}"):
        Trainer(dataclasses.replace(recipe, weights={}), tokens, tmp_path / "run")


def test_bits_per_byte_scores_every_document_alone_from_bos(tokens: Path) -> None:
    torch.manual_seed(0)
    split = TokenFolder(tokens).split("valid")
    model = Llama(dataclasses.replace(CONFIG, max_seq_len=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
    total, count = 0.0, 0
    for i in range(len(split)):
        document = torch.from_numpy(split.document(i))
        with torch.no_grad():
            log_p = model(document[None, :-1])[0].log_softmax(-1)
        total -= float(log_p[torch.arange(len(document) - 1), document[1:]].sum())
        count += len(document) - 1
    score = validate(model, split)
    assert score.n_tokens == count == split.n_tokens - len(split)
    assert score.nats_per_token == pytest.approx(total / count, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / split.n_bytes, rel=1e-5)
    short = Llama(dataclasses.replace(CONFIG, max_seq_len=12))
    assert validate(short, split).n_tokens == count  # longer documents: each token once


def test_documents_of_a_window_do_not_see_one_another() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, n_kv_heads=CONFIG.n_heads // 2)
    model, plain = Llama(config, bos_id=1), Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
        plain.load_state_dict(model.state_dict())
        # The end of a document, a whole one, the beginning of a third; and one that is not cut.
        documents = [[9, 8, 7, 2], [1, 5, 5, 6, 2], [1, 9, 8]]
        window = torch.tensor([[*itertools.chain(*documents)], [1, *range(3, 14)]])
        alone = torch.cat([plain(torch.tensor([one]))[0] for one in documents])
        torch.testing.assert_close(model(window)[0], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(window)[1], plain(window)[1])
        assert not torch.allclose(plain(window)[0, 4:], alone[4:], atol=0.1)


def test_the_recipe_says_whether_documents_see_one_another(tokens: Path, tmp_path: Path) -> None:
    for mask, bos_id in ((False, None), (True, TokenFolder(tokens).bos_id)):
        recipe = dataclasses.replace(RECIPE, document_mask=mask)
        assert Trainer(recipe, tokens, tmp_path / f"{mask}").model.bos_id == bos_id


def test_weight_decay_falls_on_matrices_only() -> None:
    model = Llama(CONFIG)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for kind in ("adamw", "muon"):
        recipe = dataclasses.replace(RECIPE, optimizer=kind, weight_decay=0.25)
        seen = []
        for optimizer in make_optimizers(model, recipe).values():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    is_matrix = parameter.dim() == 2
                    assert group["weight_decay"] == (0.25 if is_matrix else 0.0)
                    seen.append(names[id(parameter)])
        assert sorted(seen) == sorted(CONFIG.tensor_shapes())


def test_learning_rate_warms_up_and_falls() -> None:
    recipe = dataclasses.replace(RECIPE, steps=110, warmup_steps=10, final_lr_fraction=0.1)
    for schedule, middle in (("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)):
        recipe = dataclasses.replace(recipe, schedule=schedule)
        assert recipe.lr_fraction(0) == pytest.approx(0.1)
        assert recipe.lr_fraction(9) == recipe.lr_fraction(10) == 1.0
        assert recipe.lr_fraction(60) == pytest.approx(middle)
    assert dataclasses.replace(recipe, schedule="linear").lr_fraction(110) == pytest.approx(0.1)


def test_only_the_last_two_and_the_best_checkpoint_are_kept(tokens: Path, tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, tokens, tmp_path)
    for bits in (3.0, 1.0, 2.0, 2.5, 2.6):
        trainer.step()
        best = min(bits, trainer.state.best_bits_per_byte or math.inf)
        trainer.state = dataclasses.replace(
            trainer.state, bits_per_byte=bits, best_bits_per_byte=best
        )
        trainer.save()
    kept = sorted(folder.name for folder in tmp_path.glob("step-*"))
    assert kept == ["step-00000002", "step-00000004", "step-00000005"]
    assert find_checkpoint(tmp_path).name == "step-00000005"
    assert find_checkpoint(tmp_path, "BEST").name == "step-00000002"


def test_the_best_validation_is_kept_where_no_save_is_due(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([3.0, 1.0, 2.0, 2.5])  # after steps 2, 4, 6 and 7
    monkeypatch.setattr(
        "tinyllama.train.trainer.validate", lambda *_: Validation(1.0, 0.1, next(scores), 9)
    )
    recipe = dataclasses.replace(RECIPE, steps=7, every_eval=2, every_save=3)
    Trainer(recipe, tokens, tmp_path).train()
    assert find_checkpoint(tmp_path, "BEST").name == "step-00000004"
    kept = sorted(folder.name for folder in tmp_path.glob("step-*"))
    assert kept == ["step-00000004", "step-00000006", "step-00000007"]


@pytest.mark.parametrize("failing", ["save_hf", "trainer.json", "LATEST"])
def test_a_save_that_fails_leaves_the_earlier_checkpoint(
    tokens: Path, tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(RECIPE, tokens, tmp_path)
    trainer.step()
    trainer.save()
    before = weights(trainer)
    before = {name: value.copy() for name, value in before.items()}
    trainer.step()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if failing == "save_hf":
            patch.setattr("tinyllama.formats.hf.save_hf", full)
        elif failing == "trainer.json":
            patch.setattr(saving, "_manifest", full)
        else:
            patch.setattr(saving, "whole_file", full)
        with pytest.raises(OSError, match="No space left"):
            trainer.save()
    assert load_state(find_checkpoint(tmp_path)).step == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".lock"]
    model = Llama(CONFIG)
    load_weights(find_checkpoint(tmp_path), model)
    assert same(before, {name: value.numpy() for name, value in model.state_dict().items()})
    trainer.save()
    assert load_state(find_checkpoint(tmp_path)).step == 2


def test_another_recipe_or_other_data_is_refused(tokens: Path, tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, tokens, tmp_path)
    trainer.step()
    trainer.save()
    with pytest.raises(ConfigError, match=r"another recipe: learning_rate was 0\.01, now 0\.02"):
        Trainer(dataclasses.replace(RECIPE, learning_rate=0.02), tokens, tmp_path)
    wider = dataclasses.replace(RECIPE, model=dataclasses.replace(CONFIG, hidden_dim=48))
    with pytest.raises(ConfigError, match=r"recipe: model.hidden_dim was 32, now 48; --resume"):
        Trainer(wider, tokens, tmp_path)
    Trainer(dataclasses.replace(RECIPE, every_save=5), tokens, tmp_path)
    source = find_checkpoint(tmp_path) / "trainer.json"
    values = {**json.loads(source.read_text()), "data_sha256": "0" * 64}
    source.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="other data"):
        Trainer(RECIPE, tokens, tmp_path)
    source.write_text("{")
    with pytest.raises(FormatError, match=re.escape(str(source))):
        Trainer(RECIPE, tokens, tmp_path)


def test_a_folder_that_holds_something_else_is_refused(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no training run, and not empty \(it has manifest"):
        Trainer(RECIPE, tokens, tokens)
    (tmp_path / ".lock").touch()  # what a run leaves that was refused
    Trainer(RECIPE, tokens, tmp_path)
    with pytest.raises(FileNotFoundError, match="a training run that has no checkpoint yet"):
        find_checkpoint(tmp_path)
    with pytest.raises(FormatError, match="a training run that has no checkpoint yet"):
        read_checkpoint(tmp_path)


def test_less_text_than_one_window_is_refused(tokens: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        RECIPE, seq_len=4000, model=dataclasses.replace(CONFIG, max_seq_len=4000)
    )
    with pytest.raises(ConfigError, match="fewer than one window"):
        Trainer(recipe, tokens, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(tokens: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, model=dataclasses.replace(CONFIG, vocab_size=301))
    with pytest.raises(
        ConfigError,
        match=r"has 300 tokens.*vocab_size is 301: --set model.vocab_size=300.*tokenizer of 301$",
    ):
        Trainer(recipe, tokens, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_the_run(tokens: Path, tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, tokens, tmp_path)
    trainer.step()
    trainer.save()
    with torch.no_grad():
        trainer.model.final_norm.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="nan at step 2"):
        trainer.train()
    assert load_state(find_checkpoint(tmp_path)).step == 1


def test_gradients_that_overflow_stop_the_run_before_the_weights_change(
    tokens: Path, tmp_path: Path
) -> None:
    trainer = Trainer(RECIPE, tokens, tmp_path)
    before = {name: value.copy() for name, value in weights(trainer).items()}
    trainer.model.final_norm.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"norm of the gradients is (inf|nan) at step 1"):
        trainer.train()
    assert same(before, weights(trainer)) and not list(tmp_path.glob("step-*"))


def test_a_damaged_token_folder_is_refused(tokens: Path, tmp_path: Path) -> None:
    for file in tokens.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "train-0.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(FormatError, match=r"train-0\.bin"):
        TokenFolder(tmp_path).split("train")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["splits"]["valid"]["shards"][1]["file"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"manifest\.json: split valid: field 'file' is missing"):
        TokenFolder(tmp_path).split("valid")
    for text, message in (
        ('{"format": "tinyllama-tokens", "version": 1}', "field 'dtype' is missing or wrong"),
        ("{bad", "not JSON: Expecting"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(FormatError, match=rf"manifest\.json: {message}"):
            TokenFolder(tmp_path)


def test_tokens_that_have_changed_are_refused(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the big red dog ran and saw a tree " * 30)
    data = tmp_path / "data"
    prepare(tmp_path / "text.txt", tokens / "tokenizer.model", data, valid_fraction=0.0)
    TokenFolder(data).check_files()
    shard = bytearray((data / "train-00000.bin").read_bytes())
    shard[4] ^= 1
    (data / "train-00000.bin").write_bytes(shard)
    with pytest.raises(FormatError, match=r"train-00000\.bin: is damaged"):
        Trainer(RECIPE, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    shard[4] ^= 1
    (data / "train-00000.bin").write_bytes(shard)
    TokenFolder(data).check_files()
    with open(data / "tokenizer.model", "ab") as file:
        file.write(b"\0")
    with pytest.raises(FormatError, match=r"tokenizer\.model: is damaged"):
        TokenFolder(data).check_files()


def test_held_out_tokens_that_have_changed_are_not_scored(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("a cat\n<|endoftext|>\na big dog ran\n")
    data = tmp_path / "data"
    prepare(tmp_path / "text.txt", tokens / "tokenizer.model", data, valid_fraction=0.01)
    arguments = ["eval", "bundled", "--text", str(data)]
    assert main(arguments) == 0
    shard = bytearray((data / "valid-00000.bin").read_bytes())
    shard[4] ^= 1
    (data / "valid-00000.bin").write_bytes(shard)
    assert main(arguments) == 2
    assert "valid-00000.bin: is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("dropout", "lost"), [(0.1, 26), (0.001, 1), (0.5, 128)])
@pytest.mark.parametrize("shape", [(3, 7, 1001), (64, 512)])
def test_dropout_loses_its_share_and_keeps_the_mean(
    dropout: float, lost: int, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(5)
    dropped = drop(torch.ones(shape, requires_grad=True), dropout, training=True)
    assert set(dropped.unique().tolist()) == {0.0, np.float32(256 / (256 - lost))}
    share, n = (dropped == 0).float().mean().item(), dropped.numel()
    assert abs(share - lost / 256) < 5 * (lost / 256 / n) ** 0.5
    assert not torch.equal(dropped, drop(torch.ones(shape), dropout, training=True))
    assert torch.equal(drop(dropped, dropout, training=False), dropped)
