"""Writing files and folders whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def open_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary stream whose bytes appear at ``path`` when the block ends, or never.

    They are written to a temporary file in the same folder, synced, and renamed. When anything
    fails (a full disk, Ctrl-C) the temporary file is removed and what was at ``path`` stays.
    """
    target = Path(os.path.realpath(path))
    temporary = _beside(target)
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


@contextlib.contextmanager
def whole_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to fill, whose files appear in the folder ``path`` when the block ends.

    A new ``path`` appears in one rename. Into one that exists the finished files are renamed one
    by one, replacing files of the same name and leaving all others alone: nothing can fail for
    lack of space by then. When anything fails before, ``path`` is untouched.
    """
    target = Path(os.path.realpath(path))
    temporary = _beside(target)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(temporary.iterdir())
        for file in [*files, temporary]:
            _sync(file)
        if target.is_dir() and any(target.iterdir()):
            for file in files:
                os.replace(file, target / file.name)
            temporary.rmdir()
            _sync(target)
        else:
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")


def _sync(path: Path) -> None:
    """Make a file's bytes or a folder's entries survive a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
