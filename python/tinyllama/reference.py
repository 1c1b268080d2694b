"""The forward pass of a Llama in NumPy: every step in the order it happens, nothing else.

This is the page to read first. It recomputes the whole text for every call, so it is slow; the
native core (csrc/forward.cpp) computes the same, one token after the other, and fast. It also is
the oracle of the tests: in float64 its own rounding is far below anybody else's.

    checkpoint = tinyllama.formats.read_checkpoint("model.gguf")
    logits = forward(checkpoint, [1, 403, 407])
    next_token = int(logits[-1].argmax())
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .config import Config, rope_tables
from .errors import ArgumentError, ContextFullError
from .formats.checkpoint import Checkpoint

Array: TypeAlias = "npt.NDArray[np.floating[Any]]"
Tap: TypeAlias = "Callable[[str, Array], None]"  # (stage, values of shape (n_tokens, width))


def forward(
    checkpoint: Checkpoint,
    tokens: Sequence[int],
    tap: Tap | None = None,
    dtype: npt.DTypeLike = np.float32,
) -> Array:
    """Scores of every possible next token after each of ``tokens``: (n_tokens, vocab_size).

    Computed in ``dtype``, float32 or float64. ``tap`` is called at each named stage; see
    :func:`stages`. Raises ArgumentError for no tokens or an id outside the vocabulary,
    ContextFullError for more tokens than the context holds.
    """
    config = checkpoint.config
    ids = _checked(tokens, config)
    w = {name: tensor.astype(dtype, copy=False) for name, tensor in checkpoint.tensors.items()}
    tap = tap or (lambda stage, values: None)
    cos, sin = (table.astype(dtype) for table in rope_tables(config, len(ids)))

    # Each token starts as its row of the embedding. x is the residual stream, (n_tokens, dim):
    # every layer reads it, and adds to it what it found.
    x = w["tok_embed"][ids]
    tap("tok_embed", x)
    for i in range(config.n_layers):
        layer = f"layers.{i}."

        # Attention: each token looks back at all before it and gathers what it needs.
        h = rms_norm(x, w[layer + "attn_norm"], config.norm_eps)
        tap(layer + "attn_norm", h)
        q = rotate(h @ w[layer + "wq"].T, cos, sin)  # what it looks for   (n_tokens, q_dim)
        k = rotate(h @ w[layer + "wk"].T, cos, sin)  # what it can be found by  (…, kv_dim)
        v = h @ w[layer + "wv"].T  # what it has to give     (n_tokens, kv_dim)
        tap(layer + "q", q)
        tap(layer + "k", k)
        tap(layer + "v", v)
        mixed = attention(q, k, v, config)
        tap(layer + "attn", mixed)
        x = x + mixed @ w[layer + "wo"].T
        tap(layer + "attn_out", x)

        # Feed-forward: each token thinks about what it gathered, on its own.
        h = rms_norm(x, w[layer + "ffn_norm"], config.norm_eps)
        tap(layer + "ffn_norm", h)
        hidden = silu(h @ w[layer + "w_gate"].T) * (h @ w[layer + "w_up"].T)
        tap(layer + "ffn_hidden", hidden)
        x = x + hidden @ w[layer + "w_down"].T
        tap(layer + "ffn_out", x)

    # The stream at each token is compared with every row of the output matrix: how well does that
    # token come next?
    x = rms_norm(x, w["final_norm"], config.norm_eps)
    tap("final_norm", x)
    logits: Array = x @ w["tok_embed" if config.tie_embeddings else "lm_head"].T
    tap("logits", logits)
    return logits


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Each row scaled to a root mean square of 1, then each column by its weight:
    x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich, arXiv 1910.07467)."""
    mean_square = (x * x).mean(axis=-1, keepdims=True)
    scaled: Array = x / np.sqrt(mean_square + x.dtype.type(eps))
    return scaled * weight


def silu(x: Array) -> Array:
    """x · sigmoid(x): a gate that opens for positive numbers (SwiGLU, arXiv 2002.05202)."""
    sigmoid: Array = 0.5 * (1 + np.tanh(0.5 * x))  # 1 / (1 + exp(-x)), but cannot overflow
    return x * sigmoid


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary position embedding (RoFormer, arXiv 2104.09864).

    Each pair (x[2i], x[2i+1]) of each head is turned by an angle that grows with the position, so
    that the product of a query and a key depends on how far apart they are. ``x``
    (n_tokens, heads · head_dim); ``cos`` and ``sin`` (n_tokens, head_dim / 2), same for each head.
    """
    n_tokens, n_pairs = cos.shape
    pairs = x.reshape(n_tokens, -1, n_pairs, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape)


def attention(q: Array, k: Array, v: Array, config: Config) -> Array:
    """Causal attention: (n_tokens, q_dim), each row the mix of the values its token looked at.

    With n_kv_heads below n_heads, groups of query heads share one key and value head (GQA,
    arXiv 2305.13245). Weights are softmax(q · k / sqrt(head_dim)) over this token and those before.
    """
    n_tokens = len(q)
    q = q.reshape(n_tokens, config.n_heads, config.head_dim).swapaxes(0, 1)
    k = k.reshape(n_tokens, config.n_kv_heads, config.head_dim).swapaxes(0, 1)
    v = v.reshape(n_tokens, config.n_kv_heads, config.head_dim).swapaxes(0, 1)
    group = config.n_heads // config.n_kv_heads
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    scores = q @ k.swapaxes(1, 2) / q.dtype.type(np.sqrt(config.head_dim))
    future = np.triu(np.ones((n_tokens, n_tokens), bool), k=1)
    mixed = softmax(np.where(future, -np.inf, scores)) @ v  # (n_heads, n_tokens, head_dim)
    return mixed.swapaxes(0, 1).reshape(n_tokens, -1)


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) along the last axis, less the maximum so that nothing overflows."""
    weights: Array = np.exp(x - x.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def stages(
    checkpoint: Checkpoint, tokens: Sequence[int], dtype: npt.DTypeLike = np.float32
) -> dict[str, Array]:
    """Every named stage of one forward pass, in order: name -> (n_tokens, width).

    ``tok_embed``; per layer i ``layers.{i}.`` with ``attn_norm``, ``q``, ``k`` (after rotation),
    ``v``, ``attn`` (heads mixed, before wo), ``attn_out`` (the stream after adding it),
    ``ffn_norm``, ``ffn_hidden`` (silu(gate) · up), ``ffn_out`` (the stream again);
    ``final_norm``; ``logits``. The torch model and the native core name theirs the same.
    """
    found: dict[str, Array] = {}
    forward(checkpoint, tokens, found.__setitem__, dtype)
    return found


def _checked(tokens: Sequence[int], config: Config) -> npt.NDArray[np.int64]:
    ids = np.asarray(tokens, np.int64).reshape(-1)
    if len(ids) == 0:
        raise ArgumentError("no tokens given")
    if len(ids) > config.max_seq_len:
        raise ContextFullError(f"{len(ids)} tokens; the context holds {config.max_seq_len}")
    for token in ids[(ids < 0) | (ids >= config.vocab_size)]:
        raise ArgumentError(f"token {token}; the model has {config.vocab_size} tokens")
    return ids
