"""Files and folders written whole or not at all, wherever their names lead."""

import os
import subprocess
import sys

import pytest

from tinyllama.files import lock_folder, whole_file, whole_folder

HOLD = """
import pathlib, sys
from tinyllama.files import lock_folder
lock = lock_folder(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def names_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_fails_leaves_what_there_was(tmp_path):
    (tmp_path / "file").write_text("old")
    for place in (whole_file, whole_folder):
        name = "file" if place is whole_file else "folder"
        with pytest.raises(KeyboardInterrupt), place(tmp_path / name) as opened:
            opened.write(b"half") if place is whole_file else (opened / "a").write_text("half")
            raise KeyboardInterrupt
    assert names_below(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.skipif(os.name != "posix", reason="makes symbolic links")
def test_a_link_stays_and_what_it_names_is_written(tmp_path):
    (tmp_path / "other/empty").mkdir(parents=True)
    (tmp_path / "file").symlink_to("other/file")
    (tmp_path / "folder").symlink_to("other/empty")
    for content in (b"old", b"new"):
        with whole_file(tmp_path / "file") as file:
            file.write(content)
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "a").write_bytes(b"new")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "folder").is_symlink()
    assert (tmp_path / "other/file").read_bytes() == b"new"
    assert names_below(tmp_path / "other") == ["empty", "empty/a", "file"]


def test_the_folder_one_is_in_may_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with whole_folder(".") as folder:
        (folder / "a").write_text("new")
    assert names_below(tmp_path) == ["a"]


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_a_locked_folder_keeps_other_processes_out(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError, match=f"{tmp_path}: another process is at work there"):
        lock_folder(tmp_path)
    holder.kill()
    holder.communicate()
    lock_folder(tmp_path).close()
