"""Stories told by a model, and what can be measured of them without a judge.

Words are those of :func:`tinyllama.words.words`. All measures are of what the model wrote, without
the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import MissingExtraError
from ..generation import Completion, OnDone
from ..sampling import SamplingParams
from ..words import words
from .intervals import Estimate, of_prompts

if TYPE_CHECKING:
    from ..model import Model

SENTENCE_END = tuple(".!?…。！？")
CLOSING = "\"'”’»」』)*_"
MAX_BLEU_TEXTS = 100  # the work grows with the square, and so does self-BLEU with the number


@dataclass(frozen=True)
class StoryMeasures:
    """What :func:`measure` finds.

    ``ends``: the share of texts that the model itself ended, and with a sentence. ``words``: per
    text. ``repetition``: 1 - distinct 4-grams / 4-grams of words within a text (seq-rep-4 of
    Welleck et al. 2020, arXiv 1908.04319). ``distinct``: distinct n-grams / n-grams of all texts
    together, for n = 1, 2, 3 (Li et al. 2016, arXiv 1510.03055). ``self_bleu``: the mean BLEU-4,
    0 to 1, of a text against all the others (Zhu et al. 2018, arXiv 1802.01886); None for one text.
    The last two depend on how many texts there are.
    """

    ends: Estimate | None
    words: Estimate | None
    repetition: Estimate | None
    distinct: tuple[float, float, float]
    self_bleu: float | None


def tell(
    model: Model, prompts: Sequence[str], params: SamplingParams, on_done: OnDone | None = None
) -> list[list[Completion]]:
    """``params.num_return_sequences`` completions of every prompt, until the model ends them or
    the context is full."""
    groups = model.complete(list(prompts), params=params, on_done=on_done)
    return [group if isinstance(group, list) else [group] for group in groups]


def measure(groups: Sequence[Sequence[Completion]]) -> StoryMeasures:
    """The measures of the completions of each prompt. Raises MissingExtraError (sacrebleu)."""
    spelled = [[words(story.text) for story in group] for group in groups]
    texts = [text for group in spelled for text in group]
    return StoryMeasures(
        ends=of_prompts([[float(ends_properly(story)) for story in group] for group in groups]),
        words=of_prompts([[float(len(text)) for text in group] for group in spelled]),
        repetition=of_prompts(
            [[repetition(text) for text in group if len(text) >= 4] for group in spelled]
        ),
        distinct=(distinct(texts, 1), distinct(texts, 2), distinct(texts, 3)),
        self_bleu=self_bleu(texts),
    )


def ends_properly(story: Completion) -> bool:
    """Whether the model ended this text itself, and with a sentence."""
    text = story.text.rstrip().rstrip(CLOSING)
    return story.finish_reason == "stop" and text.endswith(SENTENCE_END)


def repetition(text: Sequence[str], n: int = 4) -> float:
    """The share of a text's n-grams that repeat an earlier one; 0 for a text without n-grams."""
    return 1 - distinct([text], n) if len(text) >= n else 0.0


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Distinct n-grams over n-grams of all texts together; 0 where there are none."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: Sequence[Sequence[str]]) -> float | None:
    """Mean BLEU-4 of a text against all others, of at most 100 that stand at even distances."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise MissingExtraError("sacrebleu", "eval") from None
    step = -(-len(texts) // MAX_BLEU_TEXTS)
    chosen = [" ".join(text) for text in texts[::step] if text] if texts else []
    if len(chosen) < 2:
        return None
    bleu = BLEU(tokenize="none", effective_order=True)
    scores = [
        bleu.sentence_score(text, chosen[:i] + chosen[i + 1 :]).score
        for i, text in enumerate(chosen)
    ]
    return float(sum(scores) / len(scores) / 100)
