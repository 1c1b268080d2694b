"""SamplingParams: every option of a generation, declared once.

The Python API, the command line and the documentation read names, defaults, ranges and help from
the fields below.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError

if TYPE_CHECKING:
    from . import _core

_INF = math.inf


def _option(default: Any, help_text: str, **rule: Any) -> Any:
    """A field with its help and its range: ``kind`` int or float, from ``least`` to ``most``."""
    return field(default=default, metadata={"help": help_text, **rule})


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How text is continued. Raises ArgumentError, naming argument and value, when one is wrong.

    The logits of each step pass, in this order: logit_bias and banned tokens, the three penalties,
    what choices, regex, json_schema or grammar allow (one of these at most), temperature, top_k,
    top_p, min_p; what is left is drawn from. Tokens that would leave a character broken are never
    drawn, and nothing is drawn where only one text can follow. Of up to 64 choices one is drawn as
    a whole, by its probability and the logit_bias of its tokens; no penalties count there.
    """

    max_new_tokens: int | None = _option(
        None,
        "stop after this many tokens; without it the text goes on until the model ends it or the"
        " context is full",
        kind=int,
        least=1,
    )
    min_new_tokens: int = _option(
        0, "the model may not end the text before this many tokens", kind=int, least=0
    )
    temperature: float = _option(
        1.0,
        "divides the logits: below 1 safer, above 1 wilder, 0 always the likeliest token",
        kind=float,
        least=0.0,
        most=1e6,
    )
    top_k: int = _option(0, "draw from the k likeliest tokens only; 0: from all", kind=int, least=0)
    top_p: float = _option(
        0.9,
        "draw from the fewest tokens that together have this probability; 1: from all",
        kind=float,
        least=0.0,
        most=1.0,
    )
    min_p: float = _option(
        0.0,
        "drop tokens less likely than this share of the likeliest one's probability",
        kind=float,
        least=0.0,
        most=1.0,
    )
    repetition_penalty: float = _option(
        1.0,
        "divides the positive logits of tokens already there and multiplies the negative ones;"
        " above 1 discourages repetition",
        kind=float,
        least=1e-3,
        most=1e3,
    )
    presence_penalty: float = _option(
        0.0,
        "subtracted from the logit of every token already generated",
        kind=float,
        least=-100.0,
        most=100.0,
    )
    frequency_penalty: float = _option(
        0.0,
        "subtracted from a token's logit once for each time it was generated",
        kind=float,
        least=-100.0,
        most=100.0,
    )
    stop: str | Iterable[str] | None = _option(
        None, "end the text before this string, or the first of several"
    )
    choices: Iterable[str] | None = _option(
        None,
        "the text is one of these, written right behind the prompt: give the space between words"
        " yourself",
        kind=str,
    )
    regex: str | None = _option(None, "the text matches this regular expression", kind=str)
    json_schema: str | Mapping[str, Any] | None = _option(
        None, "the text is JSON that follows this schema", kind=str
    )
    grammar: str | None = _option(
        None, "the text follows this grammar, in llguidance's variant of Lark", kind=str
    )
    on_overflow: str = _option(
        "stop",
        "when the context is full: stop the text; shift, which drops half of it, the oldest but"
        " for the first n_keep tokens, and goes on; truncate a prompt in that way so that"
        " max_new_tokens fit, then stop; or raise an error",
        choices=("stop", "shift", "truncate", "error"),
    )
    n_keep: int = _option(
        1, "tokens at the beginning that shift and truncate never drop", kind=int, least=0
    )
    seed: int | None = _option(
        None,
        "the same seed gives the same text on one kernel set; without one each run differs",
        kind=int,
        least=0,
    )
    num_return_sequences: int = _option(
        1, "how many continuations of each prompt", kind=int, least=1
    )
    logit_bias: Mapping[int, float] | None = _option(
        None, "added to the logits of these token ids; -inf bans a token"
    )
    return_full_text: bool = _option(False, "return the prompt and its continuation together")

    def __post_init__(self) -> None:
        keep = object.__setattr__  # the dataclass is frozen for everybody else
        for option in fields(self):
            value = getattr(self, option.name)
            if option.metadata.get("kind") in (int, float) and not (
                value is None and option.default is None
            ):
                keep(self, option.name, _checked(option.name, value, option.metadata))
            if value not in option.metadata.get("choices", (value,)):
                *most, last = option.metadata["choices"]
                raise ArgumentError(
                    f"{option.name} is {value!r}; it must be {', '.join(most)} or {last}"
                )
        keep(self, "stop", _stop_strings(self.stop))
        keep(self, "logit_bias", _logit_bias(self.logit_bias))
        keep(self, "choices", _choices(self.choices))
        keep(self, "json_schema", _schema(self.json_schema))
        forms = [name for name in _FORMS if getattr(self, name) is not None]
        if len(forms) > 1:
            raise ArgumentError(f"{forms[0]} and {forms[1]} exclude each other")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if not isinstance(value, (str, type(None))):
                raise ArgumentError(f"{name} is {value!r}; it must be a string")
        if self.seed is not None and self.seed >= 2**64:
            raise ArgumentError(f"seed is {self.seed}; it must be below 2^64")
        if not isinstance(self.return_full_text, bool):
            raise ArgumentError(
                f"return_full_text is {self.return_full_text!r}; it must be True or False"
            )
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ArgumentError(
                f"min_new_tokens ({self.min_new_tokens}) is above"
                f" max_new_tokens ({self.max_new_tokens})"
            )

    def form(self) -> tuple[str, list[str]]:
        """What the text has to be: the option that says so ("": none does), and its texts."""
        for name in _FORMS:
            value = getattr(self, name)
            if value is not None:
                return name, [value] if isinstance(value, str) else list(value)
        return "", []

    @property
    def cuts_prompts(self) -> bool:
        """Whether a prompt longer than the context is cut rather than refused."""
        return self.on_overflow in ("shift", "truncate")

    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple, empty when there is none."""
        return self.stop if isinstance(self.stop, tuple) else ()

    def for_core(self, vocab_size: int, banned: Iterable[int] = ()) -> _core.SamplingParams:
        """The same as the compiled core takes it, with ``banned`` tokens never drawn.

        Raises ArgumentError for a logit_bias outside the vocabulary.
        """
        from . import _core

        params = _core.SamplingParams()
        for name in _CORE_FIELDS:
            setattr(params, name, getattr(self, name))
        bias = self.logit_bias or {}
        for token in bias:
            if token >= vocab_size:
                raise ArgumentError(
                    f"logit_bias names token {token}; the model has {vocab_size} tokens"
                )
        params.logit_bias = [(token, value) for token, value in bias.items() if value != -_INF]
        params.banned = sorted({*banned, *(t for t, value in bias.items() if value == -_INF)})
        if len(params.banned) == vocab_size:
            raise ArgumentError("logit_bias and min_new_tokens together ban every token")
        return params


_CORE_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


_FORMS = ("choices", "regex", "json_schema", "grammar")


def as_int(name: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """A whole number of any kind (numpy's too) as int; ArgumentError names it when it is not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name} is {value!r}; it must be a whole number") from None
    if number < least:
        raise ArgumentError(f"{name} is {number}; it must be at least {least}")
    if most is not None and number > most:
        raise ArgumentError(f"{name} is {number}; it must be at most {most}")
    return number


def _checked(name: str, value: Any, rule: Mapping[str, Any]) -> int | float:
    if rule["kind"] is int:
        number: int | float = as_int(name, value, rule["least"])
        if number >= 2**31 and name != "seed":
            raise ArgumentError(f"{name} is {number}; it must be below 2^31")
        return number
    number = _as_float(name, value)
    if not rule["least"] <= number <= rule["most"]:  # NaN fails as well
        raise ArgumentError(
            f"{name} is {number}; it must be in [{rule['least']:g}, {rule['most']:g}]"
        )
    return number


def _as_float(name: str, value: Any) -> float:
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"{name} is {value!r}; it must be a number") from None


