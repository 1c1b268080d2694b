"""Export: what is written computes the same, or is not written."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllama
from random_models import tiny_checkpoint
from tinyllama.cli import main
from tinyllama.errors import ArgumentError, ExportError, FormatError
from tinyllama.formats import read_checkpoint
from tinyllama.formats.gguf import gguf_bytes, write_gguf
from tinyllama.train import export as module
from tinyllama.train.export import export

TARGETS = [
    *[("gguf", dtype) for dtype in ("f32", "f16", "bf16", "q8_0", "q4_0")],
    *[("hf", dtype) for dtype in ("f32", "f16", "bf16")],
    *[("llama2c", dtype) for dtype in ("f32", "q8_0")],
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    checkpoint = tiny_checkpoint(hidden_dim=172)
    # As sure of itself as a real model is: random weights are surer, and 4 bits cost them more.
    checkpoint.tensors["tok_embed"] *= np.float32(0.8)
    write_gguf(checkpoint, tmp_path / "source.gguf")
    return tmp_path / "source.gguf"


@pytest.mark.parametrize(("to", "dtype"), TARGETS)
def test_every_target(source: Path, tmp_path: Path, to: str, dtype: str) -> None:
    if to == "hf":
        pytest.importorskip("safetensors")
    out = tmp_path / "out" / f"model{module.FORMATS[to]}"
    out.parent.mkdir()
    report = export(source, out, to, dtype)
    assert (report.format, report.dtype) == (to, dtype)
    assert report.n_tokens > 300
    files = [out] if out.is_file() else list(out.iterdir())
    assert report.n_bytes == sum(file.stat().st_size for file in files)
    # The figures are those of the file: the same differences, measured from outside.
    tokens = np.random.default_rng(0).integers(0, 300, 50).tolist()
    want = tinyllama.load(source).logits(tokens)
    found = tinyllama.load(gguf_bytes(read_checkpoint(out), "f32")).logits(tokens)
    difference = float(np.abs(want - found).max())
    assert difference <= 3 * report.max_difference + 1e-6
    assert (report.max_difference > 1e-4) == (dtype != "f32")
    left = {path.name for path in out.parent.iterdir()}
    assert left == ({"model.bin", "tokenizer.bin"} if to == "llama2c" else {out.name})


def test_default_dtype_is_the_sources(source: Path, tmp_path: Path) -> None:
    assert export(source, tmp_path / "a.gguf", dtype="q8_0").dtype == "q8_0"
    again = export(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert again.dtype == "q8_0"
    pytest.importorskip("safetensors")
    assert export(tmp_path / "a.gguf", tmp_path / "folder", "hf").dtype == "f32"
    export(source, tmp_path / "c.gguf", dtype="q4_0")
    assert export(tmp_path / "c.gguf", tmp_path / "d.gguf").dtype == "q4_0"
    assert export(tmp_path / "c.gguf", tmp_path / "folder2", "hf").dtype == "f32"


def test_numpy_stands_in_for_torch(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    report = export(source, tmp_path / "out.gguf", dtype="f32")
    assert report.oracle == "NumPy"
    assert report.max_difference < 1e-4


def test_wrong_weights_are_not_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that swaps two matrices of the same shape is found out, whatever the dtype."""
    right = module.write_gguf

    def wrong(checkpoint: Any, stream: Any, dtype: str) -> None:
        layers = dict(checkpoint.tensors)
        layers["layers.0.w_gate"] = checkpoint.tensors["layers.0.w_up"]
        right(type(checkpoint)(checkpoint.config, layers, checkpoint.vocabulary), stream, dtype)

    monkeypatch.setattr(module, "write_gguf", wrong)
    out = tmp_path / "out.gguf"
    out.write_bytes(b"an older model")
    for dtype, message in {
        "f32": "logits differ by",
        "q8_0": "perplexity|diverge",
        "q4_0": "perplexity|diverge",
    }.items():
        with pytest.raises(ExportError, match=message):
            export(source, out, dtype=dtype)
        assert out.read_bytes() == b"an older model"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "source.gguf"]


