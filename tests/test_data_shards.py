"""Token shards: the same bytes however they are made, split by document, counted and hashed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from random_models import tiny_checkpoint
from tinyllama import tokenizer
from tinyllama.cli import main
from tinyllama.data import prepare, shards
from tinyllama.data.splits import is_validation
from tinyllama.errors import ArgumentError, FormatError
from tinyllama.formats.checkpoint import TokenType, Vocabulary
from tinyllama.formats.hf import save_hf

sentencepiece = pytest.importorskip("sentencepiece")

WORDS = ["once", "upon", "a", "time", "was", "little", "cat", "sat", "sun", "猫", "ção", "😀"]


def write_stories(path: Path, n: int = 300, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    stories = [" ".join(rng.choices(WORDS, k=rng.randrange(3, 40))) for _ in range(n)]
    path.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    return stories


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_stories(folder / "a.txt", seed=0)
    tokenizer.train(folder / "a.txt", folder / "tokenizer.model", 320)
    return folder / "tokenizer.model"


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(shards, "UNIT_BYTES", 3000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents_in(folder: Path, split: str) -> list[list[int]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    documents: list[list[int]] = []
    for shard in manifest["splits"][split]["shards"]:
        tokens = np.memmap(folder / shard["file"], manifest["dtype"], "r").tolist()
        ends = [i for i, token in enumerate(tokens) if token == manifest["eos_id"]]
        assert len(ends) == shard["documents"] and len(tokens) == shard["tokens"]
        for start, end in zip([0, *(i + 1 for i in ends)], ends, strict=False):
            assert tokens[start] == manifest["bos_id"]
            documents.append(tokens[start + 1 : end])
    return documents


def test_shards_hold_the_documents_and_the_manifest_counts_them(tmp_path, model):
    stories = write_stories(tmp_path / "a.txt")
    out = tmp_path / "tokens"
    manifest = prepare(tmp_path / "a.txt", model, out, valid_fraction=0.2)
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["format"] == "tinyllama-tokens" and manifest["version"] == 1
    assert manifest["dtype"] == "uint16"
    assert (out / "tokenizer.model").read_bytes() == model.read_bytes()
    assert manifest["tokenizer"] == {
        "file": "tokenizer.model",
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "vocab_size": 320,
    }

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = {"train": [], "valid": []}
    for story in stories:
        expected["valid" if is_validation(story, 0.2, 0) else "train"].append(story)
    for split, chosen in expected.items():
        assert documents_in(out, split) == [processor.encode(story) for story in chosen]
        entry = manifest["splits"][split]
        assert entry["documents"] == len(chosen)
        assert entry["bytes"] == sum(len(story.encode()) for story in chosen)
        for key in ("documents", "tokens", "bytes"):
            assert entry[key] == sum(shard[key] for shard in entry["shards"])
        for shard in entry["shards"]:
            data = (out / shard["file"]).read_bytes()
            assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    assert len(manifest["splits"]["train"]["shards"]) > 2
    names = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
    assert set(contents(out)) == names | {"manifest.json", "tokenizer.model"}


def test_the_number_of_workers_changes_nothing(tmp_path, model):
    write_stories(tmp_path / "a.txt")
    for n in (1, 2):
        prepare(tmp_path / "a.txt", model, tmp_path / str(n), valid_fraction=0.1, n_workers=n)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("killed_at", [2, 10, "join"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, model, killed_at, monkeypatch):
    write_stories(tmp_path / "a.txt")
    script = f"""
        import os, signal
        from tinyllama.data import prepare, shards
        shards.UNIT_BYTES, shards.SHARD_BYTES = 3000, 4000
        written, whole_file = 0, shards.whole_file
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        def counted(path):
            global written
            written += 1
            return die() if written == {killed_at!r} else whole_file(path)
        shards.whole_file = counted
        if {killed_at!r} == "join":
            shards._join = die
        prepare("a.txt", {str(model)!r}, "out", valid_fraction=0.1)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    out = tmp_path / "out"
    assert not (out / "manifest.json").exists()
    finished = len(list((out / ".units").glob("*.json")))
    (out / ".units" / ".torn.train.1.part").write_bytes(b"half")

    encoded = []
    encode_unit = shards._encode_unit
    monkeypatch.setattr(shards, "_encode_unit", lambda *a: (encoded.append(1), encode_unit(*a)))
    prepare(tmp_path / "a.txt", model, out, valid_fraction=0.1)
    resumed = len(encoded)
    prepare(tmp_path / "a.txt", model, tmp_path / "fresh", valid_fraction=0.1)
    assert resumed == len(encoded) - resumed - finished  # only what was missing was made again
    assert contents(out) == contents(tmp_path / "fresh")


