"""Curves of several runs together, as one picture or as a page that needs no other file."""

from __future__ import annotations

import base64
import difflib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eagle_offline.config import PlotSettings
from eagle_offline.durable import require_writable, write_bytes
from eagle_offline.errors import DataError, UsageError, one_line
from eagle_offline.pages import Row, html_table, write_page
from eagle_offline.run_curves import RunCurves, is_number, read_runs

# What a panel's y axis says, for every metric that can be drawn over steps.
_OVER_STEPS = {
    "loss": "loss, nats",
    "walked_accept_length": "walked accept length, tokens a round",
    "simulated_accept_length": "simulated accept length, tokens a round",
    "expected_accept_length": "expected accept length, tokens a round",
    "accuracy": "accuracy",
    "tokens_per_second": "tokens a second",
    "data_wait_share": "share of the time spent waiting for data",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "memory_bytes": "peak memory, bytes",
}
# And over depths, at a run's last validation.
_OVER_DEPTHS = {
    "top1": "top-1 by depth at the last validation",
    "conditional_top1": "top-1, given all before it were right, at the last validation",
    "survival": "all right up to this depth, at the last validation",
    "step_loss": "loss by depth at the last validation, nats",
}
_SHARES = ("top1", "conditional_top1", "survival")
METRICS = (*_OVER_STEPS, *_OVER_DEPTHS)
# Drawn unless metrics are named, where a run has them.
_USUAL = (
    "loss",
    "walked_accept_length",
    "simulated_accept_length",
    "expected_accept_length",
    "top1",
    "survival",
    "tokens_per_second",
    "data_wait_share",
)
_TABLE = {
    "step": "{:,.0f}",
    "epoch": "{:.2f}",
    "loss": "{:.3f}",
    "accuracy": "{:.1%}",
    "walked_accept_length": "{:.2f}",
    "simulated_accept_length": "{:.2f}",
    "expected_accept_length": "{:.2f}",
}
_COLUMNS = 2
_PANEL_INCHES = (6.5, 3.6)
_FEW_COLORS = 10  # as many as matplotlib's usual cycle tells apart
_STYLES: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 1, "alpha": 0.5},
    "heldout": {"linewidth": 1.8, "marker": "o", "markersize": 4},
}
# A legend line holds about this many characters of names a panel; names are cut nowhere.
_LEGEND_CHARACTERS = 60
_LEGEND_COLUMNS = 4
_LEGEND_LINE_INCHES = 0.25
_NAMED_RUNS = 3  # in a page's title


def plot_runs(settings: PlotSettings) -> Path:
    """Draw the curves of runs together; return the file, a picture or a page by its suffix.

    Raises:
        UsageError: no run, an unknown metric, matplotlib missing, or an output that cannot be written.
        DataError: a run is missing, has no metrics, or damaged ones; no run has a metric that was asked for.
    """
    output = settings.output
    wanted = [_known(name) for name in settings.metric]
    if not settings.run:
        raise UsageError("plot: no run given; name output directories of `train`, such as: eagle-offline plot RUN")
    if output.suffix.lower() not in (".png", ".html"):
        raise UsageError(f"--output {output}: expected a name that ends in .png or .html")
    _require_matplotlib()
    runs = read_runs(settings.run)
    metrics = _drawable(runs, wanted)
    if output.is_dir():
        raise UsageError(f"--output {output}: a directory is there; choose another name")
    require_writable(output.parent, "--output")
    picture = draw(runs, metrics)
    if output.suffix.lower() == ".png":
        write_bytes(output, picture)
    else:
        _write_page(output, runs, picture)
    return output


