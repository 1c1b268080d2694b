"""The engines, each as a class that opens a model and does the three things that are measured.

first_token(prompt) -> seconds from the prompt to the first token; tokens(prompt, n, sampled) ->
seconds of each of n tokens after the first, greedy, or sampled with top_p = 0.9 at temperature 1;
streams(prompts, n) -> seconds until each of the prompts has n more tokens. What an engine cannot do
raises Unable.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

now = time.perf_counter
STREAM_CONTEXT = 128  # tokens of context per stream, for engines that have to know


class Unable(Exception):
    """The engine has no way to do this."""


class Tinyllama:
    """Ours, by its public interface. Options of load() ride on the weights: q8_0,isa=avx2."""

    def __init__(self, path: str, weights: str, n_threads: int) -> None:
        import tinyllama

        _, *options = weights.split(",")
        kwargs: dict[str, Any] = dict(option.split("=") for option in options)
        self.model = tinyllama.load(path, n_threads=n_threads, **kwargs)
        self.version = f"tinyllama {tinyllama.__version__}"

    def first_token(self, prompt: list[int]) -> float:
        begin = now()
        self.model.complete(prompt, max_new_tokens=1, temperature=0.0)
        return now() - begin

    def tokens(self, prompt: list[int], n: int, sampled: bool) -> list[float]:
        session = self.model.session(seed=1)
        session.feed(prompt)
        how = {"temperature": 1.0, "top_p": 0.9} if sampled else {"temperature": 0.0}
        text = session.generate(max_new_tokens=n + 1, **how)
        return [b - a for a, b in pairwise([now() for _ in text])]

    def streams(self, prompts: list[list[int]], n: int) -> float:
        begin = now()
        done = self.model.complete(prompts, max_new_tokens=n, temperature=0.0)
        seconds = now() - begin
        assert all(len(one.tokens) == n for one in done)
        return seconds


class LlamaCpp:
    """llama.cpp by the low-level part of llama-cpp-python: its high-level one is slower."""

    def __init__(self, path: str, weights: str, n_threads: int) -> None:
        import ctypes

        import llama_cpp
        import numpy as np

        self.np, self.c, self.api = np, ctypes, llama_cpp
        self.n_threads = n_threads
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        assert self.model, f"llama.cpp cannot load {path}"
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context = None
        self._open(1)
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

    def _open(self, n_streams: int) -> None:
        """A context for that many streams."""
        api = self.api
        if self.context:
            if self.n_streams == n_streams:
                api.llama_memory_clear(self.memory, False)
                return
            api.llama_free(self.context)
            api.llama_batch_free(self.batch)
        params = api.llama_context_default_params()
        length = api.llama_model_n_ctx_train(self.model)
        params.n_ctx = length if n_streams == 1 else n_streams * STREAM_CONTEXT
        params.n_batch, params.n_ubatch, params.n_seq_max = 1024, 512, n_streams
        params.n_threads = params.n_threads_batch = self.n_threads
        self.context = api.llama_init_from_model(self.model, params)
        assert self.context
        self.batch = api.llama_batch_init(1024, 0, 1)
        self.memory, self.n_streams = api.llama_get_memory(self.context), n_streams

    def _feed(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, stream, whether its logits are wanted) each."""
        batch = self.batch
        for i, (token, position, stream, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
        batch.n_tokens = len(rows)
        assert self.api.llama_decode(self.context, batch) == 0

    def _likeliest(self, row: int) -> int:
        pointer = self.api.llama_get_logits_ith(self.context, row)
        array = self.c.POINTER(self.c.c_float * self.n_vocab)
        return int(self.np.ctypeslib.as_array(self.c.cast(pointer, array).contents).argmax())

    def _read(self, prompts: list[list[int]]) -> None:
        rows = [
            (token, i, stream, i == len(prompt) - 1)
            for stream, prompt in enumerate(prompts)
            for i, token in enumerate(prompt)
        ]
        self._feed(rows)

    def first_token(self, prompt: list[int]) -> float:
        self._open(1)
        begin = now()
        self._read([prompt])
        self._likeliest(-1)
        return now() - begin

    def tokens(self, prompt: list[int], n: int, sampled: bool) -> list[float]:
        api = self.api
        self._open(1)
        self._read([prompt])
        sampler = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if sampled:
            api.llama_sampler_chain_add(sampler, api.llama_sampler_init_top_p(0.9, 1))
            api.llama_sampler_chain_add(sampler, api.llama_sampler_init_dist(1))
        times = []
        for i in range(n + 1):
            if sampled:
                token = api.llama_sampler_sample(sampler, self.context, -1)
            else:
                token = self._likeliest(-1)
            times.append(now())
            self._feed([(token, len(prompt) + i, 0, True)])
        api.llama_sampler_free(sampler)
        return [b - a for a, b in pairwise(times)]

    def streams(self, prompts: list[list[int]], n: int) -> float:
        self._open(len(prompts))
        begin = now()
        self._read(prompts)
        last = [sum(map(len, prompts[: i + 1])) - 1 for i in range(len(prompts))]
        for step in range(n):
            tokens = [self._likeliest(row) for row in last]
            if step < n - 1:
                at = zip(tokens, prompts, strict=True)
                self._feed([(t, len(p) + step, i, True) for i, (t, p) in enumerate(at)])
            last = list(range(len(prompts)))
        return now() - begin


class Ctranslate2:
    def __init__(self, path: str, weights: str, n_threads: int) -> None:
        import ctranslate2

        kind = {"float32": "float32", "int8": "int8_float32"}[weights]
        self.generator = ctranslate2.Generator(
            path, device="cpu", inter_threads=1, intra_threads=n_threads, compute_type=kind
        )
        self.pieces = json.loads((Path(path) / "vocabulary.json").read_text())
        self.version = f"ctranslate2 {ctranslate2.__version__}"

    def _generate(self, prompts: list[list[int]], n: int, **options: Any) -> None:
        words = [[self.pieces[token] for token in prompt] for prompt in prompts]
        options = {"sampling_topk": 1} | options
        done = self.generator.generate_batch(
            words,
            max_length=n,
            min_length=n,
            beam_size=1,
            include_prompt_in_result=False,
            **options,
        )
        assert all(len(one.sequences_ids[0]) == n for one in done)

    def first_token(self, prompt: list[int]) -> float:
        begin = now()
        self._generate([prompt], 1)
        return now() - begin

    def tokens(self, prompt: list[int], n: int, sampled: bool) -> list[float]:
        times: list[float] = []
        how = {"sampling_topk": 0, "sampling_topp": 0.9} if sampled else {}
        # append returns None, which is false: go on
        self._generate([prompt], n + 1, callback=lambda step: times.append(now()) or False, **how)
        return [b - a for a, b in pairwise(times)]

    def streams(self, prompts: list[list[int]], n: int) -> float:
        begin = now()
        self._generate(prompts, n, max_batch_size=0)
        return now() - begin


class Openvino:
    """Weights fp32, int8 or int4; fp32@bf16: computed in bfloat16. It tells its own times."""

    def __init__(self, path: str, weights: str, n_threads: int) -> None:
        import numpy as np
        import openvino
        import openvino_genai

        self.np, self.openvino, self.api = np, openvino, openvino_genai
        _, _, precision = weights.partition("@")
        if precision == "bf16" and n_threads == 1:
            raise Unable("openvino dies of SIGFPE with the bf16 hint on one thread")
        self.pipeline = openvino_genai.LLMPipeline(
            path,
            "CPU",
            INFERENCE_NUM_THREADS=n_threads,
            INFERENCE_PRECISION_HINT=precision or "f32",
            PERFORMANCE_HINT="LATENCY",
        )
        self.version = f"openvino-genai {openvino_genai.__version__}"

    def _generate(self, prompts: list[list[int]], n: int, sampled: bool = False) -> Any:
        ids = self.np.array(prompts, dtype=self.np.int64)
        inputs = self.api.TokenizedInputs(
            self.openvino.Tensor(ids), self.openvino.Tensor(self.np.ones_like(ids))
        )
        config = self.api.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = n
        config.ignore_eos, config.eos_token_id = True, 2
        config.do_sample, config.num_beams = sampled, 1
        if sampled:
            config.temperature, config.top_p, config.top_k = 1.0, 0.9, 2**31
        result = self.pipeline.generate(inputs, config)
        assert all(len(tokens) == n for tokens in result.tokens)
        return result.perf_metrics

    def first_token(self, prompt: list[int]) -> float:
        begin = now()
        self._generate([prompt], 1)
        return now() - begin

    def tokens(self, prompt: list[int], n: int, sampled: bool) -> list[float]:
        metrics = self._generate([prompt], n + 1, sampled)
        return [float(micros) / 1e6 for micros in metrics.raw_metrics.m_durations][-n:]

    def streams(self, prompts: list[list[int]], n: int) -> float:
        begin = now()
        self._generate(prompts, n)
        return now() - begin


class Onnxruntime:
    def __init__(self, path: str, weights: str, n_threads: int) -> None:
        import numpy as np
        import onnxruntime_genai

        self.np, self.api = np, onnxruntime_genai
        config = onnxruntime_genai.Config(path)
        options = {"session_options": {"intra_op_num_threads": n_threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model = onnxruntime_genai.Model(config)
        self.version = f"onnxruntime-genai {onnxruntime_genai.__version__}"

    def _generate(self, prompts: list[list[int]], n: int, sampled: bool = False) -> list[float]:
        """The moments before the prompt and after each token."""
        params = self.api.GeneratorParams(self.model)
        length = len(prompts[0]) + n
        options: dict[str, Any] = {"do_sample": sampled, "batch_size": len(prompts)}
        if sampled:
            options |= {"top_p": 0.9, "temperature": 1.0, "top_k": 0}
        params.set_search_options(max_length=length, min_length=length, **options)
        generator = self.api.Generator(self.model, params)
        times = [now()]
        generator.append_tokens(self.np.array(prompts, dtype=self.np.int32))
        for _ in range(n):
            generator.generate_next_token()
            times.append(now())
        assert len(generator.get_sequence(0)) == length
        return times

    def first_token(self, prompt: list[int]) -> float:
        begin, end = self._generate([prompt], 1)
        return end - begin

    def tokens(self, prompt: list[int], n: int, sampled: bool) -> list[float]:
        return [b - a for a, b in pairwise(self._generate([prompt], n + 1, sampled)[1:])]

    def streams(self, prompts: list[list[int]], n: int) -> float:
        times = self._generate(prompts, n)
        return times[-1] - times[0]


class Transformers:
    def __init__(self, path: str, weights: str, n_threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(n_threads)
        transformers.logging.set_verbosity_error()
        self.torch = torch
        dtype = getattr(torch, weights)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.version = f"transformers {transformers.__version__} (torch {torch.__version__})"

    def _generate(self, prompts: list[list[int]], n: int, **options: Any) -> None:
        ids = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=n,
                min_new_tokens=n,
                pad_token_id=0,
                **{"do_sample": False} | options,
            )
        assert out.shape[1] == ids.shape[1] + n

    def first_token(self, prompt: list[int]) -> float:
        begin = now()
        self._generate([prompt], 1)
        return now() - begin

    def tokens(self, prompt: list[int], n: int, sampled: bool) -> list[float]:
        times: list[float] = []

        class Streamer:
            def put(self, value: Any) -> None:
                times.append(now())

            def end(self) -> None:
                pass

        how = {"do_sample": True, "top_p": 0.9, "temperature": 1.0, "top_k": 0} if sampled else {}
        self._generate([prompt], n + 1, streamer=Streamer(), **how)
        return [b - a for a, b in pairwise(times[1:])]  # the first is the prompt itself

    def streams(self, prompts: list[list[int]], n: int) -> float:
        begin = now()
        self._generate(prompts, n)
        return now() - begin


class Llama2c:
    """llama2.c's run and runq, a new process for each text. They tell a mean rate only, and read
    their prompt as text, here none: only decoding can be compared."""

    def __init__(self, path: str, weights: str, n_threads: int) -> None:
        run = Path(os.environ["LLAMA2C_RUN"])
        self.program = run.with_name("runq") if weights == "q8_0" else run
        self.path, self.n_threads = Path(path), n_threads
        if not self.program.exists():
            raise Unable(f"{self.program} does not exist")
        self.version = f"llama2.c {self.program.name}"

    def first_token(self, prompt: list[int]) -> float:
        raise Unable("llama2.c takes no token ids")

    def tokens(self, prompt: list[int], n: int, sampled: bool) -> list[float]:
        command = [self.program, self.path, "-z", self.path.with_name("tokenizer.bin")]
        command += ["-n", str(len(prompt) + n), "-s", "1", "-t", "1" if sampled else "0"]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.n_threads)}
        done = subprocess.run(command, capture_output=True, env=environment, check=True)
        rate = re.search(rb"tok/s: ([0-9.]+)", done.stderr)
        if rate is None or len(prompt) > 10:
            raise Unable("llama2.c told no rate")
        return [1 / float(rate[1])] * n

    def streams(self, prompts: list[list[int]], n: int) -> float:
        raise Unable("llama2.c makes one text at a time")


ENGINES: dict[str, Any] = {
    "tinyllama": Tinyllama,
    "llama.cpp": LlamaCpp,
    "ctranslate2": Ctranslate2,
    "openvino": Openvino,
    "onnxruntime": Onnxruntime,
    "transformers": Transformers,
    "llama2.c": Llama2c,
}
