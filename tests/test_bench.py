"""``tinyllama bench``: every figure is there, for a model with little room. None is judged."""

import re

import pytest

from random_models import tiny_checkpoint
from tinyllama import cli
from tinyllama.cli import bench
from tinyllama.formats.gguf import write_gguf


@pytest.mark.parametrize("threads", [[], ["--threads", "1"]])
def test_every_figure_is_printed(tmp_path, capsys, monkeypatch, threads):
    monkeypatch.setattr(bench, "LIMIT", 0.01)
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_checkpoint(), path)
    assert cli.main(["bench", "-m", str(path), *threads]) == 0
    printed = capsys.readouterr().out
    blocks = printed.split("\n\n")
    assert blocks[0].startswith(str(path)) and "f32" in blocks[0]
    assert blocks[1].startswith("1 thread\n")
    names = ("load", "decode", "per token", "ceiling", "prompt of 64", "8 texts", "32 texts")
    for block in blocks[1:]:
        for name in names:
            figure = re.search(rf"^ +{name} +([\d.,]+) (tokens/s|ms)", block, re.MULTILINE)
            assert figure and float(figure[1].replace(",", "")) > 0, name


def test_a_missing_model_is_one_line(capsys):
    assert cli.main(["bench", "-m", "no_such.gguf"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "no_such.gguf" in printed.err