def draw(runs: Sequence[RunCurves], metrics: Sequence[str]) -> bytes:
    """Return a picture as PNG: a panel a metric, a color a run, training thin and held out with markers."""
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(metrics))
    lines = -(-len(metrics) // columns)
    width, height = _PANEL_INCHES
    legend_columns = max(
        1, min(_LEGEND_COLUMNS, int(_LEGEND_CHARACTERS * columns / max(len(run.name) for run in runs)))
    )
    legend_lines = -(-(len(runs) + 2) // legend_columns)
    size = (width * columns, height * lines + _LEGEND_LINE_INCHES * legend_lines)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    colors = _colors(len(runs))
    for metric, axis in zip(metrics, panels, strict=False):
        paint = _draw_depths if metric in _OVER_DEPTHS else _draw_steps
        paint(axis, runs, colors, metric)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    for axis in panels[len(metrics) :]:
        axis.set_axis_off()
    _add_legend(figure, runs, colors, legend_columns)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _draw_steps(axis: Any, runs: Sequence[RunCurves], colors: Sequence[Any], metric: str) -> None:
    for run, color in zip(runs, colors, strict=True):
        for kind, style in _STYLES.items():
            steps, values = run.over_steps(kind, metric)
            # A line through one point shows nothing.
            marker = {"marker": "."} if len(steps) == 1 and kind == "train" else {}
            axis.plot(steps, values, color=color, **style, **marker)
    axis.set(title=_OVER_STEPS[metric], xlabel="step")


def _draw_depths(axis: Any, runs: Sequence[RunCurves], colors: Sequence[Any], metric: str) -> None:
    for run, color in zip(runs, colors, strict=True):
        values = run.over_depths(metric)
        axis.plot(range(1, len(values) + 1), values, color=color, **_STYLES["heldout"])
    axis.set(title=_OVER_DEPTHS[metric], xlabel="depth", **({"ylim": (0, 1)} if metric in _SHARES else {}))


def _add_legend(figure: Any, runs: Sequence[RunCurves], colors: Sequence[Any], columns: int) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, linewidth=4) for color in colors]
    handles += [Line2D([], [], color="black", **style) for style in _STYLES.values()]
    labels = [*(run.name for run in runs), "training", "held out"]
    # matplotlib before 3.10 leaves out labels that begin with _; a space before one is not seen.
    labels = [f" {label}" if label.startswith("_") else label for label in labels]
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= _FEW_COLORS:
        return [colormaps["tab10"](number) for number in range(count)]
    return [colormaps["turbo"](number / (count - 1)) for number in range(count)]


def _write_page(path: Path, runs: Sequence[RunCurves], picture: bytes) -> None:
    image = f'<p><img alt="curves" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>'
    title = ", ".join(run.name for run in runs) if len(runs) <= _NAMED_RUNS else f"{len(runs)} runs"
    write_page(path, title, [("Curves", image), ("Last validation", html_table(heldout_rows(runs)))])


def heldout_rows(runs: Iterable[RunCurves]) -> list[Row]:
    """Return a table of each run's last validation, its head first."""
    rows: list[Row] = [("run", *(name.replace("_", " ") for name in _TABLE), "top-1 by depth")]
    for run in runs:
        last = run.last_heldout()
        cells = (form.format(last[name]) if is_number(last.get(name)) else "–" for name, form in _TABLE.items())
        depths = " ".join(f"{value:.0%}" for value in run.over_depths("top1"))
        rows.append((run.name, *cells, depths or "–"))
    return rows


def _known(name: str) -> str:
    """Return a metric's own spelling.

    Raises:
        UsageError: there is none of that name.
    """
    metric = name.replace("-", "_")
    if metric in METRICS:
        return metric
    if Path(name).is_dir():
        raise UsageError(f"--metric {name}: this is a directory, not a metric; name the runs before --metric")
    close = difflib.get_close_matches(metric, METRICS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(METRICS)}"
    raise UsageError(f"--metric {name}: no such metric; {hint}")


def _drawable(runs: Sequence[RunCurves], wanted: Sequence[str]) -> list[str]:
    """Return the metrics to draw: those asked for, else the usual ones that a run has.

    Raises:
        DataError: no run has one that was asked for, or any at all.
    """
    present = [metric for metric in METRICS if any(run.has(metric) for run in runs)]
    missing = [metric for metric in wanted if metric not in present]
    if missing:
        raise DataError(
            f"--metric {missing[0]}: none of these runs has it; they have {', '.join(present) or 'nothing'}"
        )
    metrics = list(dict.fromkeys(wanted)) or [metric for metric in _USUAL if metric in present]
    if not metrics:
        raise DataError(f"nothing to draw: none of these runs has any of {', '.join(_USUAL)}")
    return metrics


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(f"plot: {one_line(error)}; install it with: pip install 'eagle-offline[plots]'") from error
