"""Runs beside one another on the same held-out documents: a table and plots by depth. Knows no cache and no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle_offline.errors import DataError, UsageError
from eagle_offline.pages import Row, write_plot
from eagle_offline.run_curves import read_runs
from eagle_offline.train_settings import TrainSettings

OBJECTIVES_NOTE = (
    "Loss and top-1 are each objective's own: of eagle3 soft cross-entropy, where the target's choice is in the draft "
    "vocabulary; of peagle KL, at every supervised position. Survival and accept lengths compare."
)
# What stands by depth in a validation's row: its name, what the table calls it, how its values are written.
BY_DEPTH = (
    ("step_loss", "loss at depth", "{:.3f}"),
    ("top1", "top-1 at depth", "{:.1%}"),
    ("survival", "survival to depth", "{:.1%}"),
)
# And what an evaluation says of a draft.
_DECODED = (
    ("accept_length", "real accept length"),
    ("speedup", "speed-up"),
    ("draft_forwards_per_round", "draft forwards a round"),
)
_PANELS: dict[str, tuple[str, dict[str, Any]]] = {
    "top1": ("top-1, held out", {"ylim": (0, 1)}),
    "conditional_top1": ("right, given all before it were", {"ylim": (0, 1)}),
    "survival": ("all right up to this depth", {"ylim": (0, 1)}),
    "step_loss": ("loss, held out", {"ylabel": "nats"}),
}
_ABSENT = "–"


@dataclass(frozen=True)
class HeldoutDocuments:
    """What a run was validated on.

    Attributes:
        said: for the user.
        given: as its settings name it. recorded: as its checkpoint does, by digests; None before the first one.
    """

    said: str
    given: tuple[Any, ...]
    recorded: tuple[Any, ...] | None

    def are(self, other: HeldoutDocuments) -> bool:
        """Say whether they are the other's: by digests, where both runs have them, else by name."""
        if self.recorded is None or other.recorded is None:
            return self.given == other.given
        return self.recorded == other.recorded


