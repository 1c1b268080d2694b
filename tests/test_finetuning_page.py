"""The commands of docs/finetuning.md, one after the other, on little data."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from tinyllama import load
from tinyllama.cli import main

for package in ("torch", "sentencepiece", "peft", "transformers", "sklearn"):
    pytest.importorskip(package, reason="needs the extra finetune")

ROOT = Path(__file__).resolve().parents[1]
SMALLER = {
    "data prepare": "data prepare --valid-fraction 0.2 --workers 1",
    "train --from": (
        "train --set epochs=0 --set steps=1 --set batch_size=1 --set seq_len=16 --set compile=no"
        " --set every_sample=0 --from"
    ),
    "lora.py": "lora.py --epochs 1",
    "--epochs 4": "--epochs 1 --seeds 1 --batch-size 4",
}


def test_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stories = [f"Once there were {n} ducks." for n in range(40)]
    separator = "\n<|endoftext|>\n"
    Path("tales.txt").write_text(separator.join(stories))
    Path("instruct.txt").write_text(separator.join(f"Words: duck\nStory: {s}" for s in stories))
    Path("news.csv").write_text(
        "title,text,topic\n" + "".join(f"Ducks,{s},{i % 2}\n" for i, s in enumerate(stories))
    )
    page = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    [record] = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    pairs = [{**json.loads(record), "prompt": f"Asked {n} times:"} for n in range(40)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for full, small in SMALLER.items():
        assert full in page
        page = page.replace(full, small)
    commands = "".join(
        re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    ).splitlines()
    assert len(commands) == 11
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "tinyllama":
            assert main(arguments) == 0, command
        else:
            monkeypatch.setattr("sys.argv", arguments)
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    assert load("adapted.gguf").generate("Once", max_new_tokens=3)
    assert "| majority class | 50.0 |" in capsys.readouterr().out
