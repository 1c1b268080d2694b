"""Export with its proof: what was written is read back and must compute what the checkpoint does.

The written model runs in the native core, the checkpoint in torch in float32 (without torch: in
NumPy, tinyllama.reference), both on the same real text. Only what passes takes the name asked for.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ExportError
from ..files import check_place, whole_file, whole_folder
from ..formats import read_checkpoint
from ..formats.checkpoint import Checkpoint
from ..formats.gguf import gguf_bytes, write_gguf
from ..loading import load
from ..model import Model
from .card import model_card
from .checkpoint import check_files
from .record import Statement, read_run, read_statement

PathLike: TypeAlias = "str | os.PathLike[str]"
Logits: TypeAlias = "npt.NDArray[np.float32]"
Oracle: TypeAlias = "Callable[[list[int]], Logits]"

# What can be written, and how the name of its file ends; "hf" is a folder.
FORMATS = {"gguf": ".gguf", "hf": "", "llama2c": ".bin"}
MAX_TOKENS = 2048  # enough for a steady figure; the check of 15M parameters stays at seconds

# float32 only sums in another order. The rest loses precision; a model that still foretells this
# text as well, with nearly the same probabilities, is the same model.
MAX_F32_DIFFERENCE = 1e-3  # of the largest logit
MAX_PERPLEXITY_RATIO = 1.02
MAX_KL = 0.02  # nats per token
# 4 bits lose more; still far below what a wrong tensor, scale or order does.
MAX_PERPLEXITY_RATIO_Q4_0 = 1.1
MAX_KL_Q4_0 = 0.1

TEXT = """\
Once upon a time, in a small house by the river, there lived a girl named Mia. She had a little
brown dog called Ben. Every morning they ran down the path to see the ducks.

One day, the sky was grey and it began to rain. "Oh no," said Mia. "The baby duck is all alone on
the big stone!" The water was getting higher. Ben barked, but the baby duck was too scared to jump.

Mia had an idea. She took a long branch and laid it from the stone to the grass. "Come, little one,"
she said softly. The baby duck took one step, then two, and then it ran across the branch as fast as
it could. Its mother was so happy that she flapped her wings.

"You are very kind," said her father when he heard what she had done. That night the rain stopped.
Mia and Ben fell asleep by the window, and in the morning there were five small ducks at the door.
"""


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written and how close it is to the checkpoint, over ``n_tokens`` tokens of text.

    ``source``: what was read; of a training run the checkpoint's folder.
    ``oracle`` is what computed the checkpoint's logits: "torch" or "NumPy".
    ``max_difference``: the largest difference of two logits; ``max_logit``: the largest of them.
    Bits per byte and perplexity (e to the mean loss per token) stand ``before`` for the checkpoint
    in float32, ``after`` for what was written; ``kl`` is the mean Kullback-Leibler divergence of
    their probabilities in nats per token.
    """

    source: str
    path: str
    format: str
    dtype: str
    n_bytes: int
    oracle: str
    n_tokens: int
    max_difference: float
    max_logit: float
    bits_per_byte_before: float
    bits_per_byte_after: float
    perplexity_before: float
    perplexity_after: float
    kl: float


