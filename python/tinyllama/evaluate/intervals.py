"""How sure a score is: 95 % intervals of means and of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

N_RESAMPLES = 10_000
AT_ONCE = 1_000_000  # values drawn: what of all resamples is in memory
Z = 1.959964  # of the standard normal distribution, 2.5 % lie above


@dataclass(frozen=True)
class Estimate:
    """A mean, and the ends of its 95 % interval: both None where one prompt gives none."""

    mean: float
    low: float | None
    high: float | None


def of_prompts(groups: Sequence[Sequence[float]]) -> Estimate | None:
    """The mean over prompts of each prompt's mean, with a bootstrap interval over the prompts.

    ``groups``: the values of each prompt's texts. Texts of one prompt are alike, so that to draw
    texts one by one would make the interval too narrow; whole prompts are drawn (Efron 1979; for
    evaluations Miller 2024, arXiv 2411.00640). Prompts without values are passed over; None when
    all are.
    """
    means = np.array([np.mean(group) for group in groups if len(group)])
    if len(means) == 0:
        return None
    if len(means) == 1:
        return Estimate(float(means[0]), None, None)
    random = np.random.default_rng(0)
    step = max(1, AT_ONCE // len(means))
    drawn = [
        means[random.integers(len(means), size=(min(step, N_RESAMPLES - done), len(means)))].mean(1)
        for done in range(0, N_RESAMPLES, step)
    ]
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return Estimate(float(means.mean()), float(low), float(high))


def of_share(n_right: int, n: int) -> Estimate:
    """The share ``n_right`` of ``n``, with Wilson's score interval (1927). ``n`` is not 0."""
    share = n_right / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))
