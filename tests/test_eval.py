"""Perplexity and bits per byte, and the commands eval, info and generate."""

import io
import json
import math
import sys

import numpy as np
import pytest

import tinyllama
from random_models import forced_model, tiny_checkpoint, tiny_model
from tinyllama.cli import main
from tinyllama.data import Documents, prepare
from tinyllama.errors import ArgumentError
from tinyllama.evaluate.perplexity import of_documents, of_text
from tinyllama.formats.gguf import gguf_bytes, write_gguf
from tinyllama.reference import forward

TEXT = "the rain in spain, and the train"
LONG = TEXT * 6  # several contexts


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(tiny_checkpoint(), path)
    return str(path)


def log_softmax(row):
    row = row - row.max()
    return row - np.log(np.exp(row).sum())


def expected_nats(tokens, whole):
    """The documented rule, target by target, on logits of the NumPy reference."""
    checkpoint, context = tiny_checkpoint(), 64
    n_targets = len(tokens) - 1 + whole
    nats, begin, stop = 0.0, 0, 0
    for target in range(n_targets):
        if target == stop:  # the next window begins half a context before what it scores first
            begin = max(0, stop - context // 2)
            stop = min(begin + context, n_targets)
            logits = forward(checkpoint, tokens[begin:stop], dtype=np.float64)
        row = log_softmax(logits[target - begin])
        if target + 1 < len(tokens):
            nats -= row[tokens[target + 1]]
        else:
            nats -= np.logaddexp(row[1], row[2])
    return nats, n_targets


@pytest.mark.parametrize("text", [TEXT, LONG, "a"], ids=["short", "long", "one"])
def test_of_text(model, text):
    nats, n = expected_nats(model.tokenizer.encode(text), whole=False)
    score = model.perplexity(text)
    assert score == of_text(model, text)
    assert score.n_tokens == n
    assert score.nats_per_token == pytest.approx(nats / n, abs=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(text), abs=1e-5)


def test_of_documents_scores_their_ends_too(model):
    texts = [TEXT, "", LONG, "\u6c34 caf\u00e9"]
    parts = [expected_nats(model.tokenizer.encode(text), whole=True) for text in texts if text]
    nats, n = sum(p[0] for p in parts), sum(p[1] for p in parts)
    score = of_documents(model, iter(texts))
    assert score.n_tokens == n
    assert score.nats_per_token == pytest.approx(nats / n, abs=1e-5)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-5)


@pytest.mark.parametrize("n_prompt", [3, 40, 63, 64, 65, 100, 200])
def test_of_a_pair_the_completion_counts(model, n_prompt):
    letters = np.random.default_rng(1).integers(ord("a"), ord("z") + 1, n_prompt).tolist()
    pair = (bytes(letters).decode(), " and then some more, to the end")
    prompt = model.tokenizer.encode(pair[0])
    tokens = prompt + model.tokenizer._core.encode(pair[1], False, False, at_start=False)
    context, n_targets = model.config.max_seq_len, len(tokens)
    ends = [model.tokenizer.eos_id, model.tokenizer.bos_id]
    nats, begin, scored = 0.0, 0, len(prompt) - 1
    while scored < n_targets:
        stop = min(begin + context, n_targets)
        rows = model.logits(tokens[begin:stop])
        for at in range(scored, stop):
            after = [tokens[at + 1]] if at + 1 < len(tokens) else ends
            nats -= np.logaddexp.reduce(log_softmax(rows[at - begin])[after])
        scored, begin = max(scored, stop), stop - context // 2
    score = of_documents(model, [pair])
    assert score.n_tokens == len(tokens) - len(prompt) + 1
    assert score.nats_per_token == pytest.approx(nats / score.n_tokens, abs=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(pair[1]), abs=1e-5)


@pytest.mark.parametrize("n_tokens", [62, 63, 64, 65, 66, 95, 96, 97, 128, 129])
def test_lengths_around_the_context(model, n_tokens):
    tokens = [1, *np.random.default_rng(0).integers(259, 300, n_tokens - 1).tolist()]
    text = model.tokenizer.decode(tokens)
    tokens = model.tokenizer.encode(text)
    nats, n = expected_nats(tokens, whole=True)
    score = of_documents(model, [text])
    assert (score.n_tokens, n) == (len(tokens), len(tokens))
    assert score.nats_per_token == pytest.approx(nats / n, abs=1e-5)


def test_a_context_of_one_token():
    model = tinyllama.load(gguf_bytes(tiny_checkpoint()), max_seq_len=1)
    score = model.perplexity(TEXT)
    assert score.n_tokens == len(model.tokenizer.encode(TEXT)) - 1
    assert math.isfinite(score.nats_per_token)


