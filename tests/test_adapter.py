"""Adapters made by peft: merged they compute what they did beside their model, or are refused."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", reason="needs the extra finetune")
transformers = pytest.importorskip("transformers", reason="needs the extra finetune")

import tinyllama  # noqa: E402
from random_models import tiny_checkpoint  # noqa: E402
from tinyllama.cli import main  # noqa: E402
from tinyllama.errors import ArgumentError, ExportError, FormatError  # noqa: E402
from tinyllama.formats import read_checkpoint  # noqa: E402
from tinyllama.formats.hf import save_hf  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TOKENS = [1, 300 - 1, 7, 264, 259, 33, 280, 270]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "untied"
    save_hf(tiny_checkpoint(tie_embeddings=False), folder)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tied"
    save_hf(tiny_checkpoint(), folder)
    return folder


def open_hf(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(base: Path, folder: Path, config: Any) -> tuple[np.ndarray, np.ndarray]:
    """Write an adapter whose numbers are all random: logits of base and adapter, and merged."""
    torch.manual_seed(0)
    model = peft.get_peft_model(open_hf(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        beside = model(torch.tensor([TOKENS])).logits[0].numpy()
        if not hasattr(model, "merge_and_unload"):
            return beside, beside
        merged = model.merge_and_unload()(torch.tensor([TOKENS])).logits[0].numpy()
    return beside, merged


LORA = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "lora_alpha": 3},
    "all, scaled by the root of r": {"target_modules": "all-linear", "use_rslora": True},
    "output head": {"target_modules": ["lm_head"], "lora_alpha": 16},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "ranks of their own": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 31},
    },
    "weight-decomposed": {"target_modules": ["k_proj", "down_proj"], "use_dora": True},
    "whole matrices beside it": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", LORA)
def test_merged_as_peft_merges(base: Path, tmp_path: Path, kind: str) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **LORA[kind])
    beside, merged = make_adapter(base, tmp_path / "adapter", config)
    plain = tinyllama.load(base).logits(TOKENS)
    found = tinyllama.load(tmp_path / "adapter").logits(TOKENS)
    largest = np.abs(beside).max()
    assert np.abs(found - beside).max() < 1e-5 * largest
    assert np.abs(found - merged).max() < 1e-5 * largest
    assert np.abs(found - plain).max() > 1e-2 * largest  # the adapter does something


def test_another_kind_of_adapter_that_merges(base: Path, tmp_path: Path) -> None:
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )  # fmt: skip
    beside, _ = make_adapter(base, tmp_path, config)
    found = tinyllama.load(tmp_path).logits(TOKENS)
    assert np.abs(found - beside).max() < 1e-5 * np.abs(beside).max()


def test_export_takes_the_base_that_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "model.gguf"
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    beside, _ = make_adapter(base, adapter, config)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": "someone/some-model"})
    )
    assert main(["export", str(adapter), "--out", str(out)]) == 2
    assert (
        "is 'someone/some-model', which is no Hugging Face folder here" in capsys.readouterr().err
    )
    assert main(["export", str(adapter), "--out", str(out), "--base", str(base)]) == 0
    found = tinyllama.load(out).logits(TOKENS)
    assert np.abs(found - beside).max() < 1e-5 * np.abs(beside).max()
    with pytest.raises(ArgumentError, match="base is given, but this is no adapter"):
        read_checkpoint(out, base=base)
    with pytest.raises(FormatError, match=r"model\.gguf: the adapter's base has to be"):
        read_checkpoint(adapter, base=out)


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"]])
def test_training_one_of_two_tied_matrices_is_refused(
    tied: Path, tmp_path: Path, modules: list[str]
) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=modules)
    make_adapter(tied, tmp_path, config)
    with pytest.raises(ExportError, match=r"computes something else .* that ties them"):
        read_checkpoint(tmp_path)


def test_what_cannot_be_merged_is_refused(base: Path, tied: Path, tmp_path: Path) -> None:
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    make_adapter(base, tmp_path / "prompts", prompts)
    with pytest.raises(FormatError, match="adapters of kind PROMPT_TUNING cannot be merged"):
        read_checkpoint(tmp_path / "prompts")

    adapter = tmp_path / "adapter"
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    make_adapter(base, adapter, config)
    deeper = tmp_path / "deeper"
    save_hf(tiny_checkpoint(n_layers=3), deeper)
    wider = tmp_path / "wider"
    save_hf(tiny_checkpoint(dim=40, head_dim=8), wider)
    with pytest.raises(FormatError, match=r"layers\.2\..* is missing, or nothing of"):
        read_checkpoint(adapter, base=deeper)
    with pytest.raises(FormatError, match=r"peft cannot put it onto .*wider.* lines more") as told:
        read_checkpoint(adapter, base=wider)
    assert "\n" not in str(told.value)

    source = adapter / "adapter_config.json"
    settings = json.loads(source.read_text())
    for change, message in (
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'; only CAUSAL_LM"),
        ({"peft_type": "SORCERY"}, "peft cannot put it onto"),
    ):
        source.write_text(json.dumps({**settings, **change}))
        with pytest.raises(FormatError, match=message):
            read_checkpoint(adapter)
    source.write_text(json.dumps(settings))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(FormatError, match="peft cannot put it onto"):
        read_checkpoint(adapter)
    weights.unlink()
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors is missing"):
        read_checkpoint(adapter)


def test_the_example_learns_completions_and_exports(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are random, completions all the same: only these can become likely."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("etaoin"), 6)) for _ in range(40)]
    pairs = [json.dumps({"prompt": word, "completion": " shrdlu"}) for word in words]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    script = ROOT / "examples" / "lora.py"
    arguments = [tied, tmp_path / "pairs.jsonl", "--out", tmp_path / "adapter", "--epochs", "8"]
    monkeypatch.setattr("sys.argv", list(map(str, [script, *arguments])))
    runpy.run_path(str(script), run_name="__main__")
    before = tinyllama.load(tied)
    after = tinyllama.load(tmp_path / "adapter")
    completion = before.tokenizer.encode("eta shrdlu")[4:]
    scores = []
    for model in (before, after):
        tokens = [*model.tokenizer.encode("eta"), *completion]
        logits = model.logits(tokens).astype(np.float64)
        chances = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        scores.append(sum(chances[i - 1, tokens[i]] for i in range(len(tokens) - 4, len(tokens))))
    assert scores[1] > scores[0] + 5

    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "eta" * 99, "completion": " o"}))
    arguments[3] = tmp_path / "none"
    monkeypatch.setattr("sys.argv", list(map(str, [script, *arguments])))
    with pytest.raises(SystemExit, match="no document has anything to learn"):
        runpy.run_path(str(script), run_name="__main__")
    assert not (tmp_path / "none").exists()