@pytest.mark.parametrize("to", ["hf", "llama2c"])
def test_wrong_tensors_are_not_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    pytest.importorskip("safetensors")
    from tinyllama.formats import hf, llama2c

    def wrong(*args: Any) -> Any:
        back = right(*args)
        back.tensors["layers.1.wk"][0, 0] += 1e-3
        return back

    room, name = (hf, "load_hf") if to == "hf" else (llama2c, "read_llama2c")
    right = getattr(room, name)
    monkeypatch.setattr(room, name, wrong)
    with pytest.raises(ExportError, match=r"layers\.1\.wk at \(0, 0\)"):
        export(source, tmp_path / f"out{module.FORMATS[to]}", to, "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_arguments(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="to is 'onnx'"):
        export(source, tmp_path / "out", "onnx")
    with pytest.raises(ArgumentError, match="dtype is 'q4_1'"):
        export(source, tmp_path / "out.gguf", "gguf", "q4_1")
    with pytest.raises(ArgumentError, match="dtype is 'q8_0'"):
        export(source, tmp_path / "out", "hf", "q8_0")
    with pytest.raises(ArgumentError, match="dtype is 'f16'"):
        export(source, tmp_path / "out.bin", "llama2c", "f16")
    with pytest.raises(ArgumentError, match="too short"):
        export(source, tmp_path / "out.gguf", texts=[""])
    with pytest.raises(FormatError, match="unknown format"):
        export(__file__, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


@pytest.mark.parametrize(
    ("to", "out", "message"),
    [
        ("gguf", "x.bin", r"x\.bin: gguf is .* ends in \.gguf \(`--to llama2c \S*x\.bin` would"),
        ("gguf", "x.safetensors", r"x\.safetensors: gguf is written to a file .* \.gguf$"),
        ("llama2c", "x.gguf", r"x\.gguf: llama2c is .* ends in \.bin \(`--to gguf \S*x\.gguf`"),
        ("llama2c", "x", r"x: llama2c is written to a file whose name ends in \.bin$"),
        ("hf", "x.GGUF", r"x\.GGUF: hf is written to a folder \(`--to gguf"),
    ],
)
def test_a_name_that_promises_another_format(
    tmp_path: Path, to: str, out: str, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        export(tmp_path / "not even looked at", tmp_path / out, to)


@pytest.mark.parametrize(
    ("to", "out", "error"),
    [
        ("gguf", "none/x.gguf", FileNotFoundError),
        ("llama2c", "none/x.bin", FileNotFoundError),
        ("hf", "none/x", FileNotFoundError),
        ("gguf", "folder.gguf", IsADirectoryError),
        ("hf", "file", NotADirectoryError),
        ("hf", "foreign", FileExistsError),
        ("gguf", "locked/x.gguf", PermissionError),
    ],
)
def test_a_place_that_cannot_be_written_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, out: str, error: type[OSError]
) -> None:
    for name in ("folder.gguf", "foreign", "locked"):
        (tmp_path / name).mkdir()
    for name in ("file", "foreign/config.json"):
        (tmp_path / name).write_text(name)
    # Root may write anywhere, so what a locked folder answers is put in its mouth.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    before = contents(tmp_path)
    with pytest.raises(error, match=f"^{re.escape(str(tmp_path / out))}: "):
        export(tmp_path / "not even looked at", tmp_path / out, to)
    assert contents(tmp_path) == before


def test_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the rain in the shed\n" * 5)
    command = ["export", str(source), "--text", str(text), "--out", str(tmp_path / "m.gguf")]
    assert main([*command, "--dtype", "q8_0"]) == 0
    printed = capsys.readouterr().out
    assert "m.gguf: gguf, q8_0" in printed
    assert "largest difference" in printed
    assert "bits per byte" in printed
    assert main(["export", str(source), "--to", "llama2c", str(tmp_path / "m.bin")]) == 0
    assert main(["export", str(source), "--to", "onnx", "x"]) == 2
    assert "unknown format; known: gguf, hf, llama2c" in capsys.readouterr().err


def test_a_training_runs_best_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    from tinyllama.formats.hf import save_hf

    run = tmp_path / "run"
    run.mkdir()
    for seed in (1, 2):
        save_hf(tiny_checkpoint(seed), run / f"step-{seed}")
    (run / "LATEST").write_text("step-2\n")
    (run / "BEST").write_text("step-1\n")
    export(run, tmp_path / "out.gguf")
    found = read_checkpoint(tmp_path / "out.gguf").tensors["tok_embed"]
    np.testing.assert_array_equal(found, tiny_checkpoint(1).tensors["tok_embed"])
    for best, said in (("1", "step-1: the best of those"), ("2", "step-2: the last checkpoint")):
        (run / "BEST").write_text(f"step-{best}\n")
        assert main(["export", str(run), "--out", str(tmp_path / "out.gguf")]) == 0
        assert said in capsys.readouterr().out


FULL_DISK = """
import resource, sys
sys.modules["torch"] = None  # only to be quick
sys.path.insert(0, {tests!r})
from pathlib import Path
from random_models import tiny_checkpoint
from tinyllama.formats.gguf import gguf_bytes, write_gguf
from tinyllama.formats.llama2c import write_llama2c
from tinyllama.formats.hf import save_hf
from tinyllama.formats.llama2c import write_llama2c
from tinyllama.train.export import export

folder = Path({folder!r})
checkpoint = tiny_checkpoint()
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
for write in (
    lambda: write_gguf(checkpoint, folder / "old.gguf"),
    lambda: save_hf(checkpoint, folder / "empty"),
    lambda: save_hf(checkpoint, folder / "new"),
    lambda: write_llama2c(checkpoint, folder / "old.bin"),
    lambda: export(folder / "source.gguf", folder / "old.gguf"),
    lambda: export(folder / "source.gguf", folder / "new", "hf"),
    lambda: export(folder / "source.gguf", folder / "old.bin", "llama2c"),
):
    try:
        write()
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
@pytest.mark.parametrize("limit", [0, 4096, 40000])
def test_a_full_disk_leaves_what_was_there(source: Path, tmp_path: Path, limit: int) -> None:
    pytest.importorskip("safetensors")
    for name in ("old.gguf", "old.bin"):
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    tests = str(Path(__file__).parent)
    script = FULL_DISK.format(tests=tests, folder=str(tmp_path), limit=limit)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == [str(errno.EFBIG)] * 7, done.stderr
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}
