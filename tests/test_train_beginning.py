"""How a run begins: what is compiled, what its samples continue, what its files are."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentencepiece")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

from tiny_training import CONFIG, RECIPE, same, weights  # noqa: E402
from tinyllama.train.device import pays_to_compile  # noqa: E402
from tinyllama.train.model import Llama  # noqa: E402
from tinyllama.train.recipe import PROMPTS  # noqa: E402
from tinyllama.train.trainer import Trainer  # noqa: E402
from tinyllama.train.validate import beginnings, byte_values, goes_on, tell  # noqa: E402
from tinyllama.words import first_words  # noqa: E402


def test_compiling_comes_before_the_first_step_and_changes_nothing(
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight = Trainer(RECIPE, tokens, tmp_path / "straight")
    straight.train()
    calls = []
    monkeypatch.setattr(
        torch, "compile", lambda function: lambda x, y: (calls.append(len(x)), function(x, y))[1]
    )
    trainer = Trainer(dataclasses.replace(RECIPE, compile="yes"), tokens, tmp_path / "run")
    capsys.readouterr()
    one_step = trainer.step

    def step() -> float:
        if trainer.state.step == 0:
            assert calls == [2, 2] and "compiling" in capsys.readouterr().err
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
        return one_step()

    trainer.step = step  # type: ignore[method-assign]
    trainer.train()
    assert same(weights(straight), weights(trainer)) and len(calls) == 2 + 2 * RECIPE.steps


def test_a_short_run_on_a_cpu_is_not_compiled_and_failing_to_is_no_end(
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    auto = dataclasses.replace(RECIPE, compile="auto", model=CONFIG)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not pays_to_compile(auto, cpu) and pays_to_compile(auto, cuda)
    assert pays_to_compile(dataclasses.replace(auto, steps=20_000), cpu)
    assert pays_to_compile(dataclasses.replace(auto, compile="yes"), cpu)
    assert not pays_to_compile(dataclasses.replace(auto, steps=20_000, compile="no"), cpu)

    def compile_nothing(function: object) -> object:
        def fail(*_: object) -> None:
            raise RuntimeError("no compiler\nat all")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr("tinyllama.train.device.COMPILED_TOKENS", 6 * 64)
    trainer = Trainer(auto, tokens, tmp_path / "auto")
    trainer.train()
    said = capsys.readouterr().err
    assert "does not work here, going on without: no compiler\n" in said
    assert trainer.metrics.records[0]["compiled"] is False and trainer.state.step == 6
    with pytest.raises(RuntimeError, match="no compiler"):
        Trainer(dataclasses.replace(auto, compile="yes"), tokens, tmp_path / "yes").train()


def test_samples_begin_as_held_out_documents_do(tokens: Path, tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, tokens, tmp_path)
    split = trainer.valid
    assert split is not None and len(split) == 10 and len(trainer.prompts) == 3
    for i, prompt in zip((0, 3, 6), trainer.prompts, strict=True):
        text = trainer.tokenizer.decode(split.document(i).tolist())
        assert prompt == " ".join(re.findall(r"\w+", text)[:4])
    split.prompt = np.full(10, 9)
    given = [trainer.tokenizer.decode(split.document(i, 0, 9).tolist()) for i in (0, 3, 6)]
    assert beginnings(split, trainer.tokenizer) == given
    split.start, split.shard = split.start[[0, 0, 2] * 3 + [3]], split.shard[[0, 0, 2] * 3 + [3]]
    assert len(beginnings(split, trainer.tokenizer)) == len({*split.start})  # all differ
    named = dataclasses.replace(RECIPE, prompts=["a cat"])
    assert Trainer(named, tokens, tmp_path / "named").prompts == ["a cat"]
    for file in tokens.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["splits"]["valid"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert Trainer(RECIPE, tmp_path, tmp_path / "none").prompts == list(PROMPTS)


def test_samples_never_break_a_character(tokens: Path, tmp_path: Path) -> None:
    """Of a model that knows nothing, which would draw single bytes nine times in ten."""
    model = Llama(dataclasses.replace(RECIPE.model, max_seq_len=200))
    tokenizer = Trainer(RECIPE, tokens, tmp_path).tokenizer
    values = byte_values(tokenizer)
    assert sorted(values[values >= 0]) == list(range(256))
    for seed in range(5):
        assert "\ufffd" not in tell(model, tokenizer, "the", seed=seed)
    for begun in (b"", b"\xe4", b"\xe4\xb8", b"\xf0\x9f\x98", b"\xed"):
        allowed = goes_on(values, begun)
        for token, value in enumerate(values):
            text = begun + (bytes([value]) if value >= 0 else b"a")
            # What UTF-8 can go on from is what some text begins with.
            fits = any(_is_text(text + rest) for rest in RESTS)
            assert allowed[token] == fits, (begun, value)


SECOND = (0x80, 0x90, 0xA0)  # what may follow a first byte hangs on it
RESTS = [b"", *(bytes([a, *more]) for a in SECOND for more in ((), (0x80,), (0x80, 0x80)))]


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_first_words_are_those_of_any_script() -> None:
    assert first_words("  One, two: three!", 2) == "  One, two"
    assert first_words("从前有一只小猫。", 4) == "从前有一"
    assert first_words("One", 4) == "One" and first_words("…", 4) == ""


def test_all_files_of_a_checkpoint_have_one_mode(tokens: Path, tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, tokens, tmp_path)
    trainer.step()
    assert len({file.stat().st_mode for file in trainer.save().iterdir()}) == 1
