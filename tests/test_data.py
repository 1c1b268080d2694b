"""Reading documents, finding and mending damage: every kind of file, every kind of bad input."""

import csv
import gzip
import io
import json
import os
import random
import re
import threading
from pathlib import Path

import pytest

from tinyllama.data import Documents, check
from tinyllama.data.mending import cut, mend_encoding
from tinyllama.errors import ArgumentError, FormatError

STORIES = ["One day, a cat sat.\n\nThe end.", "“Olá,” she said.", "从前有一只猫。🐱"]


def texts(*inputs, **options):
    return [text for _, text in Documents(inputs, **options)]


def as_text(stories):
    return "\n<|endoftext|>\n".join(stories).encode()


def as_jsonl(stories):
    return "".join(json.dumps({"id": 1, "text": s}) + "\n" for s in stories).encode()


def as_json(stories):
    records = [{"summary": "no", "story": f"\n{s}\n"} for s in stories]
    return json.dumps(records, ensure_ascii=False).encode()


def as_csv(stories, delimiter=","):
    file = io.StringIO(newline="")
    rows = csv.writer(file, delimiter=delimiter)
    rows.writerow(["label", "content"])
    rows.writerows([i, s] for i, s in enumerate(stories))
    return file.getvalue().encode()


def as_parquet(stories):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": stories, "n": list(range(len(stories)))}), file)
    return file.getvalue()


def zstd(data):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(data, codec="zstd", asbytes=True)


WRITERS = {
    ".txt": as_text,
    ".jsonl": as_jsonl,
    ".json": as_json,
    ".csv": as_csv,
    ".tsv": lambda stories: as_csv(stories, "\t"),
    ".parquet": as_parquet,
}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_file_gives_the_same_documents(tmp_path, suffix, compression):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[compression]
    path = tmp_path / f"stories.v1{suffix}{compression}"
    path.write_bytes(pack(WRITERS[suffix](STORIES)))
    documents = Documents(path)
    assert [text for _, text in documents] == STORIES
    assert documents.position == documents.size == path.stat().st_size


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst", ".parquet"])
def test_a_truncated_file_is_an_error_not_fewer_documents(tmp_path, suffix):
    text = as_text([f"story {i} {i * i}" for i in range(500)])
    whole = {".txt.gz": gzip.compress, ".txt.zst": zstd}.get(suffix, lambda _: as_parquet(STORIES))
    path = tmp_path / f"stories{suffix}"
    path.write_bytes(whole(text)[:-20])
    with pytest.raises(FormatError, match=rf"stories{suffix}: damaged"):
        texts(path)


def test_text_without_separator_is_one_document_and_the_separator_can_be_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n---\r\nthree\n")
    assert texts(path) == ["one\n\ntwo\n---\nthree"]
    assert texts(path, separator="---") == ["one\n\ntwo", "three"]
    assert [where for where, _ in Documents(path, separator="---")] == [
        f"{path}: line 1",
        f"{path}: line 5",
    ]


def test_folders_and_globs_are_sorted_and_each_file_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.jsonl"):
        path = tmp_path / name
        path.write_bytes((as_jsonl if name.endswith("jsonl") else as_text)([name]))
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / ".hidden.txt").write_text("not read")
    (tmp_path / "deep/.checkpoints").mkdir()
    (tmp_path / "deep/.checkpoints/c.jsonl").write_bytes(as_jsonl(["not read"]))
    assert texts(tmp_path) == ["a.txt", "b.txt", "deep/c.jsonl"]
    assert texts(tmp_path / "b.txt", f"{tmp_path}/*.txt") == ["b.txt", "a.txt"]
    hidden = tmp_path / "deep/.checkpoints"
    assert texts(hidden) == ["not read"]
    monkeypatch.chdir(tmp_path / "deep")
    assert texts("../a.txt", tmp_path / "a.txt", "../deep/../*.txt") == ["a.txt", "b.txt"]
    with pytest.raises(ArgumentError, match=r"a\.txt is in two sources, one and two"):
        Documents(["one=../a.txt", f"two={tmp_path}/a.txt"])


@pytest.mark.parametrize("name", ["README", "stories.md", "a.b.log", "stories.gz"])
def test_a_named_file_of_an_unknown_ending_is_text(tmp_path, name):
    data = as_text(STORIES)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert texts(tmp_path / name) == STORIES
    assert texts(tmp_path / name, separator="none") == [data.decode()]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        texts(f"{tmp_path}/*")
    (tmp_path / "known.txt").write_text("known")
    assert texts(f"{tmp_path}/*") == texts(tmp_path) == ["known"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a pipe")
def test_a_pipe_is_read_as_it_comes(tmp_path):
    pytest.importorskip("ftfy")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[as_text(STORIES)])
    writer.start()
    assert check(tmp_path / "pipe", progress=True).total.documents == len(STORIES)
    writer.join()


