"""What a run achieved: a table for the terminal and a page with plots, each number beside the untrained draft's."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eagle_offline.durable import make_directory, replacing, write_bytes
from eagle_offline.errors import DataError
from eagle_offline.inspection import describe_cache
from eagle_offline.training.logbook import read_metrics

_PAGE_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .9rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #ddd } img { max-width: 100% }
"""


def summarize_run(run: Path, stages_file: Path | None = None) -> dict[str, Any]:
    """Return a run's cache, its first and last validation and the seconds of its stages.

    Raises:
        DataError: there is no run, or it has no validation on held-out documents yet.
    """
    try:
        cache_path = Path(json.loads((run / "train.json").read_text())["cache"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{run}: no training run here (train.json cannot be read)") from error
    heldout = [row for row in read_metrics(run) if row["kind"] == "heldout"]
    if not heldout or heldout[0]["step"] != 0:
        raise DataError(f"{run}: no validation on held-out documents yet; was it trained with --heldout-share 0?")
    cache = describe_cache(cache_path)
    seconds = json.loads(stages_file.read_text()) if stages_file is not None and stages_file.is_file() else {}
    return {
        "run": str(run),
        "cache": {
            name: cache[name]
            for name in ("path", "samples", "tokens", "supervised_tokens", "shard_bytes", "bytes_per_token")
        },
        "raw_bytes": sum(cache["raw_field_bytes"].values()),
        "untrained": heldout[0],
        "trained": heldout[-1],
        "seconds": seconds,
    }


def table_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the lines of the table: what, untrained, trained."""
    before, after = summary["untrained"], summary["trained"]
    rows = [("held-out loss", f"{before['loss']:.3f}", f"{after['loss']:.3f}")]
    for depth, (one, two) in enumerate(zip(before["top1"], after["top1"], strict=True), start=1):
        rows.append((f"top-1 at depth {depth}", f"{one:.1%}", f"{two:.1%}"))
    for name in ("simulated_accept_length", "walked_accept_length"):
        rows.append((name.replace("_", " "), f"{before[name]:.2f}", f"{after[name]:.2f}"))
    return rows


def cache_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines about the cache."""
    cache = summary["cache"]
    ratio = cache["shard_bytes"] / summary["raw_bytes"]
    return [
        ("cache", cache["path"]),
        ("samples", f"{cache['samples']:,}"),
        ("tokens", f"{cache['tokens']:,} ({cache['supervised_tokens'] / cache['tokens']:.0%} supervised)"),
        ("size", f"{cache['shard_bytes'] / 1e6:.1f} MB"),
        (
            "bytes per token",
            f"{cache['bytes_per_token']:.0f} ({ratio:.2f} of raw)",
        ),
    ]


def render_text(summary: dict[str, Any]) -> str:
    """Return the table for the terminal."""
    lines = [f"{name:<26}{value}" for name, value in cache_rows(summary)]
    lines += ["", f"{'held-out conversations':<26}{'untrained':>12}{'trained':>12}"]
    lines += [f"{name:<26}{one:>12}{two:>12}" for name, one, two in table_rows(summary)]
    if summary["seconds"]:
        lines += ["", f"{'stage':<26}{'seconds':>12}"]
        lines += [f"{name:<26}{value:>12.1f}" for name, value in summary["seconds"].items()]
    return "\n".join(lines)


def write_report(summary: dict[str, Any], run: Path, directory: Path) -> None:
    """Write ``report.json``, plots and ``report.html`` to ``directory`` and print the table.

    Without matplotlib (extra ``plots``) the page has its tables only, and says so.
    """
    make_directory(directory)
    plots = _write_plots(read_metrics(run), summary, directory)
    write_bytes(directory / "report.json", (json.dumps(summary, indent=2) + "\n").encode())
    write_bytes(directory / "report.html", _page(summary, plots).encode())
    print(render_text(summary))  # noqa: T201
    print(f"\nreport: {directory / 'report.html'}")  # noqa: T201


def _page(summary: dict[str, Any], plots: list[str]) -> str:
    def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<table><tr>{cells}</tr>{body}</table>"

    seconds = [(name, f"{value:.1f}") for name, value in summary["seconds"].items()]
    pictures = "".join(f'<p><img src="{name}" alt="{name}"></p>' for name in plots)
    missing = "" if plots else "<p>Install the extra <code>plots</code> for curves.</p>"
    return (
        f"<!doctype html><meta charset='utf-8'><title>eagle-offline report</title><style>{_PAGE_STYLE}</style>"
        f"<h1>{html.escape(summary['run'])}</h1>"
        f"<h2>Cache</h2>{table(('', ''), cache_rows(summary))}"
        f"<h2>Held-out conversations</h2>{table(('', 'untrained', 'trained'), table_rows(summary))}"
        f"{pictures}{missing}<h2>Time</h2>{table(('stage', 'seconds'), seconds)}\n"
    )


def _write_plots(rows: list[dict[str, Any]], summary: dict[str, Any], directory: Path) -> list[str]:
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = [row for row in rows if row["kind"] == "train"]
    heldout = [row for row in rows if row["kind"] == "heldout"]
    figure, (loss, accept, depth) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    loss.plot([row["step"] for row in train], [row["loss"] for row in train], label="training", alpha=0.6)
    loss.plot([row["step"] for row in heldout], [row["loss"] for row in heldout], label="held out", marker="o")
    loss.set(title="loss", xlabel="step", ylabel="nats")
    for name, label in (("simulated_accept_length", "simulated"), ("walked_accept_length", "walked")):
        accept.plot([row["step"] for row in heldout], [row[name] for row in heldout], label=label, marker="o")
    accept.set(title="accept length, held out", xlabel="step", ylabel="tokens a round", ylim=(1, None))
    depths = range(1, len(summary["trained"]["top1"]) + 1)
    for key in ("untrained", "trained"):
        depth.plot(depths, summary[key]["conditional_top1"], label=key, marker="o")
    depth.set(title="right, given all before it were", xlabel="depth", ylim=(0, 1), xticks=list(depths))
    for axis in (loss, accept, depth):
        axis.legend()
        axis.grid(alpha=0.3)
    name = "curves.png"
    with replacing(directory / name) as sibling:
        figure.savefig(sibling, format="png", dpi=120)
    pyplot.close(figure)
    return [name]
