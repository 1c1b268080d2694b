"""Comparing two forward passes stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tinyllama import Model, _core


def first_difference(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], tolerance: float
) -> str | None:
    """The first stage, in the order of ``a``, at which two passes differ by more than ``tolerance``
    (absolute, and relative to the stage's largest number): its name and how, or None."""
    if list(a) != list(b):
        odd = next((x for x, y in zip([*a, None], [*b, None], strict=False) if x != y), None)
        return f"{odd}: the stages themselves differ"
    for name, value in a.items():
        other = b[name]
        if value.shape != other.shape:
            return f"{name}: shape {value.shape} against {other.shape}"
        if not (np.isfinite(value).all() and np.isfinite(other).all()):
            return f"{name}: not finite"
        if value.size == 0:
            continue
        difference = np.abs(value.astype(np.float64) - other)
        allowed = tolerance * max(1.0, float(np.abs(value).max()))
        if difference.max() > allowed:
            token, column = np.unravel_index(difference.argmax(), difference.shape)
            return f"{name}: {difference.max():.3g} at token {token}, column {column}"
    return None


def native_stages(model: Model, tokens: Sequence[int]) -> dict[str, np.ndarray]:
    """Every stage of the native core, under the names of ``tinyllama.reference.stages``."""
    found: dict[str, np.ndarray] = {}
    session = _core.Session(model._core, 0)
    _core.trace(session, list(tokens), lambda name, values: found.update({name: values.copy()}))
    return found
