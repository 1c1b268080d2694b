"""The hyperparameters of a Llama, and the list of its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import numpy as np

from .errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those trained on.

    ``kind="linear"`` divides every frequency by ``factor`` (Chen et al., arXiv 2306.15595).
    ``kind="llama3"`` divides low frequencies by ``factor``, keeps high ones, and blends between
    the two wavelengths ``original_max_seq_len / low_freq_factor`` and ``/ high_freq_factor``
    (Llama 3.1).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ConfigError(f"rope_scaling.kind is {self.kind!r}; known: 'linear', 'llama3'")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"):
            _check_number(f"rope_scaling.{name}", getattr(self, name))
        if not (math.isfinite(self.factor) and self.factor >= 1.0):
            raise ConfigError(f"rope_scaling.factor is {self.factor}; it must be at least 1")
        if self.kind == "llama3":
            if not 0.0 < self.low_freq_factor < self.high_freq_factor < math.inf:
                raise ConfigError(
                    f"rope_scaling needs 0 < low_freq_factor ({self.low_freq_factor})"
                    f" < high_freq_factor ({self.high_freq_factor})"
                )
            if self.original_max_seq_len < 1:
                raise ConfigError(
                    f"rope_scaling.original_max_seq_len is {self.original_max_seq_len};"
                    " it must be positive"
                )


@dataclass(frozen=True)
class Config:
    """Shape of a Llama. ``n_kv_heads``, ``head_dim`` and ``hidden_dim`` may be left out (0):
    then n_kv_heads = n_heads, head_dim = dim / n_heads, and hidden_dim = 8/3 dim rounded up to a
    multiple of 32.

    Raises ConfigError, naming field and value, when a value is out of range.
    """

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    max_seq_len: int
    n_kv_heads: int = 0
    head_dim: int = 0
    hidden_dim: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "vocab_size", "max_seq_len"):
            _check_int(name, getattr(self, name), 1)
        for name in ("n_kv_heads", "head_dim", "hidden_dim"):
            _check_int(name, getattr(self, name), 0)
        derive = object.__setattr__  # the dataclass is frozen for everybody else
        if self.n_kv_heads == 0:
            derive(self, "n_kv_heads", self.n_heads)
        if self.head_dim == 0:
            if self.dim % self.n_heads:
                raise ConfigError(
                    f"dim ({self.dim}) is not divisible by n_heads ({self.n_heads}),"
                    " so head_dim must be given"
                )
            derive(self, "head_dim", self.dim // self.n_heads)
        if self.hidden_dim == 0:
            derive(self, "hidden_dim", -(-(8 * self.dim // 3) // 32) * 32)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads ({self.n_heads}) is not divisible by n_kv_heads ({self.n_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            _check_number(name, value)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; it must be positive and finite")
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(
                f"tie_embeddings is {self.tie_embeddings!r}; it must be true or false"
            )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of a checkpoint, matrices as (out, in), in forward order.

        ``wq`` and ``wk`` are in interleaved rotary order: elements 2i and 2i+1 of a head form a
        pair. ``lm_head`` is absent when the embeddings are tied.
        """
        q_dim, kv_dim = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"tok_embed": (self.vocab_size, self.dim)}
        for i in range(self.n_layers):
            shapes |= {
                f"layers.{i}.attn_norm": (self.dim,),
                f"layers.{i}.wq": (q_dim, self.dim),
                f"layers.{i}.wk": (kv_dim, self.dim),
                f"layers.{i}.wv": (kv_dim, self.dim),
                f"layers.{i}.wo": (self.dim, q_dim),
                f"layers.{i}.ffn_norm": (self.dim,),
                f"layers.{i}.w_gate": (self.hidden_dim, self.dim),
                f"layers.{i}.w_up": (self.hidden_dim, self.dim),
                f"layers.{i}.w_down": (self.dim, self.hidden_dim),
            }
        shapes["final_norm"] = (self.dim,)
        if not self.tie_embeddings:
            shapes["lm_head"] = (self.vocab_size, self.dim)
        return shapes

    @property
    def n_parameters(self) -> int:
        """Number of trained numbers, a tied embedding counted once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


def rope_factors(config: Config) -> np.ndarray:
    """What each rotary frequency is divided by: float64, shape (head_dim / 2,).

    All ones without scaling. The llama3 rule is the one published with Llama 3.1.
    """
    n_pairs = config.head_dim // 2
    scaling = config.rope_scaling
    if scaling is None:
        return np.ones(n_pairs)
    if scaling.kind == "linear":
        return np.full(n_pairs, scaling.factor)
    frequency = config.rope_theta ** (-np.arange(n_pairs) / n_pairs)
    wavelength = 2 * np.pi / frequency
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # 0 where the wavelength is long (scaled in full), 1 where it is short (kept).
    keep = (scaling.original_max_seq_len / wavelength - low) / (high - low)
    keep = np.clip(keep, 0.0, 1.0)
    return 1.0 / (keep + (1.0 - keep) / scaling.factor)


def rope_tables(config: Config, n_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the rotary angles: two float32 arrays (n_positions, head_dim / 2).

    The angle of pair i at position p is p · rope_theta^(-2i/head_dim) / factor_i
    (RoFormer, arXiv 2104.09864), computed in float64.
    """
    n_pairs = config.head_dim // 2
    frequency = config.rope_theta ** (-np.arange(n_pairs) / n_pairs) / rope_factors(config)
    angle = np.arange(n_positions)[:, None] * frequency[None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be a number")


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number")
    if not least <= value < 2**31:
        raise ConfigError(f"{name} is {value}; it must be in [{max(least, 1)}, 2^31)")
