"""Small questions of fact, of reasoning and of context, answered by likelihood.

After the factual, reasoning and context-tracking prompts of TinyStories (Eldan and Li 2023, arXiv
2305.07759), as choices, so that no judge is needed: the continuation with the higher
log-probability counts as the answer. The questions are our own and come in twins: the same two
choices, and a prompt that differs in what decides between them. Whoever only knows which choice is
more common gets just one of each twin right.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .intervals import Estimate, of_share

if TYPE_CHECKING:
    from ..model import Model

QUESTIONS = Path(__file__).with_name("cloze.json")


@dataclass(frozen=True)
class ClozeScore:
    """The share of ``n`` questions answered rightly, with Wilson's interval; ``chance``: the share
    that guessing gets; ``wrong``: prompt and right choice of the others."""

    accuracy: Estimate
    n: int
    chance: float
    wrong: tuple[str, ...]


def cloze(model: Model) -> dict[str, ClozeScore]:
    """The scores of the kinds of questions: factual, reasoning and context."""
    kinds = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    return {kind: _score(model, questions) for kind, questions in kinds.items()}


def _score(model: Model, questions: list[dict[str, Any]]) -> ClozeScore:
    wrong = []
    for question in questions:
        right, *others = model.score_choices(question["prompt"], question["choices"])
        if right.logprob <= max(other.logprob for other in others):
            wrong.append(f"{question['prompt']}{right.text}")
    n = len(questions)
    chance = sum(1 / len(question["choices"]) for question in questions) / n
    return ClozeScore(of_share(n - len(wrong), n), n, chance, tuple(wrong))
