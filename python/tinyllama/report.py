"""Reports: one HTML file with text, tables and drawings, which loads nothing from anywhere."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .errors import ArgumentError, MissingExtraError
from .files import check_place, whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #8884; padding: .25rem .75rem; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; color: #777; font-size: .9rem; }
figure { margin: 1rem 0; }
svg { max-width: 100%; height: auto; background: #fff; }
pre { white-space: pre-wrap; background: #8881; padding: .75rem; border-radius: .25rem; }
"""


class Page:
    """A report in the making: what is added stands in that order. All text is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []
        self.heading(title, level=1)

    def heading(self, text: str, level: int = 2) -> None:
        """Add a heading, 1 the largest."""
        self._parts.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def quote(self, text: str) -> None:
        """Add text as it stands, with its line breaks: a story, a command."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(
        self, header: Sequence[str], rows: Iterable[Sequence[object]], caption: str = ""
    ) -> None:
        """Add a table. Numbers stand to the right; floats should come rounded, as text or not."""
        above = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        heads = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
        self._parts.append(f"<table>{above}<tr>{heads}</tr>\n{lines}</table>")

    def figure(self, figure: Figure, caption: str = "") -> None:
        """Add a drawing, as SVG."""
        below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        svg = _svg(figure, salt=f"{self.title} {len(self._parts)}")
        self._parts.append(f"<figure>{svg}{below}</figure>")

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page, whole or not at all. Raises OSError."""
        body = "\n".join(self._parts)
        with whole_file(path) as file:
            file.write(
                f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
                f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head>\n"
                f"<body>\n{body}\n</body></html>\n".encode(errors="xmlcharrefreplace")
            )


def check_page_place(path: str) -> None:
    """For the start of long work: raise ArgumentError, or OSError, where no page can be written.

    The name has to end in .html: no other file is overwritten by mistake.
    """
    if not path.endswith(".html"):
        raise ArgumentError(f"{path}: the name of a page ends in .html")
    check_place(path)


def new_figure(width: float = 8.0, height: float = 4.0) -> Figure:
    """An empty drawing, in inches; it needs no display and is nobody else's.

    Raises MissingExtraError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train") from error
    return Figure(figsize=(width, height), layout="constrained")


def _cell(value: object) -> str:
    kind = ' class="number"' if isinstance(value, (int, float)) else ""
    shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"<td{kind}>{html.escape(shown)}</td>"


def _svg(figure: Figure, salt: str) -> str:
    import matplotlib

    text = io.StringIO()
    # The salt names the parts of a drawing: the same each time, and no two of a page alike.
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
