"""An evaluation as a table and as a page with plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_offline.durable import make_directory, write_bytes
from eagle_offline.errors import DataError
from eagle_offline.pages import Row, html_facts, html_plot, html_table, text_facts, text_table, write_page, write_plot

# Reading a report needs no torch.
if TYPE_CHECKING:
    from eagle_offline.serving.results import Evaluation

EVALUATION_FILE = "evaluation.json"

EXPLANATION = (
    "<p>Accept length: tokens a verification yields, the target's own included. Walked: what the draft's hits along "
    "these answers predict for greedy decoding, round for round. Simulated: the mean over all their positions, as if a "
    "round could begin at any of them. A draft's validation while it trains covers other answers. Draft forwards a "
    "round: one a token for a chain, one in all for P-EAGLE.</p>"
)


def read_evaluation(directory: Path) -> dict[str, Any]:
    """Read the figures that `write_evaluation` wrote.

    Raises:
        DataError: missing or not readable.
    """
    path = directory / EVALUATION_FILE
    try:
        figures = json.loads(path.read_bytes())
        decoding_rows(figures)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not an evaluation; write one with evaluate --output-dir {directory}") from error
    return dict(figures)


def decoding_rows(figures: dict[str, Any]) -> list[Row]:
    """Return the table of drafters, its head first: what, plain decoding, each drafter."""
    drafters, plain = figures["drafters"], figures["plain"]
    results = list(drafters.values())
    greedy = _greedy(figures)
    rows: list[Row] = [(f"real decoding, {figures['num_draft_tokens']} drafts", "no draft", *drafters)]
    for name, label in (
        ("accept_length", "accept length"),
        ("walked_accept_length", f"  walked{greedy}"),
        ("simulated_accept_length", f"  simulated{greedy}"),
    ):
        rows.append((label, "1.00", *(_number(result[name]) for result in results)))
    for depth in range(figures["num_draft_tokens"]):
        rates = (f"{result['accept_rate'][depth]:.1%}" for result in results)
        rows.append((f"accepted at depth {depth + 1}", "", *rates))
    rows.append(("draft forwards a round", "", *(_number(result["draft_forwards_per_round"]) for result in results)))
    rows.append(("tokens a second", *(f"{result['tokens_per_second']:.0f}" for result in (plain, *results))))
    rows.append(("speed-up", "1.00", *(_number(result["speedup"]) for result in results)))
    for name, label in (("prefill", "prompts, s"), ("draft", "drafting, s"), ("verify", "verifying, s")):
        rows.append((label, *(f"{result[f'{name}_seconds']:.2f}" for result in (plain, *results))))
    return rows


def _greedy(figures: dict[str, Any]) -> str:
    """Return what is added to the names of predictions, which are of greedy decoding, where decoding is another."""
    return ", greedy" if figures["temperature"] else ""


def task_rows(figures: dict[str, Any]) -> list[Row]:
    """Return accept length by kind of prompt, its head first: of the draft in question in full, then of the others."""
    first, *others = figures["drafters"].values()
    _, *names = figures["drafters"]
    predicted = (f"{name}{_greedy(figures)}" for name in ("walked", "simulated"))
    rows: list[Row] = [("task", "answers", "rounds", "accept length", *predicted, *names)]
    for task, found in first["tasks"].items():
        lengths = [found[f"{name}accept_length"] for name in ("", "walked_", "simulated_")]
        lengths += [other["tasks"][task]["accept_length"] for other in others]
        rows.append((task, str(found["num_answers"]), str(found["num_rounds"]), *map(_number, lengths)))
    return rows


def facts(figures: dict[str, Any]) -> list[Row]:
    """Return what was decoded and how, one line each."""
    temperature, top_p = figures["temperature"], figures["top_p"]
    rows: list[Row] = [
        ("draft", figures["draft"]),
        *((name, given) for name, given in figures["compared"].items()),
        ("target", figures["target"]),
        ("prompts", f"{figures['prompts']}: {figures['num_answers']} answers, {figures['batch_size']} at once"),
        ("decoding", f"temperature {temperature}, top-p {top_p}" if temperature else "greedy"),
    ]
    if figures["num_identical"] is not None:
        rows.append(("same as without drafts", f"{figures['num_identical']} of {figures['num_answers']} answers"))
    if figures["num_unasked"]:
        rows.append(("not asked", f"{figures['num_unasked']} turns, after answers that reached the limit"))
    if figures["num_left_out"]:
        rows.append(("left out", f"{figures['num_left_out']} prompts, longer than the target takes"))
    return rows


def render_text(evaluation: Evaluation) -> str:
    """Return the tables for the terminal."""
    figures = evaluation.model_dump(mode="json")
    lines = text_facts(facts(figures))
    lines += ["", *text_table(decoding_rows(figures)), "", *text_table(task_rows(figures))]
    return "\n".join(lines)


def write_evaluation(evaluation: Evaluation, directory: Path) -> None:
    """Write ``evaluation.json``, ``evaluation.html`` and its plot."""
    figures = evaluation.model_dump(mode="json")
    make_directory(directory)
    write_bytes(directory / EVALUATION_FILE, (json.dumps(figures, indent=2) + "\n").encode())
    plot = plot_decoding(figures, directory)
    sections = [
        ("Real decoding", html_facts(facts(figures)) + EXPLANATION + html_table(decoding_rows(figures))),
        ("By depth, by task, by time", html_plot(plot) + html_table(task_rows(figures))),
    ]
    write_page(directory / "evaluation.html", figures["draft"], sections)


def plot_decoding(figures: dict[str, Any], directory: Path) -> str | None:
    """Write ``decoding.png`` and return its name: acceptance by depth, accept length by task, work, time a token."""
    drafters = figures["drafters"]
    tasks = list(next(iter(drafters.values()))["tasks"])

    def paint(axes: Sequence[Any]) -> None:
        depth, task, work, time = axes
        depths = range(1, figures["num_draft_tokens"] + 1)
        for name, result in drafters.items():
            depth.plot(depths, result["accept_rate"], label=name, marker="o")
        depth.set(title="rounds that accepted the draft", xlabel="depth", ylim=(0, 1), xticks=list(depths))
        height = 0.8 / len(drafters)
        middles = [place + 0.4 - height / 2 for place in range(len(tasks))]
        for number, (name, result) in enumerate(drafters.items()):
            places = [place + number * height for place in range(len(tasks))]
            found = [result["tasks"][kind] for kind in tasks]
            task.barh(places, [one["accept_length"] for one in found], height=height, label=name)
            for key, mark in (("walked", "o"), ("simulated", "|")):
                label = None if number else f"{key}{_greedy(figures)}"
                task.plot([one[f"{key}_accept_length"] for one in found], places, mark, color="black", label=label)
        task.set(title="accept length", xlabel="tokens a round", yticks=middles, yticklabels=tasks)
        task.set(xlim=(0, figures["num_draft_tokens"] + 2))  # room for the legend
        task.invert_yaxis()
        for number, (key, label) in enumerate(
            (("draft_forwards_per_round", "draft forwards a round"), ("speedup", "speed-up"))
        ):
            places = [place + 0.4 * number for place in range(len(drafters))]
            work.bar(places, [result[key] or 0.0 for result in drafters.values()], width=0.4, label=label)
        work.set(title="work and speed", xticks=[place + 0.2 for place in range(len(drafters))])
        work.set(xticklabels=list(drafters))
        work.margins(y=0.4)  # room for the legend
        bottom = [0.0] * (len(drafters) + 1)
        names = ["no draft", *drafters]
        for phase, color in (("draft", "tab:green"), ("verify", "tab:purple")):
            shares = [
                1e3 * result[f"{phase}_seconds"] / max(result["num_tokens"], 1)
                for result in (figures["plain"], *drafters.values())
            ]
            time.bar(names, shares, bottom=bottom, label=phase, color=color)
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
        time.set(title="time a token", ylabel="ms")

    return write_plot(directory / "decoding.png", 4, paint)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
