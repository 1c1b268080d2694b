"""What is known of a model to be published: its run has it on record, or its author states it."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError
from ..formats.hf_tokenizer import read_json
from .metrics import read_records
from .recipe import check_keys, read_toml_file


@dataclasses.dataclass(frozen=True)
class Statement:
    """What only the author of a model can say. All of it may be left out.

    ``name``: of the model, else the folder's. ``description`` and ``limits`` are Markdown.
    ``languages``: codes, such as "pt". ``license``, ``datasets``, ``base_model``: as the hub spells
    them, such as "apache-2.0" and "roneneldan/TinyStories". ``authors``, ``year`` and ``url`` make
    the citation. Samples continue each of the ``prompts`` ``samples`` times; of an empty prompt the
    model begins by itself.

    Raises ConfigError, naming field and value, when a value is of the wrong kind.
    """

    name: str = ""
    description: str = ""
    languages: list[str] = dataclasses.field(default_factory=list)
    license: str = ""
    datasets: list[str] = dataclasses.field(default_factory=list)
    base_model: str = ""
    tags: list[str] = dataclasses.field(default_factory=list)
    authors: list[str] = dataclasses.field(default_factory=list)
    year: int = 0
    url: str = ""
    limits: str = ""
    prompts: list[str] = dataclasses.field(default_factory=lambda: [""])
    samples: int = 10

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                right = isinstance(value, int) and not isinstance(value, bool) and value >= 0
                kind = "a whole number from 0"
            elif field.type == "str":
                right, kind = isinstance(value, str), "text"
            else:
                right = isinstance(value, list) and all(isinstance(one, str) for one in value)
                kind = "a list of texts"
            if not right:
                raise ConfigError(f"{field.name} is {value!r}; it must be {kind}")
        for code in self.languages:
            if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code", code):
                raise ConfigError(f"languages has {code!r}; expected codes of ISO 639, such as pt")

    def missing(self, run: Run | None) -> list[str]:
        """The names of what a published model of that run should have stated, and has not."""
        wanted = ["description", "languages", "license", "datasets", "authors", "year", "limits"]
        if run and run.start:
            wanted.append("base_model")
        missing = [name for name in wanted if not getattr(self, name)]
        return missing + ["prompts"] * (run is not None and run.has_pairs and self.prompts == [""])


def read_statement(path: str | os.PathLike[str]) -> Statement:
    """Read a TOML file with fields of :class:`Statement`.

    Raises OSError when it cannot be read, ConfigError when it is no TOML, has an unknown field, or
    one of the wrong kind.
    """
    values = read_toml_file(path)
    check_keys(values, Statement, "", str(path))
    try:
        return Statement(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Run:
    """What is on record of the training that made a checkpoint.

    ``state``: its ``trainer.json``. ``records``: those of ``metrics.jsonl`` up to its step;
    ``later``: the validations after it.
    """

    state: dict[str, Any]
    records: list[dict[str, Any]]
    later: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def recipe(self) -> dict[str, Any]:
        recipe: dict[str, Any] = self.state["recipe"]
        return recipe

    @property
    def start(self) -> str:
        """The name of the model that the training went on from; empty of a new one."""
        start = str(self.recipe.get("init_from") or "")
        return "the model that ships with tinyllama" if start == "bundled" else Path(start).name

    @property
    def has_pairs(self) -> bool:
        """Whether it learned to complete prompts."""
        return bool(self.state.get("data", {}).get("train", {}).get("pairs"))

    @property
    def tokens_per_step(self) -> int:
        sizes = ("batch_size", "grad_accum", "seq_len")
        return math.prod(int(self.recipe[size]) for size in sizes)

    def latest(self, field: str) -> Any:
        """The newest value on record, or None."""
        return next((r[field] for r in reversed(self.records) if r.get(field) is not None), None)

    def scores(self) -> list[dict[str, Any]]:
        """The validations, each with all that is on record up to its step."""
        known: dict[str, Any] = {}
        found = []
        for record in self.records:
            known |= record
            if "valid_nats" in record:
                found.append(dict(known))
            elif found and found[-1]["step"] == record["step"]:
                found[-1] |= record
        return found

    @property
    def score(self) -> dict[str, Any] | None:
        """The validation of this very checkpoint."""
        return next((s for s in self.scores() if s["step"] == self.state["step"]), None)

    @property
    def metered_steps(self) -> int:
        """Of how many of its steps the energy on record is."""
        metered = self.latest("metered_steps")
        return int(self.state["step"] if metered is None else metered)

    @property
    def tokens_per_epoch(self) -> float:
        """0 where it is not on record."""
        if known := self.latest("tokens_per_epoch"):
            return float(known)
        if self.has_pairs:  # their padding is not
            return 0.0
        sources = self.state.get("data", {}).get("train", {}).get("sources", [])
        weights = self.recipe.get("weights", {})
        return math.fsum(s["tokens"] * weights.get(s["name"], 1.0) for s in sources)


def read_run(folder: Path) -> Run | None:
    """The run of a checkpoint's folder, or None where no run is on record.

    Raises OSError and FormatError when what is there cannot be read.
    """
    if not (folder / "trainer.json").is_file():
        return None
    state = read_json(folder / "trainer.json")
    if not isinstance(state.get("recipe"), dict) or not isinstance(state.get("step"), int):
        raise FormatError(f"{folder / 'trainer.json'}: damaged: recipe or step is missing")
    records = []
    if (folder.parent / "metrics.jsonl").is_file():
        records = read_records(folder.parent)
    until = [r for r in records if r["step"] <= state["step"]]
    later = [r for r in records if r["step"] > state["step"] and "bits_per_byte" in r]
    return Run(state, until, later)
