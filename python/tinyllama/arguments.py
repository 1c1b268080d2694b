"""What callers pass in: prompts, tokens, seeds and options, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError
from .generation import new_seed
from .sampling import SamplingParams, as_int

Tokens: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]]"
Prompt: TypeAlias = "str | Tokens"

_F = TypeVar("_F", bound=Callable[..., Any])


def takes_sampling(function: _F) -> _F:
    """Show SamplingParams' fields as keyword arguments of ``function``, in place of ``**sampling``:
    the options are declared once, and help() still names them all."""
    shown = signature(function)
    own = [p for p in shown.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    options = [
        Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(SamplingParams)
    ]
    function.__signature__ = shown.replace(parameters=own + options)  # type: ignore[attr-defined]
    return function


def check_names(sampling: dict[str, Any]) -> None:
    """Raise TypeError, as Python does for any function, for an option that does not exist."""
    known = [f.name for f in fields(SamplingParams)]
    for name in sampling:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"unknown option {name!r}{hint}")


def checked_seed(seed: int | None) -> int:
    return new_seed() if seed is None else SamplingParams(seed=seed).seed or 0


def split_prompts(prompt: Any) -> tuple[list[Prompt], bool]:
    """(prompts, whether several were given). A sequence of ids is one prompt."""
    if isinstance(prompt, str):
        return [prompt], False
    if isinstance(prompt, np.ndarray):
        return (list(prompt), True) if prompt.ndim == 2 else ([prompt], False)
    if isinstance(prompt, (bytes, dict)) or not isinstance(prompt, Sequence):
        raise ArgumentError(f"prompt is {prompt!r}; it must be text, token ids, or a list of these")
    if prompt and not isinstance(prompt[0], (str, Sequence, np.ndarray)):
        return [prompt], False
    return list(prompt), True


def refuse_several(prompt: Any, options: SamplingParams, name: str) -> None:
    """Raise ArgumentError where ``name``, which makes one text, is asked for several."""
    if split_prompts(prompt)[1]:
        raise ArgumentError(f"{name} takes one prompt; generate takes several")
    if options.num_return_sequences != 1:
        raise ArgumentError(
            f"num_return_sequences is {options.num_return_sequences}; {name} makes one"
        )


def shaped(groups: list[list[Any]], many: bool, options: SamplingParams) -> Any:
    """A list per prompt only where several sequences were asked for; a list only for several."""
    results = [group[0] if options.num_return_sequences == 1 else group for group in groups]
    return results if many else results[0]


def checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise ArgumentError(f"text is {text!r}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"text holds half a surrogate pair ({text[error.start]!r}) at {error.start}"
        ) from None
    return text


def checked_tokens(tokens: Any, vocab_size: int) -> list[int]:
    if isinstance(tokens, np.ndarray) and tokens.ndim == 1:
        tokens = tokens.tolist()
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Sequence):
        raise ArgumentError(f"tokens is {tokens!r}; it must be a sequence of token ids")
    checked = [as_int(f"tokens[{i}]", token) for i, token in enumerate(tokens)]
    for i, token in enumerate(checked):
        if token >= vocab_size:
            raise ArgumentError(f"tokens[{i}] is {token}; the model has {vocab_size} tokens")
    return checked
