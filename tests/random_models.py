"""Random tiny models: every shape a Llama file may have, small enough to compare hundreds."""

from __future__ import annotations

import itertools
import string
from dataclasses import replace

import numpy as np

from tinyllama import Model, load
from tinyllama.config import Config, RopeScaling
from tinyllama.formats.checkpoint import Checkpoint, TokenType, Vocabulary
from tinyllama.formats.gguf import gguf_bytes


def random_config(rng: np.random.Generator) -> Config:
    """Multi-head, grouped-query and multi-query attention, head_dim tied to dim or not, odd sizes,
    tied and untied output, both kinds of rotary scaling; dims 8 to 64, vocabularies 17 to 300."""
    n_heads = int(rng.choice([1, 2, 3, 4, 6, 8]))
    n_kv_heads = int(rng.choice([n for n in range(1, n_heads + 1) if n_heads % n == 0]))
    head_dim = 2 * int(rng.integers(1, 9))
    dim = n_heads * head_dim if rng.random() < 0.6 and n_heads * head_dim <= 64 else 0
    scaling = None
    if rng.random() < 0.4:
        factor = float(np.float32(rng.uniform(1.0, 8.0)))
        if rng.random() < 0.5:
            scaling = RopeScaling("linear", factor)
        else:
            scaling = RopeScaling("llama3", factor, 1.0, 4.0, int(rng.integers(8, 64)))
    return Config(
        dim=dim or int(rng.integers(8, 65)),
        n_layers=int(rng.integers(1, 4)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=int(rng.choice([172, 32, 64, int(rng.integers(1, 130))])),
        vocab_size=int(rng.integers(17, 301)),
        max_seq_len=int(rng.integers(16, 65)),
        rope_theta=float(rng.choice([10000.0, 500000.0, 100.0])),
        rope_scaling=scaling,
        norm_eps=float(np.float32(rng.choice([1e-5, 1e-6, 1e-2]))),
        tie_embeddings=bool(rng.random() < 0.5),
    )


def random_checkpoint(config: Config, rng: np.random.Generator) -> Checkpoint:
    """Weights that keep numbers near 1 through all layers: a wrong step shows at the end."""
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            values = rng.uniform(0.5, 1.5, shape)
        elif name == "tok_embed":
            values = rng.normal(0.0, 1.0 if not config.tie_embeddings else 0.3, shape)
        else:
            values = rng.normal(0.0, 1.0 / np.sqrt(shape[1]), shape)
        tensors[name] = values.astype(np.float32)
    return Checkpoint(config, tensors, byte_vocabulary(config.vocab_size), source="random")


def byte_vocabulary(n: int) -> Vocabulary:
    """unk, bos, eos, then the 256 bytes where they fit, then a space, letters and pairs of them."""
    pieces = ["<unk>", "<s>", "</s>"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    if n >= len(pieces) + 256:
        pieces += [f"<0x{byte:02X}>" for byte in range(256)]
        types += [TokenType.BYTE] * 256
    words = ["\u2581", *dict.fromkeys("etaoinshrdlu" + string.ascii_lowercase)]
    words += [a + b for a, b in itertools.product(words, words[1:])]
    pieces = (pieces + words)[:n]
    types += [TokenType.NORMAL] * (n - len(types))
    scores = -np.arange(n, dtype=np.float32)
    return Vocabulary(tuple(pieces), scores, np.array(types, np.int32))


def tiny_checkpoint(seed: int = 0, **changes: object) -> Checkpoint:
    """A model with a vocabulary that can spell any text: 2 layers, 300 tokens, a context of 64."""
    config = Config(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=300, max_seq_len=64
    )
    config = replace(config, **changes)  # type: ignore[arg-type]
    return random_checkpoint(config, np.random.default_rng(seed))


def tiny_model(seed: int = 0, dtype: str = "f32", **changes: object) -> Model:
    """:func:`tiny_checkpoint` in the native core."""
    return load(gguf_bytes(tiny_checkpoint(seed, **changes), dtype), n_threads=1)


def forced_model(text: bytes) -> Model:
    """A model that says ``text`` (bytes) and then ends, whatever the weights: position decides.

    Attention and feed-forward add nothing; the embedding of each token points at its successor.
    """
    sequence = [1, *(3 + byte for byte in text), 2]
    assert len(set(sequence)) == len(sequence), "each token has one successor"
    config = Config(
        dim=300,
        n_layers=1,
        n_heads=1,
        head_dim=2,
        hidden_dim=32,
        vocab_size=300,
        max_seq_len=64,
        tie_embeddings=False,
    )
    tensors = {name: np.zeros(shape, np.float32) for name, shape in config.tensor_shapes().items()}
    for name in tensors:
        if name.endswith("norm"):
            tensors[name][:] = 1
    tensors["tok_embed"][:] = np.eye(300)
    for token, following in itertools.pairwise(sequence):
        tensors["lm_head"][following, token] = 1
    checkpoint = Checkpoint(config, tensors, byte_vocabulary(300))
    return load(gguf_bytes(checkpoint), n_threads=1)
