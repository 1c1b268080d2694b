"""Data sets read through ``datasets``: local ones, by the code that reads those of the hub."""

import json
import sys

import pytest

from tinyllama import tokenizer
from tinyllama.data import Documents, check, hub, prepare, shards
from tinyllama.errors import ArgumentError, FormatError, MissingExtraError

datasets = pytest.importorskip("datasets")

STORIES = [f"Story {i} of a cat, a dog and {i * i} mice.\n\nThe end." for i in range(60)]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    (folder / "small").mkdir(parents=True)
    write(folder / "train.jsonl", STORIES)
    write(folder / "validation.jsonl", ["held out"])
    write(folder / "small/train.jsonl", STORIES[:2])
    configs = """---
configs:
- config_name: all
  default: true
  data_files: [{split: train, path: train.jsonl}, {split: validation, path: validation.jsonl}]
- config_name: small
  data_files: [{split: train, path: small/train.jsonl}]
---
"""
    (folder / "README.md").write_text(configs)
    return folder


def write(path, stories):
    lines = (json.dumps({"id": i, "text": f" {s}\n"}) for i, s in enumerate(stories))
    path.write_text("\n".join(lines))


def texts(spec, **options):
    return [text for _, text in Documents(spec, **options)]


def test_split_and_config_are_chosen(folder):
    assert texts(f"hf:{folder}") == STORIES
    assert texts(f"hf:{folder},split=validation") == ["held out"]
    assert texts(f"hf:{folder},config=small,split=train", field="text") == STORIES[:2]
    documents = Documents([f"a=hf:{folder},config=small", f"b=hf:{folder},split=validation"])
    assert documents.size is None and documents.paths == []
    for _ in range(2):  # it may be read again
        where, seen = zip(*((where, documents.source) for where, _ in documents), strict=True)
        assert seen == ("a", "a", "b")
        assert where[1] == f"hf:{folder},config=small: record 2"


def test_only_the_text_is_read_of_a_record(folder):
    dataset = hub.HubDataset(f"hf:{folder},config=small")
    dataset.open()
    assert dataset.columns == ["id", "text"]
    assert [list(record) for record in dataset.records(["text"])] == [["text"]] * 2


def test_folders_that_were_saved_to_disk(tmp_path):
    one = datasets.Dataset.from_dict({"story": STORIES[:3]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "two")
    assert texts(f"hf:{tmp_path / 'one'}") == STORIES[:3]
    assert texts(f"hf:{tmp_path / 'two'},split=test") == STORIES[1:2]
    for setting, message in (
        ("split=validation", "holds a single split, without a name"),
        ("config=all", "a folder that was saved has no config"),
        ("revision=1", "a folder that was saved has no revision"),
    ):
        with pytest.raises(ArgumentError, match=f"{setting}: {message}"):
            Documents(f"hf:{tmp_path / 'one'},{setting}")


def test_all_that_reads_text_reads_data_sets(folder, tmp_path):
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(STORIES))
    for name, given in (("hub", f"hf:{folder}"), ("file", tmp_path / "a.txt")):
        tokenizer.train(given, tmp_path / f"{name}.model", 290)
        prepare(given, tmp_path / f"{name}.model", tmp_path / name, valid_fraction=0.2)
    hub, file = (json.loads((tmp_path / n / "manifest.json").read_bytes()) for n in ("hub", "file"))
    assert hub.pop("made_from")["inputs"] == [f"text=hf:{folder}"]
    assert file.pop("made_from")["inputs"] == ["text=a.txt"]
    assert hub == file
    for name in ("train-00000.bin", "valid-00000.bin", "tokenizer.model"):
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()
    assert check(f"hf:{folder}").total.documents == len(STORIES)


def test_the_hub_is_asked_for_what_was_named(monkeypatch):
    asked = {}

    def load_dataset(name, config, **options):
        asked.update(options, name=name, config=config)
        return datasets.Dataset.from_dict({"content": ["a story"], "n": [1]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = "hf:roneneldan/TinyStories,revision=refs/pr/1,config=V2"
    assert texts(spec) == ["a story"]
    assert asked == {
        "name": "roneneldan/TinyStories", "config": "V2", "split": "train",
        "revision": "refs/pr/1", "streaming": True,
    }  # fmt: skip


def test_what_is_wrong_is_named(folder, tmp_path, monkeypatch):
    for spec, message in (
        ("hf:", "a data set's name is expected"),
        ("hf:a/b,spilt=train", r"hf:a/b,spilt=train: 'spilt=train' is unknown; known: config=…"),
        ("hf:a/b,split=", "'split=' is unknown"),
        (f"hf:{folder},split=test", "split=test: .*train.*validation"),
        (f"hf:{folder},config=large", "config=large: .*large.*not found"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Documents(spec)
    with pytest.raises(FileNotFoundError, match=f"hf:{tmp_path}/none: "):
        Documents(f"hf:{tmp_path}/none")
    with pytest.raises(FormatError, match=r"does not have field 'body': it has id, text"):
        texts(f"hf:{folder}", field="body")
    (folder / "train.jsonl").write_text('{"text": "fine"}\n{"text": broken}\n')
    with pytest.raises(FormatError, match=f"hf:{folder}: damaged data"):
        texts(f"hf:{folder}")
    write(folder / "train.jsonl", ["fine"])
    (folder / "train.jsonl").write_text('{"text": "fine"}\n{"text": null}\n')
    with pytest.raises(FormatError, match=f"hf:{folder}: record 2: text is null"):
        texts(f"hf:{folder}")


def test_a_network_that_fails_keeps_what_was_encoded(folder, tmp_path, monkeypatch):
    tokenizer.train(f"hf:{folder}", tmp_path / "t.model", 290)
    monkeypatch.setattr("tinyllama.data.shards.UNIT_BYTES", 500)
    records = hub.HubDataset.records

    def interrupted(self, column):
        for number, record in enumerate(records(self, column)):
            if number == 40:
                raise ConnectionError("gone")
            yield record

    with monkeypatch.context() as patched:
        patched.setattr(hub.HubDataset, "records", interrupted)
        with pytest.raises(ConnectionError):
            prepare(f"hf:{folder}", tmp_path / "t.model", tmp_path / "out", valid_fraction=0.2)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/.units").iterdir()}
    assert len(kept) > 6
    encoded = []
    encode = shards._encode_unit
    monkeypatch.setattr(shards, "_encode_unit", lambda *a: (encoded.append(1), encode(*a)))
    prepare(f"hf:{folder}", tmp_path / "t.model", tmp_path / "out", valid_fraction=0.2)
    resumed = len(encoded)
    prepare(f"hf:{folder}", tmp_path / "t.model", tmp_path / "new", valid_fraction=0.2)
    for path in (tmp_path / "new").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert resumed == len(encoded) - resumed - len(kept) // 5


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="the extra 'data'"):
        Documents("hf:a/b")
