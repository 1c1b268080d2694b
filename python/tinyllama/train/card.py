"""The card of an exported model: README.md, as the Hugging Face Hub shows it and searches by it.

Shape, recipe, text, scores and energy come from the model and from the run that made it; samples
are what the exported model itself says, none left out. The rest only its author knows, and states
in a TOML file. What nobody stated or measured is left out, or said not to be stated.

The form of the front matter: huggingface/hub-docs, modelcard.md.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError
from ..model import Model
from .metrics import perplexity
from .page import bits_error, plus_minus
from .recipe import FREE_SETTINGS
from .record import Run, Statement

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

MAX_NEW_TOKENS = 200
MAX_ROWS = 20  # of the table of scores


def model_card(
    model: Model, run: Run | None, statement: Statement, folder: str, dtype: str,
    steps: Sequence[str] = (),
) -> str:  # fmt: skip
    """The text of README.md for ``model``, exported in ``dtype`` to a folder of that name.

    ``steps``: the folders of other checkpoints within it. Raises MissingExtraError without the
    package huggingface_hub.
    """
    name = _line(statement.name or folder)
    sections = [
        f"---\n{_front_matter(name, run, statement)}\n---",
        f"# {name}",
        statement.description.strip(),
        _shape(model, run, statement, dtype),
        _use(statement, folder, steps),
        _data(run, statement),
        _training(run),
        _scores(run),
        _energy(run),
        *_samples(model, statement),
        _limits(model, run, statement),
        _citation(name, statement),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


# --- front matter -------------------------------------------------------------------------------


def _front_matter(name: str, run: Run | None, statement: Statement) -> str:
    try:
        from huggingface_hub import ModelCardData
    except ImportError:
        raise MissingExtraError("huggingface_hub", "convert") from None
    results = _eval_results(run)
    data = ModelCardData(
        language=statement.languages or None,
        license=statement.license or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llama", "tinyllama", *statement.tags],
        datasets=statement.datasets or None,
        base_model=statement.base_model or None,
        metrics=["perplexity"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    kg = run.latest("kg_co2eq") if run else None
    if run and kg is not None and run.metered_steps == run.state["step"]:
        emissions = {
            "emissions": round(1000 * kg, 3),  # grams
            "source": run.latest("estimated_by") or "estimated during the training",
            "training_type": "fine-tuning" if run.start else "pre-training",
            "hardware_used": run.latest("device"),
        }
        data["co2_eq_emissions"] = {k: v for k, v in emissions.items() if v is not None}
    return str(data.to_yaml())


def _eval_results(run: Run | None) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    score = run.score if run else None
    if run is None or score is None:
        return []
    what = "completions" if run.has_pairs else "documents"
    values = [
        ("perplexity", "perplexity per token", round(perplexity(score["valid_nats"]), 4)),
        ("bits_per_byte", "bits per byte", round(score["bits_per_byte"], 4)),
    ]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=f"{what} held out of the training",
            metric_type=kind,
            metric_name=title,
            metric_value=value,
        )
        for kind, title, value in values
    ]


# --- sections -----------------------------------------------------------------------------------


def _shape(model: Model, run: Run | None, statement: Statement, dtype: str) -> str:
    config = model.config
    heads = f"{config.n_heads} heads (head_dim {config.head_dim}"
    shared = config.n_kv_heads != config.n_heads
    heads += f", {config.n_kv_heads} of keys and values)" if shared else ")"
    tied = "tied" if config.tie_embeddings else "untied"
    rows = [
        ("parameters", f"{config.n_parameters:,}, {dtype}"),
        (
            "shape",
            f"Llama: dim {config.dim}, {config.n_layers} layers, {heads},"
            f" hidden_dim {config.hidden_dim}, {tied} embeddings",
        ),
        ("vocabulary", f"{config.vocab_size:,} tokens, SentencePiece BPE"),
        ("context", _context(config.max_seq_len, run)),
        ("languages", ", ".join(statement.languages) or "not stated"),
        ("licence", statement.license or "not stated"),
        ("authors", ", ".join(statement.authors) or "not stated"),
    ]
    base = statement.base_model or (run.start if run else "")
    if base:
        rows.append(("made from", base))
    return _table(("", ""), rows)


def _context(max_seq_len: int, run: Run | None) -> str:
    """How many tokens it can read at once, and how many it was trained with."""
    trained = run.recipe.get("seq_len", max_seq_len) if run else max_seq_len
    here = " here" if run and run.start else ""  # what it went on from may have had longer ones
    windows = f", trained{here} in windows of {trained:,}" if trained < max_seq_len else ""
    return f"{max_seq_len:,} tokens{windows}"


def _use(statement: Statement, folder: str, steps: Sequence[str]) -> str:
    prompt = next((prompt for prompt in statement.prompts if prompt), "")
    text, quoted = json.dumps(prompt, ensure_ascii=False), json.dumps(folder, ensure_ascii=False)
    gguf = shlex.quote(f"{folder}.gguf")
    parts = [
        "## How to use it",
        f"`{folder}` stands for the folder this file lies in.",
        f"```python\nfrom transformers import pipeline\n\n"
        f'teller = pipeline("text-generation", model={quoted})\n'
        f"for text in teller({text}, num_return_sequences=2):\n"
        f'    print(text["generated_text"])\n```',
        "With tinyllama on a CPU, and as a GGUF file with llama.cpp:",
        f"```sh\ntinyllama generate {shlex.quote(prompt)} -m {shlex.quote(folder)}\n"
        f"tinyllama export {shlex.quote(folder)} --out {gguf}\n"
        f"llama-cli -m {gguf} -p {shlex.quote(prompt)}\n```",
    ]
    if steps:
        parts.append(
            "Checkpoints from on the way lie in folders of their own, complete like this one, and"
            f' load by `from_pretrained({quoted}, subfolder="{steps[0]}")`: '
            + ", ".join(f"`{step}`" for step in steps)
            + "."
        )
    return "\n\n".join(parts)


def _data(run: Run | None, statement: Statement) -> str:
    parts = ["## Text it was trained on"]
    if statement.datasets:
        parts.append("Data sets: " + ", ".join(statement.datasets) + ".")
    if run and run.start:
        base = statement.base_model or run.start
        parts.append(f"This training went on from {base}, whose own text is not counted here.")
    if run and run.has_pairs:
        parts.append("Pairs of prompt and completion: the prompts were read, not learned.")
    splits = run.state.get("data", {}) if run else {}
    if "train" in splits:
        weights = run.recipe.get("weights", {}) if run else {}
        rows = [
            (source["name"], *_counts(source), f"{weights.get(source['name'], 1):g}")
            for source in splits["train"].get("sources", [])
        ]
        rows.append(("all", *_counts(splits["train"]), ""))
        parts.append(_table(("source", "documents", "tokens", "bytes", "times per epoch"), rows))
    if run and run.recipe.get("weights") and run.latest("n_tokens"):
        parts.append(
            f"An epoch has {run.latest('n_documents'):,} documents of it with"
            f" {run.latest('n_tokens'):,} tokens, each counted as often as it is there. Of a"
            " fraction of a source, every epoch has the same documents; the others were not"
            " trained on."
        )
    if "valid" in splits:
        documents, tokens, n_bytes = _counts(splits["valid"])
        parts.append(f"Held out of it: {documents} documents, {tokens} tokens, {n_bytes} bytes.")
    return "\n\n".join(parts if len(parts) > 1 else [*parts, "Not stated."])


def _counts(entry: dict[str, Any]) -> tuple[str, str, str]:
    documents, tokens, n_bytes = (
        f"{entry[key]:,}" if key in entry else "?" for key in ("documents", "tokens", "bytes")
    )
    return documents, tokens, n_bytes


def _training(run: Run | None) -> str:
    if run is None:
        return "## Training\n\nNot on record."
    step, recipe = run.state["step"], run.recipe
    tokens = step * run.tokens_per_step
    summary = f"{step:,} steps of {run.tokens_per_step:,} tokens, {tokens:,} in all"
    epoch = run.tokens_per_epoch
    summary += f" or {tokens / epoch:.1f} epochs" if epoch else ""
    summary += f", of a recipe of {recipe['steps']:,} steps" if step < recipe["steps"] else ""
    seconds = run.state.get("seconds")
    summary += f"; {_duration(seconds)}" if seconds else ""
    device = run.latest("device")
    summary += f" on {device}" if device else ""
    if run.latest("dtype"):
        summary += f", {run.latest('dtype')}{', compiled' * bool(run.latest('compiled'))}"
    first = next((r["began"] for r in run.records if "began" in r), "")
    summary += f"; begun {first} with tinyllama {run.latest('version')}" if first else ""
    rows = []
    for key, value in recipe.items():
        if key in (*FREE_SETTINGS, "model", "weights", "epochs") or value in ("", None, [], {}):
            continue
        if key == "init_from":
            value = run.start  # where it lay is nobody's business
        rows.append((f"`{key}`", f"{value}"))
    return "\n\n".join(["## Training", f"{summary}.", _table(("recipe", ""), rows)])


def _scores(run: Run | None) -> str:
    scores = run.scores() if run else []
    if run is None or not scores:
        return "## Scores\n\nNone are on record."
    if len(scores) > MAX_ROWS:
        last = len(scores) - 1
        scores = [scores[round(i * last / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]
    columns = {"kwh": "kWh", "kg_co2eq": "kg CO2 equivalent"}
    columns = {key: title for key, title in columns.items() if run.latest(key) is not None}
    rows = [
        (
            f"{score['step']:,}",
            f"{score['step'] * run.tokens_per_step:,}",
            f"{perplexity(score['valid_nats']):.3f}",
            f"{score['bits_per_byte']:.4f}{plus_minus(bits_error(score))}",
            *(f"{score[key]:.3g}" if key in score else "" for key in columns),
        )
        for score in scores
    ]
    head = ("step", "tokens", "perplexity", "bits per byte", *columns.values())
    step = run.state["step"]
    what = "every token and the end of each scored"
    if run.has_pairs:
        what = "of pairs the completion, of others every token, and the end of each scored"
    text = (
        f"On the held-out documents, each on its own, {what}."
        " Perplexity is per token and compares only with models of the same vocabulary; bits per"
        " byte compare with any; ± is half of a 95 % interval over the documents."
    )
    text += " Step 0 is the model that it went on from." if scores[0]["step"] == 0 else ""
    text += "" if run.score else f" This checkpoint, of step {step:,}, was not scored itself."
    return "\n\n".join(["## Scores", text, _table(head, rows)])


def _energy(run: Run | None) -> str:
    kwh, kg = (run.latest("kwh"), run.latest("kg_co2eq")) if run else (None, None)
    if run is None or kwh is None:
        return "## Energy\n\nNot measured."
    by = run.latest("estimated_by")
    text = f"{kwh:.3g} kWh" + (f", {kg:.3g} kg CO2 equivalent" if kg is not None else "")
    if run.metered_steps < run.state["step"]:
        text += f", for {run.metered_steps:,} of the {run.state['step']:,} steps"
    return f"## Energy\n\nEstimated: {text}" + (f" ({_line(by)})." if by else ".")


def _samples(model: Model, statement: Statement) -> Iterator[str]:
    """What the model says, by the settings of generation_config.json."""
    from tqdm import tqdm

    n, prompts = statement.samples, statement.prompts
    if not n or not prompts:
        return
    command = f"--num-return-sequences {n} --seed 1 --max-new-tokens {MAX_NEW_TOKENS}"
    yield "## Samples, unselected"
    yield f"In this folder, `tinyllama generate PROMPT -m . {command}`: every text that it gives."
    with tqdm(total=n * len(prompts), desc="samples for the card", disable=None) as bar:
        for prompt in prompts:
            if len(prompts) > 1:
                yield f"### {_line(prompt) or 'No prompt'}"
            (told,) = model.complete(
                [prompt],
                num_return_sequences=n,
                seed=1,
                max_new_tokens=MAX_NEW_TOKENS,
                return_full_text=True,
                on_done=lambda *_: bar.update(),
            )
            for number, completion in enumerate([told] if n == 1 else told, 1):
                ended = "" if completion.finish_reason == "stop" else " (cut off)"
                yield f"{number}.{ended}\n\n{_fenced(completion.text)}"


def _limits(model: Model, run: Run | None, statement: Statement) -> str:
    known = [
        f"It continues text, in a context of {_context(model.config.max_seq_len, run)}. Nothing"
        " filters what it says, and nothing makes it true."
    ]
    score = run.score if run else None
    if score:
        known.append(
            "It was scored on text held out of what it was trained on, and on no other here."
        )
    if run and score and run.state.get("best_bits_per_byte") == score["bits_per_byte"]:
        known.append(
            "No checkpoint before it did better on that text: if it was picked for that, its score"
            " is a little optimistic."
        )
    if run and run.later:
        worst, last = max(later["bits_per_byte"] for later in run.later), run.later[-1]
        known.append(
            f"Its training went on to step {last['step']:,}, where that text took"
            f" {last['bits_per_byte']:.4f} bits per byte ({worst:.4f} at most)."
        )
    return "\n\n".join(filter(None, ["## Limits", statement.limits.strip(), " ".join(known)]))


def _citation(name: str, statement: Statement) -> str:
    if not (statement.authors and statement.year):
        return "## Citation\n\nNot stated."
    key = "".join(c for c in name.lower() if c.isascii() and c.isalnum()) or "model"
    fields = {
        "title": _latex(name),
        "author": " and ".join(map(_latex, statement.authors)),
        "year": str(statement.year),
    }
    if statement.url:
        fields["url"] = _line(statement.url)
    lines = [f"  {field} = {{{value}}}" for field, value in fields.items()]
    entry = f"@misc{{{key}{statement.year},\n" + ",\n".join(lines) + "\n}"
    return f"## Citation\n\n{_fenced(entry, 'bibtex')}"


# --- Markdown -----------------------------------------------------------------------------------


def _line(text: str) -> str:
    return " ".join(text.split())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _fenced(text: str, language: str = "text") -> str:
    """The text as it is, between fences longer than any that it holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {mark: "\\" + mark for mark in "&%$#_{}"}
    return "".join(special.get(mark, mark) for mark in _line(text))


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
