"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PathLike = str | os.PathLike[str]


def check_place(path: PathLike, folder: bool = False) -> None:
    """Raise OSError, naming ``path``, where no file (or ``folder``) of that name can be written.

    For the start of long work. A file that is there would be replaced; a folder has to be empty.
    """
    path = Path(path)
    parent = Path(os.path.realpath(path)).parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {parent} does not exist")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: the folder {parent} cannot be written to")
    if not folder and path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file")
    if folder and path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: is a file; name a new folder")
    if folder and path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{path}: the folder is not empty; name a new one, or remove it")


@contextmanager
def whole_file(path: PathLike) -> Iterator[BinaryIO]:
    """A file to write bytes into, which takes the name ``path`` only once it is complete.

    The bytes go to a hidden file in the same folder. When the block ends normally they are
    forced to disk and the file is renamed over ``path``, or over what a link of that name leads
    to; when it raises (a full disk, Ctrl-C) the hidden file is removed, and what stood at ``path``
    stays as it was.

    Raises OSError as :func:`check_place` does, and when writing fails.
    """
    check_place(path)
    path = Path(os.path.realpath(path))
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
def whole_folder(path: PathLike) -> Iterator[Path]:
    """An empty folder to fill, which takes the name ``path`` once all its files are complete.

    ``path`` has to be new, or an empty folder or a link to one: what lies in a folder belongs
    together, and is neither mixed nor thrown away. When the block raises, nothing is left.

    Raises OSError as :func:`check_place` does, and when writing fails.
    """
    check_place(path, folder=True)
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process with our number left it
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_dir():
                _sync_folder(file)
                continue
            with open(file, "r+b") as stream:
                os.fsync(stream.fileno())
        _sync_folder(temporary)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def sha256_of(file: PathLike) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(file, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def lock_folder(folder: Path) -> BinaryIO:
    """Keep other processes out of ``folder`` until what is returned is closed, or we end.

    It is a lock of POSIX on the file ``.lock`` there; where there are none, nothing is kept out.
    Raises BlockingIOError, naming the folder, where another process has it.
    """
    file = open(folder / ".lock", "wb")  # noqa: SIM115  # the caller closes it
    try:
        lock(file, folder)
    except BlockingIOError:
        file.close()
        raise
    return file


def lock(file: BinaryIO, name: PathLike) -> None:
    """Lock an open file, as :func:`lock_folder` does, until it is closed.

    So it is, too, when this process closes the same file elsewhere.
    """
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BlockingIOError(f"{name}: another process is at work there") from None
    except (ImportError, OSError):  # Windows, and file systems without locks
        pass


def _sync_folder(folder: Path) -> None:
    # Without this a power cut can undo the rename. Windows cannot open folders, nor needs it.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
