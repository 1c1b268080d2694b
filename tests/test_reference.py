"""The NumPy forward pass, and the native core and torch compared with it stage by stage."""

import numpy as np
import pytest

import tinyllama
from random_models import random_checkpoint, random_config, tiny_checkpoint
from stages import first_difference, native_stages
from tinyllama.errors import ArgumentError, ContextFullError
from tinyllama.formats.gguf import gguf_bytes
from tinyllama.reference import attention, forward, rms_norm, silu, softmax, stages

SEEDS = range(40)


def random_case(seed):
    rng = np.random.default_rng(seed)
    checkpoint = random_checkpoint(random_config(rng), rng)
    config = checkpoint.config
    n_tokens = int(rng.integers(1, config.max_seq_len + 1))
    return checkpoint, rng.integers(0, config.vocab_size, n_tokens).tolist()


def test_random_configs_cover_every_variant():
    configs = [random_config(np.random.default_rng(seed)) for seed in SEEDS]
    assert {c.n_kv_heads == c.n_heads for c in configs} == {True, False}
    assert any(c.n_kv_heads == 1 < c.n_heads for c in configs)
    assert any(1 < c.n_kv_heads < c.n_heads for c in configs)
    assert {c.n_heads * c.head_dim == c.dim for c in configs} == {True, False}
    assert {c.tie_embeddings for c in configs} == {True, False}
    kinds = {c.rope_scaling.kind if c.rope_scaling else None for c in configs}
    assert kinds == {None, "linear", "llama3"}
    assert any(c.hidden_dim == 172 for c in configs)


def test_stage_names_and_shapes():
    checkpoint = tiny_checkpoint()
    found = stages(checkpoint, [1, 2, 3])
    layer = ["attn_norm", "q", "k", "v", "attn", "attn_out", "ffn_norm", "ffn_hidden", "ffn_out"]
    expected = ["tok_embed", *(f"layers.{i}.{s}" for i in range(2) for s in layer)]
    assert list(found) == [*expected, "final_norm", "logits"]
    widths = {name.split(".")[-1]: value.shape for name, value in found.items()}
    assert widths["q"] == (3, 32)
    assert widths["k"] == widths["v"] == (3, 16)
    assert widths["ffn_hidden"] == (3, 64)
    assert widths["logits"] == (3, 300)


@pytest.mark.parametrize("seed", SEEDS)
def test_native_core_agrees_at_every_stage(seed):
    checkpoint, tokens = random_case(seed)
    model = tinyllama.load(gguf_bytes(checkpoint), n_threads=1)
    expected = stages(checkpoint, tokens, np.float64)
    assert first_difference(expected, native_stages(model, tokens), 1e-5) is None


def test_torch_model_agrees_at_every_stage():
    pytest.importorskip("torch")
    from tinyllama.train.model import Llama, tensors_to_state, trace

    for seed in SEEDS:
        checkpoint, tokens = random_case(seed)
        torch_model = Llama(checkpoint.config)
        torch_model.load_state_dict(tensors_to_state(checkpoint.tensors, checkpoint.config))
        expected = stages(checkpoint, tokens, np.float64)
        assert first_difference(expected, trace(torch_model, tokens), 1e-5) is None, f"seed {seed}"


@pytest.mark.parametrize(
    ("tensor", "stage"),
    [
        ("tok_embed", "tok_embed"),
        ("layers.0.wk", "layers.0.k"),
        ("layers.1.wo", "layers.1.attn_out"),
        ("layers.1.w_up", "layers.1.ffn_hidden"),
        ("final_norm", "final_norm"),
        ("lm_head", "logits"),
    ],
)
def test_a_wrong_tensor_is_named_by_its_stage(tensor, stage):
    checkpoint = tiny_checkpoint(tie_embeddings=False)
    expected = stages(checkpoint, [1, 2, 3])
    broken = dict(checkpoint.tensors)
    broken[tensor] = broken[tensor] + np.float32(0.01)
    model = tinyllama.load(
        gguf_bytes(type(checkpoint)(checkpoint.config, broken, checkpoint.vocabulary))
    )
    difference = first_difference(expected, native_stages(model, [1, 2, 3]), 1e-4)
    assert difference is not None
    assert difference.startswith(f"{stage}: ")


def test_float32_is_near_float64():
    checkpoint = tiny_checkpoint()
    tokens = list(range(1, 40))
    single = forward(checkpoint, tokens)
    double = forward(checkpoint, tokens, dtype=np.float64)
    assert single.dtype == np.float32
    assert double.dtype == np.float64
    assert np.abs(single - double).max() < 1e-4


def test_a_token_does_not_see_what_follows():
    checkpoint = tiny_checkpoint()
    whole = forward(checkpoint, [1, 5, 9, 200, 7], dtype=np.float64)
    part = forward(checkpoint, [1, 5, 9], dtype=np.float64)
    np.testing.assert_allclose(whole[:3], part, atol=1e-12)


def test_bad_tokens_are_named():
    checkpoint = tiny_checkpoint()
    with pytest.raises(ArgumentError, match="token 300"):
        forward(checkpoint, [1, 300])
    with pytest.raises(ArgumentError, match="no tokens"):
        forward(checkpoint, [])
    with pytest.raises(ArgumentError, match="token -1"):
        forward(checkpoint, [-1])
    with pytest.raises(ContextFullError, match="65 tokens; the context holds 64"):
        forward(checkpoint, [1] * 65)


def test_pieces_by_hand():
    x = np.array([[3.0, 4.0]])
    np.testing.assert_allclose(rms_norm(x, np.array([1.0, 2.0]), 0.0), x / np.sqrt(12.5) * [1, 2])
    np.testing.assert_allclose(softmax(np.array([1000.0, 1000.0])), [0.5, 0.5])
    np.testing.assert_allclose(silu(np.array([-1000.0, 0.0, 1000.0])), [0.0, 0.0, 1000.0])
    config = tinyllama.Config(dim=2, n_layers=1, n_heads=1, vocab_size=3, max_seq_len=4)
    zero, values = np.zeros((2, 2)), np.array([[2.0, 0.0], [0.0, 4.0]])
    np.testing.assert_allclose(attention(zero, zero, values, config), [[2, 0], [1, 2]])