def test_the_field_may_be_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "no", "body": "yes"}\n\n{"text": "no", "body": "too"}\n')
    assert texts(path, field="body") == ["yes", "too"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nbad \xff here\n", "a.txt: line 2: not UTF-8: byte 0xFF at offset 9"),
        ("a.txt", "“a”".encode("utf-16"), "a.txt: UTF-16, expected UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl: line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "line 2: does not have any of story, text"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: text is number, expected text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: text holds half a surrogate pair"),
        ("a.jsonl", b"[1]\n", "line 1: holds a JSON list, expected an object"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.json", b'{"text": "x"}', "holds a JSON object, expected a list"),
        ("a.json", b'[{"story": "x"}, {"story": null}]', "record 2: story is null"),
        ("a.csv", b"label,text\n1\n", "record 1: text is null, expected text"),
        ("a.csv", b"label,text\n1,a,b\n", "record 1: more values than the header"),
        ("a.csv", b'label,text\n1,"a\n', "line 2: damaged CSV"),
        (
            "a.csv",
            b"label,title\n1,a\n",
            "line 1, which has to name the columns: .* it has label, title",
        ),
        ("a.parquet", b"PAR1 not", "a.parquet: damaged Parquet"),
        ("a.txt.gz", b"not gzip", "a.txt.gz: damaged compressed data"),
        ("a.doc", b"\xd0\xcf\x11\0\0", "a.doc: unknown kind of file, and not text; known: .txt"),
        ("a.doc.gz", gzip.compress(b"x\0"), "a.doc.gz: unknown kind of file, and not text"),
        ("GGUF", b"GGUF\3\0\0\0", "GGUF: unknown kind of file, and not text"),
    ],
)
def test_bad_input_is_named(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    for replace in (None, lambda *_: None):  # a repair does not make text of it
        if replace is None or "not UTF-8" not in message:
            with pytest.raises(FormatError, match=message):
                texts(path, replace_invalid=replace)


def test_sources_are_named_and_follow_one_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "d", "n=1"):
        Path(f"{name}.txt").write_text(name)
    documents = Documents(["one=a.txt", "two=b.txt", "one=[ca].txt", "d.txt", "./n=1.txt"])
    seen = [(documents.source, text) for _, text in documents]
    assert seen == [("one", "a"), ("one", "c"), ("two", "b"), ("text", "d"), ("text", "n=1")]
    assert texts(Path("n=1.txt")) == ["n=1"]
    with pytest.raises(ArgumentError, match=r"a\.txt is in two sources, one and text"):
        Documents(["one=a.txt", "*.txt"])
    with pytest.raises(FileNotFoundError, match=r"1\.txt: no such file"):
        Documents("n=1.txt")