def export(
    source: PathLike,
    out: PathLike,
    to: str = "gguf",
    dtype: str | None = None,
    *,
    tokenizer: PathLike | None = None,
    base: PathLike | None = None,
    texts: Iterable[str] | None = None,
    card: PathLike | None = None,
    checkpoints: Literal["all"] | Iterable[int] = (),
) -> Report:
    """Write the model ``source`` as ``out`` and prove that it is the same model.

    ``source``: whatever ``read_checkpoint`` reads, a training run's folder too; ``tokenizer`` for
    llama2.c's files, ``base`` for an adapter, which is merged into it. ``to``: "gguf" (a file
    ….gguf; dtype f32, f16, bf16, q8_0 or q4_0, default: the source's), "hf" (a new or empty folder;
    f32, f16 or bf16, default: the source's, f32 for q8_0 and q4_0), or "llama2c" (a file ….bin and
    ``tokenizer.bin`` beside it; f32 writes v0, which run.c reads, q8_0 v2, for runq.c; default
    f32). ``texts``: what the check reads, up to 2048 tokens; default: a short story.

    A Hugging Face folder gets a model card, README.md (see ``card.model_card``), for which ``card``
    names a TOML file of what only its author knows (``record.Statement``), and in it a folder for
    each of the ``checkpoints`` of a training run, given by their steps, or "all" that the run kept.
    Those are read back and compared tensor by tensor.

    Raises ExportError when the written model computes something else; then, as after any other
    error, nothing is left and what stood at ``out`` stays. The bounds: in f32, logits within 1e-3
    of the largest; in q4_0, perplexity within 10 % and a mean divergence of 0.1 nats per token;
    else 2 % and 0.02.
    Raises, before anything is read, ArgumentError for an unknown format, checkpoints that are not
    there and a name that does not fit the format, and OSError for a place that cannot be written;
    then ArgumentError for a dtype that the format does not take and for too little text, and what
    readers and writers of the formats and of the card raise, and FormatError for a training run's
    checkpoint whose files are not as they were written.
    """
    if to not in FORMATS:
        raise ArgumentError(f"to is {to!r}; known: {', '.join(FORMATS)}")
    _check_name(Path(out), to)
    check_place(out, folder=to == "hf")
    if to != "hf" and (card is not None or checkpoints):
        raise ArgumentError(f"card and checkpoints are for a Hugging Face folder; to is {to!r}")
    statement = Statement() if card is None else read_statement(card)
    others = _kept_checkpoints(Path(source), checkpoints)
    checkpoint = read_checkpoint(source, tokenizer=tokenizer, base=base)
    for folder in (Path(checkpoint.source), *others):
        if (folder / "trainer.json").is_file():
            check_files(folder, resuming=False)
    dtype = _default_dtype(checkpoint, to) if dtype is None else dtype
    name, oracle = _oracle(checkpoint)
    out = Path(os.path.realpath(out))
    texts = [TEXT] if texts is None else texts

    def check(written: Model, part: Path) -> Report:
        figures = _compare(written, oracle, texts)
        report = Report(
            checkpoint.source, str(out), to, dtype, part.stat().st_size, name, **figures
        )
        _judge(report)
        return report

    to_hf = partial(_to_hf, statement=statement, others=others)
    writers: dict[str, Callable[[Checkpoint, Path, str, Check], Report]]
    writers = {"gguf": _to_gguf, "hf": to_hf, "llama2c": _to_llama2c}
    return writers[to](checkpoint, out, dtype, check)


Check: TypeAlias = "Callable[[Model, Path], Report]"


def _check_name(out: Path, to: str) -> None:
    """Raises ArgumentError for a name that promises another format than ``to``."""
    suffix = out.suffix.lower()
    promised = next((name for name, end in FORMATS.items() if end and end == suffix), None)
    if promised != to and (promised or to != "hf"):
        place = f"a file whose name ends in {FORMATS[to]}" if FORMATS[to] else "a folder"
        hint = f" (`--to {promised} {out}` would write what the name says)" if promised else ""
        raise ArgumentError(f"{out}: {to} is written to {place}{hint}")


def _default_dtype(checkpoint: Checkpoint, to: str) -> str:
    if to == "llama2c" or (to == "hf" and checkpoint.dtype in ("q8_0", "q4_0")):
        return "f32"
    return checkpoint.dtype


def _to_gguf(checkpoint: Checkpoint, out: Path, dtype: str, check: Check) -> Report:
    with whole_file(out) as stream:
        write_gguf(checkpoint, stream, dtype)
        stream.flush()
        return check(load(stream.name), Path(stream.name))


