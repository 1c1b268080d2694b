"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write bytes into, which takes the name ``path`` only once it is complete.

    The bytes go to a hidden file in the same folder. When the block ends normally they are
    forced to disk and the file is renamed over ``path``; when it raises (a full disk, Ctrl-C)
    the hidden file is removed, and what stood at ``path`` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to fill, whose files appear in the folder ``path`` once all are complete.

    A ``path`` that is new (or empty) appears in one rename. Into one that holds files already, the
    finished ones are renamed one by one, replacing those of the same name and leaving all others
    alone: by then nothing can fail for lack of space. When anything fails before that, ``path``
    stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process with our number left it
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(temporary.iterdir())
        for file in files:
            with open(file, "r+b") as stream:
                os.fsync(stream.fileno())
        _sync_folder(temporary)
        if path.is_dir() and any(path.iterdir()):
            for file in files:
                os.replace(file, path / file.name)
            temporary.rmdir()
            _sync_folder(path)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # Without this a power cut can undo the rename. Windows cannot open folders, nor needs it.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
