"""What a host does to a process: fork, spawn, torch beside us, threads, Ctrl-C at any moment."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from random_models import tiny_model
from tinyllama.errors import BusyError

HERE = Path(__file__).parent
SETUP = (
    f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
    "import math, os, signal, threading, time\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever we inherited\n"
    "import tinyllama\n"
    "from random_models import tiny_model\n"
    "def text(model, seed=3): return model.generate('the rain', seed=seed, max_new_tokens=20)\n"
)


def run(code, timeout=60):
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code], capture_output=True, text=True, timeout=timeout
    )
    assert (done.returncode, done.stderr) == (0, ""), code
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("n_threads", [1, 2])
def test_fork_after_use(n_threads):
    """A child goes on with everything that its parent had made: model, session, scheduler."""
    run(
        f"model = tinyllama.load(tinyllama.load(None)._source, n_threads={n_threads})\n"
        "expected = text(model)\n"
        "session = model.session(seed=1); session.feed('Once upon a time')\n"
        "scheduler = model.scheduler()\n"
        "request = scheduler.submit('Tom saw', seed=2, max_new_tokens=30)\n"
        "for _ in range(3): scheduler.step(0.2)\n"
        "def go_on():\n"
        "    while not request.done: scheduler.step(1.0)\n"
        "    return text(model), request.text, ''.join(session.generate(max_new_tokens=20))\n"
        "for _ in range(5):\n"
        "    read, write = os.pipe()\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.write(write, repr(go_on()).encode()); os._exit(0)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "    said = os.read(read, 100000).decode()\n"
        "    os.close(read); os.close(write)\n"
        "mine = go_on()\n"
        "assert mine[0] == expected and repr(mine) == said\n"
    )


def test_spawn(tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(
        "import multiprocessing\n"
        "import tinyllama\n"
        "def tell(seed):\n"
        "    return tinyllama.generate('The dog', seed=seed, max_new_tokens=15)\n"
        "if __name__ == '__main__':\n"
        "    here = [tell(seed) for seed in range(4)]\n"
        "    for way in ('spawn', 'forkserver', 'fork'):\n"
        "        with multiprocessing.get_context(way).Pool(2) as pool:\n"
        "            assert pool.map(tell, range(4)) == here, way\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=100)


@pytest.mark.parametrize("first", ["import torch\n", ""])
def test_torch_before_and_after(first):
    pytest.importorskip("torch")
    run(
        first + "model = tinyllama.load(n_threads=2)\n"
        "expected = text(model)\n"
        "import torch\n"
        "torch.set_flush_denormal(True)\n"
        "a = torch.randn(300, 300)\n"
        "for _ in range(20):\n"
        "    a @ a\n"
        "    assert text(model) == expected\n"
        "assert text(tinyllama.load(n_threads=1)) == expected\n",
        timeout=120,
    )


def test_two_threads_on_one_session():
    """The documented error or the right answer; the session is usable afterwards."""
    model = tiny_model()
    session = model.session(seed=1)
    session.feed([1, 5, 6])
    expected = session._core.logits().tobytes()
    wrong, n_busy, n_fine = [], 0, 0
    lock = threading.Lock()

    def work():
        nonlocal n_busy, n_fine
        for _ in range(400):
            try:
                session.drop_cache()
                found = session._core.logits().tobytes()
                with lock:
                    n_fine += 1
                if found != expected:
                    wrong.append(found)
            except BusyError as error:
                assert "in use by another thread" in str(error)
                with lock:
                    n_busy += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert n_fine > 0
    assert session._core.logits().tobytes() == expected


INTERRUPTED = """
import random
model = tinyllama.load(n_threads=2)
ends = {1: -math.inf, 2: -math.inf}
options = {"logit_bias": ends, "on_overflow": "shift", "max_new_tokens": 40}
def alone(seed): return model.generate("Tom", seed=seed, **options)
session = model.session(seed=5); session.feed("Lily")
scheduler = model.scheduler()
n_interrupted = 0
def interrupt(): os.kill(os.getpid(), signal.SIGINT)
rng = random.Random(SEED)
for i in range(12):
    timer = threading.Timer(rng.uniform(0.0, 0.12), interrupt)
    try:
        timer.start()  # on a busy machine it may be over before this returns
        kind = i % 4
        if kind == 0:
            while True: model.generate(["Tom"] * 8, logit_bias=ends)
        if kind == 1:
            while True:
                for _ in session.generate(logit_bias=ends): pass
                session.rewind(2)
        if kind == 2:
            for seed in range(8): scheduler.submit("Ben", seed=seed, **options)
            while True: scheduler.step(2.0)
        while True: session.score_choices([" and the cat sat"] * 40)
    except KeyboardInterrupt:
        n_interrupted += 1
    timer.join()
    # All of it is usable.
    n = session.n_tokens
    if session.room: session.feed([7])
    session.rewind(min(n, 2))
    expected = model.logits(session.tokens)[-1].tobytes()
    assert session._core.logits().tobytes() == expected
    while scheduler.stats()["n_live"]: scheduler.step()
    request = scheduler.submit("Tom", seed=i, **options)
    while not request.done: scheduler.step()
    assert request.text == alone(i)
assert n_interrupted == 12
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("seed", range(3))
def test_ctrl_c_at_random_times(seed):
    run(INTERRUPTED.replace("SEED", str(seed)), timeout=120)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_ends_the_command(tmp_path):
    """At any time after its start it ends soon, by the signal or with its status, and says so."""
    rng = random.Random(1)
    command = [sys.executable, "-c", "from tinyllama.cli import main; import sys; sys.exit(main())"]
    for _ in range(4):
        process = subprocess.Popen(
            [*command, "generate", "--num-return-sequences", "5000"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        time.sleep(rng.uniform(0.6, 1.2))
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=20)
        assert process.returncode in (130, -signal.SIGINT), printed
