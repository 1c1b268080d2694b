"""Models of random, seeded weights, written once as ours and converted for each peer.

A model lies in FOLDER/NAME: f32.gguf, q8_0.gguf and so on for us and llama.cpp, hf/ for
transformers and for the converters of the others, ct2-*/, ov-*/, ort-*/ and *.bin.
"""

from __future__ import annotations

import itertools
import os
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyllama.config import Config
from tinyllama.formats.checkpoint import Checkpoint, TokenType, Vocabulary

N_SPECIAL = 259  # unknown, begin, end and 256 bytes: never in a prompt, never drawn
ALL = ("f32", "bf16", "q8_0", "q4_0")


@dataclass(frozen=True)
class Case:
    """A shape, the formats it is measured in unless others are named, and how many tokens a
    decoding run has: enough to be steady, few enough to be done."""

    config: Config
    formats: tuple[str, ...]
    n_new: int


def _shape(
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    hidden_dim: int,
    vocab_size: int,
    max_seq_len: int,
    tied: bool = True,
) -> Config:
    return Config(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        tie_embeddings=tied,
    )


MODELS = {
    "stories15m": Case(_shape(288, 6, 6, 6, 768, 32000, 256), ALL, 200),
    "stories42m": Case(_shape(512, 8, 8, 8, 1376, 32000, 1024), ALL, 128),
    "stories110m": Case(_shape(768, 12, 12, 12, 2048, 32000, 1024), ALL, 96),
    "stories-zh-93m": Case(_shape(768, 12, 12, 12, 2268, 3000, 768), ALL, 96),
    "ttl-460m": Case(_shape(1024, 24, 16, 16, 4096, 32000, 2048, False), ("q8_0", "q4_0"), 48),
    "llama-1.1b": Case(_shape(2048, 22, 32, 4, 5632, 32000, 2048, False), ("q8_0", "q4_0"), 32),
}


def prompt(config: Config, n: int, seed: int) -> list[int]:
    """n tokens: the begin token, then random words."""
    rng = np.random.default_rng(seed)
    return [1, *map(int, rng.integers(N_SPECIAL, config.vocab_size, n - 1))]


def matrix_parameters(config: Config, head: bool = True) -> int:
    """Weights that a token is multiplied with; ``head``: with those that make the logits."""
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = 2 * config.dim * (q_dim + kv_dim) + 3 * config.dim * config.hidden_dim
    return config.n_layers * layer + head * config.vocab_size * config.dim


def weight_bytes(config: Config, weights: str) -> float:
    """Bytes read per decoded token."""
    bits = {"f32": 32, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5}[weights]
    return matrix_parameters(config) * bits / 8