def compare_runs(run: Path, others: Sequence[Path], evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """Return runs as they stood at their last validation, the one in question first, as JSON values.

    Args:
        run: in question.
        others: to show beside it; those validated on other documents are only named.
        evaluation: says of drafts of these runs what real decoding yields.

    Returns:
        ``runs``: name, directory, objective, ``num_steps`` (of the unroll, or depths), draft layers, the validation's
        row, and the evaluation's figures, None without them. ``apart``: a line on each run that is left out.

    Raises:
        DataError: a run is missing, damaged, or was not validated.
    """
    by_place: dict[Path, Path] = {}
    for path in (run, *others):
        by_place.setdefault(path.resolve(), path)
    directories = list(by_place.values())
    curves, settings = read_runs(directories), [_read_settings(directory) for directory in directories]
    documents = [heldout_documents(*pair) for pair in zip(directories, settings, strict=True)]
    runs, apart = [], []
    for directory, curve, chosen, own in zip(directories, curves, settings, documents, strict=True):
        if not curve.last_heldout():
            raise DataError(f"{directory}: no validation on held-out documents yet; leave it out, or train it further")
        if not own.are(documents[0]):
            as_then = " as it was then" if own.said == documents[0].said else ""
            apart.append(
                f"{curve.name} is left out: it was validated on {own.said}{as_then}, {curves[0].name} on "
                f"{documents[0].said}; figures of unlike documents do not compare"
            )
            continue
        runs.append(
            {
                "name": curve.name,
                "run": str(directory),
                "objective": chosen.objective,
                "num_steps": chosen.num_steps,
                "num_draft_layers": chosen.num_layers,
                "heldout": curve.last_heldout(),
                "decoding": None if evaluation is None else _decoded(evaluation, directory),
            }
        )
    return {"runs": runs, "apart": apart}


def heldout_documents(run: Path, settings: TrainSettings) -> HeldoutDocuments:
    """Return what a run was validated on."""
    share, seed = settings.heldout_share, settings.seed
    recorded = _recorded(run)
    if settings.heldout_cache is not None:
        identity = recorded.get("heldout_cache")
        said, given = str(settings.heldout_cache), (str(settings.heldout_cache),)
        return HeldoutDocuments(said, given, None if identity is None else tuple(identity))
    caches = tuple(map(str, settings.cache))
    said = f"{share:.0%} of {', '.join(caches)}, seed {seed}"
    names = ("cache_identity", "num_samples")
    digests = None if not all(name in recorded for name in names) else tuple(tuple(recorded[name]) for name in names)
    return HeldoutDocuments(said, (caches, share, seed), None if digests is None else (*digests, share, seed))


def comparison_rows(comparison: dict[str, Any]) -> list[Row]:
    """Return the table, its head first: what, then each run. What no run has is left out."""
    runs = comparison["runs"]
    rows: list[Row] = [
        ("held-out conversations", *(run["name"] for run in runs)),
        ("objective", *(run["objective"] for run in runs)),
        ("draft layers", *(str(run["num_draft_layers"]) for run in runs)),
        ("tokens predicted", *(str(run["num_steps"]) for run in runs)),
        ("optimizer steps", *(f"{run['heldout']['step']:,}" for run in runs)),
        ("loss", *(_cell(run["heldout"].get("loss"), "{:.3f}") for run in runs)),
    ]
    for metric, label, form in BY_DEPTH:
        by_run = [run["heldout"].get(metric) or [] for run in runs]
        for depth in range(max(map(len, by_run))):
            cells = (_cell(values[depth] if depth < len(values) else None, form) for values in by_run)
            rows.append((f"{label} {depth + 1}", *cells))
    for name in ("simulated_accept_length", "walked_accept_length"):
        rows.append((name.replace("_", " "), *(_cell(run["heldout"].get(name), "{:.2f}") for run in runs)))
    for name, label in _DECODED:
        values = [(run["decoding"] or {}).get(name) for run in runs]
        if any(value is not None for value in values):
            rows.append((label, *(_cell(value, "{:.2f}") for value in values)))
    return rows


def comparison_notes(comparison: dict[str, Any]) -> list[str]:
    """Return what is to be said beside the table, a line each."""
    unlike = len({run["objective"] for run in comparison["runs"]}) > 1
    return [*comparison["apart"], *([OBJECTIVES_NOTE] if unlike else [])]


def plot_comparison(comparison: dict[str, Any], directory: Path) -> str | None:
    """Write ``comparison.png`` and return its name: what the runs have by depth, a line a run."""
    runs = comparison["runs"]
    panels = [metric for metric in _PANELS if any(run["heldout"].get(metric) for run in runs)]

    def paint(axes: Sequence[Any]) -> None:
        for metric, axis in zip(panels, axes, strict=True):
            title, limits = _PANELS[metric]
            for run in runs:
                values = run["heldout"].get(metric) or []
                axis.plot(range(1, len(values) + 1), values, label=_label(run["name"]), marker="o")
            depths = range(1, max(len(run["heldout"].get(metric) or []) for run in runs) + 1)
            axis.set(title=title, xlabel="depth", xticks=list(depths), **limits)

    return write_plot(directory / "comparison.png", len(panels), paint)


def _label(name: str) -> str:
    """Return a legend's label that matplotlib shows as it is: no formula, and not left out for a leading _."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _cell(value: float | None, form: str) -> str:
    return _ABSENT if value is None else form.format(value)


def _decoded(evaluation: dict[str, Any], run: Path) -> dict[str, Any] | None:
    """Return the figures of a run's draft, decoded from the run itself or from an export inside it."""
    drafters = evaluation["drafters"]
    given = {next(iter(drafters)): evaluation["draft"], **evaluation.get("compared", {})}
    for name, draft in given.items():
        path = Path(draft).resolve()
        if name in drafters and (path == run.resolve() or run.resolve() in path.parents):
            found = {key: drafters[name].get(key) for key, _ in _DECODED}
            return {"drafter": name, "num_draft_tokens": evaluation["num_draft_tokens"], **found}
    return None


def _read_settings(run: Path) -> TrainSettings:
    try:
        return TrainSettings.model_validate(json.loads((run / "train.json").read_text()))
    except (OSError, ValueError, UsageError) as error:
        raise DataError(f"{run}: no training run here (train.json cannot be read)") from error


def _recorded(run: Path) -> dict[str, Any]:
    """Return what a run's checkpoints must share to go on from each other; empty before the first."""
    for path in sorted((run / "checkpoints").glob("step-*/training_state.json"))[-1:]:
        try:
            return dict(json.loads(path.read_text())["fingerprint"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{path}: not readable; see which checkpoint is whole with train --resume") from error
    return {}
