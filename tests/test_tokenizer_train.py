"""Trained tokenizers: what sentencepiece and transformers make of them, and of what we write."""

import random

import numpy as np
import pytest

from tinyllama import cli, tokenizer
from tinyllama.errors import ArgumentError, FormatError
from tinyllama.formats.checkpoint import TokenType
from tinyllama.formats.sentencepiece import read_sentencepiece, save_sentencepiece

sentencepiece = pytest.importorskip("sentencepiece")

ENGLISH = [
    "the",
    "cat",
    "sat on",
    "12",
    "mats,",
    "and",
    "dogs ran",
    "345",
    "hats.\nOnce",
    "time!\n",
]
CHINESE = "从前有一只小猫它很高兴和狗在山上玩了三天你好吗日本"


def processor(model: bytes):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def random_texts(n: int = 400) -> list[str]:
    rng = random.Random(5)
    pools = [
        "abcdefgh  \n\t",
        CHINESE,
        "😀👍🏽é▁\u0301\u200d",
        "<s></s><unk><0x0A>",
        "\xa0\u3000\0ÿ",
    ]
    return ["".join(rng.choices(rng.choice(pools), k=rng.randrange(30))) for _ in range(n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(2)
    english = [" ".join(rng.choices(ENGLISH, k=12)) for _ in range(400)]
    chinese = ["".join(rng.choices(CHINESE, k=20)) + "。" for _ in range(400)]
    (folder / "english.txt").write_text("\n<|endoftext|>\n".join(english), encoding="utf-8")
    (folder / "chinese.txt").write_text("\n".join(chinese), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(folder) -> bytes:
    tokenizer.train([folder], folder / "both.model", 420)
    return (folder / "both.model").read_bytes()


def test_a_trained_tokenizer_is_a_llamas(folder, model):
    vocabulary = tokenizer.load_sentencepiece(folder / "both.model")
    assert len(vocabulary) == 420
    assert (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id) == (0, 1, 2)
    assert vocabulary.pad_id is None
    assert vocabulary.add_space_prefix and not vocabulary.remove_extra_whitespaces
    assert vocabulary.pieces[3:259] == tuple(f"<0x{byte:02X}>" for byte in range(256))
    assert (vocabulary.types[3:259] == TokenType.BYTE).all()
    assert not any(len(p) > 1 and any(c.isdigit() for c in p) for p in vocabulary.pieces[259:])
    sp = processor(model)
    for text in random_texts():
        assert sp.decode(sp.encode(text)) == text.replace("▁", " ")


def test_training_is_deterministic_and_the_seed_draws_the_lines(folder):
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = folder / f"{name}.model"
        tokenizer.train(folder / "english.txt", out, 300, sample_lines=30, seed=seed)
        results.append(out.read_bytes())
    assert results[0] == results[1] != results[2]
    rows = (folder / "a.vocab").read_text(encoding="utf-8").splitlines()
    assert [row.split("\t")[0] for row in rows][:3] == ["<unk>", "<s>", "</s>"] and len(rows) == 300


def test_the_command_names_both_files_and_its_help_the_sizes(folder, tmp_path, capsys):
    out = tmp_path / "t.model"
    train = ["tokenizer", "train", str(folder / "english.txt"), "--out", str(out), "--vocab-size"]
    assert cli.main([*train, "300"]) == 0
    assert f"wrote {out} and {tmp_path / 't.vocab'}: 300 tokens" in capsys.readouterr().out
    assert cli.main([*train, "1"]) == cli.main([*train, "1", "--no-byte-fallback"]) == 2
    refused = capsys.readouterr().err
    assert "expected 261 to 1048576" in refused and "expected 5 to 1048576" in refused
    with pytest.raises(SystemExit):
        cli.main(["tokenizer", "train", "--help"])
    assert "261 (5 without byte tokens) to 1048576" in " ".join(capsys.readouterr().out.split())


def test_every_line_is_as_likely_to_be_drawn():
    drawn = np.zeros(20)
    for seed in range(2000):
        for line in tokenizer._sample(map(str, range(20)), 5, seed):
            drawn[int(line)] += 1
    assert abs(drawn / 2000 - 0.25).max() < 0.05  # 0.25 ± 5 standard deviations


def test_rare_characters_become_bytes_and_do_not_join(folder):
    rare = [chr(0x4E00 + i) for i in range(0, 4000, 2)]
    text = "".join(f"小猫{char}小猫\n" for char in rare)
    (folder / "rare.txt").write_text(text, encoding="utf-8")
    vocabulary = tokenizer.train(folder / "rare.txt", folder / "rare.model", 400)
    single = [p for p, t in zip(vocabulary.pieces, vocabulary.types, strict=True) if t == 1]
    assert sum(len(piece) == 1 for piece in single) <= 0.7 * (400 - 259) + 2
    assert "小猫" in single and not any("0" in piece and piece != "0" for piece in single)
    with pytest.raises(ArgumentError, match=r"want a token of their own.*lower character_coverage"):
        tokenizer.train(folder / "rare.txt", folder / "x.model", 400, character_coverage=1.0)
    assert not (folder / "x.model").exists()


def test_without_byte_fallback_and_with_joined_digits(folder):
    vocabulary = tokenizer.train(
        folder / "english.txt", folder / "d.model", 80, byte_fallback=False, split_digits=False
    )
    assert not (vocabulary.types == TokenType.BYTE).any()
    assert any(piece.strip("▁").isdigit() and len(piece) > 2 for piece in vocabulary.pieces)
    assert 0 in processor((folder / "d.model").read_bytes()).encode("猫")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100}, "vocab_size is 100"),
        ({"vocab_size": 50_000}, "vocab_size 50000 does not suit the text: .*too high"),
        ({"character_coverage": 1.5}, "character_coverage is 1.5"),
        ({"character_coverage": float("nan")}, "character_coverage is nan"),
        ({"sample_lines": 0}, "sample_lines is 0"),
        ({"out": "x.bin"}, "ends in .model"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(folder, tmp_path, options, message):
    arguments = {"vocab_size": 300, "out": "x.model"} | options
    arguments["out"] = tmp_path / arguments["out"]
    with pytest.raises(ArgumentError, match=message):
        tokenizer.train(folder / "english.txt", **arguments)
    assert not list(tmp_path.iterdir())


def test_no_text_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ArgumentError, match="no text to learn from"):
        tokenizer.train(tmp_path / "a.txt", tmp_path / "x.model", 300)


def test_a_written_model_encodes_as_the_one_it_was_read_from(model):
    vocabulary = read_sentencepiece(model)
    written = save_sentencepiece(vocabulary)
    again = read_sentencepiece(written)
    assert again.pieces == vocabulary.pieces
    assert (again.scores == vocabulary.scores).all() and (again.types == vocabulary.types).all()
    ours, theirs = processor(written), processor(model)
    assert (ours.unk_id(), ours.bos_id(), ours.eos_id(), ours.pad_id()) == (0, 1, 2, -1)
    for text in random_texts():
        tokens = theirs.encode(text)
        assert ours.encode(text) == tokens
        assert ours.decode(tokens) == theirs.decode(tokens)


def test_the_flags_survive(model):
    from dataclasses import replace

    vocabulary = read_sentencepiece(model)
    for prefix in (False, True):
        for remove in (False, True):
            changed = replace(vocabulary, add_space_prefix=prefix, remove_extra_whitespaces=remove)
            written = save_sentencepiece(changed)
            again = read_sentencepiece(written)
            assert (again.add_space_prefix, again.remove_extra_whitespaces) == (prefix, remove)
            text = "a  cat "
            expected = " ".join(text.split()) if remove else text
            assert processor(written).decode(processor(written).encode(text)) == expected


def test_other_models_are_refused_by_name(folder):
    for options, message in (
        ({"model_type": "unigram"}, "model_type is unigram"),
        ({"model_type": "bpe", "normalization_rule_name": "nfkc"}, "normaliser is nfkc"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "whitespace_as_suffix"),
    ):
        defaults = {"normalization_rule_name": "identity", "vocab_size": 40, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(
            input=folder / "english.txt", model_prefix=folder / "other", **defaults | options
        )
        with pytest.raises(FormatError, match=message):
            tokenizer.load_sentencepiece(folder / "other.model")


def test_damaged_models_give_one_error(model):
    rng = random.Random(0)
    for cut in (*range(0, 60, 5), *(rng.randrange(len(model)) for _ in range(40))):
        with pytest.raises(FormatError, match=r"t\.model"):
            # Even cut between two pieces: the trainer's part, which says BPE, comes last.
            read_sentencepiece(model[:cut], source="t.model")
    for _ in range(300):
        mutated = bytearray(model)
        for _ in range(rng.randrange(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        try:
            vocabulary = read_sentencepiece(bytes(mutated), source="t.model")
        except FormatError:
            continue
        assert len(vocabulary) > 0


def test_impossible_vocabularies_are_not_written(model):
    from dataclasses import replace

    vocabulary = read_sentencepiece(model)
    pieces = vocabulary.pieces
    for changed, message in (
        (replace(vocabulary, pieces=("", *pieces[1:])), "piece 0 is empty"),
        (replace(vocabulary, pieces=(*pieces[:-1], pieces[300])), "pieces 300 and 419 are both"),
        (replace(vocabulary, unk_id=None), "no unknown token"),
    ):
        with pytest.raises(FormatError, match=message):
            save_sentencepiece(changed)


def test_transformers_reads_it_alike(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it")
    (tmp_path / "tokenizer.model").write_bytes(model)
    theirs, ours = transformers.LlamaTokenizer.from_pretrained(tmp_path), processor(model)
    assert len(theirs) == ours.vocab_size()
    for text in ("the cat sat.", "从前有一只小猫", "Once 12 cats\nsat 😀", "a dog's hat, é"):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


def test_show_prints_the_pieces(folder, model, capsys, monkeypatch):
    monkeypatch.setattr(cli, "GROUPS", ("tokenizer",))
    assert cli.main(["tokenizer", "show", str(folder / "both.model"), "the cat"]) == 0
    printed = capsys.readouterr().out
    for token in processor(model).encode("the cat"):
        assert f"{read_sentencepiece(model).pieces[token]}:{token}" in printed
    assert "7 characters, 7 bytes" in printed