def random_checkpoint(name: str) -> Checkpoint:
    """Weights that keep numbers near 1 through all layers, and logits as spread (a standard
    deviation of 4) as a trained model's: with flat ones top-p would keep thousands of tokens. The
    special tokens' rows are tiny, so that no engine ever draws an end token.

    hidden_dim is rounded up to a multiple of 32 with units of zeros, which add nothing: the peers'
    block formats need it.
    """
    config = MODELS[name].config
    rng = np.random.default_rng(1234)
    padded = replace(config, hidden_dim=-(-config.hidden_dim // 32) * 32)
    tensors = {}
    output = "tok_embed" if config.tie_embeddings else "lm_head"
    for tensor, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            values = np.ones(shape, np.float32)
        else:
            values = rng.standard_normal(shape, np.float32)
            values *= (4.0 if tensor == output else 1.0) / np.sqrt(shape[1], dtype=np.float32)
        if tensor == output:
            values[:N_SPECIAL] *= 0.01
        to = padded.tensor_shapes()[tensor]
        tensors[tensor] = np.pad(values, [(0, b - a) for a, b in zip(shape, to, strict=True)])
    return Checkpoint(padded, tensors, _vocabulary(config.vocab_size), source=name)


def _vocabulary(n: int) -> Vocabulary:
    """Special tokens, bytes, then letters, pairs and triples of them, bare and after a space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    for length in range(4):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            word = "".join(letters)
            pieces += ["\u2581" + word, word] if word else ["\u2581"]
    pieces = pieces[:n]
    types += [TokenType.NORMAL] * (n - len(types))
    return Vocabulary(tuple(pieces), -np.arange(n, dtype=np.float32), np.array(types, np.int32))


class Files:
    """The files of one model below ``folder``, each made when first asked for, and kept."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self._name = name
        self._checkpoint: Checkpoint | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        if self._checkpoint is None:
            self._checkpoint = random_checkpoint(self._name)
        return self._checkpoint

    def forget(self) -> None:
        """Free the memory that making files took."""
        self._checkpoint = None

    def path(self, engine: str, weights: str) -> Path:
        """What ``engine`` opens for weights of that kind (one of its own names for it)."""
        file = {
            "tinyllama": f"{weights}.gguf",
            "llama.cpp": f"{weights}.gguf",
            "transformers": "hf",
            "ctranslate2": f"ct2-{weights}",
            "openvino": f"ov-{weights}",
            "onnxruntime": f"ort-{weights}",
            "llama2.c": f"{weights}.bin",
        }[engine]
        return self._made(file)

    def _made(self, file: str) -> Path:
        path = self.folder / file
        if path.exists():
            return path
        print(f"making {path}", file=sys.stderr)
        part = self.folder / f"part-{file}"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._make(file, part)
            part.rename(path)
        finally:
            if part.is_dir():
                shutil.rmtree(part)
            part.unlink(missing_ok=True)
        return path

    def _make(self, file: str, out: Path) -> None:
        kind, _, weights = file.partition("-")
        if file.endswith(".gguf"):
            from tinyllama.formats.gguf import write_gguf

            write_gguf(self.checkpoint, out, file.removesuffix(".gguf"))
        elif file == "hf":
            from tinyllama.formats.hf import save_hf

            large = self.checkpoint.config.n_parameters > 1e9
            save_hf(self.checkpoint, out, "bf16" if large else "f32")
        elif file.endswith(".bin"):
            from tinyllama.formats.llama2c import write_llama2c

            write_llama2c(self.checkpoint, out, 2 if file == "q8_0.bin" else 0)
        else:
            {"ct2": self._ct2, "ov": self._openvino, "ort": self._onnxruntime}[kind](weights, out)

    def _ct2(self, weights: str, out: Path) -> None:
        code = (
            "import sys, ctranslate2\n"
            "source, out, weights = sys.argv[1:]\n"
            "ctranslate2.converters.TransformersConverter(source, low_cpu_mem_usage=True)"
            ".convert(out, quantization=weights)"
        )
        _run(sys.executable, "-c", code, self._made("hf"), out, weights)

    def _openvino(self, weights: str, out: Path) -> None:
        program = Path(sys.executable).with_name("optimum-cli")
        options = ["--task", "text-generation-with-past", "--weight-format", weights]
        if weights == "int4":
            config = self.checkpoint.config
            group = "32" if config.dim % 64 or config.hidden_dim % 64 else "64"
            options += ["--sym", "--group-size", group, "--ratio", "1.0"]
        _run(program, "export", "openvino", "-m", self._made("hf"), *options, out)

    def _onnxruntime(self, weights: str, out: Path) -> None:
        cache = self.folder / "part-cache"
        options = ["-i", self._made("hf"), "-o", out, "-p", weights, "-e", "cpu", "-c", cache]
        if weights == "int4":
            options += ["--extra_options", "int4_accuracy_level=4"]
        _run(sys.executable, "-m", "onnxruntime_genai.models.builder", *options)
        shutil.rmtree(cache, ignore_errors=True)


def _run(*command: str | os.PathLike[str]) -> None:
    """Run a converter, quietly; raise with the end of what it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stdout + done.stderr)[-600:]}")
