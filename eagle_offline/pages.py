"""HTML pages with tables and plots, and the same tables as text."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from eagle_offline.durable import make_directory, replacing, write_bytes

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .9rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #ddd } img { max-width: 100% }
"""
_FIRST_COLUMN = 26
_COLUMN = 14

Row = Sequence[str]


def text_table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table for the terminal, the first column to the left, the others to the right."""
    columns = list(zip_longest(*(others for _, *others in rows), fillvalue=""))
    widths = [max(_COLUMN, 1 + max(map(len, column))) for column in columns]
    return [
        f"{first:<{_FIRST_COLUMN}}" + "".join(f"{cell:>{width}}" for cell, width in zip(others, widths, strict=False))
        for first, *others in rows
    ]


def text_facts(rows: Sequence[Row]) -> list[str]:
    """Return one line a fact: its name, then what it is."""
    return [f"{name:<{_FIRST_COLUMN}}{value}" for name, value in rows]


def html_table(rows: Sequence[Row]) -> str:
    """Return a table whose first row is its head."""
    head, *body = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return html_facts(body).replace("<table>", f"<table><tr>{cells}</tr>", 1)


def html_facts(rows: Sequence[Row]) -> str:
    """Return a table of facts, without a head."""
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{lines}</table>"


def html_plot(name: str | None) -> str:
    """Return a picture beside the page, or what to install for it."""
    if name is None:
        return "<p>Install the extra <code>plots</code> for curves.</p>"
    return f'<p><img src="{html.escape(name)}" alt="{html.escape(name)}"></p>'


def write_page(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write a page: its title, then headings with what stands below them, HTML already."""
    make_directory(path.parent)
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    page = (
        f"<!doctype html><meta charset='utf-8'><title>eagle-offline: {html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{body}\n"
    )
    write_bytes(path, page.encode())


def write_plot(path: Path, num_axes: int, paint: Callable[[Sequence[Any]], None]) -> str | None:
    """Write a row of plots as PNG and return its file name; None without matplotlib (extra ``plots``).

    Args:
        path: the picture.
        num_axes: plots side by side.
        paint: fills the axes; each gets a legend and a grid.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, num_axes, figsize=(14, 4), layout="constrained")
    paint(axes)
    for axis in axes:
        axis.legend()
        axis.grid(alpha=0.3)
    make_directory(path.parent)
    with replacing(path) as sibling:
        figure.savefig(sibling, format="png", dpi=120)
    pyplot.close(figure)
    return path.name
