"""Native logits against other implementations: torch, and transformers reading our export."""

import numpy as np
import pytest

import tinyllama
from random_models import random_checkpoint, random_config, tiny_checkpoint
from tinyllama.config import RopeScaling
from tinyllama.formats.gguf import gguf_bytes

N_CONFIGS = 320
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Threads cost more than they bring at these sizes."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_native_logits_equal_torch_on_random_configs():
    """Every position of a random text, on every variant of the architecture."""
    import torch

    from tinyllama.train.model import Llama, tensors_to_state

    worst = (0.0, -1)
    for seed in range(N_CONFIGS):
        rng = np.random.default_rng([4, seed])
        checkpoint = random_checkpoint(random_config(rng), rng)
        config = checkpoint.config
        tokens = rng.integers(0, config.vocab_size, config.max_seq_len)
        native = tinyllama.load(gguf_bytes(checkpoint), n_threads=1).logits(tokens)
        torch_model = Llama(config).eval()
        torch_model.load_state_dict(tensors_to_state(checkpoint.tensors, config))
        with torch.no_grad():
            expected = torch_model(torch.from_numpy(tokens)[None])[0].numpy()
        assert native.shape == expected.shape == (config.max_seq_len, config.vocab_size)
        worst = max(worst, (float(np.abs(native - expected).max()), seed))
    print(f"largest difference {worst[0]:.3g} (seed {worst[1]}) on {N_CONFIGS} configs")
    assert worst[0] <= TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 4},
        {"n_kv_heads": 1, "tie_embeddings": False},
        {"head_dim": 12, "hidden_dim": 172, "rope_theta": 500000.0},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"rope_scaling": RopeScaling("llama3", 4.0, 1.0, 4.0, 32), "norm_eps": 1e-6},
    ],
    ids=["grouped", "multi-head", "multi-query-untied", "odd-sizes", "linear", "llama3"],
)
def test_native_logits_equal_transformers_reading_our_export(changes, tmp_path):
    import torch

    transformers = pytest.importorskip("transformers")
    hf = pytest.importorskip("tinyllama.formats.hf")
    checkpoint = tiny_checkpoint(**changes)
    hf.save_hf(checkpoint, tmp_path / "model")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model").float().eval()
    tokens = np.random.default_rng(0).integers(0, 300, 64)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()
    native = tinyllama.load(gguf_bytes(checkpoint), n_threads=1).logits(tokens)
    assert np.abs(native - expected).max() <= TOLERANCE
    again = tinyllama.load(tmp_path / "model", n_threads=1).logits(tokens)
    np.testing.assert_array_equal(again, native)