def test_a_text_that_is_certain_costs_little():
    model = forced_model(b"ABCDEFG")
    assert model.perplexity("ABC").nats_per_token < model.perplexity("CBA").nats_per_token


def test_a_token_may_be_next_to_impossible():
    checkpoint = tiny_checkpoint(tie_embeddings=False)
    checkpoint.tensors["lm_head"] *= 3e4  # logits lie thousands apart: e to that is 0
    model = tinyllama.load(gguf_bytes(checkpoint))
    tokens = model.tokenizer.encode("ab")
    rows = model.logits(tokens).astype(np.float64)
    expected = -sum(log_softmax(row)[token] for row, token in zip(rows, tokens[1:], strict=False))
    score = model.perplexity("ab")
    assert score.nats_per_token == pytest.approx(expected / (len(tokens) - 1), rel=1e-5)
    assert score.nats_per_token > 745


def test_no_text_is_refused(model):
    with pytest.raises(ArgumentError, match="no text"):
        model.perplexity("")
    with pytest.raises(ArgumentError, match="no text"):
        of_documents(model, ["", ""])
    with pytest.raises(ArgumentError, match="text is 3"):
        model.perplexity(3)


# --- the commands ---------------------------------------------------------------------------------


def test_eval_command(model, model_file, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(f"{TEXT}\n<|endoftext|>\n{LONG}\n<|endoftext|>\n")
    text = str(tmp_path / "text.txt")
    assert main(["eval", model_file, "--text", text, "--threads", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["text"]
    expected = of_documents(model, [TEXT, LONG])
    assert figures["bits_per_byte"] == expected.bits_per_byte
    assert figures["nats_per_token"] == expected.nats_per_token
    assert figures["tokens"] == expected.n_tokens
    assert figures["documents"] == 2
    assert figures["bytes"] == len(TEXT + LONG)
    assert main(["eval", model_file, "--text", text, "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert f"bits per byte   {expected.bits_per_byte:.4f}\n" in out
    assert "documents       2\n" in out and "bytes           224\n" in out


def test_eval_reads_a_named_file_whatever_its_ending(model_file, tmp_path, capsys):
    (tmp_path / "notes.md").write_text(TEXT)
    text = str(tmp_path / "notes.md")
    assert main(["eval", model_file, "--text", text, "--threads", "1"]) == 0
    assert "documents       1\n" in capsys.readouterr().out
    assert main(["eval", model_file, "--text", model_file]) == 2
    assert f"{model_file}: unknown kind of file, and not text" in capsys.readouterr().err


def test_eval_on_what_a_folder_of_tokens_holds_out(model_file, tmp_path, capsys):
    pytest.importorskip("sentencepiece")
    texts = [f"{TEXT} {i}  two spaces, 猫 and ção" for i in range(30)]
    for name, some in (("train", texts), ("valid", texts[:5])):
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(some), encoding="utf-8")
    own = tmp_path / "own.model"  # another tokenizer than the model's
    tinyllama.tokenizer.train(tmp_path / "train.txt", own, 300)
    prepare(tmp_path / "train.txt", own, tmp_path / "tokens", valid=tmp_path / "valid.txt")
    figures = []
    for source in ("tokens", "valid.txt"):
        text = str(tmp_path / source)
        assert main(["eval", model_file, "--text", text, "--threads", "1", "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out)["text"])
        del figures[-1]["file"], figures[-1]["tok_per_s"]
    assert figures[0] == figures[1] and figures[0]["documents"] == 5


def test_eval_says_where_tokens_do_not_keep_the_text(model_file, tmp_path, capsys):
    pytest.importorskip("sentencepiece")
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "valid.txt").write_text(f"{TEXT} and 猫", encoding="utf-8")
    for fallback in (True, False):
        own = tmp_path / f"{fallback}.model"
        size = 300 if fallback else 40
        tinyllama.tokenizer.train(tmp_path / "train.txt", own, size, byte_fallback=fallback)
        tokens = tmp_path / str(fallback)
        prepare(tmp_path / "train.txt", own, tokens, valid=tmp_path / "valid.txt")
        assert main(["eval", model_file, "--text", str(tokens), "--threads", "1"]) == 0
        said = capsys.readouterr().err
        assert ("does not keep all of a text" in said) == (not fallback)


def test_eval_of_an_empty_file_is_refused(model_file, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    assert main(["eval", model_file, "--text", str(tmp_path / "empty.txt")]) == 2
    assert "empty.txt: there is no text to score" in capsys.readouterr().err


def test_info_command(model_file, capsys):
    assert main(["info", model_file, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["path"] == model_file
    assert facts["parameters"] == tiny_checkpoint().config.n_parameters
    assert facts["config"]["n_kv_heads"] == 2
    assert facts["tokenizer"] == {"vocab_size": 300, "bos_id": 1, "eos_id": 2, "unk_id": 0}
    assert facts["kv_bytes"] == 64 * facts["kv_bytes_per_token"]
    assert main(["info", model_file, "--dtype", "q8_0"]) == 0
    out = capsys.readouterr().out
    assert "q8_0" in out
    assert "28,192" in out


def test_generate_command(model, model_file, capsys):
    options = ["-m", model_file, "--threads", "1", "--seed", "3", "--max-new-tokens", "9"]
    text = model.generate("the rain", seed=3, max_new_tokens=9)
    assert main(["generate", "the rain", *options]) == 0
    assert capsys.readouterr().out == f"the rain{text}\n"
    assert main(["generate", "the rain", *options, "--no-return-full-text"]) == 0
    assert capsys.readouterr().out == f"{text}\n"
    assert main(["generate", "the rain", *options, "--stream"]) == 0
    assert capsys.readouterr().out == f"the rain{text}\n"


@pytest.mark.parametrize("typed", ["the rain", "the rain\n", "two\nlines\n\n", ""])
def test_generate_reads_its_prompt_from_standard_input(model_file, capsys, monkeypatch, typed):
    options = ["-m", model_file, "--threads", "1", "--seed", "3", "--max-new-tokens", "5"]
    assert main(["generate", typed.removesuffix("\n"), *options]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert main(["generate", "-", *options]) == 0
    assert capsys.readouterr().out == expected


def test_generate_refuses_standard_input_that_is_no_text(model_file, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    assert main(["generate", "-", "-m", model_file]) == 2
    assert "the prompt on standard input: 'utf-8' codec" in capsys.readouterr().err


def test_generate_separates_texts_as_its_help_says(model_file, tmp_path, capsys):
    options = ["--threads", "1", "--num-return-sequences", "3", "--max-new-tokens", "9"]
    assert main(["generate", "the rain", "-m", model_file, "--seed", "1", *options]) == 0
    (tmp_path / "texts.txt").write_text(capsys.readouterr().out, encoding="utf-8")
    assert len(list(Documents(tmp_path / "texts.txt"))) == 3
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "<|endoftext|>" in capsys.readouterr().out


def test_an_interrupted_stream_ends_its_line(model_file, capsys, monkeypatch):
    def pieces(*args, **options):
        yield "the rain"
        raise KeyboardInterrupt

    monkeypatch.setattr(tinyllama.Model, "stream", pieces)
    assert main(["generate", "the", "-m", model_file, "--stream"]) == 130
    captured = capsys.readouterr()
    assert captured.out == "the rain\n"
    assert captured.err == "tinyllama: interrupted\n"


def test_generate_command_as_json(model, model_file, capsys):
    command = ["generate", "the rain", "-m", model_file, "--threads", "1", "--seed", "3", "--json"]
    options = ["--num-return-sequences", "2", "--stop", "e", "--stop", "x", "--logprobs", "1"]
    bias = ["--logit-bias", "40=1.5", "--logit-bias", "41=-inf", "--temperature", "0.5"]
    assert main([*command, *options, *bias]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = model.complete(
        "the rain",
        1,
        seed=3,
        num_return_sequences=2,
        stop=["e", "x"],
        logit_bias={40: 1.5, 41: -math.inf},
        temperature=0.5,
    )
    for record, completion in zip(records, expected, strict=True):
        assert record["prompt"] == "the rain"
        assert record["text"] == completion.text
        assert record["tokens"] == list(completion.tokens)
        assert record["finish_reason"] == completion.finish_reason
        assert record["seed"] == completion.seed
        assert record["usage"]["total_tokens"] == completion.usage.total_tokens
        assert len(record["logprobs"]) == len(record["tokens"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-p", "2"], "top_p is 2"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--stop", ""], "empty string"),
        (["--logit-bias", "300=1"], "logit_bias names token 300"),
        (["--logprobs", "2"], "--logprobs needs --json"),
        (["--stream", "--json"], "--stream"),
        (["--isa", "sse1"], "sse1"),
        (["--threads", "0"], "n_threads is 0"),
        (["--dtype", "q9"], "dtype is 'q9'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_command_names_what_is_wrong(model_file, capsys, options, message):
    assert main(["generate", "a", "-m", model_file, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_the_help_of_generate_shows_every_option(capsys):
    import dataclasses

    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    shown = capsys.readouterr().out
    for option in dataclasses.fields(tinyllama.SamplingParams):
        assert "--" + option.name.replace("_", "-") in shown
