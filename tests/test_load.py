"""Opening models: paths, bytes, dtypes, kernel sets, and what is no model."""

import subprocess
import sys

import numpy as np
import pytest

import tinyllama
from random_models import tiny_checkpoint, tiny_model
from tinyllama import loading
from tinyllama.errors import ArgumentError, ContextFullError, FormatError, NonFiniteError
from tinyllama.formats.checkpoint import Checkpoint
from tinyllama.formats.gguf import gguf_bytes, write_gguf

PROMPT = "the rain"


def test_load_takes_paths_and_bytes(tmp_path):
    checkpoint = tiny_checkpoint()
    path = tmp_path / "model.gguf"
    write_gguf(checkpoint, path)
    expected = tinyllama.load(path).logits([1, 2, 3])
    np.testing.assert_array_equal(tinyllama.load(str(path)).logits([1, 2, 3]), expected)
    np.testing.assert_array_equal(tinyllama.load(path.read_bytes()).logits([1, 2, 3]), expected)
    assert tinyllama.generate("a", model=path, max_new_tokens=3, seed=1) == tinyllama.generate(
        "a", model=tinyllama.load(path), max_new_tokens=3, seed=1
    )
    assert "".join(tinyllama.stream("a", model=path, max_new_tokens=3, seed=1))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8_0", "q4_0"])
def test_load_converts_to_a_dtype(dtype):
    data = gguf_bytes(tiny_checkpoint())
    model = tinyllama.load(data, dtype=dtype)
    assert model.info()["dtype"] == dtype
    tolerance = {"f32": 0, "bf16": 0.3, "q8_0": 0.6, "q4_0": 3.0}[dtype]
    expected = tinyllama.load(data).logits([1, 40, 41])
    assert np.abs(model.logits([1, 40, 41]) - expected).max() <= tolerance
    assert model.config == tiny_checkpoint().config


def test_threads_of_a_lone_step_are_chosen_by_trial_unless_told():
    data = gguf_bytes(tiny_checkpoint())
    told = tinyllama.load(data, n_threads=3).info()
    assert (told["n_threads"], told["n_threads_alone"]) == (3, 3)
    chosen = tinyllama.load(data).info()
    assert 1 <= chosen["n_threads_alone"] <= chosen["n_threads"]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_info_tells_of_the_model_not_of_its_file(dtype):
    """Zero units that pad hidden_dim to whole blocks do not count; f16 is f32 in memory."""
    checkpoint = tiny_checkpoint(hidden_dim=37, tie_embeddings=False)
    model = tinyllama.load(gguf_bytes(checkpoint, dtype))
    assert model.config == checkpoint.config
    assert model.info()["parameters"] == checkpoint.config.n_parameters
    if dtype in ("f32", "f16"):
        assert model.info()["bytes"] == 4 * checkpoint.config.n_parameters


def test_a_shorter_context():
    model = tinyllama.load(gguf_bytes(tiny_checkpoint()), max_seq_len=10)
    assert model.config.max_seq_len == 10
    assert model.complete([1] * 4, logit_bias={1: -100, 2: -100}).usage.total_tokens == 10
    with pytest.raises(ContextFullError, match="the prompt has 11 tokens; the context holds 10"):
        model.generate([1] * 11)
    with pytest.raises(ArgumentError, match="max_seq_len"):
        tinyllama.load(gguf_bytes(tiny_checkpoint()), max_seq_len=65)


@pytest.mark.parametrize("isa", tinyllama.supported_isas())
def test_the_kernel_set_can_be_forced(isa, monkeypatch):
    data = gguf_bytes(tiny_checkpoint())
    assert tinyllama.load(data, isa=isa).info()["isa"] == isa
    monkeypatch.setenv("TINYLLAMA_ISA", isa)
    assert tinyllama.load(data).info()["isa"] == isa


def test_an_unknown_kernel_set_is_refused(monkeypatch):
    data = gguf_bytes(tiny_checkpoint())
    with pytest.raises(ArgumentError, match=r"sse1.*generic"):
        tinyllama.load(data, isa="sse1")
    monkeypatch.setenv("TINYLLAMA_ISA", "sse1")
    with pytest.raises(ArgumentError, match=r"sse1.*generic"):
        tinyllama.load(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "q9"}, "dtype is 'q9'; known: f32"),
        ({"kv_dtype": "int4"}, "kv_dtype is 'int4'; known: f32"),
        ({"n_threads": 0}, "n_threads is 0"),
        ({"n_threads": -1}, "n_threads is -1"),
        ({"n_threads": 1.5}, "n_threads is 1.5"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"isa": 3}, "isa is 3"),
        ({"dtype": "f16"}, "dtype is 'f16'; known: f32, bf16, q8_0, q4_0"),
        ({"tokenizer": "tok.model"}, "tok.model"),
    ],
    ids=str,
)
def test_bad_arguments_of_load(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        tinyllama.load(gguf_bytes(tiny_checkpoint()), **arguments)


def test_files_that_are_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        tinyllama.load(tmp_path / "absent.gguf")
    with pytest.raises(FormatError):
        tinyllama.load(tmp_path)
    (tmp_path / "text.gguf").write_text("Once upon a time")
    with pytest.raises(FormatError, match=r"text\.gguf"):
        tinyllama.load(tmp_path / "text.gguf")
    with pytest.raises(FormatError):
        tinyllama.load(b"")
    with pytest.raises(ArgumentError, match="path is 3"):
        tinyllama.load(3)


def test_logits_that_are_not_finite_are_refused():
    checkpoint = tiny_checkpoint(tie_embeddings=False)
    huge = checkpoint.tensors | {"lm_head": np.full((300, 32), 3e38, np.float32)}
    model = tinyllama.load(gguf_bytes(Checkpoint(checkpoint.config, huge, checkpoint.vocabulary)))
    with pytest.raises(NonFiniteError, match="logit"):
        model.generate(PROMPT)


def test_the_model_that_ships_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "loading.py"))
    with pytest.raises(FileNotFoundError, match="no model ships with this installation"):
        tinyllama.load()
    (tmp_path / "models").mkdir()
    write_gguf(tiny_checkpoint(seed=8), tmp_path / "models" / "stories.gguf")
    np.testing.assert_array_equal(tinyllama.load().logits([1]), tiny_model(seed=8).logits([1]))


def test_importing_loads_nothing_heavy():
    script = "import sys, tinyllama; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    extras = {"torch", "sentencepiece", "safetensors", "tokenizers", "tqdm", "pyarrow", "ftfy"}
    heavy = {"argparse", "matplotlib", "tinyllama.formats", "tinyllama.train", "tinyllama.cli"}
    assert not (extras | heavy) & set(done.stdout.split())


def test_rooms_are_reached_by_attribute():
    assert tinyllama.formats.read_checkpoint
    assert tinyllama.reference.forward
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = tinyllama.trian
