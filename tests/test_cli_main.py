"""The command's frame: errors in one line, exit statuses, groups that load nothing heavy."""

import json
import os
import subprocess
import sys

import pytest

from random_models import tiny_checkpoint
from tinyllama import __version__, cli, load
from tinyllama.errors import FormatError
from tinyllama.formats.gguf import write_gguf
from tinyllama.formats.hf import save_hf
from tinyllama.formats.llama2c import write_llama2c

RUN = [sys.executable, "-c", "import sys; from tinyllama.cli import main; sys.exit(main())"]


def handle(monkeypatch, error):
    def register(subparsers):
        def fail(args):
            raise error

        subparsers.add_parser("fail").set_defaults(handler=fail)

    monkeypatch.setattr(cli, "GROUPS", ("data",))
    monkeypatch.setattr("tinyllama.cli.data.register", register)
    return cli.main(["fail"])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (FormatError("a.bin: n_heads is 0"), 2, "tinyllama: error: a.bin: n_heads is 0\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "tinyllama: error: x: No such file"),
        (MemoryError(), 2, "tinyllama: error: out of memory\n"),
        (KeyboardInterrupt(), 130, "tinyllama: interrupted\n"),
    ],
)
def test_expected_errors_are_one_line(monkeypatch, capsys, error, status, line):
    assert handle(monkeypatch, error) == status
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(line) and printed.err.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        handle(monkeypatch, ZeroDivisionError())


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"tinyllama {__version__}\n"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(group in printed for group in cli.GROUPS)


@pytest.mark.parametrize("group", cli.GROUPS)
def test_every_help_shows_an_example(group, capsys):
    verbs = {"data": ["check", "prepare"], "tokenizer": ["train", "show"]}.get(group, [None])
    for verb in verbs:
        with pytest.raises(SystemExit) as exit_info:
            cli.main([group, *([verb] if verb else []), "--help"])
        assert exit_info.value.code == 0
        assert f"tinyllama {group}" in capsys.readouterr().out.split("\n", 1)[1]


def test_building_the_command_line_loads_no_extra():
    heavy = ["torch", "sentencepiece", "safetensors", "pyarrow", "ftfy", "tqdm", "tokenizers"]
    code = (
        "import sys; from tinyllama.cli import build_parser; build_parser();"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.strip() == b"[]"


def test_a_closed_pipe_ends_quietly(tmp_path):
    (tmp_path / "a.txt").write_text("story\n")
    process = subprocess.Popen(
        [*RUN, "data", "check", str(tmp_path / "a.txt")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.parametrize("command", [[], ["data"], ["tokenizer"]])
def test_a_command_still_to_be_named_shows_the_help(capsys, command):
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    assert printed.out == capsys.readouterr().out != ""
    assert printed.err == ""


def test_an_interrupt_while_commands_are_imported(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build_parser", interrupted)
    assert cli.main([]) == 130
    assert capsys.readouterr().err == "tinyllama: interrupted\n"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("cp1252", "“é” \\u4ece\\U0001f431".encode("cp1252")),
        ("ascii", rb"\u201c\xe9\u201d \u4ece\U0001f431"),
        ("utf-8", "“é” 从🐱".encode()),
    ],
)
def test_output_that_is_not_utf8_shows_what_it_can(tmp_path, encoding, shown):
    (tmp_path / "a.txt").write_text("“é” 从🐱 \ufffd", encoding="utf-8")
    command = [*RUN, "data", "check", str(tmp_path / "a.txt")]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert shown in done.stdout


def test_json_stays_json_in_any_encoding(tmp_path):
    options = ["--json", "--max-new-tokens", "1", "--seed", "1", "--threads", "1"]
    for encoding in ("latin-1", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
        command = [*RUN, "generate", "A 🐱 “é”", *options]
        done = subprocess.run(command, capture_output=True, env=environment)
        assert json.loads(done.stdout.decode(encoding))["prompt"] == "A 🐱 “é”", done.stderr
        assert ("🐱".encode() in done.stdout) == (encoding == "utf-8")


@pytest.mark.parametrize(
    "kind", ["shipped", "bundled", ".gguf", "folder", "tokenizer.bin", "model.bin"]
)
def test_show_takes_whatever_carries_a_vocabulary(tmp_path, capsys, kind):
    checkpoint = tiny_checkpoint(hidden_dim=64)
    write_gguf(checkpoint, tmp_path / "x.gguf")
    write_llama2c(checkpoint, tmp_path / "model.bin")
    if kind == "folder":
        pytest.importorskip("safetensors")
        save_hf(checkpoint, tmp_path / "folder")
    path = {"shipped": [], "bundled": ["bundled"], ".gguf": [str(tmp_path / "x.gguf")]}.get(
        kind, [str(tmp_path / kind)]
    )
    assert cli.main(["tokenizer", "show", *path, "the é\n"]) == 0
    shown = capsys.readouterr().out.splitlines()[0].split()
    if kind in ("shipped", "bundled"):
        assert shown[0].startswith("▁the:") and shown[-1].startswith("<0x0A>:")
    else:
        pieces = checkpoint.vocabulary.pieces
        expected = load(tmp_path / "x.gguf").tokenizer.encode("the é\n", bos=False)
        assert shown == [f"{pieces[token]}:{token}" for token in expected]
        assert "<0xC3>:198" in shown


@pytest.mark.parametrize(
    "command",
    [
        ["info", "bundled"],
        ["eval", "bundled", "--text", "text.txt"],
        ["generate", "A", "-m", "bundled", "--max-new-tokens", "1"],
        ["export", "bundled", "--out", "copy.gguf"],
    ],
)
def test_the_model_that_ships_can_be_named(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Once upon a time there was a dog.")
    assert cli.main(command) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("out", ["none/x.model", "folder.model"])
def test_train_names_a_place_it_cannot_write_before_it_reads(tmp_path, capsys, out):
    (tmp_path / "folder.model").mkdir()
    out = str(tmp_path / out)
    assert cli.main(["tokenizer", "train", "not read", "--vocab-size", "300", "--out", out]) == 2
    assert capsys.readouterr().err.startswith(f"tinyllama: error: {out}: ")