def test_inputs_that_name_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Documents(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        Documents(f"{tmp_path}/*.txt")
    with pytest.raises(ArgumentError, match="holds no"):
        Documents(tmp_path)
    with pytest.raises(ArgumentError, match="no input"):
        Documents([])


def damage(text):
    """UTF-8 read as Windows-1252, the five bytes it does not know dropped, as many programs do."""
    return text.encode().decode("cp1252", "ignore")


@pytest.mark.parametrize(
    "text",
    [
        "“Hello,” she said. “I’m here — now.”",
        "He said “yes.”\n\nThen he left.",
        "Olá, não é açúcar… – fim",
        "“A,” said B, “C.” D",
    ],
)
def test_damaged_encoding_is_mended(text):
    pytest.importorskip("ftfy")
    assert damage(text) != text
    assert mend_encoding(damage(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "“Curly” ‘quotes’ stay — as do … and ﬁ, ｆｕｌｌ width, & &amp; and e\u0301",
        "从前有一只猫，“它”说：你好！",
        "Ação, coração, São João; naïve café",
        "a dagger † and a euro € sign, 5 €",
        "tab\tand\x0cform feed",
    ],
)
def test_sound_text_is_left_alone(text):
    pytest.importorskip("ftfy")
    assert mend_encoding(text) == text


@pytest.mark.parametrize("max_bytes", [10, 17, 64])
def test_cut_loses_nothing_and_keeps_the_limit(max_bytes):
    text = "One. Two three.\n\nFour five\nsix 从前有一只猫。它很高兴 " * 5 + "x" * 50 + "😀" * 20
    pieces = list(cut(text, max_bytes))
    assert all(0 < len(piece.encode()) <= max_bytes for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_a_folder_that_holds_something_else_is_named(tmp_path):
    for folder, files in (
        ("of a model", ("config.json", "model.safetensors", "tokenizer.json")),
        ("of an old model", ("config.json", "pytorch_model.bin")),
        ("of prepared tokens", ("manifest.json", "train-00000.bin", "tokenizer.model")),
    ):
        (tmp_path / folder).mkdir()
        for name in files:
            (tmp_path / folder / name).write_text("{}")
        with pytest.raises(ArgumentError, match=f"{folder}: .*, not of text$"):
            Documents(tmp_path / folder)
    (tmp_path / "config.json").write_text('["text"]')
    for kind in ("of a model", "of an old model", "of prepared tokens"):
        for file in (tmp_path / kind).iterdir():
            file.unlink()
    assert texts(tmp_path) == ["text"]


def test_check_finds_everything_and_repair_mends_it(tmp_path):
    pytest.importorskip("ftfy")
    path, mended = tmp_path / "a.txt", tmp_path / "mended.txt"
    quote = "“Yes,” he said."
    stories = ["Sound.", damage(quote), "", "Sound.  ", "Lost \ufffd.", "Long story.\n\n" * 20]
    path.write_bytes(as_text(stories) + b"\n<|endoftext|>\nbad \x93bytes\x94\n")

    report = check(path, repair=mended, max_bytes=100)
    total, kept = report.total, report.total.kept
    counts = {key: finding.count for key, finding in total.findings.items()}
    assert counts == {
        "damaged": 1, "invalid": 1, "foreign": 0, "lost": 1, "duplicates": 1, "empty": 1,
        "over_long": 1,
    }  # fmt: skip
    assert total.documents == 7
    assert total.findings["invalid"].examples[0].endswith("'bad “bytes”'")
    assert "line 3" in total.findings["damaged"].examples[0]
    assert "“Yes" in total.findings["damaged"].examples[0]

    result = texts(mended)
    assert result[:3] == ["Sound.", quote, "Lost \ufffd."]
    assert result[-1] == "bad “bytes”"
    assert len(result) == kept.documents
    assert kept.bytes == sum(len(text.encode()) for text in result)
    assert len(result[3:-1]) > 1 and set("\n\n".join(result[3:-1]).split("\n\n")) == {"Long story."}
    again = {
        key: finding.count for key, finding in check(mended, max_bytes=100).total.findings.items()
    }
    assert again == dict.fromkeys(counts, 0) | {"lost": 1, "duplicates": again["duplicates"]}


STORY = "Era uma vez um gato que dormia no jardim de uma casa. Não havia ninguém. "


@pytest.mark.parametrize(
    ("data", "foreign"),
    [
        ("从前有一只猫，它很高兴。\n".encode("gb18030") * 9, True),
        ("一只猫很高兴。".encode("gb18030") * 9, True),  # a single line
        (random.Random(1).randbytes(3000), True),
        (("Жил-был кот.\n" * 9).encode("koi8-r") + b"English. " * 30, True),
        ((STORY * 20).encode("cp1252"), True),  # rightly taken as that, but so would others be
        (("Była raz kotka. " * 30).encode("iso-8859-2"), True),
        ("“Yes,” he said.\n".encode("cp1252") * 3, False),  # few
        ((STORY * 9).encode("cp1252") + (STORY * 10).encode(), False),
        (("从前有一只猫，它很高兴。\n" * 99).encode() + b"\xff\x93\n" * 11, False),
    ],
)
def test_text_in_another_encoding_is_not_called_mended(tmp_path, data, foreign):
    pytest.importorskip("ftfy")
    path, mended = tmp_path / "a.txt", tmp_path / "mended.txt"
    path.write_bytes(data)
    (tmp_path / "b.txt").write_text("sound")
    inputs = [path, f"other={tmp_path}/b.txt"]
    finding = check(inputs).sources["text"].findings["foreign"]
    assert finding.count == foreign == len(finding.examples)
    if foreign:
        with pytest.raises(FormatError, match=r"a\.txt: in another .*--encoding: windows-1252"):
            check(inputs, repair=mended)
        assert not mended.exists()
    else:
        check(inputs, repair=mended)
        assert len(texts(mended)) == 2


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("iso-8859-2", "Była raz kotka, która lubiła źródła."),
        ("windows-1252", "“Não há”, disse ele – e saiu."),
        ("gb18030", "从前有一只猫，它很高兴。𠮷"),
        ("shift_jis", "むかしむかし、表に猫がいました。"),
        ("utf-16", "Była raz kotka. 从前𠮷"),
        ("utf-16-le", "\ufeffrest"),  # whose mark of the byte order stays a character
    ],
)
def test_text_in_a_named_encoding_becomes_utf8(tmp_path, encoding, text):
    pytest.importorskip("ftfy")
    stories = [f"{number}\n{text}" for number in range(9)]
    joined = "\n<|endoftext|>\n".join(stories).replace("\n", "\r\n")
    (tmp_path / "a.txt").write_bytes(joined.encode(encoding))
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(json.dumps({"text": text}, ensure_ascii=False).encode(encoding))
    report = check(tmp_path, repair=tmp_path / "mended.txt", encoding=encoding).total
    assert not any(finding.count for finding in report.findings.values())
    assert texts(tmp_path / "mended.txt") == [*stories, text]
    assert texts(tmp_path / "a.txt", encoding=encoding, progress="read") == stories


