"""The C interface from an installed package: found, linked, and alone enough."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import tinyllama

EXAMPLE = Path(__file__).parent.parent / "examples" / "game_loop.c"
MODEL = Path(tinyllama.__file__).parent / "models" / "stories.gguf"
FLAGS = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1"]

try:
    INCLUDE = tinyllama.get_include()
except FileNotFoundError:
    pytest.skip("tinyllama is imported from its sources", allow_module_level=True)
LIB = Path(tinyllama.get_cmake_dir()).parent.parent


def needs(program):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program}")


def play(program):
    done = subprocess.run(
        [program, str(MODEL), "400"], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert "400 frames of 2.0 ms" in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Tom ")
    assert any(len(line.split()) > 1 for line in lines[:-1]), "none of four has a word to show"


@needs("cc")
def test_a_c_program_linked_with_the_shared_library_alone(tmp_path):
    program = tmp_path / "game_loop"
    link = [f"-L{LIB}", "-ltinyllama", f"-Wl,-rpath,{LIB}"]
    subprocess.run(
        ["cc", *FLAGS, str(EXAMPLE), f"-I{INCLUDE}", *link, "-o", str(program)], check=True
    )
    play(program)


@needs("cmake")
@needs("cc")
@pytest.mark.parametrize("which", ["shared", "static"])
def test_found_by_cmake(tmp_path, which):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\n"
        "project(game LANGUAGES C CXX)\n"
        f"find_package(tinyllama {'.'.join(tinyllama.__version__.split('.')[:2])} REQUIRED)\n"
        f"add_executable(game {EXAMPLE})\n"
        f"target_link_libraries(game PRIVATE tinyllama::{which})\n"
    )
    folder = f"-Dtinyllama_DIR={tinyllama.get_cmake_dir()}"
    subprocess.run(["cmake", "-S", tmp_path, "-B", tmp_path / "b", folder], check=True)
    subprocess.run(["cmake", "--build", tmp_path / "b"], check=True)
    play(tmp_path / "b" / "game")


@needs("pkg-config")
def test_found_by_pkg_config():
    environment = {**os.environ, "PKG_CONFIG_PATH": str(LIB / "pkgconfig")}
    done = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "tinyllama"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    folders = {word[2:] for word in done.stdout.split() if word[:2] in ("-I", "-L")}
    assert {os.path.realpath(folder) for folder in folders} == {
        os.path.realpath(INCLUDE),
        os.path.realpath(LIB),
    }


@needs("nm")
def test_the_library_shows_its_functions_and_nothing_else():
    (library,) = LIB.glob("libtinyllama.so")
    lines = subprocess.run(["nm", "-D", str(library)], check=True, capture_output=True, text=True)
    symbols = [line.split() for line in lines.stdout.splitlines()]
    shown = {words[-1] for words in symbols if words[-2] not in ("U", "w", "v")}
    assert shown
    assert all(name.startswith("tl_") for name in shown), shown
    header = (Path(INCLUDE) / "tinyllama.h").read_text()
    assert all(f" {name}(" in header or f"*{name}(" in header for name in shown)
    needed = {words[-1].split("@")[0] for words in symbols if words[-2] == "U"}
    ends_or_prints = {"exit", "abort", "_exit", "printf", "puts", "putchar", "signal", "sigaction"}
    assert not (ends_or_prints - {"abort"}) & needed  # libstdc++ has an abort in it
    assert not any("setlocale" in name for name in needed)
