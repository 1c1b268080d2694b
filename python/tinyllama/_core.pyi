"""The compiled core. Thin: conversion, error mapping, and the release of the GIL; no logic."""

from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from . import grammar, scheduler

__version__: str

def supported_isas() -> list[str]:
    """Kernel sets this CPU can run, best first."""

class GgufReader:
    """A parsed GGUF file: metadata and raw tensors (the one parser, for the Python side too)."""

    def __init__(
        self, data: bytes | None = ..., path: str | None = ..., name: str = ...
    ) -> None: ...
    def metadata(self) -> dict[str, Any]: ...
    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype name "f32"|"f16"|"bf16"|"q8_0", torch-order shape) in file order."""
    def tensor_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """Raw bytes of a tensor, a read-only view that keeps the file open."""

class Tokenizer:
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...  # -1 where there is none
    @property
    def eos_id(self) -> int: ...
    @property
    def unk_id(self) -> int: ...
    @property
    def add_bos(self) -> bool: ...
    def encode(self, text: str, bos: bool, eos: bool, at_start: bool = ...) -> list[int]: ...
    def decode(self, tokens: Sequence[int], at_start: bool = ...) -> bytes: ...
    def token_bytes(self, token: int) -> bytes: ...

class StreamDecoder:
    def __init__(self, tokenizer: Tokenizer, at_start: bool) -> None: ...
    def copy(self) -> StreamDecoder: ...
    def push(self, token: int) -> str: ...
    def finish(self) -> str: ...

class SamplingParams:
    """Mirror of sampler.h; validated when set on a session (ArgumentError)."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: list[tuple[int, float]]
    n_prompt_tokens: int  # presence and frequency count tokens from here on; repetition all
    banned: list[int]  # never sampled, e.g. the end tokens before min_new_tokens
    def __init__(self) -> None: ...

class Model:
    def __init__(
        self,
        path: str | None = ...,
        data: bytes | None = ...,
        name: str = ...,
        n_threads: int = ...,  # 0: as many as physical cores allowed to the process
        isa: str = ...,  # "": the environment variable TINYLLAMA_ISA, else the best
        kv_dtype: str = ...,  # "": f32
        max_seq_len: int = ...,  # 0: the file's
    ) -> None: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def config(self) -> dict[str, Any]:
        """dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, max_seq_len,
        rope_theta, norm_eps, tie_embeddings, rope_factors (list of floats)"""
    def spell(self, text: str | bytes, at_start: bool = ...) -> list[int]:
        """Tokens that show as exactly this text; none where the vocabulary has none."""
    @property
    def info(self) -> dict[str, Any]:
        """path, dtype, isa, n_threads, parameters, bytes (of weights), kv_bytes_per_token"""

class Session:
    """One timeline: tokens, KV cache, random state. `logits` are those after the last token."""

    def __init__(self, model: Model, seed: int) -> None: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...
    def logits(self) -> npt.NDArray[np.float32]:
        """Copy of the logits (vocab_size,) after the last token; ArgumentError when empty."""
    @property
    def n_unread(self) -> int:
        """Tokens that the model has not read yet: what needs the logits reads them."""
    def append(self, tokens: Sequence[int]) -> None:
        """Append tokens, unread. ArgumentError, ContextFullError, BusyError change nothing."""
    def drop_cache(self) -> None: ...
    def rewind(self, n_tokens: int) -> None:
        """Keep the first n_tokens. The logits return with the next feed or sample."""
    def fork(self, seed: int) -> Session:
        """A copy with the same past and a random state of its own."""

class RequestState:
    """What a saved request was, for Request(session, state)."""

    @property
    def form(self) -> tuple[str, list[str]]:
        """Of its text, and what that was made from."""

def save(session: Session, decoder: StreamDecoder | None, cache: bool) -> bytes: ...
def restore(model: Model, blob: bytes) -> tuple[Session, StreamDecoder | None, RequestState | None]:
    """FormatError with the reason for other bytes; see Model.restore in model.py."""