def _choices(choices: Any) -> tuple[str, ...] | None:
    if choices is None:
        return None
    if isinstance(choices, (str, bytes)) or not isinstance(choices, Iterable):
        raise ArgumentError(f"choices is {choices!r}; it must be several strings")
    strings = tuple(choices)
    if not strings:
        raise ArgumentError("choices is empty")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ArgumentError(f"choices holds {string!r}; it must be a string, and not empty")
        _check_unicode("choices", string)
    return strings


def _schema(schema: Any) -> str | None:
    """As JSON."""
    if schema is None:
        return None
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        if not isinstance(json.loads(text), (dict, bool)):
            raise ValueError("a schema is an object")
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"json_schema is {schema!r}: {error}") from None
    return text


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"{name} holds half a surrogate pair ({text[error.start]!r}) at {error.start}"
        ) from None


def _stop_strings(stop: Any) -> tuple[str, ...] | None:
    if stop is None:
        return None
    strings = (stop,) if isinstance(stop, str) else stop
    if isinstance(strings, bytes) or not isinstance(strings, Iterable):
        raise ArgumentError(f"stop is {stop!r}; it must be a string or several")
    strings = tuple(strings)
    for string in strings:
        if not isinstance(string, str):
            raise ArgumentError(f"stop holds {string!r}; it must be a string")
        if not string:
            raise ArgumentError("stop holds an empty string, which would end every text at once")
    return strings


def _logit_bias(bias: Any) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise ArgumentError(f"logit_bias is {bias!r}; it must map token ids to numbers")
    checked: dict[int, float] = {}
    for token, value in bias.items():
        number = _as_float(f"logit_bias[{token!r}]", value)
        if not (abs(number) <= 1e4 or number == -_INF):
            raise ArgumentError(
                f"logit_bias[{token!r}] is {number}; it must be in [-10000, 10000], or -inf to ban"
            )
        checked[as_int("a token of logit_bias", token)] = number
    return checked
