"""Where the C interface lies, for programs that are built against it."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def get_include() -> str:
    """The folder of ``tinyllama.h``, as for ``-I``."""
    return str(_found("include", "tinyllama.h"))


def get_cmake_dir() -> str:
    """The folder for ``find_package(tinyllama)``, as for ``-Dtinyllama_DIR=``. The libraries lie in
    ``lib``, beside ``cmake``, where pkg-config's file is too."""
    return str(_found("lib/cmake/tinyllama", "tinyllamaConfig.cmake"))


def _found(folder: str, name: str) -> Path:
    path = _PACKAGE / folder
    if not (path / name).exists():
        raise FileNotFoundError(f"{path / name}: tinyllama was not installed, only imported")
    return path
