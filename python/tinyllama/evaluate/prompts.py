"""Beginnings of stories: those that ship, those of a file, and documents cut in two."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, FormatError, MissingExtraError
from ..words import UNSPACED

if TYPE_CHECKING:
    from ..model import Model

SHIPPED = Path(__file__).with_name("prompts.json")
LEAST_WORDS = 20  # of a document that is cut
_WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")  # with the punctuation beside it


@dataclass(frozen=True)
class Prompts:
    """Beginnings of stories, and the rule by which they came about, which is kept with a score."""

    texts: tuple[str, ...]
    rule: str

    def some(self, n: int, seed: int) -> Prompts:
        """``n`` of them, drawn by ``seed``, in their order; all where there are no more."""
        if n >= len(self.texts):
            return self
        drawn = sorted(random.Random(seed).sample(range(len(self.texts)), n))
        rule = f"{self.rule}; {n} of {len(self.texts)} drawn by seed {seed}"
        return replace(self, texts=tuple(self.texts[i] for i in drawn), rule=rule)

    def check(self, model: Model) -> None:
        """Raise ArgumentError, naming the first, for a prompt that leaves the context no room."""
        context = model.config.max_seq_len
        for number, text in enumerate(self.texts, 1):
            n_tokens = len(model.tokenizer.encode(text))
            if n_tokens >= context:
                raise ArgumentError(
                    f"prompt {number} has {n_tokens} tokens, and the context holds {context}:"
                    f" {text[:40]!r}…"
                )


def shipped() -> Prompts:
    """The 40 beginnings that ship with the package."""
    return replace(read_prompts(SHIPPED), rule="the beginnings that ship, whole")


def read_prompts(path: str | os.PathLike[str]) -> Prompts:
    """The prompts of a file, less white space at their ends: one a line in a ``.txt``; in a
    ``.json`` or ``.yaml`` a list of strings, or an object of such lists.

    Raises OSError, FormatError for anything else, MissingExtraError where PyYAML is missing.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            found = _parse_yaml(text)
        elif path.suffix == ".json":
            found = json.loads(text)
        else:
            found = [line for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None
    lists = list(found.values()) if isinstance(found, dict) else [found]
    if not all(isinstance(one, list) for one in lists):
        raise FormatError(f"{path}: holds neither a list of prompts nor an object of such lists")
    prompts = [prompt for one in lists for prompt in one]
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str) or not prompt.strip():
            raise FormatError(f"{path}: prompt {number} is {prompt!r}, expected text")
    if not prompts:
        raise FormatError(f"{path}: holds no prompts")
    return Prompts(tuple(prompt.strip() for prompt in prompts), f"{path.name}, whole")


def cut_documents(model: Model, documents: Iterable[tuple[str, str]], seed: int) -> Prompts:
    """The beginnings of documents (where, text): 40 to 60 % of the words of each, drawn by
    ``seed``, of those with at least 20 words that fit into the model's context as a whole.

    Raises ArgumentError when there are none.
    """
    chance = random.Random(seed)
    texts = []
    for _, text in documents:
        ends = [word.end() for word in _WORD.finditer(text)]
        n_words = round(chance.uniform(0.4, 0.6) * len(ends))
        if len(ends) < LEAST_WORDS or len(model.tokenizer.encode(text)) > model.config.max_seq_len:
            continue
        texts.append(text[: ends[n_words - 1]])
    if not texts:
        raise ArgumentError(
            f"no document has at least {LEAST_WORDS} words and fits into the context"
            f" of {model.config.max_seq_len} tokens: such are needed to be cut in two"
        )
    return Prompts(tuple(texts), f"40 to 60 % of each document's words, by seed {seed}")


def _parse_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise MissingExtraError("pyyaml", "eval") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None
