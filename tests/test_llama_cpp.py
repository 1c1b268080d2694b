"""Our GGUF files in llama.cpp: the same tokens, greedily, as from our own core."""

import os
from pathlib import Path

import numpy as np
import pytest

import tinyllama
from tinyllama.formats import read_checkpoint
from tinyllama.formats.gguf import gguf_bytes, write_gguf

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")

N_TOKENS = 200
N_PROMPTS = 50 if os.environ.get("TINYLLAMA_FULL_TESTS") else 8


def prompts(shared: Path) -> list[str]:
    text = (shared / "data" / "tinystories" / "valid.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    return [" ".join(story.split()[: 3 + i % 12]) for i, story in enumerate(stories[:N_PROMPTS])]


def greedy(llama, tokens: list[int], n_new: int) -> list[int]:
    llama.reset()
    new: list[int] = []
    llama.eval(tokens)
    while len(new) < n_new:
        logits = np.asarray(llama.scores[llama.n_tokens - 1])
        new.append(int(logits.argmax()))
        llama.eval(new[-1:])
    return new


def source(shared: Path, name: str) -> Path | str:
    weights = shared / "weights"
    if name == "shipped":
        return str(tinyllama.load().info()["path"])
    return weights / name


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("stories260k/stories260K.bin", "stories260k/tok512.bin"),
        ("babyllama_tok105/model5000.bin", "babyllama_tok105/tok105.model"),
        ("shipped", None),
    ],
)
def test_greedy_text_is_llama_cpps(shared, tmp_path, name, tokenizer) -> None:
    """Equal, or first different where the two best logits are closer than 1e-3."""
    found = None if tokenizer is None else shared / "weights" / tokenizer
    checkpoint = read_checkpoint(source(shared, name), tokenizer=found)
    path = tmp_path / "model.gguf"
    write_gguf(checkpoint, path, "f32")
    ours = tinyllama.load(path)
    n_ctx = checkpoint.config.max_seq_len
    f32 = llama_cpp.GGML_TYPE_F32  # for the cache, which is f16 unless told otherwise
    theirs = llama_cpp.Llama(
        str(path), n_ctx=n_ctx, type_k=f32, type_v=f32, logits_all=True, verbose=False, n_threads=1
    )
    differences = []
    for prompt in prompts(shared):
        tokens = ours.tokenizer.encode(prompt)
        assert tokens == theirs.tokenize(prompt.encode(), add_bos=True, special=False)
        n_new = min(N_TOKENS, n_ctx - len(tokens) - 1)
        expected = greedy(theirs, tokens, n_new)
        logits = ours.logits(tokens + expected)[len(tokens) - 1 : -1]
        chosen = logits.argmax(axis=1)
        for i in np.flatnonzero(chosen != np.array(expected)):
            best = np.sort(logits[i])[-2:]
            differences.append((prompt, int(i), float(best[1] - best[0])))
            break
    for prompt, position, gap in differences:
        print(f"{name}: differs after {position} tokens of {prompt!r}: top-2 gap {gap:.2e}")
    assert all(gap < 1e-3 for _, _, gap in differences), differences


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_llama_cpp_reads_the_same_blocks(shared, tmp_path, dtype) -> None:
    """Its logits from a file in blocks against ours in f32 from what our reader makes of it: apart
    only by its rounding of activations to 8 bits, which is far less than the blocks lost."""
    path = tmp_path / "model.gguf"
    write_gguf(read_checkpoint(source(shared, "shipped")), path, "f32")
    original = tinyllama.load(path)
    write_gguf(read_checkpoint(path), path, dtype)
    widened = tinyllama.load(gguf_bytes(read_checkpoint(path), "f32"))
    theirs = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    tokens = original.tokenizer.encode(" ".join(prompts(shared)))[:200]
    theirs.eval(tokens)
    expected = np.asarray(theirs.scores[: len(tokens)])
    apart = np.abs(widened.logits(tokens) - expected).mean()
    lost = np.abs(original.logits(tokens) - expected).mean()
    assert apart < 0.05
    if dtype == "q4_0":  # the shipped model is q8_0 itself
        assert apart < 0.3 * lost