def test_bytes_that_are_not_of_the_named_encoding(tmp_path):
    pytest.importorskip("ftfy")
    path = tmp_path / "a.txt"
    path.write_bytes("one\n猫\n".encode("gb18030") + b"dam\xff aged\n" + "猫".encode("gb18030"))
    findings = check(path, repair=tmp_path / "out.txt", encoding="gb18030").total.findings
    assert findings["invalid"].examples == [f"{path}: line 3: 'dam\ufffd aged'"]
    assert findings["lost"].count == 1 and findings["foreign"].count == 0
    assert texts(tmp_path / "out.txt") == ["one\n猫\ndam\ufffd aged\n猫"]
    with pytest.raises(FormatError, match=r"a\.txt: behind line \d: not gb18030: .* byte 0xff"):
        texts(path, encoding="gb18030")
    for unknown in ("utf-7000", "hex", ""):
        with pytest.raises(ArgumentError, match=f"encoding is '{unknown}': .* iso-8859-2"):
            check(path, encoding=unknown)


def test_utf8_is_not_read_as_another_encoding(tmp_path):
    story = "Es war einmal ein Bär. Der hörte Flöhe, schöne grüne: äöüßÄÖÜ."
    (tmp_path / "old.txt").write_bytes(story.encode("windows-1252"))
    (tmp_path / "new.txt").write_bytes(story.encode())
    assert texts(tmp_path / "old.txt", encoding="windows-1252") == [story]
    assert texts(tmp_path / "new.txt", encoding="utf-8-sig") == [story]
    for encoding in ("windows-1252", "gb18030"):
        with pytest.raises(FormatError, match=rf"new.txt: is UTF-8, not {encoding}: name files of"):
            check(tmp_path / "new.txt", encoding=encoding)
    (tmp_path / "new.txt.gz").write_bytes(gzip.compress((story * 500).encode()))
    with pytest.raises(FormatError, match=r"new.txt.gz: is UTF-8"):
        texts(tmp_path / "new.txt.gz", encoding="windows-1252")
    (tmp_path / "late.txt").write_text("Only letters at first. " * 1000 + story, encoding="utf-8")
    with pytest.raises(FormatError, match=r"late.txt: is UTF-8"):
        check(tmp_path / "late.txt", encoding="windows-1252", repair=tmp_path / "mended.txt")
    assert not (tmp_path / "mended.txt").exists()
    (tmp_path / "plain.txt").write_text("Only letters that all of them have. " * 100)
    assert len(texts(tmp_path / "plain.txt", encoding="windows-1252")) == 1


def test_what_is_counted_is_the_mended_text(tmp_path):
    pytest.importorskip("ftfy")
    quotes, space = "“a” " * 15, damage("\u2003")  # an em space and nothing else
    path, mended = tmp_path / "a.txt", tmp_path / "mended.txt"
    path.write_bytes(as_text([damage(quotes), "Sound.", space]))
    assert len(damage(quotes).encode()) > 130 > len(quotes.encode())
    report = check(path, repair=mended, max_bytes=130).total
    counts = {key: finding.count for key, finding in report.findings.items() if finding.count}
    assert counts == {"damaged": 2, "empty": 1}
    assert texts(mended) == [quotes.strip(), "Sound."] and report.kept.documents == 2


def test_repair_refuses_before_it_writes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text\n")
    for target, message in ((path, "one of the inputs"), (tmp_path / "x.json", "ends in .txt")):
        with pytest.raises(ArgumentError, match=message):
            check(path, repair=target)
    path.write_text("\n")
    with pytest.raises(ArgumentError, match="would hold no document"):
        check(path, repair=tmp_path / "out.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_place_that_cannot_be_written_is_named_before_anything_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\0" * 10)
    (tmp_path / "folder.txt").mkdir()
    for target, error in (("none/x.txt", FileNotFoundError), ("folder.txt", IsADirectoryError)):
        with pytest.raises(error, match=f"^{re.escape(str(tmp_path / target))}: "):
            check(path, repair=tmp_path / target)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.txt", "folder.txt"]


def test_the_real_stories(shared: Path):
    pytest.importorskip("ftfy")
    findings = check(shared / "data/tinystories/train.txt").total.findings
    assert findings["damaged"].count == 76
    assert findings["invalid"].count == findings["lost"].count == 0
    for name, damaged in (("tinystories/valid.txt", 2), ("books_en/storybooks.txt", 0)):
        assert check(shared / "data" / name).total.findings["damaged"].count == damaged