def _to_hf(
    checkpoint: Checkpoint,
    out: Path,
    dtype: str,
    check: Check,
    statement: Statement,
    others: list[Path],
) -> Report:
    with whole_folder(out) as part:
        report = check(_native(_folder(checkpoint, part, dtype)), part)
        for other in others:
            _folder(read_checkpoint(other), part / other.name, dtype)
        run = read_run(Path(checkpoint.source))
        steps = [other.name for other in others]
        text = model_card(load(part), run, statement, out.name, dtype, steps)
        (part / "README.md").write_text(text, encoding="utf-8")
        n_bytes = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
    return dataclasses.replace(report, n_bytes=n_bytes)


def _folder(checkpoint: Checkpoint, folder: Path, dtype: str) -> Checkpoint:
    """Write a Hugging Face folder: what is read back, which is what was to be written."""
    from ..formats.hf import load_hf, save_hf

    save_hf(checkpoint, folder, dtype)
    read_back = load_hf(folder)
    _compare_contents(checkpoint, read_back, dtype)
    return read_back


def _kept_checkpoints(run: Path, steps: Literal["all"] | Iterable[int]) -> list[Path]:
    """The folders of a run's checkpoints, by step. Raises ArgumentError for one it has not."""
    kept = {
        int(folder.name.removeprefix("step-")): folder
        for folder in sorted(run.glob("step-*"))
        if folder.name.removeprefix("step-").isdecimal() and (folder / "config.json").is_file()
    }
    if steps == "all" and not kept:
        raise ArgumentError(f"checkpoints: {run} has none; it is no training run's folder")
    wanted = sorted(kept if steps == "all" else set(steps))
    for step in wanted:
        if step not in kept:
            there = ", ".join(map(str, kept)) or "none"
            raise ArgumentError(f"checkpoints: {run} has no step {step}; it has: {there}")
    return [kept[step] for step in wanted]


def _to_llama2c(checkpoint: Checkpoint, out: Path, dtype: str, check: Check) -> Report:
    from ..formats.llama2c import place_tokenizer, read_llama2c, write_llama2c

    versions = {"f32": 0, "q8_0": 2}
    if dtype not in versions:
        raise ArgumentError(f"dtype is {dtype!r}; llama2.c's files take f32 or q8_0")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        part = Path(folder) / out.name
        write_llama2c(checkpoint, part, versions[dtype])
        read_back = read_llama2c(part)
        _compare_contents(checkpoint, read_back, dtype)
        report = check(_native(read_back), part)
        place_tokenizer(part.with_name("tokenizer.bin").read_bytes(), out.parent)
        os.replace(part, out)
    return report


def _native(checkpoint: Checkpoint) -> Model:
    """What was read back, in the native core with the exact numbers it was read with."""
    return load(gguf_bytes(checkpoint, "f32"))


def _compare_contents(before: Checkpoint, after: Checkpoint, dtype: str) -> None:
    """Everything that was read back against what was to be written. Raises ExportError."""
    if before.vocabulary.pieces != after.vocabulary.pieces:
        raise ExportError("the tokenizer was read back with other pieces")
    if before.config != dataclasses.replace(
        after.config, rope_theta=before.config.rope_theta, norm_eps=before.config.norm_eps
    ):
        raise ExportError(f"read back with another config: {after.config} for {before.config}")
    step = {"f32": 0.0, "bf16": 2.0**-8, "f16": 2.0**-11, "q8_0": 0.501 / 127}[dtype]
    for name, tensor in before.tensors.items():
        # f16 and bf16 round each number, q8_0 to a step of its group's largest. Below f16's
        # smallest normal number, 6e-5, its steps stay at 6e-8.
        largest = np.abs(tensor).max() if dtype == "q8_0" else np.abs(tensor)
        wrong = np.abs(after.tensors[name] - tensor) > largest * step + 6e-8 * (dtype == "f16")
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ExportError(
                f"tensor {name} at {where} is {after.tensors[name][where]} when read back as"
                f" {dtype}, {tensor[where]} in the checkpoint"
            )


# --- the same text through both -----------------------------------------------------------------