class Request:
    """One text being continued: a session, to which ``prompt`` is appended now, and what is made of
    it. ``stops`` are UTF-8; with ``n_top``, log-probabilities are kept (0: of the drawn tokens
    alone). ``deadline_ms`` counts from now. ArgumentError for a token that does not exist, nothing
    to continue, or wrong params, ContextFullError, BusyError."""

    @overload
    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        decoder: StreamDecoder,
        params: SamplingParams,
        max_new_tokens: int | None = ...,
        min_new_tokens: int = ...,
        end_tokens: Sequence[int] = ...,
        stops: Sequence[bytes] = ...,
        on_overflow: str = ...,
        n_keep: int = ...,
        n_top: int | None = ...,
        priority: int = ...,
        deadline_ms: float | None = ...,
        form: str = ...,
        form_texts: Sequence[str] = ...,
        matcher: grammar.Matcher | None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self, session: Session, state: RequestState, matcher: grammar.Matcher | None = ...
    ) -> None: ...
    def save(self, cache: bool = ...) -> bytes: ...
    @property
    def decoder(self) -> StreamDecoder: ...
    @property
    def text(self) -> str:
        """What is certain of it: what may become a stop string is held back."""
    @property
    def tokens(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[tuple[int, float, list[tuple[int, float]]]]:
        """Per token: its id, its log-probability under the model itself, the likeliest n_top."""
    @property
    def finish_reason(self) -> str | None:
        """None while it goes on, then "stop", "length", "cancelled", "deadline" or "error"."""
    @property
    def paused(self) -> bool: ...
    def rethrow(self) -> None:
        """Raise what ended it with "error"."""
    def cancel(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...

class Event:
    """What a step did for one request: the text that became certain, the tokens that were drawn,
    and whether it has ended."""

    @property
    def request(self) -> scheduler.Request:
        """The object that was submitted."""
    @property
    def text(self) -> str: ...
    @property
    def tokens(self) -> tuple[int, ...]: ...
    @property
    def done(self) -> bool: ...

class Scheduler:
    """Steps requests of one model together. Used by one thread at a time (BusyError for a second).
    Whatever happens to a request, the others go on; Ctrl-C is raised between two pieces of work,
    and the next step goes on from there."""

    def __init__(self, model: Model, max_live: int = ...) -> None: ...
    def warm_up(self) -> None:
        """Measure passes of 1 to max_live rows, so that the first budget is kept."""
    def reserve(self, n_positions: int) -> None:
        """Take memory for so many now, and give none back while the scheduler lives."""
    def submit(self, request: Request) -> None:
        """Takes part from the next step on."""
    def step(self, budget_ms: float | None = ...) -> list[Event]:
        """Work for that long, or, without a budget, until some request has drawn a token or ended.
        Returns what came of it, one event per request, whose text is thereby taken."""
    def run(self) -> list[Request]:
        """Step until a request has ended. Those that have leave and are returned, in the order in
        which they came."""
    @property
    def stats(self) -> dict[str, Any]:
        """n_live and n_waiting (for their first token) requests; tokens_read, tokens_drawn, pieces
        of work and the time spent_ms in them since the beginning; next_piece_ms."""

class Background:
    """The same on a thread of its own. For any thread; a session is busy until its request has
    ended."""

    def __init__(self, model: Model, max_live: int = ..., n_positions: int = ...) -> None: ...
    def stop(self) -> None:
        """For good; what has not ended is cancelled."""
    def submit(self, request: Request) -> None: ...
    def wake(self) -> None:
        """Look again: a request was cancelled or resumed."""
    def step(self, budget_ms: float | None = ...) -> list[Event]:
        """What came since the last call. None: wait for something, or for nothing to be left."""
    def save(self, request: Request, cache: bool = ...) -> bytes:
        """Request.save, between two pieces of work."""
    @property
    def stats(self) -> dict[str, Any]: ...

def forward(
    sessions: Sequence[Session], tokens: Sequence[Sequence[int]], all_logits: bool = ...
) -> list[npt.NDArray[np.float32]]:
    """Feed tokens[i] to sessions[i], all in one batch (a long batch in chunks, Ctrl-C between
    them). Returns per session logits (n_tokens, vocab_size) when all_logits, else (0, vocab_size)
    arrays. Nothing is changed when any input is invalid: token ids out of range (ArgumentError),
    context full (ContextFullError), a session twice or of another model (ArgumentError), busy
    (BusyError)."""

def sample(session: Session, params: SamplingParams, text: StreamDecoder | None = ...) -> int:
    """Draw the next token from the session's logits. With ``text``, what was generated so far,
    tokens that would break a character are not drawn. The session does not move: feed it with
    forward()."""

def logprob(session: Session, token: int) -> float:
    """Natural log of the probability of ``token`` as the next one, under the model's unmodified
    distribution."""

def top_logprobs(session: Session, n: int) -> list[tuple[int, float]]:
    """The n most likely next tokens under the unmodified distribution, best first."""

def score(session: Session, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    """Feed tokens and return the log-probability (natural) of tokens[i] given all before, i >= 1
    for an empty session (first entry NaN), computed without keeping all logits."""

def trace(
    session: Session, tokens: Sequence[int], tap: Callable[[str, npt.NDArray[np.float32]], None]
) -> None:
    """Feed tokens as one batch; call tap(stage, values (n_tokens, width)) at each named stage."""

def kernel_matmul(
    isa: str,
    dtype: str,
    weights: npt.NDArray[Any],
    rows: int,
    cols: int,
    x: npt.NDArray[np.float32],
    begin: int = ...,
    end: int = ...,
    add: bool = ...,
) -> npt.NDArray[np.float32]:
    """One kernel on its own, for tests: x (n_tokens, cols) -> (n_tokens, rows up to a multiple of
    16), of which panels [begin, end) of 16 are computed. What is not written is NaN; with add, the
    products are added to 1."""

def score_texts(
    model: Model,
    texts: Sequence[Sequence[int]],
    n_given: Sequence[int],
    progress: Callable[[int], object],
) -> list[tuple[float, bool]]:
    """For each text, from token n_given[i] >= 1 on: the natural logarithm of the probability of its
    tokens, given all before each, and whether each is the likeliest in its place. What several
    begin with is read once; a text may have a token more than the context. Between passes, progress
    is told how many more texts are done. ArgumentError, ContextFullError."""

def score_ways(session: Session, ways: Sequence[Sequence[int]]) -> list[float]:
    """The natural logarithm of the probability of each way to go on. ArgumentError for an empty
    one, ContextFullError; the session stays as it is."""

def hash64(data: bytes, seed: int = ...) -> int:
    """XXH64, for tests."""

def kernel_unpack(
    isa: str, dtype: str, weights: npt.NDArray[Any], rows: int, cols: int
) -> npt.NDArray[np.float32]:
    """The values (rows, cols) of a matrix that was packed for the kernels."""

def kernel_quantize_q8(
    isa: str, x: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """int8 (up to a multiple of 64; 99 is what was not written), a scale per group of 1,024, and
    the sum of each 32 int8."""

def kernel_hand_out(
    isa: str, x: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], int]:
    """A copy, the largest of each 64, and the bits of the largest magnitude."""

def kernel_round_bf16(isa: str, x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of x, rounded, up to a multiple of 32."""

def kernel_weigh(
    isa: str, x: npt.NDArray[np.float32], best: float, scale: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """2^((x - best) * scale) for each of x, whole blocks of 64, and the sum of each block."""

def kernel_attend(
    isa: str,
    kv_dtype: str,
    q: npt.NDArray[np.float32],
    n_positions: npt.NDArray[np.int32],
    k: npt.NDArray[np.float32],
    v: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Attention of one key head, for tests: query i of q (n_queries, head_dim) looks at the first
    n_positions[i] of k and v (positions, head_dim), stored in a cache full of NaN."""

def kernel_unary(
    isa: str, name: str, *arrays: npt.NDArray[np.float32], scalar: float = ...
) -> npt.NDArray[np.float32]:
    """rms_norm(x, weight; eps), rope(x (n_heads, head_dim), cos, sin), swiglu(gate, up)."""
