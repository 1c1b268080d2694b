"""The report of a check as a page: amounts, lengths, and findings with examples."""

from __future__ import annotations

import numpy as np

from ..report import Page, new_figure
from .checking import FINDINGS, LENGTHS, Report, Tally


def report_page(report: Report) -> Page:
    """``report`` as a Page, its sources beside each other.

    Raises MissingExtraError where matplotlib is not installed.
    """
    page = Page("Text")
    _add_amounts(page, report)
    page.heading("Length")
    page.table(
        ["source", *LENGTHS],
        [[name, *map(s.kept.length, LENGTHS.values())] for name, s in report.rows],
        "Bytes of a document that is kept",
    )
    if report.total.kept.documents:
        _add_histogram(page, report)
    _add_findings(page, report)
    return page


def _add_amounts(page: Page, report: Report) -> None:
    page.table(
        ["source", "documents", "bytes", "kept documents", "kept bytes", "kept characters"],
        [
            [name, s.documents, s.bytes, s.kept.documents, s.kept.bytes, s.kept.characters]
            for name, s in report.rows
        ],
        "Documents as they were read, and as a repair keeps them",
    )
    if report.tokenizer:
        page.table(
            ["source", "tokens", "bytes per token", "unknown", "share", "single bytes", "share"],
            [[name, *_tokens(source.kept)] for name, source in report.rows],
            f"Tokens of {report.tokenizer} in what is kept, begin and end of documents included",
        )


def _tokens(kept: Tally) -> list[object]:
    n = max(1, kept.tokens)
    per_token = round(kept.bytes / n, 3)
    unknown, single = (f"{count / n:.3%}" for count in (kept.unknown, kept.byte_tokens))
    return [kept.tokens, per_token, kept.unknown, unknown, kept.byte_tokens, single]


def _add_histogram(page: Page, report: Report) -> None:
    kept = report.total.kept
    edges = np.geomspace(kept.length(0.0), kept.length(1.0) + 1, 41)
    figure = new_figure(8.0, 3.0)
    axes = figure.subplots()
    lengths = [np.array(source.kept.lengths) for source in report.sources.values()]
    axes.hist(lengths, edges.tolist(), stacked=True, label=list(report.sources))
    axes.set(xscale="log", xlabel="bytes", ylabel="documents")
    if len(report.sources) > 1:
        axes.legend()
    page.figure(figure, "How many documents are how long")


def _add_findings(page: Page, report: Report) -> None:
    page.heading("Findings")
    findings = report.total.findings
    page.table(
        ["documents", *(name for name, _ in report.rows), "in a repair"],
        [
            [FINDINGS[key][0], *(s.findings[key].count for _, s in report.rows), FINDINGS[key][1]]
            for key in findings
        ],
        "" if report.near is None else f"Near: a Jaccard index of {report.near} or more",
    )
    for key in findings:
        examples = [e for s in report.sources.values() for e in s.findings[key].examples]
        if examples:
            page.heading(FINDINGS[key][0], level=3)
            page.quote("\n".join(examples))
