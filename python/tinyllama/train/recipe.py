"""What a training run is made of: one dataclass, its TOML files and its presets."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..config import Config, RopeScaling
from ..errors import ConfigError, MissingExtraError

MAX_WEIGHT = 1000
# What samples begin with where neither the recipe nor held-out text says it.
PROMPTS = ("Once upon a time", "The little dog", "Lily found a")
# Settings that may differ between the parts of one run: they do not change what is learned.
FREE_SETTINGS = (
    "every_eval",
    "every_save",
    "every_sample",
    "keep_checkpoints",
    "device",
    "n_threads",
    "parallel",
    "activation_checkpointing",
    "prompts",
    "tensorboard",
    "energy",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run. ``model`` is the Config; one step sees ``tokens_per_step`` tokens.

    The learning rate rises linearly for ``warmup_steps``, then falls by ``schedule`` to
    ``final_lr_fraction`` of its peak at ``steps``. ``optimizer="muon"`` trains the matrices of the
    layers by Muon at ``muon_learning_rate`` and everything else by AdamW at ``learning_rate``.
    ``every_*`` count steps; 0 switches the thing off. With ``every_save``, what scores best so far
    is saved too. The last ``keep_checkpoints`` and the best stay; 0: all of them. ``init_from``
    names a run, or a model that ``load`` reads ("bundled": the one that ships), whose weights are
    the starting point. With ``epochs``, ``steps`` follows from the data, which are seen so many
    times, and the warm-up is a tenth of them at most. ``weights`` mixes the data: how often an
    epoch has the documents of a source, by its name; 1 unless given, 0.5 is half of them, 2.5 all
    of them twice and half once more (``batches.mixture``). With ``document_mask`` attention ends
    where a document begins, though a window holds several. ``dtype``, ``compile`` and ``device``
    "auto" mean: bf16 where the processor multiplies it natively, compiled where a compiler is found
    and, on a CPU, the run is of a million tokens or more, cuda before mps before cpu. ``prompts``
    (none: the beginnings of three held-out documents) are continued every ``every_sample`` steps,
    each with the same random numbers every time. ``tensorboard`` writes event files beside the
    metrics; ``energy``, a country's three letters or "world", has energy and CO2 equivalent
    estimated (``energy.EnergyMeter``).

    Processes that torchrun starts share each step's ``batch_size`` × ``grad_accum`` windows, at
    most ``batch_size`` at once; ``parallel`` says whether each holds the whole model ("ddp") or a
    share of it ("fsdp"). ``activation_checkpointing`` saves memory for a third more arithmetic.

    Raises ConfigError, naming field and value, when a value is out of range.
    """

    model: Config
    steps: int = 1000
    epochs: float = 0.0
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    batch_size: int = 16
    grad_accum: int = 1
    seq_len: int = 256
    optimizer: str = "adamw"
    learning_rate: float = 5e-4
    muon_learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    warmup_steps: int = 100
    schedule: str = "cosine"
    final_lr_fraction: float = 0.0
    dropout: float = 0.0
    document_mask: bool = False
    seed: int = 1
    every_eval: int = 500
    every_save: int = 500
    every_sample: int = 500
    keep_checkpoints: int = 2
    init_from: str = ""
    device: str = "auto"
    parallel: str = "ddp"
    activation_checkpointing: bool = False
    dtype: str = "auto"
    compile: str = "auto"
    n_threads: int = 0
    prompts: list[str] = dataclasses.field(default_factory=list)
    tensorboard: bool = False
    energy: str = ""

    def __post_init__(self) -> None:
        least = {
            "steps": 1, "batch_size": 1, "grad_accum": 1, "seq_len": 2, "warmup_steps": 0,
            "seed": 0, "every_eval": 0, "every_save": 0, "every_sample": 0,
            "keep_checkpoints": 0, "n_threads": 0,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from {low}")
        ranges = {
            "epochs": 1e4, "learning_rate": 1.0, "muon_learning_rate": 1.0, "weight_decay": 1.0,
            "grad_clip": math.inf, "final_lr_fraction": 1.0,
            "beta1": 0.99999, "beta2": 0.99999, "dropout": 0.99,
        }  # fmt: skip
        for name, high in ranges.items():
            _check_number(name, getattr(self, name), high)
        if self.grad_clip == 0:
            raise ConfigError("grad_clip is 0; it must be larger: nothing would be learned")
        if not isinstance(self.weights, dict):
            raise ConfigError(f"weights is {self.weights!r}; it must be a section of numbers")
        for name, value in self.weights.items():
            _check_number(f"weights.{name}", value, MAX_WEIGHT)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("activation_checkpointing", "document_mask", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if not isinstance(self.init_from, str):
            raise ConfigError(f"init_from is {self.init_from!r}; it must be a path")
        prompts = self.prompts
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise ConfigError(f"prompts is {prompts!r}; it must be a list of texts")
        if not isinstance(self.energy, str):
            raise ConfigError(f'energy is {self.energy!r}; it must be a country or "world"')
        if self.seq_len > self.model.max_seq_len:
            raise ConfigError(
                f"seq_len ({self.seq_len}) is larger than model.max_seq_len"
                f" ({self.model.max_seq_len})"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, which averages their loss, masked ones left out."""
        return self.batch_size * self.grad_accum * self.seq_len

    def for_windows(self, windows_per_epoch: int) -> Recipe:
        """The recipe with the steps that ``epochs``, if given, are on so much data."""
        if not self.epochs:
            return self
        per_step = self.batch_size * self.grad_accum
        steps = math.ceil(self.epochs * windows_per_epoch / per_step)
        return dataclasses.replace(self, steps=steps).with_short_warmup()

    def with_short_warmup(self) -> Recipe:
        """The recipe with a warm-up of a tenth of its steps at most: then its rate is reached."""
        return dataclasses.replace(self, warmup_steps=min(self.warmup_steps, self.steps // 10))

    def lr_fraction(self, step: int) -> float:
        """The learning rate of step ``step`` (from 0) as a fraction of its peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        left = 1.0 - done if self.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
        if self.schedule == "constant":
            left = 1.0
        return self.final_lr_fraction + (1.0 - self.final_lr_fraction) * left

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as in the TOML file; ``recipe_from_dict`` reads them back."""
        return dataclasses.asdict(self)


def _check_number(name: str, value: object, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} is {value!r}; it must be a number")
    if not 0.0 <= value <= high:
        raise ConfigError(f"{name} is {value}; it must be in [0, {high}]")


def flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values, as ``to_dict`` gives them, by the names that ``--set`` takes."""
    model = {f"model.{field}": value for field, value in recipe["model"].items()}
    return {key: value for key, value in recipe.items() if key != "model"} | model


CHOICES = {
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear", "constant"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "parallel": ("ddp", "fsdp"),
    "dtype": ("auto", "f32", "bf16"),
    "compile": ("auto", "yes", "no"),
}


def recipe_from_dict(
    values: Mapping[str, Any],
    source: str = "recipe",
    settings: Iterable[str] = (),
    fast: bool = False,
) -> Recipe:
    """A Recipe from nested plain values, changed by ``settings`` (each ``key=value``).

    A section ``fast`` has what other values learn the same from fewer tokens; they count where
    ``fast`` is asked for. Steps that are set take the place of the recipe's epochs, and its warm-up
    becomes a tenth of them at most. Raises ConfigError for unknown or missing keys.
    """
    values, settings = dict(values), list(settings)
    faster = values.pop("fast", {})
    if not isinstance(faster, Mapping):
        raise ConfigError(f"{source}: fast is {faster!r}, not a section")
    if "model" in faster:
        raise ConfigError(f"{source}: fast.model: the faster way is one to the same model")
    if fast and not faster:
        raise ConfigError(f"{source} has no [fast] section")
    values = _with_settings({**values, **faster} if fast else values, settings)
    changed = {setting.partition("=")[0].strip() for setting in settings}
    if {"steps", "epochs"} <= changed and values["epochs"]:
        raise ConfigError(f"{source}: steps and epochs are both set; either says how long it is")
    if "steps" in changed:
        values["epochs"] = 0.0
    model = values.pop("model", None)
    if not isinstance(model, Mapping):
        raise ConfigError(f"{source}: the section [model] is missing")
    model = dict(model)
    scaling = model.pop("rope_scaling", None)
    check_keys(values, Recipe, "", source)
    _check_section(model, Config, "model.", source)
    if scaling is not None:
        if not isinstance(scaling, Mapping):
            raise ConfigError(f"{source}: model.rope_scaling is {scaling!r}, not a section")
        _check_section(scaling, RopeScaling, "model.rope_scaling.", source)
    try:
        if scaling is not None:
            model["rope_scaling"] = RopeScaling(**scaling)
        recipe = Recipe(model=Config(**model), **values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    short = "steps" in changed and "warmup_steps" not in changed
    return recipe.with_short_warmup() if short else recipe


def load_recipe(path: str | Path, settings: Iterable[str] = (), fast: bool = False) -> Recipe:
    """Read a TOML recipe and change it by ``settings``, each ``key=value`` or ``model.key=value``.

    Raises OSError when the file cannot be read, ConfigError when it is not a recipe.
    """
    return recipe_from_dict(read_toml_file(path), str(path), settings, fast)


def load_preset(name: str, settings: Iterable[str] = (), fast: bool = False) -> Recipe:
    """The recipe of that name among those in this package; see :func:`preset_names`."""
    names = preset_names()
    if name not in names:
        raise ConfigError(f"no preset {name!r}{_nearest(name, names)}; known: {', '.join(names)}")
    source = f"preset {name}"
    file = resources.files(__package__) / "presets" / f"{name}.toml"
    values = read_toml(file.read_text(encoding="utf-8"), source)
    return recipe_from_dict(values, source, settings, fast)


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    files = (resources.files(__package__) / "presets").iterdir()
    return sorted(file.name[: -len(".toml")] for file in files if file.name.endswith(".toml"))


def _with_settings(values: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    changed = copy.deepcopy(dict(values))
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {setting!r} is not of the form key=value")
        section = changed
        *parents, last = key.strip().split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--set {setting!r}: {parent!r} is not a section")
        section[last] = _read_value(value.strip())
    return changed


def _read_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none (``device=cpu`` without quotes)."""
    try:
        return read_toml(f"value = {text}", "--set")["value"]
    except ConfigError:
        return text


def read_toml_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a TOML file holds. Raises OSError, and ConfigError when it is not TOML."""
    try:
        return read_toml(Path(path).read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def read_toml(text: str, source: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise MissingExtraError("tomli", "train") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from None


def check_keys(values: Mapping[str, Any], kind: type, prefix: str, source: str) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            hint = _nearest(key, known, prefix)
            raise ConfigError(f"{source}: unknown key {prefix + key!r}{hint}")


def _check_section(values: Mapping[str, Any], kind: type, prefix: str, source: str) -> None:
    check_keys(values, kind, prefix, source)
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ConfigError(f"{source}: {prefix}{field.name} is missing")


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""
