"""A run as a page: what it is, how good it is, its curves, its texts, and what it has used."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FormatError
from ..report import Page, new_figure
from .metrics import Records, perplexity, read_records, series
from .recipe import flat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Half the width of a 95 % interval, in standard errors.
INTERVAL = 1.96
SHOWN_POINTS = 1000
SHOWN_SAMPLES = 8
CURVES = {
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate", "muon_learning_rate"),
    "tokens per second": ("tok_per_s",),
}


def run_page(run: Path) -> Page:
    """The page of the run in that folder, ended or under way, from its metrics alone.

    Raises OSError or FormatError where it has none, MissingExtraError without matplotlib.
    """
    records = read_records(run)
    beginning = newest(records, "recipe", run)
    page = Page(f"Training of {run.resolve().name}")
    _add_summary(page, records, beginning, _last_written(run))
    _add_loss(page, records)
    _add_curves(page, records)
    _add_validations(page, records)
    _add_samples(page, records)
    page.heading("Recipe")
    settings = flat(beginning["recipe"])
    page.table(["setting", "value"], [[key, str(value)] for key, value in settings.items()])
    return page


def newest(records: Records, field: str, run: Path) -> dict[str, Any]:
    """The last record that has ``field``. Raises FormatError when there is none."""
    for record in reversed(records):
        if field in record:
            return record
    raise FormatError(
        f"{run / 'metrics.jsonl'}: no record has {field!r}: its training did not begin"
    )


def smoothed(values: np.ndarray) -> np.ndarray:
    """``values`` (n,) as an exponential average over about a fiftieth of them, without bias."""
    keep = 1 - 1 / max(2.0, len(values) / 50)
    total, weight = 0.0, 0.0
    result = np.empty(len(values))
    for i, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        result[i] = total / weight
    return result


def thinned(*arrays: np.ndarray) -> list[np.ndarray]:
    """As many points of each as a drawing can show, first and last among them."""
    n = len(arrays[0])
    chosen = np.unique(np.linspace(0, n - 1, min(n, SHOWN_POINTS)).astype(int))
    return [array[chosen] for array in arrays]


def duration(seconds: float) -> str:
    """ "1:02:03": hours, minutes, seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def dress(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Name the axes, and the lines where there are several."""
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    if len(axes.lines) > 1:
        axes.legend()


def _last_written(run: Path) -> str:
    """When the newest record was written, in local time."""
    written = (run / "metrics.jsonl").stat().st_mtime
    return time.strftime("%H:%M on %Y-%m-%d", time.localtime(written))


def energy_text(kwh: float) -> str:
    """ "1.5 kWh", or "1.5 Wh" where that is less than one."""
    return f"{kwh:.4g} kWh" if kwh >= 1 else f"{1e3 * kwh:.4g} Wh"


def mass_text(kg: float) -> str:
    """ "1.5 kg", "1.5 g" or "1.5 mg": the largest of which there is one."""
    if kg >= 1:
        return f"{kg:.4g} kg"
    return f"{1e3 * kg:.4g} g" if kg >= 1e-3 else f"{1e6 * kg:.4g} mg"


def _beginning_rows(records: Records, beginning: dict[str, Any]) -> list[list[object]]:
    """Where, how and by what a run was made, as far as it has that on record."""
    source = next((r["source"] for r in reversed(records) if r.get("source")), "")
    rows: list[list[object]] = [["recipe", source]] if source else []
    if "version" in beginning:
        first = next(record["began"] for record in records if "began" in record)
        rows.append(["begun", f"{first}; tinyllama {beginning['version']}"])
    rows += [
        ["gone on with", f"{record['began']}, from step {record['step']:,}"]
        for record in [record for record in records if "began" in record][1:]
    ]
    how = [str(beginning["device"])]
    if "dtype" in beginning:
        how += [beginning["dtype"], "compiled" if beginning["compiled"] else "not compiled"]
    return [*rows, ["device", ", ".join(how)]]


def _source_rows(beginning: dict[str, Any]) -> list[list[object]]:
    """Where the text has several sources: what each holds, and how often an epoch has it."""
    sources = beginning.get("sources", [])
    weights = beginning["recipe"].get("weights", {})
    return [
        [
            f"text: {source['name']}",
            f"{source['documents']:,} documents, {source['tokens']:,} tokens,"
            f" {weights.get(source['name'], 1):g} times an epoch",
        ]
        for source in sources
        if len(sources) > 1
    ]


def _add_summary(
    page: Page, records: Records, beginning: dict[str, Any], last_written: str
) -> None:
    recipe, last = beginning["recipe"], records[-1]
    steps = recipe["steps"]
    tokens = last["tokens"]
    epochs = tokens / beginning.get("tokens_per_epoch", beginning["n_tokens"])
    rows: list[list[object]] = [
        ["parameters", f"{beginning['n_parameters']:,}"],
        [
            "text",
            f"{beginning['n_documents']:,} documents, {beginning['n_tokens']:,} tokens an epoch",
        ],
        *_source_rows(beginning),
        [
            "seen",
            f"{tokens:,} tokens, {epochs:.2f} epochs; {last['step']:,} of {steps:,} steps",
        ],
        ["time", duration(last["seconds"])],
        *_beginning_rows(records, beginning),
    ]
    speeds = series(records, "tok_per_s", "peak_share")
    if len(speeds[0]):
        speed, share = (float(np.median(values)) for values in speeds)
        rows.append(["speed", f"{speed:,.0f} tokens per second, the median"])
        rows.append(
            [
                "share of the peak",
                f"{share:.1%} of the {beginning['peak_flop_per_s'] / 1e12:.3g} TFLOP/s that matrix"
                " products reached here when it began",
            ]
        )
        if last["step"] < steps:
            left = (steps * tokens / max(1, last["step"]) - tokens) / speed
            rows.append(["left to train", f"about {duration(left)}"])
    rows += _validation_rows(records)
    standing = f"under way at its last record, {last_written}"
    if "stopped" in last:
        standing = f"stopped after step {last['step']:,}; the same command goes on"
    page.table(["", "ended" if last["step"] == steps else standing], rows)


def _validation_rows(records: Records) -> list[list[object]]:
    found = [record for record in records if "bits_per_byte" in record]
    if not found:
        return [["validation", "none yet"]]
    last = found[-1]
    best = min(own_scores(found) or found, key=lambda record: float(record["bits_per_byte"]))
    error = last["standard_error"]
    rows: list[list[object]] = [
        ["validation loss", f"{last['valid_nats']:.4f}{plus_minus(error)} nats per token"],
        ["perplexity", f"{perplexity(last['valid_nats']):.3f}"],
        ["bits per byte", f"{last['bits_per_byte']:.4f}{plus_minus(bits_error(last))}"],
    ]
    if best is not last:
        at = f"{best['bits_per_byte']:.4f} at step {best['step']:,}"
        rows.append(["bits per byte, the best", at])
    return rows


def own_scores(records: Records) -> Records:
    """The validations of what a training has made: not that of the model it began with."""
    return [record for record in records if "bits_per_byte" in record and record["step"] > 0]


def bits_error(validation: dict[str, Any]) -> float | None:
    """The standard error of a record's bits per byte."""
    error = validation.get("standard_error")
    if error is None:
        return None
    return float(error / validation["valid_nats"] * validation["bits_per_byte"])


def plus_minus(error: float | None) -> str:
    """ " ± 0.0123", half the width of a 95 % interval; nothing where it is not known."""
    return "" if error is None else f" ± {INTERVAL * error:.4f}"


def _add_loss(page: Page, records: Records) -> None:
    figure = new_figure(8.0, 4.5)
    axes = figure.subplots()
    tokens, nats = series(records, "tokens", "train_nats")
    if len(tokens):
        at, raw, smooth = thinned(tokens, nats, smoothed(nats))
        axes.plot(at, raw, color="C0", lw=0.6, alpha=0.4, label="training, a step")
        axes.plot(at, smooth, color="C0", lw=1.5, label="training, smoothed")
    at, valid, error = series(records, "tokens", "valid_nats", "standard_error")
    if len(at):
        axes.plot(at, valid, "o-", color="C1", ms=3, lw=1.5, label="validation")
        low, high = valid - INTERVAL * error, valid + INTERVAL * error
        axes.fill_between(at, low, high, color="C1", alpha=0.25, lw=0)
    # The first steps, near ln(vocabulary), would press all that matters into the lower edge.
    settled = np.concatenate([smoothed(nats)[len(nats) // 20 :], valid])
    if len(settled):
        axes.set_ylim(top=float(settled.max()) + 0.1)
    dress(axes, "tokens", "nats per token")
    page.heading("Loss")
    page.figure(
        figure,
        "The band is the 95 % interval of the validation loss over documents. Training loss is that"
        " of single steps, smoothed over about a fiftieth of the run.",
    )


def _add_curves(page: Page, records: Records) -> None:
    if not len(series(records, "grad_norm")[0]):
        return
    figure = new_figure(8.0, 5.5)
    for axes, (title, fields) in zip(figure.subplots(len(CURVES)), CURVES.items(), strict=True):
        for field in fields:
            axes.plot(*thinned(*series(records, "tokens", field)), lw=0.8, label=field)
        axes.set_ylim(bottom=0)
        dress(axes, "tokens", title)
    page.figure(
        figure,
        "The gradients' norm is that before clipping. The speed is that of the steps alone, without"
        " validations, samples and checkpoints.",
    )


def _add_validations(page: Page, records: Records) -> None:
    """The table that the authors of TeenyTinyLlama published (arXiv 2401.16640)."""
    used = {record["step"]: record for record in records if "kwh" in record}
    header = ["step", "tokens", "time", "nats per token", "±", "perplexity", "bits per byte"]
    if used:
        header += ["energy (estimated)", "CO₂ equivalent (estimated)"]
    rows = []
    for record in records:
        if "valid_nats" not in record:
            continue
        row: list[object] = [
            record["step"],
            record["tokens"],
            duration(record["seconds"]),
            f"{record['valid_nats']:.4f}",
            plus_minus(record["standard_error"]).removeprefix(" ± "),
            f"{perplexity(record['valid_nats']):.3f}",
            f"{record['bits_per_byte']:.4f}",
        ]
        if used:
            energy = used.get(record["step"])
            row += [energy_text(energy["kwh"]) if energy else ""]
            row += [mass_text(energy["kg_co2eq"]) if energy else ""]
        rows.append(row)
    if not rows:
        return
    page.heading("Validation")
    page.table(header, rows, "± half of a 95 % interval over documents")
    if used:
        last = list(used.values())[-1]
        steps, metered = records[-1]["step"], last.get("metered_steps", records[-1]["step"])
        of = "In all" if metered == steps else f"Of {metered:,} of the {steps:,} steps, metered,"
        page.text(
            f"{of} {energy_text(last['kwh'])} and {mass_text(last['kg_co2eq'])} of CO₂"
            f" equivalent. These are estimates, of the whole machine, by {last['estimated_by']}."
        )


def _add_samples(page: Page, records: Records) -> None:
    by_prompt: dict[str, Records] = {}
    for record in records:
        if "sample" in record:
            by_prompt.setdefault(record["prompt"], []).append(record)
    if by_prompt:
        page.heading("Samples")
        page.text("Continued with the same random numbers every time, at temperature 0.8.")
    for prompt, samples in by_prompt.items():
        page.heading(prompt, level=3)
        chosen = np.linspace(0, len(samples) - 1, min(len(samples), SHOWN_SAMPLES)).astype(int)
        for i in chosen:
            page.text(f"step {samples[i]['step']:,}")
            page.quote(samples[i]["sample"])
