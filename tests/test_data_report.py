"""The report of a check, against independent counts; the same figures as text and as a page."""

import html
import re

import pytest

from tinyllama import tokenizer
from tinyllama.cli import main
from tinyllama.data import Documents, check
from tinyllama.data.page import report_page

sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("ftfy")

STORIES = [f"A story of {i} cats, {'a dog ' * i}and a “mouse”.\nThe end." for i in range(1, 60)]
OTHERS = ["Olá, não 猫猫 é isso 🐱!", "â€œYes,â€\x9d he said.", "", "Olá, não 猫猫 é isso  🐱!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for name, stories in (("a", STORIES), ("b", OTHERS)):
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join([*stories, ""]), "utf-8")
    tokenizer.train(folder / "a.txt", folder / "bytes.model", 320)
    tokenizer.train(folder / "a.txt", folder / "unknown.model", 64, byte_fallback=False)
    return folder


@pytest.fixture
def inputs(folder):
    return [f"stories={folder}/a.txt", f"others={folder}/b.txt"]


def pieces(processor, text):
    return [processor.id_to_piece(token) for token in processor.encode(text)]


@pytest.mark.parametrize("name", ["bytes", "unknown"])
def test_counts_are_those_of_the_repaired_file(folder, inputs, name, tmp_path):
    model = folder / f"{name}.model"
    report = check(inputs, tokenizer=model, repair=tmp_path / "clean")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for source in ("stories", "others"):
        texts = [text for _, text in Documents(tmp_path / f"clean/{source}.txt")]
        kept = report.sources[source].kept
        assert kept.documents == len(texts)
        assert kept.bytes == sum(len(text.encode()) for text in texts)
        assert kept.characters == sum(map(len, texts))
        all_pieces = [piece for text in texts for piece in pieces(processor, text)]
        assert kept.tokens == len(all_pieces) + 2 * len(texts)
        assert kept.byte_tokens == sum(bool(re.fullmatch("<0x..>", p)) for p in all_pieces)
        assert kept.unknown == all_pieces.count("<unk>")
    total = report.total.kept
    assert total.tokens == sum(source.kept.tokens for source in report.sources.values())
    assert (total.byte_tokens > 0, total.unknown > 0) == (name == "bytes", name == "unknown")


def test_lengths_and_findings_of_each_source(inputs):
    report = check(inputs)
    lengths = sorted(len(story.encode()) for story in STORIES)
    kept = report.sources["stories"].kept
    assert [kept.length(share) for share in (0.0, 0.5, 1.0)] == [
        lengths[0],
        lengths[29],
        lengths[-1],
    ]
    assert sum(length <= kept.length(0.95) for length in lengths) == 57  # the first above 95 %
    found = {
        name: {key: finding.count for key, finding in source.findings.items() if finding.count}
        for name, source in report.sources.items()
    }
    assert found == {"stories": {}, "others": {"damaged": 1, "duplicates": 1, "empty": 1}}
    assert (report.sources["others"].documents, report.sources["others"].kept.documents) == (4, 2)
    assert report.total.documents == 63
    assert report.total.bytes == sum(len(text.encode()) for text in STORIES + OTHERS)


def test_text_and_page_say_what_the_report_says(folder, inputs, tmp_path, capsys):
    arguments = ["data", "check", *inputs, "--tokenizer", str(folder / "bytes.model")]
    assert main([*arguments, "--report", str(tmp_path / "report.html")]) == 0
    printed = capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    rows = re.findall("<tr>(.*?)</tr>", page)
    cells = [[html.unescape(c) for c in re.findall("<td[^>]*>(.*?)</td>", row)] for row in rows]
    report = check(inputs, tokenizer=folder / "bytes.model")
    for name, source in (*report.sources.items(), ("all", report.total)):
        kept = source.kept
        read = [f"{n:,}" for n in (source.documents, source.bytes)]
        left = [f"{n:,}" for n in (kept.documents, kept.bytes, kept.characters)]
        assert [name, *read, *left] in cells
        assert (
            f"{name}: {read[0]} documents, {read[1]} bytes;"
            f" kept {left[0]}, {left[1]} bytes, {left[2]} characters\n"
        ) in printed
        tokens, rate = f"{kept.tokens:,}", f"{kept.bytes / kept.tokens:.3f}"
        row = next(row for row in cells if row[:2] == [name, tokens])
        assert float(row[2]) == float(rate) and row[5] == f"{kept.byte_tokens:,}"
        assert f"{tokens} tokens, {rate} bytes per token, 0.000% unknown, {row[6]} sin" in printed
    assert ["duplicates of an earlier one", "0", "1", "1", "dropped"] in cells
    example = report.total.findings["damaged"].examples[0]
    assert example in printed and example in html.unescape(page)
    assert "stories" in page[page.index("<svg") : page.index("</svg>")]


def test_a_report_of_one_source_and_of_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n<|endoftext|>\n")
    report = check(tmp_path / "a.txt")
    assert [name for name, _ in report.rows] == ["text"]
    assert report.total.kept.length(0.5) == 0
    report_page(report).write(tmp_path / "a.html")
    assert "<td>empty, or pairs without a completion</td>" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize("text", ["", "\n", "\n<|endoftext|>\n\n"])
def test_a_check_of_no_text_says_so(tmp_path, capsys, text):
    (tmp_path / "a.txt").write_text(text)
    assert main(["data", "check", str(tmp_path / "a.txt")]) == 2
    printed = capsys.readouterr()
    assert "kept 0, 0 bytes" in printed.out
    assert printed.err.endswith("a.txt: there is no text\n")


def test_a_page_that_cannot_be_written_is_refused_first(inputs, tmp_path, capsys):
    for place, message in (("a.txt", "ends in .html"), ("none/a.html", "does not exist")):
        arguments = [
            *inputs,
            "--report",
            str(tmp_path / place),
            "--repair",
            str(tmp_path / "b.txt"),
        ]
        assert main(["data", "check", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
