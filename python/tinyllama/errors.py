"""Every error tinyllama raises on purpose.

Each message names the file, field and value that is wrong. All of them derive from
:class:`TinyllamaError`; most also derive from the builtin that fits, so that code which
catches ``ValueError`` keeps working. Missing files stay ``OSError``, exhausted memory stays
``MemoryError``.
"""


class TinyllamaError(Exception):
    """Base of all errors raised by tinyllama."""


class FormatError(TinyllamaError, ValueError):
    """A file or byte string is not what it claims to be, or is damaged."""


class ConfigError(TinyllamaError, ValueError):
    """A hyperparameter or recipe setting is unknown, out of range, or contradicts another."""


class ArgumentError(TinyllamaError, ValueError):
    """An argument of a call is out of range or of the wrong kind."""


class ContextFullError(TinyllamaError, ValueError):
    """The tokens do not fit into what is left of the context."""


class NonFiniteError(TinyllamaError, ArithmeticError):
    """NaN or infinity where a finite number is needed: in weights, logits or a loss."""


class BusyError(TinyllamaError, RuntimeError):
    """Two threads used one session at the same time."""


class ExportError(TinyllamaError, RuntimeError):
    """An exported model does not compute what the checkpoint computes."""


class MissingExtraError(TinyllamaError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {package!r}, which is not installed; the extra {extra!r}"
            f' brings it: pip install ".[{extra}]" where tinyllama was installed from',
            name=package,
        )
