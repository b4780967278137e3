"""What a check found: one verdict a rule and engine, and how it is shown."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any, Literal

from eagle_offline.serving.configs import DraftLayout
from eagle_offline.serving.rules import ENGINE_NAMES, ENGINES, RULES, Effect, Engine

Status = Literal["ok", "problem", "note", "not applicable"]

_MARKS = {"ok": "ok", "problem": "PROBLEM", "note": "note", "not applicable": "-"}
_TEXT_WIDTH = 110


@dataclass(frozen=True)
class Verdict:
    """What one engine makes of one rule; ``effect`` says what the engine does about a problem."""

    rule: str
    engine: Engine
    status: Status
    message: str = ""
    effect: Effect | None = None


@dataclass(frozen=True)
class CheckReport:
    """Every verdict on a draft directory.

    Attributes:
        directory: the draft's.
        layout: which layout it is in.
        verdicts: one for every rule and engine, in the rules' order.
        claimed: engines that this layout and this kind of draft are meant for.
    """

    directory: str
    layout: DraftLayout
    verdicts: tuple[Verdict, ...]
    claimed: tuple[Engine, ...]

    def problems(self, engine: Engine) -> list[Verdict]:
        """Return what keeps an engine from serving this draft as it was trained."""
        return [verdict for verdict in self.verdicts if verdict.engine == engine and verdict.status == "problem"]

    def is_clean(self, engine: Engine) -> bool:
        """Say whether nothing keeps an engine from serving this draft as it was trained."""
        return not self.problems(engine)

    @property
    def is_clean_as_claimed(self) -> bool:
        """Whether every engine that it is meant for serves it as it was trained."""
        return bool(self.claimed) and all(self.is_clean(engine) for engine in self.claimed)

    def verdict(self, rule: str, engine: Engine) -> Verdict:
        """Return one verdict."""
        return next(v for v in self.verdicts if v.rule == rule and v.engine == engine)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "directory": self.directory,
            "layout": self.layout,
            "claimed": list(self.claimed),
            "engines": {
                engine: {
                    "claimed": engine in self.claimed,
                    "clean": self.is_clean(engine),
                    "problems": [{"rule": v.rule, "message": v.message} for v in self.problems(engine)],
                }
                for engine in ENGINES
            },
            "verdicts": [
                {"rule": v.rule, "engine": v.engine, "status": v.status, "message": v.message, "effect": v.effect}
                for v in self.verdicts
            ],
        }

    def render_text(self) -> str:
        """Return the report as a table, rule by engine, with what was found under each rule."""
        width = max(len(rule.id) for rule in RULES) + 2
        columns = [max(len(ENGINE_NAMES[engine]), 8) + 2 for engine in ENGINES]
        head = "rule".ljust(width) + "".join(
            ENGINE_NAMES[engine].ljust(size) for engine, size in zip(ENGINES, columns, strict=True)
        )
        lines = [f"{self.directory}: {self.layout} layout", "", head.rstrip()]
        for rule in RULES:
            row = [self.verdict(rule.id, engine) for engine in ENGINES]
            marks = "".join(_MARKS[v.status].ljust(size) for v, size in zip(row, columns, strict=True))
            lines.append((rule.id.ljust(width) + marks).rstrip())
            for message, engines in _by_message(row).items():
                lines += textwrap.wrap(
                    f"{', '.join(engines)}: {message}", _TEXT_WIDTH, initial_indent="    ", subsequent_indent="      "
                )
        return "\n".join([*lines, "", *self.conclusions()])

    def conclusions(self) -> list[str]:
        """Return one line an engine: clean, or how many problems."""
        lines = []
        for engine in ENGINES:
            problems = len(self.problems(engine))
            state = f"{problems} problem{'s' if problems > 1 else ''}" if problems else "clean"
            meant = "" if engine in self.claimed else " (not meant for it)"
            lines.append(f"{ENGINE_NAMES[engine]}: {state}{meant}")
        return lines


def _by_message(row: list[Verdict]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for verdict in row:
        if verdict.status in ("problem", "note") and verdict.message:
            found.setdefault(verdict.message, []).append(ENGINE_NAMES[verdict.engine])
    return found
