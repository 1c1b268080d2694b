"""A recipe for a number of parameters and a text: shape, learning rates, batch and steps."""

from __future__ import annotations

import math
import re

from ..config import Config
from ..errors import ConfigError
from .recipe import Recipe

# Of a model's text: what compute is best spent on (20 tokens for each parameter, Hoffmann et al.,
# arXiv 2203.15556), but no text more often than repetition still helps (four times, Muennighoff et
# al., arXiv 2305.16264), unless it is so little that nothing would be learned.
TOKENS_PER_PARAMETER = 20
MOST_EPOCHS = 4
LEAST_STEPS = 200
# Tokens of context, and below how many million parameters.
CONTEXTS = ((256, 20), (512, 60), (1024, 500), (2048, 2001))
UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}


def parse_size(text: str) -> int:
    """ "3M" -> 3,000,000. Raises ConfigError for what is no number from 100K to 2B."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper())
    size = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if not 100_000 <= size <= 2_000_000_000:
        raise ConfigError(f"size is {text!r}; it must be from 100K to 2B, such as 260K, 3M or 1.1B")
    return size


def sized_recipe(size: int, vocab_size: int, n_tokens: int, steps: int = 0) -> Recipe:
    """The recipe of a model of about ``size`` parameters for a text of ``n_tokens`` an epoch, of as
    many steps as suit it, or of so many ``steps``, by which validations are then spaced.

    Layers of the proportions that small Llamas have (a width of 32 times their number at a million
    parameters, 64 times at a hundred), trained by Muon with learning rates that fall slowly with
    the size: those at 1M and 5M were found by trial on stories (docs/training_log.md), the others
    follow from them. Documents do not see one another. Raises ConfigError when the embedding would
    be nearly all of it.
    """
    model = _shape(size, vocab_size)
    millions = size / 1e6
    tokens = min(TOKENS_PER_PARAMETER * size, MOST_EPOCHS * n_tokens)
    rows = max(1, min(16, 8192 // model.max_seq_len // 2))
    tokens_per_step = 4096 * math.sqrt(max(1.0, millions))
    grad_accum = max(1, round(tokens_per_step / (rows * model.max_seq_len)))
    suited = max(LEAST_STEPS, round(tokens / (rows * model.max_seq_len * grad_accum)))
    steps = steps or suited
    return Recipe(
        model=model,
        steps=steps,
        batch_size=rows,
        grad_accum=grad_accum,
        seq_len=model.max_seq_len,
        optimizer="muon",
        learning_rate=_rounded(4e-3 * millions**-0.15),
        muon_learning_rate=_rounded(0.01 * millions**-0.12),
        schedule="linear",
        warmup_steps=max(20, suited // 50),
        document_mask=True,
        every_eval=max(50, math.ceil(steps / 10)),
        every_save=max(50, math.ceil(steps / 20)),
        every_sample=max(50, math.ceil(steps / 10)),
    )


def tuned_recipe(model: Config, init_from: str) -> Recipe:
    """The recipe that goes on with a trained model: twice over the text.

    Its learning rates are a thirtieth of those that a model of its size begins with, as tried on
    the model that ships (docs/finetuning.md): larger ones undo what it has learned.
    """
    millions = model.n_parameters / 1e6
    seq_len = min(model.max_seq_len, 1024)
    return Recipe(
        model=model,
        init_from=init_from,
        epochs=2.0,
        batch_size=max(1, 4096 // seq_len),
        seq_len=seq_len,
        optimizer="muon",
        learning_rate=_rounded(1.25e-4 * millions**-0.15),
        muon_learning_rate=_rounded(3.6e-4 * millions**-0.12),
        schedule="linear",
        warmup_steps=20,
        every_eval=100,
        every_save=100,
        every_sample=100,
    )


def _shape(size: int, vocab_size: int) -> Config:
    millions = size / 1e6
    seq_len = next(n for n, most in CONTEXTS if millions < most)
    best, least = None, math.inf
    dims = (*range(32, 512, 32), *range(512, 2561, 64)) if size >= 100 * vocab_size else ()
    wanted_ratio = min(100.0, 32 * max(0.1, millions) ** 0.15)
    for dim in dims:
        head_dim = 64 if dim % 64 == 0 and dim >= 512 else 32
        for n_layers in range(2, 49):
            model = Config(dim, n_layers, dim // head_dim, vocab_size, seq_len)
            off = abs(math.log(model.n_parameters / size))
            if off > 0.1:
                continue
            distance = 5 * off + abs(math.log(dim / n_layers / wanted_ratio))
            if distance < least:
                best, least = model, distance
    if best is None:
        raise ConfigError(
            f"{size:,} parameters are too few for {vocab_size:,} tokens: the embedding has a vector"
            f" for each; choose {100 * vocab_size:,} parameters or more, or a smaller tokenizer"
        )
    return best


def _rounded(x: float) -> float:
    return float(f"{x:.2g}")