def test_other_settings_do_not_take_over_finished_units(tmp_path, model, monkeypatch):
    write_stories(tmp_path / "a.txt")
    out = tmp_path / "out"

    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(shards, "_join", full)
        prepare(tmp_path / "a.txt", model, out, valid_fraction=0.1, seed=1)
    assert list(out.glob(".units/*.json"))
    notes = {name: b"one's own" for name in ("notes-2024.txt", "train-1.md", "tok-3000.model")}
    for name, content in notes.items():
        (out / name).write_bytes(content)
    prepare(tmp_path / "a.txt", model, out, valid_fraction=0.1, seed=2)
    prepare(tmp_path / "a.txt", model, tmp_path / "fresh", valid_fraction=0.1, seed=2)
    assert contents(out) == contents(tmp_path / "fresh") | notes


def test_what_is_finished_is_not_replaced_by_other_data(tmp_path, model):
    for name in ("a", "b"):
        write_stories(tmp_path / f"{name}.txt")
    (tmp_path / "other.model").write_bytes(
        tokenizer.save_sentencepiece(
            replace(tokenizer.load_sentencepiece(model), add_space_prefix=False)
        )
    )
    out, a = tmp_path / "out", f"x={tmp_path}/a.txt"
    options = {"valid_fraction": 0.1, "seed": 1}
    prepare(a, model, out, **options)
    before = contents(out)

    def refused(message, inputs=a, model=model, **changed):
        with pytest.raises(FileExistsError, match=f"out: holds other data .*{message}.*new folder"):
            prepare(inputs, model, out, **options | changed)
        assert contents(out) == before

    refused("sources x, now text", tmp_path / "a.txt")
    refused("inputs x=a.txt, now x=b.txt", f"x={tmp_path}/b.txt")
    refused("tokenizer ", model=tmp_path / "other.model")
    refused("valid_fraction 0.1, now 0.2", valid_fraction=0.2)
    refused("seed 1, now 2", seed=2)
    refused("valid none, now text=b.txt", valid=tmp_path / "b.txt")
    refused("separator <|endoftext|>, now ---".replace("|", "[|]"), separator="---")

    (tmp_path / "a.txt").rename(tmp_path / "moved.txt")
    write_stories(tmp_path / "a.txt", n=20)
    assert prepare(a, model, out, **options)["splits"]["train"]["documents"] <= 20

    manifest = json.loads((out / "manifest.json").read_bytes())
    del manifest["made_from"]  # as folders were before
    (out / "manifest.json").write_text(json.dumps(manifest))
    before = contents(out)
    refused("sources x, now text", tmp_path / "a.txt")
    prepare(a, model, out, **options | {"seed": 2})
    for others in ("{}", "[]", '{"splits": []}', "notes"):
        (out / "manifest.json").write_text(others)
        with pytest.raises(FileExistsError, match="out: exists and holds no prepared tokens"):
            prepare(a, model, out, **options)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_of_few_documents_one_is_held_out_wherever_it_stands(tmp_path, model, n_workers):
    path, held_out = tmp_path / "a.txt", []
    stories = [f"A cat of {i} years." for i in range(20)]
    for texts in (stories, stories[::-1], ["", *stories, *stories]):
        path.write_text("\n<|endoftext|>\n".join(texts))
        out = tmp_path / str(len(held_out))
        prepare(path, model, out, valid_fraction=1e-9, n_workers=n_workers)
        held_out.append(documents_in(out, "valid"))
        assert len(documents_in(out, "train")) == 19 * len(held_out[-1])
        assert held_out[0][0] not in documents_in(out, "train")
    assert [len(documents) for documents in held_out] == [1, 1, 2]
    assert held_out[0] == held_out[1] == held_out[2][:1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a pipe")
def test_a_pipe_is_not_read_twice_to_hold_one_out(tmp_path, model):
    os.mkfifo(tmp_path / "pipe")
    text = b"one\n<|endoftext|>\ntwo"
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[text])
    writer.start()
    with pytest.raises(ArgumentError, match="no validation document among 2: raise it, or name"):
        prepare(tmp_path / "pipe", model, tmp_path / "out", valid_fraction=1e-9)
    writer.join()


