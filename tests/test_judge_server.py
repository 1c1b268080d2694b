"""The judge against a real server, llama-cpp-python's with the model that ships, both killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from tinyllama.evaluate.judge import SCHEMA
from tinyllama.loading import bundled_model

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, the extra bench")
for package in ("uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings"):
    pytest.importorskip(package, reason="needs llama-cpp-python[server]")
jsonschema = pytest.importorskip("jsonschema", reason="a judge needs the extra eval")

N_QUESTIONS = 6
CLIENT = """
import sys
from tinyllama.cli import main
from tinyllama.evaluate import judge
judge.RETRIES = 1  # of a server that was killed: the pauses grow
sys.exit(main(sys.argv[1:]))
"""
MODEL = str(bundled_model())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def server(port: int, log: Path):
    """The model serves as ``tiny``; the length of the question is not what it was trained for."""
    command = [sys.executable, "-m", "llama_cpp.server", "--model", MODEL]
    command += ["--model_alias", "tiny", "--n_ctx", "4096", "--port", str(port)]
    command += ["--n_threads", "1", "--verbose", "false"]
    with open(log, "ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        while True:
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").close()
                break
            except OSError:
                time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def client(port: int, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", CLIENT, "eval", MODEL, "--stories", "--json"]
    command += ["--max-prompts", "3", "--completions", "2", "--judge-temperature", "1"]
    command += ["--judge", f"http://127.0.0.1:{port}/v1", "--judge-model", "tiny"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe)


def records(folder: Path) -> list[dict]:
    """The answers that are there whole."""
    path = folder / "judge.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def wait_for(n: int, folder: Path, running: subprocess.Popen) -> None:
    while len(records(folder)) < n:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.01)


def test_client_and_server_killed_in_the_middle(tmp_path):
    port, log = free_port(), tmp_path / "server.log"
    with server(port, log) as serving:
        first = client(port, tmp_path)
        wait_for(1, tmp_path, first)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        n_first = len(records(tmp_path))
        second = client(port, tmp_path)
        wait_for(n_first + 1, tmp_path, second)
        serving.send_signal(signal.SIGKILL)
        _, error = second.communicate(timeout=120)
    assert second.returncode == 2
    assert b"run again to go on" in error
    n_second = len(records(tmp_path))
    assert n_first < n_second < N_QUESTIONS
    with server(port, log):
        out, error = client(port, tmp_path).communicate(timeout=120)
    found = json.loads(out)["stories"]["judge"]
    assert found["n_graded"] == N_QUESTIONS and found["failed"] == []
    answers = records(tmp_path)
    for answer in answers:
        if answer["scores"]:
            jsonschema.validate(answer["scores"], SCHEMA)
    valid = [answer["key"] for answer in answers if answer["scores"]]
    assert len(valid) == len(set(valid)) == N_QUESTIONS
    # What was on its way when the client was killed was answered to nobody.
    assert (
        len(answers)
        <= log.read_text().count('"POST /v1/chat/completions HTTP/1.1" 200')
        <= (len(answers) + 1)
    )
