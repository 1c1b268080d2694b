"""Pairs of prompt and completion: read, encoded, laid into windows, learned and scored."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentencepiece")
pytest.importorskip("safetensors")

from tiny_training import CONFIG, RECIPE, VOCAB, same, weights, write_tokens  # noqa: E402
from tinyllama.cli import main  # noqa: E402
from tinyllama.data import check  # noqa: E402
from tinyllama.data.documents import Documents, Pair  # noqa: E402
from tinyllama.data.shards import prepare  # noqa: E402
from tinyllama.errors import ArgumentError, ConfigError, FormatError  # noqa: E402
from tinyllama.formats import read_checkpoint  # noqa: E402
from tinyllama.formats.checkpoint import TokenType, Vocabulary  # noqa: E402
from tinyllama.formats.gguf import gguf_bytes  # noqa: E402
from tinyllama.formats.sentencepiece import open_processor, save_sentencepiece  # noqa: E402
from tinyllama.loading import bundled_model  # noqa: E402
from tinyllama.train.batches import UNSCORED, Texts, TokenFolder  # noqa: E402
from tinyllama.train.metrics import read_records  # noqa: E402
from tinyllama.train.page import run_page  # noqa: E402
from tinyllama.train.pairs import PairWindows, pack  # noqa: E402
from tinyllama.train.trainer import Trainer  # noqa: E402
from tinyllama.train.validate import validate  # noqa: E402

PROMPT = "Summary: A cat runs.\nWords: cat, run\nFeatures: Dialogue\nStory:"
STORY = f"{PROMPT} \n\nA cat ran.\nStory: no."


def letters(folder: Path) -> Path:
    """A tokenizer of ▁, a, b, c, d (3 to 7) and bc (8), which wins where b stands before c."""
    pieces = ("<unk>", "<s>", "</s>", "▁", "a", "b", "c", "d", "bc")
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.NORMAL] * 6]
    scores = np.arange(9, dtype=np.float32)
    vocabulary = Vocabulary(pieces, scores, np.array(types, np.int32))
    (folder / "tok.model").write_bytes(save_sentencepiece(vocabulary))
    return folder / "tok.model"


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"prompt": prompt, "completion": rest}) for prompt, rest in pairs]
    path.write_text("\n".join(lines))
    return path


def pair_folder(folder: Path, lengths: list[tuple[int, int]]) -> Path:
    """A token folder of pairs with these numbers of tokens (prompt and BOS, all), both splits."""
    tokens = write_tokens(folder)
    random = np.random.default_rng(1)
    documents = [[1, *random.integers(3, VOCAB, n - 2), 2] for _, n in lengths]
    manifest = json.loads((tokens / "manifest.json").read_text())
    for name in ("train", "valid"):
        np.concatenate(documents).astype("<u2").tofile(tokens / f"{name}-0.bin")
        np.array([n for n, _ in lengths], "<i4").tofile(tokens / f"{name}-0.prompts")
        shard = {
            "file": f"{name}-0.bin",
            "documents": len(documents),
            "tokens": sum(map(len, documents)),
            "prompts": {"file": f"{name}-0.prompts"},
        }
        manifest["splits"][name] = {"bytes": 5000, "prompt_bytes": 1000, "shards": [shard]}
    (tokens / "manifest.json").write_text(json.dumps(manifest))
    return tokens


def nats_of(model: torch.nn.Module, tokens: np.ndarray, first: int) -> float:
    """-ln of the probability of tokens[first:], given all before."""
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[None, :-1]))[0].double().log_softmax(-1)
    return -sum(float(logits[i - 1, tokens[i]]) for i in range(first, len(tokens)))


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_records_with_prompt_and_completion_are_pairs_kept_as_they_are(
    tmp_path: Path, kind: str
) -> None:
    records = [
        {"prompt": " Q: why?\n", "completion": " So. \n"},
        {"prompt": "Hi", "completion": "x"},
    ]
    path = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "csv":
        path.write_text('prompt,completion\n" Q: why?\n"," So. \n"\nHi,x\n')
    else:
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(records), path)
    pairs = [pair for _, pair in Documents(path).pairs()]
    assert pairs == [Pair(" Q: why?\n", " So. \n"), Pair("Hi", "x")]
    assert [text for _, text in Documents(path)] == [" Q: why?\n So. \n", "Hix"]


def test_a_named_field_or_a_text_is_no_pair(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "b", "text": " c "}\n{"prompt": "a", "completion": "b"}'
    )
    assert [pair for _, pair in Documents(path).pairs()] == [Pair("", "c"), Pair("a", "b")]
    assert [pair for _, pair in Documents(path, field="prompt").pairs()] == [Pair("", "a")] * 2
    path.write_text('{"prompt": "a"}')
    with pytest.raises(FormatError, match=r"line 1: does not have .* prompt and completion"):
        list(Documents(path))
    path.write_text('{"prompt": "a", "completion": 3}')
    with pytest.raises(FormatError, match="line 1: completion is number, expected text"):
        list(Documents(path))


def test_check_reads_pairs_and_does_not_mend_them(tmp_path: Path) -> None:
    pytest.importorskip("ftfy")
    path = write_pairs(tmp_path / "p.jsonl", [("a", " b"), ("a", " b"), ("c", "d")])
    report = check(path).total
    assert (report.documents, report.findings["duplicates"].count) == (3, 1)
    with pytest.raises(ArgumentError, match="3 of the documents are pairs"):
        check(path, repair=tmp_path / "mended.txt")
    assert not (tmp_path / "mended.txt").exists()


def test_pairs_without_a_completion_are_told_of(tmp_path: Path, capsys: Any) -> None:
    pairs = [(f"Q{i}:", " yes." if i % 3 else " ") for i in range(90)]
    path = write_pairs(tmp_path / "pairs.jsonl", pairs)
    report = check(path).total
    assert report.kept.documents == 60 and report.findings["empty"].count == 30
    arguments = ["data", "prepare", str(path), "--tokenizer", "bundled", "--workers", "1"]
    assert main([*arguments, "--out", str(tmp_path / "tokens")]) == 0
    said = capsys.readouterr()
    assert "left out: 30 documents, empty or pairs without" in said.out
    assert "the text has few in all" in said.err
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert manifest["empty"] == 30
    assert sum(split["pairs"] for split in manifest["splits"].values()) == 60


def test_instruct_layout_ends_its_prompt_at_story(tmp_path: Path) -> None:
    path = tmp_path / "instruct.txt"
    path.write_text(f"{STORY}\n<|endoftext|>\n\nWords: a\nStory:b\n<|endoftext|>\n")
    pairs = [pair for _, pair in Documents(path, instruct=True).pairs()]
    assert pairs == [Pair(PROMPT, " \n\nA cat ran.\nStory: no."), Pair("Words: a\nStory:", "b")]
    assert [pair.prompt for _, pair in Documents(path).pairs()] == ["", ""]
    for text in ("Once there was a cat.\nStory: x", "Words: cat\nA Story: x"):
        path.write_text(text)
        with pytest.raises(FormatError, match=r"instruct.txt: line 1: not in the layout"):
            list(Documents(path, instruct=True))


# --- encoding -----------------------------------------------------------------------------------


def test_tokens_and_prompts_on_disk_token_by_token(tmp_path: Path) -> None:
    model = letters(tmp_path)
    pairs = [("ab", "cd"), ("d", " a"), ("a", "  "), ("", "bc")]
    prepare(write_pairs(tmp_path / "p.jsonl", pairs), model, tmp_path / "out", valid_fraction=0)
    tokens = np.fromfile(tmp_path / "out/train-00000.bin", "<u2").tolist()
    # ▁ a b | c d, never bc across the border; ▁ d | ▁ a; no completion, no document; ▁ bc.
    assert tokens == [1, 3, 4, 5, 6, 7, 2, 1, 3, 7, 3, 4, 2, 1, 3, 8, 2]
    assert np.fromfile(tmp_path / "out/train-00000.prompts", "<i4").tolist() == [4, 3, 0]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    entry = manifest["splits"]["train"]
    assert (entry["bytes"], entry["pairs"], entry["prompt_bytes"]) == (9, 2, 3)
    split = TokenFolder(tmp_path / "out").split("train")
    assert split.n_bytes == 6 and split.prompt.tolist() == [4, 3, 0]
    assert split.targets(0, 0, 7).tolist() == [UNSCORED] * 4 + [6, 7, 2]
    assert split.targets(0, 3, 6).tolist() == [UNSCORED, 6, 7]
    assert split.targets(2, 0, 4).tolist() == [1, 3, 8, 2]


def test_prompts_that_do_not_fit_their_shard_are_refused(tmp_path: Path) -> None:
    tokens = pair_folder(tmp_path, [(3, 9), (2, 5)])
    for wrong in ([3], [3, 5], [-1, 2]):
        np.array(wrong, "<i4").tofile(tokens / "train-0.prompts")
        with pytest.raises(FormatError, match=r"train-0.prompts: not the lengths of the prompts"):
            TokenFolder(tokens).split("train")


# --- windows ------------------------------------------------------------------------------------


def test_windows_token_by_token(tmp_path: Path) -> None:
    model = letters(tmp_path)
    pairs = write_pairs(tmp_path / "p.jsonl", [("ab", "cd"), ("d", "a")])
    prepare(pairs, model, tmp_path / "out", valid_fraction=0)
    windows = PairWindows(TokenFolder(tmp_path / "out").split("train"), 13, seed=1)
    tokens, targets = windows.batch(0, 2)
    no = UNSCORED
    # BOS ▁ a b | c d EOS, then BOS ▁ d | a EOS, then nothing: 13 inputs of 14 tokens.
    assert tokens.tolist() == [[1, 3, 4, 5, 6, 7, 2, 1, 3, 7, 4, 2, 0]] * 2
    assert targets.tolist() == [[no, no, no, 6, 7, 2, no, no, no, 4, 2, no, no]] * 2


@pytest.mark.parametrize("seq_len", [4, 7, 16])
def test_an_epoch_has_each_completion_token_once_behind_what_came_before(
    tmp_path: Path, seq_len: int
) -> None:
    random = np.random.default_rng(0)
    lengths = [(int(n * random.random() * 0.8), int(n)) for n in random.integers(3, 30, 80)]
    split = TokenFolder(pair_folder(tmp_path, lengths)).split("train")
    windows = PairWindows(split, seq_len, seed=3)
    epochs = [
        windows.batch(e * windows.windows_per_epoch, windows.windows_per_epoch) for e in (0, 1)
    ]
    assert not np.array_equal(epochs[0][0], epochs[1][0])
    documents = [split.document(i) for i in range(len(split))]
    completions = [split.document(i, max(1, n)) for i, (n, _) in enumerate(lengths)]
    expected = np.sort(np.concatenate(completions))
    for tokens, targets in epochs:
        assert np.array_equal(np.sort(targets[targets != UNSCORED]), expected)
        inner = targets[:, :-1] != UNSCORED
        assert np.array_equal(tokens[:, 1:][inner], targets[:, :-1][inner])
    rows = [" ".join(map(str, row)) for row in np.hstack([tokens, targets[:, -1:]])]
    for document in documents:
        if len(document) <= seq_len + 1:  # never cut where that can be helped
            assert any(" ".join(map(str, document)) in row for row in rows)


def test_pack_fills_groups_and_never_beyond() -> None:
    none = np.zeros(500, bool)
    assert sorted(map(sorted, pack(np.array([5, 3, 6, 4, 2]), 10, none[:5]))) == [[0, 1, 4], [2, 3]]
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    groups = pack(lengths, 100, none)
    assert sorted(i for group in groups for i in group) == list(range(500))
    assert max(lengths[group].sum() for group in groups) <= 100
    assert len(groups) <= math.ceil(lengths.sum() / 100) * 1.05
    first = np.random.default_rng(1).random(500) < 0.2
    groups = pack(lengths, 100, first)
    assert sorted(i for group in groups for i in group) == list(range(500))
    assert max(lengths[group].sum() for group in groups) <= 100
    assert all(not first[i] for group in groups for i in group[1:])
    assert len(groups) <= math.ceil(lengths.sum() / 100) * 1.05


def test_the_end_of_a_long_document_sees_no_other_before_it(tmp_path: Path) -> None:
    """It has no begin token that would keep it apart."""
    lengths = [(3, 20), (5, 19), (2, 7), (1, 6), (2, 5), (9, 40), (1, 4), (2, 6)]
    split = TokenFolder(pair_folder(tmp_path, lengths)).split("train")
    windows = PairWindows(split, 16, seed=3)
    tokens, _ = windows.batch(0, windows.windows_per_epoch)
    shared = 0
    for n, row in enumerate(tokens):
        pieces = windows._pieces[windows._window(n)]
        assert (pieces[1:, 1] == 0).all()
        shared += len(pieces) > 1 and pieces[0, 1] > 0
        assert row[0] == split.document(*pieces[0, :2], pieces[0, 1] + 1)[0]
    assert shared


# --- learning and scoring -----------------------------------------------------------------------

# One to a window of 16 + 1, with completions of 1 to 13 tokens.
ALONE = [(3, 16), (14, 15), (10, 13), (2, 11), (15, 17), (9, 17), (4, 10), (11, 12)]


def test_the_loss_is_the_mean_over_completion_tokens_document_by_document(tmp_path: Path) -> None:
    tokens = pair_folder(tmp_path, ALONE)
    recipe = dataclasses.replace(RECIPE, batch_size=4, grad_accum=2, dropout=0.0)
    trainer = Trainer(recipe, tokens, tmp_path / "run")
    split = TokenFolder(tokens).split("train")
    nats = sum(nats_of(trainer.model, split.document(i), n) for i, (n, _) in enumerate(ALONE))
    assert trainer.windows.windows_per_epoch == len(ALONE)
    assert trainer.step() == pytest.approx(nats / sum(m - n for n, m in ALONE), rel=1e-5)


def test_a_step_in_parts_is_a_step_at_once(tmp_path: Path) -> None:
    """The parts hold 3 to 22 targets each; a mean of their means would weigh them alike."""
    tokens = pair_folder(tmp_path, ALONE)
    ends = []
    for parts in (1, 2, 8):
        recipe = dataclasses.replace(
            RECIPE, optimizer="adamw", batch_size=8 // parts, grad_accum=parts, dropout=0.0
        )
        trainer = Trainer(recipe, tokens, tmp_path / f"run{parts}")
        losses = [trainer.step(), trainer.step()]
        ends.append((losses, weights(trainer)))
    for losses, found in ends[1:]:
        assert losses == pytest.approx(ends[0][0], rel=1e-5)
        for name, tensor in ends[0][1].items():
            assert np.allclose(found[name], tensor, atol=2e-5), name


def test_windows_hold_something_to_learn_or_are_none(tmp_path: Path) -> None:
    """The first pieces of a document whose prompt is longer than a window hold nothing."""
    tokens = pair_folder(tmp_path, [(40, 60), (0, 5)])
    windows = PairWindows(TokenFolder(tokens).split("train"), 16, seed=0)
    _, targets = windows.batch(0, windows.windows_per_epoch)
    assert ((targets != UNSCORED).sum(1) > 0).all()


@pytest.mark.parametrize("context", [8, 32])
def test_validation_scores_completions_only(tmp_path: Path, context: int) -> None:
    lengths = [(3, 16), (14, 15), (25, 40), (0, 6)]
    tokens = pair_folder(tmp_path, lengths)
    trainer = Trainer(dataclasses.replace(RECIPE, seq_len=8), tokens, tmp_path / "run")
    model = trainer.model.eval()
    model.config = dataclasses.replace(CONFIG, max_seq_len=context)
    split = TokenFolder(tokens).split("valid")
    score = validate(model, split)
    assert score.n_tokens == 13 + 1 + 15 + 5
    assert score.bits_per_byte == pytest.approx(
        score.nats_per_token * score.n_tokens / math.log(2) / 4000
    )
    if context == 32:
        nats = sum(nats_of(model, split.document(i), max(1, lengths[i][0])) for i in (0, 1, 3))
        # The third is longer than the context: a first window to token 32, then one from 16.
        document = split.document(2)
        nats += nats_of(model, document[:33], 25) + nats_of(model, document[16:], 17)
        assert score.nats_per_token * score.n_tokens == pytest.approx(nats, rel=1e-5)


# --- going on from a model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = Trainer(RECIPE, tokens, tmp_path_factory.mktemp("first") / "run")
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["run", "checkpoint", "gguf"])
def test_init_from_takes_whatever_loads(
    tokens: Path, first: Trainer, tmp_path: Path, kind: str
) -> None:
    last, gguf = first.run / "step-00000006", tmp_path / "m.gguf"
    gguf.write_bytes(gguf_bytes(read_checkpoint(last), "f32"))
    start = {"run": first.run, "checkpoint": last, "gguf": gguf}[kind]
    recipe = dataclasses.replace(RECIPE, init_from=str(start), seq_len=32)
    assert same(weights(Trainer(recipe, tokens, tmp_path / "second")), weights(first))
    text = tmp_path / "a.txt"
    text.write_text("the cat sat and ran")
    by_file = prepare(text, tokens / "tokenizer.model", tmp_path / "a", valid_fraction=0)
    by_model = prepare(text, start, tmp_path / "b", valid_fraction=0)
    assert by_model["splits"] == by_file["splits"]


def test_the_score_before_is_on_record_but_never_the_best(
    tokens: Path, first: Trainer, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(
        RECIPE, init_from=str(first.run), steps=3, optimizer="adamw", learning_rate=1.0
    )
    second = Trainer(recipe, tokens, tmp_path / "second")
    second.train()
    before, after = (r for r in second.metrics.records if "bits_per_byte" in r)
    (*_, expected) = (r for r in first.metrics.records if "bits_per_byte" in r)
    assert (before["step"], before["tokens"]) == (0, 0)
    assert before["bits_per_byte"] == expected["bits_per_byte"] < after["bits_per_byte"]
    assert second.state.best_bits_per_byte == after["bits_per_byte"]
    run_page(second.run)


def test_init_from_refuses_another_model(tokens: Path, first: Trainer, tmp_path: Path) -> None:
    for change, message in (
        ({"n_layers": 1}, "n_layers is 2 there, model.n_layers 1"),
        ({"rope_theta": 500.0}, "rope_theta is 10000.0 there"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-05 there"),
        ({"tie_embeddings": False}, "tie_embeddings is True there"),
    ):
        model = dataclasses.replace(CONFIG, **change)
        recipe = dataclasses.replace(RECIPE, model=model, init_from=str(first.run))
        with pytest.raises(ConfigError, match=message):
            Trainer(recipe, tokens, tmp_path / "run")
    other = write_tokens(tmp_path)
    vocabulary = read_checkpoint(first.run).vocabulary
    pieces = [*vocabulary.pieces[:-1], "猫"]
    vocabulary = dataclasses.replace(vocabulary, pieces=tuple(pieces))
    (other / "tokenizer.model").write_bytes(save_sentencepiece(vocabulary))
    with pytest.raises(ConfigError, match=r"token 299 is '.*' there, '猫' here; prepare the data"):
        Trainer(dataclasses.replace(RECIPE, init_from=str(first.run)), other, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fine_tuning_the_bundled_model_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stories = [STORY.replace("ran", f"ran {i} times") for i in range(40)]
    Path("instruct.txt").write_text("\n<|endoftext|>\n".join(stories))
    command = "data prepare instruct.txt --instruct --tokenizer bundled --out pairs --workers 1"
    assert main([*command.split(), "--valid-fraction", "0.2"]) == 0
    assert "are pairs" in capsys.readouterr().out
    short = "--set epochs=0 --set steps=1 --set batch_size=1 --set seq_len=64 --set compile=no"
    short += " --set every_sample=0"
    assert main(f"train --from bundled --data pairs --out tuned {short}".split()) == 0
    tuned, start = read_checkpoint("tuned"), read_checkpoint(bundled_model())
    assert tuned.vocabulary.pieces == start.vocabulary.pieces
    moved = [np.abs(tuned.tensors[name] - tensor).max() for name, tensor in start.tensors.items()]
    assert 0 < max(moved) < 0.01
    (*_, score) = (r for r in read_records(Path("tuned")) if "bits_per_byte" in r)
    capsys.readouterr()
    for text in ("pairs", "held_out.jsonl"):
        if text != "pairs":  # the same pairs, not prepared
            folder = TokenFolder("pairs")
            texts = Texts(folder, open_processor(folder.tokenizer.read_bytes()))
            lines = [json.dumps(pair._asdict()) + "\n" for _, pair in texts.pairs()]
            Path(text).write_text("".join(lines))
        assert main(["eval", "tuned", "--text", text, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["text"]
        assert found["pairs"] == found["documents"] > 1
        # Training may score in bf16; with the prompts it would be another figure.
        assert found["bits_per_byte"] == pytest.approx(score["bits_per_byte"], rel=5e-3)
