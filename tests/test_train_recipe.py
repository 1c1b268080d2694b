"""Recipes: presets, TOML, --set, and errors that name the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyllama.errors import ConfigError
from tinyllama.train.recipe import load_preset, load_recipe, preset_names, recipe_from_dict

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
    ("name", "millions"),
    [("stories260k", 0.26), ("stories1m", 1.0), ("stories15m", 15.2), ("stories42m", 41.7),
     ("stories110m", 109.5)],
)  # fmt: skip
def test_presets_have_the_size_of_their_name(name: str, millions: float) -> None:
    parameters = load_preset(name).model.n_parameters / 1e6
    assert parameters == pytest.approx(millions, rel=0.07)


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
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, setting: str, message: str) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(path, [setting])
    assert "small.toml" in str(caught.value) or "--set" in str(caught.value)


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
