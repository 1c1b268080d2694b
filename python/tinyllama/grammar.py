"""Texts that follow a regular expression, a JSON schema or a grammar, by way of llguidance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ArgumentError, MissingExtraError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from . import _core


class Vocabulary:
    """The tokens of a model, as llguidance takes them, and one more behind them for the end, which
    the core knows otherwise."""

    def __init__(self, model: _core.Model) -> None:
        tokenizer = model.tokenizer
        n = tokenizer.vocab_size
        self.tokens = [*(tokenizer.token_bytes(token) for token in range(n)), b""]
        self.special_token_ids = [
            token for token in range(n + 1) if not self.tokens[token] or token == tokenizer.unk_id
        ]
        self.bos_token_id = None
        self.eos_token_id = n
        self._spell = model.spell

    def __call__(self, text: bytes) -> list[int]:
        return self._spell(text)


def guidance_tokenizer(model: _core.Model) -> LLTokenizer:
    """What :class:`Matcher` needs of a model; made once. Raises MissingExtraError."""
    try:
        import llguidance
    except ImportError:
        raise MissingExtraError("llguidance", "grammar") from None
    vocabulary = Vocabulary(model)
    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(vocabulary),
        n_vocab=len(vocabulary.tokens),
        eos_token=vocabulary.eos_token_id,
    )


class Matcher:
    """Where a text stands in its grammar: what the core asks of a constraint (constraint.h)."""

    def __init__(self, matcher: LLMatcher, kind: str) -> None:
        self._matcher = matcher
        self._kind = kind

    @classmethod
    def of(cls, tokenizer: LLTokenizer, kind: str, text: str) -> Matcher:
        """``kind``: "regex", "json_schema" or "grammar" (llguidance's variant of Lark). Raises
        ArgumentError with the reason for a text that is none."""
        from llguidance import LLMatcher

        try:
            if kind == "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            elif kind == "json_schema":
                # As json.dumps writes: free whitespace would be drawn, by tiny models for ever.
                grammar = LLMatcher.grammar_from_json_schema(
                    text,
                    overrides={
                        "whitespace_flexible": False,
                        "item_separator": ", ",
                        "key_separator": ": ",
                    },
                )
            else:
                grammar = LLMatcher.grammar_from_lark(text)
        except ValueError as error:
            raise ArgumentError(f"{kind}: {error}") from None
        if problem := LLMatcher.validate_grammar(grammar, tokenizer):
            raise ArgumentError(f"{kind}: {problem.strip()}")
        return cls(LLMatcher(tokenizer, grammar, log_level=0), kind)

    def copy(self) -> Matcher:
        """One for a text of its own."""
        return Matcher(self._matcher.deep_copy(), self._kind)

    def find_allowed(self) -> tuple[bytes, bool]:
        """One bit per token, and whether the text may end here."""
        if self._matcher.is_stopped():
            self._check()
            return b"", True
        mask = self._matcher.compute_bitmask()
        self._check()
        return mask, self._matcher.is_accepting()

    def find_forced(self) -> list[int]:
        return [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ArgumentError(f"{self._kind}: {self._matcher.get_error().strip()}")
