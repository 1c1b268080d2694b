"""Recipes: presets, TOML, --set, and errors that name the nearest key."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinyllama.cli import main
from tinyllama.errors import ConfigError
from tinyllama.train import sizing
from tinyllama.train.batches import TokenFolder
from tinyllama.train.checkpoint import find_checkpoint, load_state
from tinyllama.train.metrics import read_records, series
from tinyllama.train.model import Llama
from tinyllama.train.recipe import (
    FREE_SETTINGS,
    Recipe,
    load_preset,
    load_recipe,
    preset_names,
    read_toml,
    recipe_from_dict,
)
from tinyllama.train.sizing import parse_size, sized_recipe, tuned_recipe

SMALL = """\
steps = 10
seq_len = 8
[model]
dim = 16
n_layers = 1
n_heads = 2
vocab_size = 300
max_seq_len = 8
"""


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("stories260k", 260_032), ("stories15m", 15_191_712), ("stories42m", 41_689_600),
     ("stories110m", 109_529_856), ("stories-zh-93m", 93_340_416), ("ttl-160m", 162_417_408),
     ("ttl-460m", 468_239_360)],
)  # fmt: skip
def test_presets_have_exactly_the_parameters_on_record(name: str, parameters: int) -> None:
    model = load_preset(name).model
    assert model.n_parameters == parameters
    with torch.device("meta"):
        built = Llama(model)
    assert sum(p.numel() for p in built.parameters()) == parameters
    tokens = torch.zeros(2, 16, dtype=torch.long, device="meta")
    logits = built.to("meta")(tokens)
    assert logits.shape == (2, 16, model.vocab_size)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in built.parameters())


def test_stories1m_has_the_size_of_its_name() -> None:
    assert load_preset("stories1m").model.n_parameters == pytest.approx(1e6, rel=0.07)


@pytest.mark.parametrize("size", ["260K", "1M", "3M", "15M", "42M", "110M", "460M", "1.1B"])
@pytest.mark.parametrize("vocab_size", [512, 3000, 32000])
def test_a_size_becomes_a_recipe(size: str, vocab_size: int) -> None:
    parameters = parse_size(size)
    if parameters < 100 * vocab_size:
        with pytest.raises(ConfigError, match="or a smaller tokenizer"):
            sized_recipe(parameters, vocab_size, 10**9)
        return
    recipe = sized_recipe(parameters, vocab_size, 10**9)
    assert recipe.model.n_parameters == pytest.approx(parameters, rel=0.11)
    assert recipe.model.head_dim in (32, 64)
    assert recipe_from_dict(recipe.to_dict()) == recipe
    tokens = recipe.steps * recipe.tokens_per_step
    assert tokens == pytest.approx(min(20 * parameters, 4 * 10**9), rel=0.01)


def test_a_size_on_little_text_reads_it_four_times() -> None:
    recipe = sized_recipe(3_000_000, 2048, 5_000_000)
    assert recipe.steps * recipe.tokens_per_step == pytest.approx(20_000_000, rel=0.01)


def test_sizes_of_llama2c_get_its_shapes() -> None:
    for size, name in (("15M", "stories15m"), ("42M", "stories42m"), ("110M", "stories110m")):
        ours, theirs = sized_recipe(parse_size(size), 32000, 10**9).model, load_preset(name).model
        assert (ours.dim, ours.n_layers) == (theirs.dim, theirs.n_layers)
        assert ours.hidden_dim == theirs.hidden_dim


@pytest.mark.parametrize("text", ["", "3", "3MB", "-3M", "0.01M", "5B", "many"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="it must be from 100K to 2B"):
        parse_size(text)


def test_weights_are_a_section(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(SMALL + "[weights]\nstories = 3\nold-books = 0.5\n")
    recipe = load_recipe(tmp_path / "a.toml", ["weights.old-books=2"])
    assert recipe.weights == {"stories": 3, "old-books": 2}
    assert recipe_from_dict(recipe.to_dict()) == recipe
    for setting, message in (
        ("weights=3", "weights is 3; it must be a section of numbers"),
        ("weights.stories=many", "weights.stories is 'many'; it must be a number"),
        ("weights.stories=-1", r"weights.stories is -1; it must be in \[0, 1000\]"),
        ("weights.stories=nan", "weights.stories is nan; it must be in"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_recipe(tmp_path / "a.toml", [setting])


def test_epochs_become_steps() -> None:
    recipe = load_preset("stories-zh-93m")
    assert recipe.for_windows(1000).steps == 125
    assert recipe.for_windows(1001).steps == 126  # every window three times at least
    assert load_preset("stories15m").for_windows(1000).steps == 100_000


def test_a_short_run_reaches_its_rate(tmp_path: Path) -> None:
    recipe = tuned_recipe(load_preset("stories260k").model, "bundled")
    assert recipe.for_windows(10_000).warmup_steps == recipe.warmup_steps == 20
    short = recipe.for_windows(int(recipe.batch_size * 30 / recipe.epochs))
    assert (short.steps, short.warmup_steps) == (30, 3)
    assert max(map(short.lr_fraction, range(30))) == 1.0
    assert short.for_windows(int(recipe.batch_size * 30 / recipe.epochs)) == short


def test_steps_that_are_set_take_the_place_of_epochs() -> None:
    values = tuned_recipe(load_preset("stories260k").model, "bundled").to_dict()
    assert values["epochs"] == 2.0
    recipe = recipe_from_dict(values, settings=["steps=40"])
    assert recipe.for_windows(10_000).steps == 40 and recipe.warmup_steps == 4
    assert recipe_from_dict(values, settings=["steps=40", "warmup_steps=30"]).warmup_steps == 30
    assert recipe_from_dict(values, settings=["steps=40", "epochs=0"]).steps == 40
    assert recipe_from_dict(values, settings=["epochs=3"]).epochs == 3.0
    with pytest.raises(ConfigError, match="steps and epochs are both set"):
        recipe_from_dict(values, settings=["epochs=3", "steps=40"])


def test_a_size_of_few_steps_reaches_its_rate(tokens: Path, tmp_path: Path) -> None:
    few = "--set steps=10 --set every_eval=0 --set every_sample=0 --set compile=no"
    command = f"train --size 100K {few} --data {tokens} --out {tmp_path / 'run'}"
    assert main(command.split()) == 0
    rates = series(read_records(tmp_path / "run"), "learning_rate")[0]
    assert rates[-1] == pytest.approx(0.1 / 0.9 * sized_recipe(10**5, 300, 10**5).learning_rate)
    assert load_state(find_checkpoint(tmp_path / "run")).recipe["warmup_steps"] == 1


def test_what_is_due_when_follows_the_steps_that_are_set() -> None:
    own, set_ = (sized_recipe(3_000_000, 2048, 5_000_000, steps) for steps in (0, 1000))
    assert set_.steps == 1000 and own.steps > 2000
    spaced = {"every_eval": 100, "every_sample": 100, "every_save": 50}
    assert dataclasses.replace(own, steps=1000, **spaced) == set_  # all else stays
    odd = sized_recipe(3_000_000, 2048, 5_000_000, 1001)
    assert odd.every_eval == 101 and 1001 - 9 * 101 > 50  # none is due just before the last
    assert sized_recipe(3_000_000, 2048, 5_000_000, 120).every_eval == 50


def test_training_without_torch_names_the_extra(tokens: Path, tmp_path: Path) -> None:
    arguments = ["train", "--size", "100K", "--data", str(tokens), "--out", str(tmp_path / "run")]
    for recipe in (["--size", "100K"], ["--from", "bundled"], ["--resume"]):
        arguments[1:-4] = recipe
        script = (
            "import sys; sys.modules['torch'] = None; from tinyllama.cli import main;"
            f" sys.exit(main({arguments!r}))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr, recipe
        assert 'pip install ".[train]"' in done.stderr, recipe


def test_a_size_is_for_the_text_that_the_weights_leave(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((tokens / "manifest.json").read_text())
    n = sum(shard["documents"] for shard in manifest["splits"]["train"]["shards"])
    manifest["splits"]["train"]["sources"] = [
        {"name": "a", "documents": 30, "tokens": 1},
        {"name": "b", "documents": n - 30, "tokens": 1},
    ]
    shutil.copytree(tokens, tmp_path / "tokens")
    (tmp_path / "tokens" / "manifest.json").write_text(json.dumps(manifest))
    lengths = TokenFolder(tmp_path / "tokens").split("train").length
    seen = []
    sized = sizing.sized_recipe
    monkeypatch.setattr(sizing, "sized_recipe", lambda *args: seen.append(args[2]) or sized(*args))
    few = "--set steps=1 --set every_eval=0 --set compile=no --set weights.b=0"
    command = f"train --size 100K {few} --data {tmp_path / 'tokens'} --out {tmp_path / 'run'}"
    assert main(command.split()) == 0
    assert seen[-1] == lengths[:30].sum() < lengths.sum()


def test_the_help_names_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in preset_names() if not name.startswith("bundled_"))
    assert "bundled_1" not in said and "docs/recipes.md" in said


def test_every_preset_loads_and_survives_a_round_trip() -> None:
    for name in preset_names():
        recipe = load_preset(name)
        assert recipe_from_dict(recipe.to_dict()) == recipe


def test_stories15m_is_the_recipe_on_record() -> None:
    recipe = load_preset("stories15m")
    assert recipe.tokens_per_step == 131_072
    assert (recipe.learning_rate, recipe.beta1, recipe.beta2) == (5e-4, 0.9, 0.95)
    assert (recipe.weight_decay, recipe.grad_clip, recipe.warmup_steps) == (0.1, 1.0, 1000)
    assert (recipe.model.dim, recipe.model.n_layers, recipe.model.n_heads) == (288, 6, 6)


def test_settings_change_values_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    recipe = load_recipe(path, ["steps=20", "model.dim=32", "device=cpu", "learning_rate=1e-3"])
    assert (recipe.steps, recipe.model.dim, recipe.device) == (20, 32, "cpu")
    assert recipe.learning_rate == 1e-3 and recipe.model.head_dim == 16


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("learning_rat=1", "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("model.dimm=1", "unknown key 'model.dimm'; did you mean 'model.dim'"),
        ("model.rope_scaling.kindd='linear'", "did you mean 'model.rope_scaling.kind'"),
        ("steps", "not of the form key=value"),
        ("steps.x=1", "'steps' is not a section"),
        ("steps=0", "steps is 0"),
        ("steps=1.5", "steps is 1.5"),
        ("batch_size=-1", "batch_size is -1"),
        ("dropout=1.0", "dropout is 1.0"),
        ("learning_rate=nan", "learning_rate is nan"),
        ("grad_clip=0", "grad_clip is 0"),
        ("optimizer=adam", "optimizer is 'adam'; known: adamw, muon"),
        ("seq_len=9", r"seq_len \(9\) is larger than model.max_seq_len"),
        ("model.n_heads=3", "not divisible by n_heads"),
        ("model.rope_theta=high", "rope_theta is 'high'; it must be a number"),
        ("model.tie_embeddings=no", "tie_embeddings is 'no'; it must be true or false"),
        ("model.rope_scaling.kind='linear'", "model.rope_scaling.factor is missing"),
        ("model.rope_scaling={kind='linear',factor='2'}", "rope_scaling.factor is '2'; it must be"),
        ("model.rope_scaling={kind='linear',factor=0}", "rope_scaling.factor is 0; it must be at"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, setting: str, message: str) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(path, [setting])
    assert "small.toml" in str(caught.value) or "--set" in str(caught.value)


def test_fast_values_count_where_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SMALL.replace("[model]", "[fast]\nsteps = 7\ndocument_mask = true\n[model]"))
    assert load_recipe(path).steps != 7 and not load_recipe(path).document_mask
    assert load_recipe(path, fast=True).steps == 7 and load_recipe(path, fast=True).document_mask
    assert load_recipe(path, ["steps=9"], fast=True).steps == 9
    path.write_text(SMALL + "[fast.model]\ndim = 32\n")
    with pytest.raises(ConfigError, match=r"small\.toml: fast\.model"):
        load_recipe(path)
    path.write_text(SMALL)
    with pytest.raises(ConfigError, match=r"small\.toml has no \[fast\] section"):
        load_recipe(path, fast=True)
    path.write_text("fast = 3\n" + SMALL)
    with pytest.raises(ConfigError, match=r"small\.toml: fast is 3, not a section"):
        load_recipe(path, fast=True)


def test_fast_belongs_to_a_recipe_with_such_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert main(["train", "--size", "1M", "--fast", "--data", str(tmp_path), "--out", out]) == 2
    assert "--fast takes the [fast] section of a --preset" in capsys.readouterr().err


def test_missing_parts_and_unknown_presets_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no preset 'stories15'; did you mean 'stories15m'"):
        load_preset("stories15")
    with pytest.raises(ConfigError, match=r"\[model\] is missing"):
        recipe_from_dict({"steps": 3})
    with pytest.raises(ConfigError, match=r"model\.dim is missing"):
        recipe_from_dict({"model": {"n_layers": 1}})
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML"):
        load_recipe(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_bytes("título = 1".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML: 'utf-8' codec"):
        load_recipe(tmp_path / "bad.toml")


def test_the_page_of_recipes_has_every_key_and_its_default(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/recipes.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "my.toml").write_text(example)
    assert load_recipe(tmp_path / "my.toml", fast=True).steps == 600
    rows = dict(re.findall(r"^\| `(\w+)` \| (?:`(.*?)`|.*?) \|", page, re.MULTILINE))
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert sorted(rows) == sorted(fields - {"model", "weights"})
    plain = Recipe(load_preset("stories1m").model)
    for name, default in rows.items():
        if default:
            assert read_toml(f"value = {default}", name)["value"] == getattr(plain, name), name
    (free,) = re.findall(r"what is learned: (.*?)\. Everything", page, re.DOTALL)
    assert re.findall(r"`(\w+)`", free) == list(FREE_SETTINGS)