def test_the_tokenizer_of_a_model_is_taken_with_what_was_added_to_it(tmp_path):
    pytest.importorskip("safetensors")
    save_hf(tiny_checkpoint(), tmp_path / "model")
    for name, field, value in (
        ("tokenizer", "added_tokens", [{"id": 300, "content": "<end>", "special": True}]),
        ("config", "eos_token_id", 300),
    ):
        path = tmp_path / f"model/{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    write_stories(tmp_path / "a.txt")
    manifest = prepare(tmp_path / "a.txt", tmp_path / "model", tmp_path / "out", valid_fraction=0.1)
    assert manifest["eos_id"] == 300 and manifest["tokenizer"]["vocab_size"] == 301
    again = prepare(tmp_path / "a.txt", tmp_path / "out", tmp_path / "more", valid_fraction=0.1)
    assert again == manifest


def test_the_split_follows_the_document_not_its_place(tmp_path, model):
    stories = write_stories(tmp_path / "a.txt")
    shuffled = random.Random(3).sample(stories, len(stories))
    twice = [text for story in shuffled for text in (story, "  " + story.replace(" ", "  ", 1))]
    (tmp_path / "b.txt").write_text("\n<|endoftext|>\n".join(twice), encoding="utf-8")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    split = {}
    for name in ("a", "b"):
        prepare(tmp_path / f"{name}.txt", model, tmp_path / name, valid_fraction=0.3)
        split[name] = {
            side: {
                " ".join(processor.decode(d).split()) for d in documents_in(tmp_path / name, side)
            }
            for side in ("train", "valid")
        }
    assert split["a"] == split["b"]
    assert 0.2 < len(split["a"]["valid"]) / len(set(stories)) < 0.4


def test_validation_text_can_be_named(tmp_path, model):
    write_stories(tmp_path / "a.txt")
    held_out = write_stories(tmp_path / "held_out.txt", n=7, seed=9)
    out = prepare(tmp_path / "a.txt", model, tmp_path / "o", valid=tmp_path / "held_out.txt")
    assert out["splits"]["train"]["documents"] == 300
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = [processor.encode(story) for story in held_out]
    assert documents_in(tmp_path / "o", "valid") == expected


def test_named_validation_text_is_not_trained_on(tmp_path, model):
    stories = write_stories(tmp_path / "a.txt")
    held_out = [stories[5], "  " + stories[250].replace(" ", "\n"), "only here"]
    (tmp_path / "held_out.txt").write_text("\n<|endoftext|>\n".join(held_out), encoding="utf-8")
    for n in (1, 2):
        out = tmp_path / f"o{n}"
        manifest = prepare(
            tmp_path / "a.txt", model, out, valid=tmp_path / "held_out.txt", n_workers=n
        )
        assert manifest["left_out"] == 2
        assert manifest["splits"]["train"]["documents"] == 298
        assert manifest["splits"]["valid"]["documents"] == 3
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        expected = [processor.encode(s) for i, s in enumerate(stories) if i not in (5, 250)]
        assert documents_in(out, "train") == expected


def test_sources_lie_one_after_another_and_are_counted(tmp_path, model):
    stories = {
        name: write_stories(tmp_path / f"{name}.txt", 100, i) for i, name in enumerate("abc")
    }
    inputs = [
        f"{name}={tmp_path / file}.txt" for name, file in (("x", "a"), ("y", "b"), ("x", "c"))
    ]
    out = tmp_path / "out"
    splits = prepare(inputs, model, out, valid_fraction=0.2, n_workers=2)["splits"]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for side in ("train", "valid"):
        expected, counts = [], []
        for name, texts in (("x", stories["a"] + stories["c"]), ("y", stories["b"])):
            texts = [t for t in texts if is_validation(t, 0.2, 0) == (side == "valid")]
            encoded = [processor.encode(text) for text in texts]
            expected += encoded
            counts.append(
                {
                    "name": name,
                    "documents": len(texts),
                    "tokens": sum(len(tokens) + 2 for tokens in encoded),
                    "bytes": sum(len(text.encode()) for text in texts),
                }
            )
        assert documents_in(out, side) == expected
        assert splits[side]["sources"] == counts


