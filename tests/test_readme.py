"""Every example of the README and of docs/game_loop.md runs.

What would take minutes runs on less: see SMALLER.
"""

import ast
import contextlib
import io
import re
import runpy
import shlex
from pathlib import Path

import pytest

import tinyllama
from tinyllama.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "docs/game_loop.md"]

# What the test changes in the commands, so that they end in seconds.
SMALLER = {
    "--num-return-sequences 2000": "--num-return-sequences 40",
    "--vocab-size 2048": "--vocab-size 400",
    "--out tokens": "--out tokens --valid-fraction 0.2",
    "--preset stories1m": (
        "--preset stories1m --set model.vocab_size=400 --set steps=4 --set batch_size=2"
        " --set compile=no"
    ),
}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """The tinyllama commands of a block; pip and pytest are what brought us here."""
    parts = re.split(r"\n|&&", block)
    return [part.strip() for part in parts if part.strip().startswith("tinyllama ")]


def run(command: str) -> str:
    """Run a command as a shell would, with its output sent where ``>`` says."""
    arguments, _, target = command.partition(" > ")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(shlex.split(arguments)[1:])
    assert not status, command
    if target:
        Path(target).write_text(printed.getvalue(), encoding="utf-8")
    return printed.getvalue()


def test_no_page_has_a_table_to_be_filled_in() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        assert not re.search(r"^[A-Z_]{3,}$", page.read_text(encoding="utf-8"), re.MULTILINE), page


@pytest.mark.parametrize("page", PAGES)
def test_python_examples(page: str) -> None:
    examples = blocks("python", page)
    assert len(examples) >= 2
    names: dict[str, object] = {}
    for example in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example, page, "exec"), names)
        assert len(printed.getvalue().split()) >= 3


def test_commands(tmp_path, monkeypatch) -> None:
    """A story from the shipped model; then a model trained on its stories, from start to end."""
    pytest.importorskip("torch", reason="training needs the extra train")
    pytest.importorskip("sentencepiece", reason="training needs the extra train")
    monkeypatch.chdir(tmp_path)
    text = "\n".join(blocks("sh"))
    for full, small in SMALLER.items():
        assert full in text, f"the README no longer has {full!r}"
        text = text.replace(full, small)
    ran = [(command, run(command)) for command in commands(text)]
    assert len(ran) >= 7
    assert "Once upon a time" in ran[0][1]
    assert (tmp_path / "mine.gguf").stat().st_size > 100_000
    assert "<svg" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_see_it_think(monkeypatch, capsys) -> None:
    """The pieces it shows make up the text, spaces included; what is wrong takes one line."""
    example = str(ROOT / "examples" / "see_it_think.py")
    monkeypatch.setattr("sys.argv", [example, "The dog"])
    runpy.run_path(example, run_name="__main__")
    prompt, *lines = capsys.readouterr().out.splitlines()
    assert prompt == "The dog"
    drawn, weighed = zip(*(line.split("  of  ") for line in lines), strict=True)
    text = "".join(map(ast.literal_eval, map(str.strip, drawn)))
    assert text == tinyllama.load().generate("The dog", max_new_tokens=30, seed=1)
    n_shared = sum(f"{piece.strip()} " in row for piece, row in zip(drawn, weighed, strict=True))
    assert n_shared > len(lines) / 2  # most were among the four likeliest, spelled alike
    monkeypatch.setattr("sys.argv", [example, "The dog " * 2000])
    with pytest.raises(SystemExit, match=r"^see_it_think: .*context"):
        runpy.run_path(example, run_name="__main__")


@pytest.mark.parametrize("page", [*PAGES, "docs/evaluation.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", read(page)):
        assert ((ROOT / page).parent / target).exists(), target
