"""Our engine alone under pytest-benchmark: pytest benchmarks/test_speed.py --benchmark-autosave

For watching one machine over time (--benchmark-compare); beside peers and ceilings: compare.py.
"""

import pytest
from models import MODELS, prompt, random_checkpoint

import tinyllama
from tinyllama.formats.gguf import gguf_bytes

CONFIG = MODELS["stories15m"].config


@pytest.fixture(scope="module", params=["f32", "bf16", "q8_0", "q4_0"])
def model(request):
    if request.param not in tinyllama.loading.DTYPES:
        pytest.skip(f"no {request.param} in this version")
    return tinyllama.load(gguf_bytes(random_checkpoint("stories15m"), request.param))


def test_decode(benchmark, model):
    session = model.session(seed=1)

    def setup():
        session.rewind(0)
        session.feed(prompt(CONFIG, 5, 1))

    def decode():
        for _ in session.generate(max_new_tokens=50, temperature=0.0):
            pass

    benchmark.pedantic(decode, setup=setup, rounds=10, warmup_rounds=1)
    assert session.n_tokens == 55


def test_prompt(benchmark, model):
    tokens = prompt(CONFIG, 200, 1)
    done = benchmark(lambda: model.complete(tokens, max_new_tokens=1, temperature=0.0))
    assert len(done.tokens) == 1


@pytest.mark.parametrize("n", [8, 32, 64])
def test_streams(benchmark, model, n):
    prompts = [prompt(CONFIG, 5, seed) for seed in range(n)]
    run = {"max_new_tokens": 32, "temperature": 0.0}
    done = benchmark.pedantic(model.complete, (prompts,), run, rounds=3, warmup_rounds=1)
    assert all(len(one.tokens) == 32 for one in done)
