"""A published folder in transformers: the text of its pipeline is that of the native core."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllama
from random_models import random_checkpoint
from tinyllama.config import Config
from tinyllama.formats import read_checkpoint
from tinyllama.formats.gguf import write_gguf
from tinyllama.formats.hf import save_hf
from tinyllama.loading import bundled_model

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("safetensors", reason="needs the extra convert")
transformers = pytest.importorskip("transformers", reason="needs transformers")

PROMPTS = [
    "Once upon a time",
    "One day, a girl named",
    "The dog",
    "Lily found a small red box. She opened it and",
    "It was raining.",
    'Tom said, "',
    "The cat sat on the",
    "Ben and his mom went to the park. They saw",
    "In the forest there lived",
    "A little bird",
    "The sun was hot and the",
    "Sue had a big",
    "There was an old man who",
    'Mia was sad.\n"Why are you sad?"',
    "Every day after lunch",
    "Max wanted to fly",
    "Zoë has 3 €",  # é and € are spelled in bytes
    "The wind blew",
    "After dinner, Dad",
    "They lived hap",
]
N_NEW = 25


class Published:
    """One model twice: as a folder in a pipeline, as a file in f32 in the native core."""

    def __init__(self, checkpoint: Any, folder: Path) -> None:
        save_hf(checkpoint, folder / "model")
        write_gguf(checkpoint, folder / "model.gguf", "f32")
        self.folder = folder / "model"
        self.native = tinyllama.load(folder / "model.gguf", n_threads=1)
        self.pipe = transformers.pipeline("text-generation", model=str(self.folder), device="cpu")

    def texts(self, prompts: Sequence[str], **options: Any) -> list[str]:
        found = self.pipe(list(prompts), do_sample=False, max_new_tokens=N_NEW, **options)
        return [one[0]["generated_text"] for one in found]

    def check(self, prompts: Sequence[str], found: Sequence[str], **sampling: Any) -> None:
        """Equal, or first different where the two best logits are closer than 1e-3."""
        want = self.native.generate(
            list(prompts), temperature=0, max_new_tokens=N_NEW, return_full_text=True, **sampling
        )
        for ours, theirs in zip(want, found, strict=True):
            assert ours == theirs or self.gap(ours, theirs) < 1e-3, (ours, theirs)

    def gap(self, ours: str, theirs: str) -> float:
        """Between the two likeliest tokens where the texts part."""
        a, b = map(self.native.tokenizer.encode, (ours, theirs))
        same = next(i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])
        second, first = np.sort(self.native.logits(a[:same])[-1])[-2:]
        return float(first - second)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published(read_checkpoint(bundled_model()), tmp_path_factory.mktemp("shipped"))


def test_greedy_text_of_twenty_prompts(shipped: Published) -> None:
    assert len(PROMPTS) == 20
    shipped.check(PROMPTS, shipped.texts(PROMPTS))


def test_batches_are_padded_without_a_trace(shipped: Published) -> None:
    shipped.check(PROMPTS[:8], shipped.texts(PROMPTS[:8], batch_size=8))


def test_repetition_penalty_is_the_same(shipped: Published) -> None:
    prompts = PROMPTS[:5]
    found = shipped.texts(prompts, repetition_penalty=1.3)
    assert found != shipped.texts(prompts)
    shipped.check(prompts, found, repetition_penalty=1.3)


def test_continuations_alone(shipped: Published) -> None:
    """A first space belongs to the continuation, not to nobody."""
    found = shipped.texts(["The dog"], return_full_text=False)
    assert found == [shipped.native.generate("The dog", temperature=0, max_new_tokens=N_NEW)]
    assert found[0].startswith(" ")


def test_several_stories_to_their_ends(shipped: Published) -> None:
    """With nothing said, a pipeline draws as we do: whole stories, not the library's 20 tokens."""
    transformers.set_seed(0)
    stories = shipped.pipe("Once upon a time", num_return_sequences=2)
    texts = [story["generated_text"] for story in stories]
    assert len(set(texts)) == 2
    assert all(text.startswith("Once upon a time") and len(text) > 200 for text in texts)


def test_settings_are_ours(shipped: Published) -> None:
    settings = shipped.pipe.model.generation_config
    defaults = tinyllama.SamplingParams()
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (
        True, defaults.temperature, defaults.top_k, defaults.top_p,
    )  # fmt: skip
    assert settings.max_length == shipped.native.config.max_seq_len
    assert settings.eos_token_id == 2
    assert shipped.pipe.tokenizer.pad_token == "<unk>"  # EOS would be left out of further training
    assert settings.pad_token_id == shipped.pipe.model.config.pad_token_id == 0


def test_the_tokenizers_output_fits_generate(shipped: Published) -> None:
    """Padded on the left, with nothing that a Llama does not take."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(shipped.folder)
    inputs = tokenizer(["The dog", "Once upon a time"], return_tensors="pt", padding=True)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"].tolist()[0][0] == 0
    assert inputs["input_ids"].tolist()[0][-2:] == shipped.native.tokenizer.encode("The dog")[1:]
    new = shipped.pipe.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert new.shape == (2, inputs["input_ids"].shape[1] + 3)


def test_a_random_model(tmp_path: Path) -> None:
    """Grouped queries, an untied output, a width that is no multiple of 32.

    Both are kept from drawing <unk>, which we spell and transformers leaves out, and <s>.
    """
    config = Config(
        dim=48, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=100, vocab_size=200,
        max_seq_len=64, tie_embeddings=False,
    )  # fmt: skip
    published = Published(random_checkpoint(config, np.random.default_rng(5)), tmp_path)
    prompts = ["the rain", "a shed", "no sun", "her", "in the"]
    found = published.texts(prompts, suppress_tokens=[0, 1])
    published.check(prompts, found, logit_bias={0: -100.0, 1: -100.0})


def test_back_here(shipped: Published) -> None:
    tokens = shipped.native.tokenizer.encode(PROMPTS[3])
    want = shipped.native.logits(tokens)
    np.testing.assert_array_equal(tinyllama.load(shipped.folder).logits(tokens), want)
