"""One whole job from one YAML file: stages in order, each resumed where it stopped."""

from __future__ import annotations

import importlib.resources
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from eagle_offline import stages
from eagle_offline.capture_settings import ImportSettings, PrecomputeSettings, TokenizeSettings
from eagle_offline.config import (
    CheckSettings,
    ConvertSettings,
    CorpusSettings,
    EvaluateSettings,
    ExampleTargetSettings,
    ExportSettings,
    InspectSettings,
    ReportSettings,
    RewriteSettings,
    Settings,
    build,
    read_yaml,
)
from eagle_offline.durable import make_directory, write_bytes
from eagle_offline.errors import UsageError
from eagle_offline.train_settings import TrainSettings

STAGES_FILE = "stages.json"

# Stands for the work directory in a pipeline's paths.
_WORK = "{work}"


@dataclass(frozen=True)
class StageKind:
    """A stage that pipelines can name: its settings and what runs it."""

    settings: type[Settings]
    run: Callable[[Any], Any]


def _inspect(settings: InspectSettings) -> Any:
    from eagle_offline.errors import DataError
    from eagle_offline.inspection_page import render_text

    description = stages.inspect_manifest(settings.cache, verify=settings.verify)
    print(render_text(description), end="\n\n")  # noqa: T201
    if description["problems"]:
        raise DataError(f"{settings.cache}: {description['problems'][0]}")


def _check(settings: CheckSettings) -> Any:
    from eagle_offline.errors import MismatchError

    report = stages.check(settings)
    print("\n".join(report.conclusions(settings.engine)), end="\n\n")  # noqa: T201
    if not report.passes(settings.engine):
        raise MismatchError(f"{settings.directory}: not clean; see export --check {settings.directory}")


KINDS: dict[str, StageKind] = {
    "make-corpus": StageKind(CorpusSettings, stages.make_corpus),
    "train-target": StageKind(ExampleTargetSettings, stages.train_example_target),
    "rewrite-answers": StageKind(RewriteSettings, stages.rewrite_answers),
    "tokenize": StageKind(TokenizeSettings, stages.tokenize),
    "precompute": StageKind(PrecomputeSettings, stages.precompute),
    "import": StageKind(ImportSettings, stages.import_states),
    "convert": StageKind(ConvertSettings, stages.convert),
    "inspect-manifest": StageKind(InspectSettings, _inspect),
    "train": StageKind(TrainSettings, stages.train),
    "export": StageKind(ExportSettings, stages.export),
    "check": StageKind(CheckSettings, _check),
    "evaluate": StageKind(EvaluateSettings, stages.evaluate),
    "report": StageKind(ReportSettings, stages.report),
}


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline: its name in it, its kind and its settings."""

    name: str
    kind: StageKind
    settings: BaseModel


def find_pipeline(name: str) -> Path:
    """Return a pipeline that comes with the package, by name.

    Raises:
        UsageError: there is none of that name.
    """
    packaged = Path(str(importlib.resources.files("eagle_offline"))) / "pipelines" / f"{name}.yaml"
    in_repository = Path(__file__).resolve().parent.parent / "pipelines" / f"{name}.yaml"
    for path in (packaged, in_repository):
        if path.is_file():
            return path
    raise UsageError(f"no pipeline called {name} comes with this package")


def _placed(value: Any, work: Path) -> Any:
    """Return a setting with ``work`` in its place, in each item of a list."""
    if isinstance(value, list):
        return [_placed(item, work) for item in value]
    return value.replace(_WORK, str(work)) if isinstance(value, str) else value


def read_pipeline(path: Path, work: Path) -> list[Stage]:
    """Read a pipeline and check every stage's settings, before any work starts.

    Args:
        path: YAML with a list under ``stages``, each entry one mapping from a stage kind to its settings; an
            entry's ``name`` tells stages of a kind apart.
        work: takes the place of ``{work}`` in settings.

    Raises:
        UsageError: not a pipeline, an unknown stage, or settings out of range; says which.
    """
    entries = read_yaml(path).get("stages")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path}: expected a list of stages under 'stages'")
    read = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or len(entry) != 1:
            raise UsageError(f"{path}: stage {number}: expected one stage name with its settings")
        (kind_name, values), *_ = entry.items()
        kind = KINDS.get(kind_name)
        if kind is None:
            raise UsageError(f"{path}: stage {number}: no stage {kind_name!r}; known: {', '.join(KINDS)}")
        if not isinstance(values, dict | None):
            raise UsageError(f"{path}: stage {number}: expected the settings of {kind_name}, found {values!r}")
        placed = {str(key).replace("-", "_"): _placed(value, work) for key, value in (values or {}).items()}
        name = placed.pop("name", kind_name)
        if "resume" in kind.settings.model_fields:
            placed.setdefault("resume", True)
        read.append(Stage(name, kind, build(kind.settings, placed, where=f"{path}: {name}: ")))
    return read


def run_pipeline(path: Path, work: Path, announce: Callable[[str], None]) -> None:
    """Run every stage in order; a stage that is done already takes no time, one that was cut short goes on.

    Seconds are added up over interruptions in ``stages.json``.

    Raises:
        EagleOfflineError: a stage's; later stages are not begun.
    """
    read = read_pipeline(path, work)
    make_directory(work)
    seconds = read_seconds(work / STAGES_FILE)
    for number, stage in enumerate(read, start=1):
        announce(f"[{number}/{len(read)}] {stage.name}")
        started = time.monotonic()
        try:
            stage.kind.run(stage.settings)
        finally:
            seconds[stage.name] = seconds.get(stage.name, 0.0) + time.monotonic() - started
            write_bytes(work / STAGES_FILE, (json.dumps(seconds, indent=2) + "\n").encode())


def read_seconds(path: Path) -> dict[str, float]:
    """Return the seconds spent in each stage so far."""
    if not path.is_file():
        return {}
    return {str(name): float(value) for name, value in json.loads(path.read_text()).items()}
