"""The report of a check as a page: figures, findings with examples, and how long documents are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..report import Page, new_figure
from .checking import FINDINGS, Report, SourceReport


def report_page(report: Report) -> Page:
    """``report`` as a Page, all sources beside each other. Raises MissingExtraError as it does."""
    rows = {**report.sources, "all": report.total} if len(report.sources) > 1 else report.sources
    page = Page("Text")
    page.table(
        ["source", "documents", "bytes", "kept documents", "bytes", "characters"],
        [[name, *_amounts(source)] for name, source in rows.items()],
        "Documents as they were read, and as a repair leaves them",
    )
    if report.tokenizer:
        page.table(
            ["source", "tokens", "bytes per token", "unknown", "", "single bytes", ""],
            [[name, *_tokens(source)] for name, source in rows.items()],
            f"Tokens of {report.tokenizer} in what is kept, begin and end of documents included",
        )
    page.heading("Length")
    shares = {"shortest": 0.0, "half up to": 0.5, "95 % up to": 0.95, "longest": 1.0}
    page.table(
        ["source", *shares],
        [[name, *map(s.kept.length, shares.values())] for name, s in rows.items()],
        "Bytes of a document that is kept",
    )
    if report.total.kept.documents:
        _add_lengths(page, report)
    page.heading("Findings")
    page.table(
        ["", *rows, "a repair leaves them"],
        [
            [title, *(source.findings[key].count for source in rows.values()), action]
            for key, (title, action) in _looked_for(report)
        ],
        "" if report.near is None else f"Near duplicates: a Jaccard index of {report.near} or more",
    )
    for key, (title, _) in _looked_for(report):
        examples = [e for source in report.sources.values() for e in source.findings[key].examples]
        if examples:
            page.heading(title, level=3)
            page.quote("\n".join(examples))
    return page


def _looked_for(report: Report) -> Iterator[tuple[str, tuple[str, str]]]:
    return ((key, FINDINGS[key]) for key in report.total.findings)


def _amounts(source: SourceReport) -> list[int]:
    kept = source.kept
    return [source.documents, source.bytes, kept.documents, kept.bytes, kept.characters]


def _tokens(source: SourceReport) -> list[object]:
    kept = source.kept
    n = max(1, kept.tokens)
    unknown, single = (f"{count / n:.3%}" for count in (kept.unknown, kept.byte_tokens))
    per_token = f"{kept.bytes / n:.3f}"
    return [kept.tokens, per_token, kept.unknown, unknown, kept.byte_tokens, single]


def _add_lengths(page: Page, report: Report) -> None:
    kept = report.total.kept
    edges = np.geomspace(max(1, kept.length(0.0)), kept.length(1.0) + 1, 41)
    figure = new_figure(8.0, 3.0)
    axes = figure.subplots()
    lengths = [np.array(source.kept.lengths) for source in report.sources.values()]
    axes.hist(lengths, edges.tolist(), stacked=True, label=list(report.sources))
    axes.set(xscale="log", xlabel="bytes", ylabel="documents")
    if len(report.sources) > 1:
        axes.legend()
    page.figure(figure, "How many documents are how long")
