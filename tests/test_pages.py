"""The commands of pages that lead from text to a model, one after the other, on little data."""

import json
import random
import re
import runpy
import shlex
from pathlib import Path

import pytest

from tinyllama import load
from tinyllama.cli import main

for package in ("torch", "sentencepiece", "peft", "transformers", "sklearn", "datasets", "rensa"):
    pytest.importorskip(package, reason="needs the extras finetune and data")

ROOT = Path(__file__).resolve().parents[1]
SEPARATOR = "\n<|endoftext|>\n"
A_STEP = "--set batch_size=1 --set compile=no --set every_sample=0"
CLASSIFY = "--epochs 1 --seeds 1 --batch-size 4"


def run_page(page: str, smaller: dict[str, str]) -> int:
    """Run a page's commands here, some of them made ``smaller``: how many there were."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for full, small in smaller.items():
        assert full in text, f"{page} no longer has {full!r}"
        text = text.replace(full, small)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = "".join(blocks).replace("\\\n", "").splitlines()
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "tinyllama":
            assert main(arguments) == 0, command
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", arguments)
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    return len(commands)


def test_finetuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stories = [f"Once there were {n} ducks." for n in range(40)]
    Path("tales.txt").write_text(SEPARATOR.join(stories))
    Path("instruct.txt").write_text(SEPARATOR.join(f"Words: duck\nStory: {s}" for s in stories))
    Path("news.csv").write_text(
        "title,text,topic\n" + "".join(f"Ducks,{s},{i % 2}\n" for i, s in enumerate(stories))
    )
    page = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    [record] = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    pairs = [{**json.loads(record), "prompt": f"Asked {n} times:"} for n in range(40)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    smaller = {
        "data prepare": "data prepare --valid-fraction 0.2 --workers 1",
        "train --from": f"train --set epochs=0 --set steps=1 --set seq_len=16 {A_STEP} --from",
        "lora.py": "lora.py --epochs 1",
        "--epochs 4": CLASSIFY,
    }
    assert run_page("finetuning.md", smaller) == 11
    assert load("adapted.gguf").generate("Once", max_new_tokens=3)
    assert "| majority class | 50.0 |" in capsys.readouterr().out


def test_chinese(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    characters = [chr(0x4E00 + 7 * n) for n in range(300)]

    def text(n_documents: int) -> str:
        lines = ["".join(draw.choices(characters, k=60)) + "。" for _ in range(5 * n_documents)]
        return SEPARATOR.join("\n".join(lines[i::n_documents]) for i in range(n_documents))

    for name, n_documents in (("wikipedia", 60), ("sanguoyanyi", 9), ("shuihuzhuan", 9)):
        Path(f"{name}.txt").write_text(text(n_documents), encoding="utf-8")
    Path("xiyouji.txt").write_text(text(3), encoding="utf-8")
    Path("old.txt").write_bytes(text(3).encode("gb18030"))
    Path("mine").mkdir()
    Path("mine/stories.txt").write_text(text(9), encoding="utf-8")
    shape = ["vocab_size=700", "dim=24", "n_layers=1", "hidden_dim=32", "max_seq_len=64"]
    tiny = " ".join(f"--set model.{setting}" for setting in shape)
    smaller = {
        "--vocab-size 3000": "--vocab-size 700",
        "--set steps=600": f"--set steps=2 {A_STEP}",
        "data prepare": "data prepare --workers 1",
        "hf:RobinChen2001/TinyStories-Zh-1M": "novels.jsonl",
        "train --preset stories-zh-93m": (
            f"train --preset stories-zh-93m {tiny} --set steps=1 --set seq_len=16 {A_STEP}"
        ),
    }
    records = [json.dumps({"text": part}) for part in text(40).split(SEPARATOR)]
    Path("novels.jsonl").write_text("\n".join(records), encoding="utf-8")
    assert run_page("chinese.md", smaller) == 12
    assert set(Path("new.txt").read_text(encoding="utf-8")) <= {*characters, *"。\n<|endoftext>"}
    said = capsys.readouterr().out
    assert "wiki: 60 documents" in said and "novels: 18 documents" in said
    assert "bits per byte" in said and "\n中国" in said
    assert "sanguoyanyi" not in Path("text.html").read_text(encoding="utf-8")
    report = Path("zh_run/report.html").read_text(encoding="utf-8")
    assert "text: novels" in report and "2 times an epoch" in report


def test_portuguese(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdeilmnoprstuvãéç", k=draw.randint(2, 9))) for _ in range(500)]
    sentences = [" ".join(draw.choices(words, k=9)).capitalize() + "." for _ in range(900)]
    Path("novels.txt").write_text("\n\n".join(sentences), encoding="utf-8")
    for part in ("train-only", "test"):
        pairs = [
            f'<pair entailment="{"None" if i % 2 else "Entailment"}"><t>{a}</t><h>{b}</h></pair>'
            for i, (a, b) in enumerate(zip(sentences[:20], sentences[20:40], strict=True))
        ]
        text = f"<entailment-corpus>{''.join(pairs)}</entailment-corpus>"
        Path(f"assin2-{part}.xml").write_text(text, encoding="utf-8")
    rows = "".join(f'"{i % 4 + 1}","Title {i}","News of day {i}."\n' for i in range(40))
    Path("ag_news_test.csv").write_text(rows)
    shape = ["vocab_size=400", "dim=24", "n_layers=1", "hidden_dim=32", "max_seq_len=64"]
    tiny = " ".join(f"--set model.{setting}" for setting in shape)
    smaller = {
        "hf:nicholasKluge/Pt-Corpus-Instruct": "pt.txt",
        "--valid-fraction 0.0002": "--valid-fraction 0.2",
        "--vocab-size 32000": "--vocab-size 400",
        "train --preset ttl-160m --energy BRA": (
            f"train --preset ttl-160m {tiny} --set steps=1 --set seq_len=16 {A_STEP}"
        ),
        "--vocab-size 2048": "--vocab-size 400",
        "--set steps=1000": f"--set steps=2 {A_STEP}",
        "data prepare": "data prepare --workers 1",
        "--epochs 4": CLASSIFY,
        "--epochs 2": CLASSIFY,
    }
    assert run_page("portuguese.md", smaller) == 14
    said = capsys.readouterr().out
    assert "Era uma vez" in said
    assert "| majority class | 50.0 |" in said and "| majority class | 25.0 |" in said
