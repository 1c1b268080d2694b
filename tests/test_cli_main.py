"""The command's frame: errors in one line, exit statuses, groups that load nothing heavy."""

import subprocess
import sys

import pytest

from tinyllama import __version__, cli
from tinyllama.errors import FormatError

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
        (FileNotFoundError(2, "No such file", "x"), 2, "tinyllama: error: [Errno 2] No such file"),
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