def test_a_tokenizer_that_does_not_know_the_script_is_told_of(tmp_path, model, capsys):
    write_stories(tmp_path / "known.txt")
    (tmp_path / "unknown.txt").write_text("Жил-был кот.\n<|endoftext|>\nЖила-была собака.")
    inputs = [f"{name}={tmp_path}/{name}.txt" for name in ("known", "unknown")]
    out = str(tmp_path / "out")
    assert main(["data", "prepare", *inputs, "--tokenizer", str(model), "--out", out]) == 0
    err = capsys.readouterr().err
    hints = [line for line in err.splitlines() if "bytes per token" in line]
    assert [hint[:25] for hint in hints] == ["tinyllama: unknown: only "]
    assert "scores will hang on" in err and "holds out more" in err


def test_more_than_65535_tokens_need_four_bytes(tmp_path):
    extra = tuple(f"word{i}" for i in range(65_536 - 3))
    vocabulary = Vocabulary(
        pieces=("<unk>", "<s>", "</s>", *extra[:-2], "▁", "猫"),
        scores=-np.arange(65_536, dtype=np.float32),
        types=np.array(
            [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
            + [TokenType.NORMAL] * len(extra),
            np.int32,
        ),
    )
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.save_sentencepiece(vocabulary))
    (tmp_path / "a.txt").write_text("猫", encoding="utf-8")
    manifest = prepare(tmp_path / "a.txt", tmp_path, tmp_path / "out", valid_fraction=0)
    assert manifest["dtype"] == "uint32"
    assert manifest["splits"]["valid"] == {
        "documents": 0, "tokens": 0, "bytes": 0, "sources": [], "shards": [],
    }  # fmt: skip
    assert np.fromfile(tmp_path / "out/train-00000.bin", "<u4").tolist() == [1, 65534, 65535, 2]


def test_bad_input_leaves_nothing_behind(tmp_path, model):
    out = tmp_path / "out"
    good, bad, empty = tmp_path / "good.txt", tmp_path / "bad.jsonl", tmp_path / "empty.txt"
    write_stories(good)
    bad.write_text('{"text": "fine"}\n' * 500 + '{"text": broken}\n')
    empty.write_text("\n\n")
    one = tmp_path / "one.txt"
    one.write_text("a single story")
    alike = tmp_path / "alike.txt"
    alike.write_text("a story\n<|endoftext|>\na  story")
    for inputs, options, error, message in (
        (bad, {}, FormatError, "bad.jsonl: line 501: not JSON"),
        (empty, {}, ArgumentError, "no document to train on"),
        (one, {}, ArgumentError, r"one document, .* line <\|endoftext\|> .* --valid FILE"),
        (one, {"valid_fraction": 0.999}, ArgumentError, "one document, and"),
        (alike, {}, ArgumentError, r"valid_fraction 0\.01 holds out all 2 documents.* alike"),
        (good, {"valid": empty}, ArgumentError, "empty.txt: there is no document to validate on"),
        (good, {"valid_fraction": 1.0}, ArgumentError, "valid_fraction is 1.0"),
        (good, {"n_workers": 0}, ArgumentError, "n_workers is 0"),
        (good, {"seed": 2**63}, ArgumentError, "seed is 9223372036854775808"),
        (tmp_path / "none.txt", {}, FileNotFoundError, "none.txt"),
    ):
        with pytest.raises(error, match=message):
            prepare(inputs, model, out, **options)
        assert not out.exists()
    with pytest.raises(FormatError, match="not a SentencePiece model"):
        prepare(good, good, out)
    assert not out.exists()

    finished = prepare(good, model, out, valid_fraction=0.1)
    before = contents(out)
    with pytest.raises(FormatError):
        good.write_bytes(good.read_bytes() + b"\xff")
        prepare(good, model, out, valid_fraction=0.1)
    assert contents(out) == before and finished

    with pytest.raises(FileExistsError, match="holds no prepared tokens"):
        prepare(good, model, tmp_path)
    with pytest.raises(NotADirectoryError, match=r"good\.txt/out'$"):
        prepare(good, model, good / "out")


def test_text_and_tokenizers_need_no_torch(tmp_path):
    write_stories(tmp_path / "a.txt")
    script = """
import sys
sys.modules["torch"] = None
from tinyllama.cli import main
for command in (
    "data check a.txt --repair b.txt --tokenizer bundled --report text.html",
    "tokenizer train b.txt --vocab-size 320 --out t.model",
    "tokenizer show t.model cat",
    "data prepare b.txt --tokenizer t.model --workers 1 --out tokens",
):
    assert main(command.split()) == 0, command
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
    assert (tmp_path / "tokens" / "manifest.json").is_file()
