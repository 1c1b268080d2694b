"""Where the C interface lies, for programs that are built against it."""

from __future__ import annotations

import os  # and not pathlib: this is imported with the package, and must cost nothing


def get_include() -> str:
    """The folder of ``tinyllama.h``, as for ``-I``."""
    return _found("include", "tinyllama.h")


def get_cmake_dir() -> str:
    """The folder for ``find_package(tinyllama)``, as for ``-Dtinyllama_DIR=``. The libraries lie in
    ``lib``, beside ``cmake``, where pkg-config's file is too."""
    return _found("lib/cmake/tinyllama", "tinyllamaConfig.cmake")


def _found(folder: str, name: str) -> str:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), *folder.split("/"))
    if not os.path.exists(os.path.join(path, name)):
        raise FileNotFoundError(
            f"{os.path.join(path, name)}: tinyllama was imported, not installed"
        )
    return path
