"""``tinyllama export``: a trained model as one file, proved to compute the same."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from ..errors import ArgumentError


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``export``."""
    parser = subparsers.add_parser(
        "export",
        help="write a model as GGUF, a Hugging Face folder, or llama2.c's .bin",
        description="Write a model in another format, read it back, and compare what it computes\n"
        "with the source in torch (in NumPy where torch is not installed) on real text. What\n"
        "does not compute the same is not written.\n\n"
        "A source is a training run's folder (its best checkpoint), a Hugging Face folder, a\n"
        ".gguf file, `bundled` (the one that ships), llama2.c's .bin or .pt, or the folder of an\n"
        "adapter (LoRA and others, by peft), which is merged into its model.",
        epilog="examples:\n"
        "  tinyllama export run --out model.gguf --dtype q8_0\n"
        "  tinyllama export run --to hf my-model --card card.toml --checkpoints all\n"
        "  tinyllama export bundled --to hf stories --dtype f32\n"
        "  tinyllama export my-adapter --base my-model --out model.gguf\n"
        "  tinyllama export model.gguf --to llama2c model.bin",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="the model to export")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--out",
        metavar="MODEL.gguf",
        help="a GGUF file, ….gguf: what tinyllama, llama.cpp and Ollama run",
    )
    target.add_argument(
        "--to",
        nargs=2,
        metavar=("FORMAT", "PATH"),
        help="hf: a folder for transformers, new or empty; llama2c: a .bin (v0, or v2 for q8_0)"
        " and its tokenizer.bin beside it; gguf: as --out",
    )
    parser.add_argument(
        "--dtype",
        help="f32, f16, bf16, q8_0 (8 bits a weight, a scale per 32 of them: 27 %% of f32's size)"
        " or q4_0 (4 bits, the embedding and output 8: smaller and faster, a little less exact);"
        " default: the source's",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.bin or .model, for llama2.c's files"
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="the Hugging Face folder that an adapter was trained on; default: the one it names",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="text for the comparison; default: a short story"
    )
    parser.add_argument(
        "--card",
        metavar="FILE.toml",
        help="for hf: what only you can say for the model card: name, description, languages,"
        " license, datasets, base_model, tags, authors, year, url, limits, prompts, samples",
    )
    parser.add_argument(
        "--checkpoints",
        metavar="all|STEP,…",
        type=_steps,
        default=(),
        help="for hf: checkpoints of a training run that go along, each in a folder of its own",
    )
    parser.set_defaults(handler=run)


def _steps(text: str) -> Literal["all"] | list[int]:
    try:
        return "all" if text == "all" else [int(step) for step in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor steps: 1000,2000") from None


def run(args: argparse.Namespace) -> None:
    from ..data.documents import Documents
    from ..loading import find_model
    from ..train.export import FORMATS, export
    from ..train.record import Statement, read_run, read_statement

    to, out = ("gguf", args.out) if args.to is None else args.to
    if to not in FORMATS:
        raise ArgumentError(f"--to {to}: unknown format; known: {', '.join(FORMATS)}")
    texts = None if args.text is None else (text for _, text in Documents(args.text))
    report = export(
        find_model(args.source), out, to, args.dtype, tokenizer=args.tokenizer, base=args.base,
        texts=texts, card=args.card, checkpoints=args.checkpoints,
    )  # fmt: skip
    _tell_checkpoint(find_model(args.source), Path(report.source))
    print(f"wrote {report.path}: {report.format}, {report.dtype}, {report.n_bytes:,} bytes")
    print(
        f"logits against {report.oracle} in float32 over {report.n_tokens:,} tokens:"
        f" largest difference {report.max_difference:.2g} (largest logit {report.max_logit:.3g}),"
        f" divergence {report.kl:.2g} nats per token"
    )
    text = args.text or "a short story in English (--text FILE takes yours)"
    print(
        f"on {text}: bits per byte {report.bits_per_byte_before:.4f} before,"
        f" {report.bits_per_byte_after:.4f} after;"
        f" perplexity {report.perplexity_before:.4f} before, {report.perplexity_after:.4f} after"
    )
    if to == "hf":
        statement = Statement() if args.card is None else read_statement(args.card)
        if missing := statement.missing(read_run(Path(report.source))):
            names = ", ".join(missing)
            print(f"the model card, README.md, does not state: {names} (--card FILE.toml does)")


def _tell_checkpoint(source: Path, checkpoint: Path) -> None:
    """Of a run: which of its checkpoints it is, and whether there is a newer one."""
    if checkpoint == source or not (source / "LATEST").is_file():
        return
    newest = (source / "LATEST").read_text(encoding="utf-8").strip()
    if newest == checkpoint.name:
        best = source / "BEST"
        is_best = best.is_file() and best.read_text(encoding="utf-8").strip() == newest
        print(f"{checkpoint}: the last checkpoint{', and the best' if is_best else ''}")
    else:
        print(f"{checkpoint}: the best of those validated; the last one is {source / newest}")
