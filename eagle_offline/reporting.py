"""What a run achieved: a table for the terminal and a page with plots, each number beside the untrained draft's."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eagle_offline.durable import make_directory, write_bytes
from eagle_offline.errors import DataError
from eagle_offline.evaluation_page import EXPLANATION, decoding_rows, facts, plot_decoding, read_evaluation, task_rows
from eagle_offline.inspection import describe_cache
from eagle_offline.pages import html_facts, html_plot, html_table, text_facts, text_table, write_page, write_plot
from eagle_offline.run_comparison import BY_DEPTH, compare_runs, comparison_notes, comparison_rows, plot_comparison
from eagle_offline.training.logbook import read_metrics


def summarize_run(
    run: Path, stages_file: Path | None = None, evaluation: Path | None = None, compare: Sequence[Path] = ()
) -> dict[str, Any]:
    """Return a run's cache, its first and last validation, the seconds of its stages, and what else is given.

    Args:
        run: output directory of `train`.
        stages_file: seconds of each stage.
        evaluation: output directory of `evaluate`, for real decoding.
        compare: further runs; see `compare_runs`.

    Raises:
        DataError: there is no run, or one has no validation on held-out documents yet.
    """
    try:
        cache_paths = [Path(path) for path in json.loads((run / "train.json").read_text())["cache"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{run}: no training run here (train.json cannot be read)") from error
    heldout = [row for row in read_metrics(run) if row["kind"] == "heldout"]
    if not heldout or heldout[0]["step"] != 0:
        raise DataError(f"{run}: no validation on held-out documents yet; was it trained with --heldout-share 0?")
    caches = [describe_cache(path) for path in cache_paths]
    seconds = json.loads(stages_file.read_text()) if stages_file is not None and stages_file.is_file() else {}
    decoded = None if evaluation is None else read_evaluation(evaluation)
    return {
        "run": str(run),
        "cache": _added_up(caches),
        "raw_bytes": sum(sum(cache["raw_field_bytes"].values()) for cache in caches),
        "untrained": heldout[0],
        "trained": heldout[-1],
        "seconds": seconds,
        "evaluation": decoded,
        "comparison": compare_runs(run, compare, decoded) if compare else None,
    }


def _added_up(caches: list[dict[str, Any]]) -> dict[str, Any]:
    """Return several caches as one."""
    total = {
        name: sum(cache[name] for cache in caches) for name in ("samples", "tokens", "supervised_tokens", "shard_bytes")
    }
    paths = ", ".join(str(cache["path"]) for cache in caches)
    return {"path": paths, **total, "bytes_per_token": total["shard_bytes"] / max(1, total["tokens"])}


def table_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the lines of the table: what, untrained, trained."""
    before, after = summary["untrained"], summary["trained"]
    rows = [("held-out loss", f"{before['loss']:.3f}", f"{after['loss']:.3f}")]
    for metric, label, form in BY_DEPTH:
        # A run of an older version has no loss and no survival by depth.
        for depth, (one, two) in enumerate(zip(before.get(metric, ()), after.get(metric, ()), strict=False), start=1):
            rows.append((f"{label} {depth}", form.format(one), form.format(two)))
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
    lines = text_facts(cache_rows(summary))
    lines += ["", *text_table([("held-out conversations", "untrained", "trained"), *table_rows(summary)])]
    if summary["comparison"] is not None:
        lines += ["", *text_table(comparison_rows(summary["comparison"])), *comparison_notes(summary["comparison"])]
    if summary["evaluation"] is not None:
        lines += ["", *text_table(decoding_rows(summary["evaluation"]))]
    if summary["seconds"]:
        lines += ["", *text_table([("stage", "seconds"), *_second_rows(summary)])]
    return "\n".join(lines)


def write_report(summary: dict[str, Any], run: Path, directory: Path) -> None:
    """Write ``report.json``, plots and ``report.html`` to ``directory`` and print the table.

    Without matplotlib (extra ``plots``) the page has its tables only, and says so.
    """
    make_directory(directory)
    write_bytes(directory / "report.json", (json.dumps(summary, indent=2) + "\n").encode())
    sections = []
    evaluation = summary["evaluation"]
    if evaluation is not None:
        plot = plot_decoding(evaluation, directory)
        tables = html_table(decoding_rows(evaluation)) + html_plot(plot) + html_table(task_rows(evaluation))
        sections.append(("Real decoding", html_facts(facts(evaluation)) + EXPLANATION + tables))
    comparison = summary["comparison"]
    if comparison is not None:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in comparison_notes(comparison))
        plot = plot_comparison(comparison, directory)
        sections.append(("Beside other runs", notes + html_table(comparison_rows(comparison)) + html_plot(plot)))
    curves = _plot_curves(read_metrics(run), summary, directory)
    heldout = html_table([("", "untrained", "trained"), *table_rows(summary)])
    sections += [
        ("Held-out conversations", heldout + html_plot(curves)),
        ("Cache", html_facts(cache_rows(summary))),
        ("Time", html_table([("stage", "seconds"), *_second_rows(summary)])),
    ]
    write_page(directory / "report.html", summary["run"], sections)
    print(render_text(summary))  # noqa: T201
    print(f"\nreport: {directory / 'report.html'}")  # noqa: T201


def _second_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, f"{value:.1f}") for name, value in summary["seconds"].items()]


def _plot_curves(rows: list[dict[str, Any]], summary: dict[str, Any], directory: Path) -> str | None:
    train = [row for row in rows if row["kind"] == "train"]
    heldout = [row for row in rows if row["kind"] == "heldout"]

    def paint(axes: Sequence[Any]) -> None:
        loss, accept, depth = axes
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

    return write_plot(directory / "curves.png", 3, paint)