def _oracle(checkpoint: Checkpoint) -> tuple[str, Oracle]:
    """The checkpoint's logits in float32, from torch, or from NumPy where torch is missing."""
    try:
        import torch
    except ImportError:
        from ..reference import forward

        return "NumPy", lambda tokens: np.asarray(forward(checkpoint, tokens), np.float32)
    from .model import Llama, tensors_to_state

    # torch makes rotary tables for the whole context, which a file may put at two billion.
    config = checkpoint.config
    config = dataclasses.replace(config, max_seq_len=min(config.max_seq_len, MAX_TOKENS))
    model = Llama(config).eval()
    model.load_state_dict(tensors_to_state(checkpoint.tensors, config, checkpoint.source))

    def logits(tokens: list[int]) -> Logits:
        with torch.no_grad():
            values: Logits = model(torch.tensor([tokens]))[0].float().numpy()
        return values

    return "torch", logits


def _windows(model: Model, texts: Iterable[str]) -> Iterator[list[int]]:
    """The texts in tokens, cut at the context, up to MAX_TOKENS in all."""
    left = MAX_TOKENS
    for text in texts:
        tokens = model.tokenizer.encode(text)
        for start in range(0, len(tokens), model.config.max_seq_len):
            window = tokens[start : start + min(model.config.max_seq_len, left)]
            if len(window) < 2:
                continue
            yield window
            left -= len(window)
            if left < 2:
                return


def _compare(written: Model, oracle: Oracle, texts: Iterable[str]) -> dict[str, Any]:
    """The figures of a Report."""
    difference = largest = before = after = kl = 0.0
    n_tokens = n_targets = n_bytes = 0
    for tokens in _windows(written, texts):
        expected, found = oracle(tokens), written.logits(tokens)
        difference = max(difference, float(np.abs(expected - found).max()))
        largest = max(largest, float(np.abs(expected).max()))
        p, q = _log_softmax(expected), _log_softmax(found)
        kl += float((np.exp(p) * (p - q)).sum())
        rows, targets = np.arange(len(tokens) - 1), tokens[1:]
        before -= float(p[rows, targets].sum())
        after -= float(q[rows, targets].sum())
        n_tokens += len(tokens)
        n_targets += len(targets)
        n_bytes += len(written.tokenizer.decode(targets).encode())
    if n_targets == 0 or n_bytes == 0:
        raise ArgumentError("the text for the check is too short: it makes less than two tokens")
    return {
        "n_tokens": n_tokens,
        "max_difference": difference,
        "max_logit": largest,
        "bits_per_byte_before": before / math.log(2) / n_bytes,
        "bits_per_byte_after": after / math.log(2) / n_bytes,
        "perplexity_before": math.exp(min(before / n_targets, 700.0)),
        "perplexity_after": math.exp(min(after / n_targets, 700.0)),
        "kl": kl / n_tokens,
    }


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    shifted: npt.NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return shifted


def _judge(report: Report) -> None:
    """Raises ExportError when a figure is out of bounds; a NaN is."""
    what = f"{report.path} ({report.format}, {report.dtype}) against {report.oracle}"
    if report.dtype == "f32":
        bound = MAX_F32_DIFFERENCE * report.max_logit
        if not report.max_difference <= bound:
            raise ExportError(
                f"{what}: logits differ by {report.max_difference:.3g}, allowed are {bound:.3g};"
                " nothing was written"
            )
        return
    max_ratio, max_kl = MAX_PERPLEXITY_RATIO, MAX_KL
    if report.dtype == "q4_0":
        max_ratio, max_kl = MAX_PERPLEXITY_RATIO_Q4_0, MAX_KL_Q4_0
    ratio = report.perplexity_after / report.perplexity_before
    if not 1 / max_ratio <= ratio <= max_ratio:
        raise ExportError(
            f"{what}: perplexity {report.perplexity_before:.4g} became"
            f" {report.perplexity_after:.4g}, allowed are {100 * (max_ratio - 1):.0f} %;"
            " nothing was written"
        )
    if not report.kl <= max_kl:
        raise ExportError(
            f"{what}: probabilities diverge by {report.kl:.3g} nats per token, allowed are"
            f" {max_kl}; nothing was written"
        )
