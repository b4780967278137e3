"""What a check found: one verdict a rule and engine, and how it is shown."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any, Literal

from eagle_offline.serving.configs import DraftLayout
from eagle_offline.serving.rules import ENGINE_NAMES, ENGINES, RULES, SERVING_ENGINES, Effect, Engine

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
        """Whether every engine that it is meant for, a serving one among them, serves it as it was trained."""
        return self._has_serving_engine and all(self.is_clean(engine) for engine in self.claimed)

    @property
    def _has_serving_engine(self) -> bool:
        return any(engine in self.claimed for engine in SERVING_ENGINES)

    def passes(self, engine: Engine | None) -> bool:
        """Return the verdict on one engine, or with None on all engines that the draft is meant for."""
        return self.is_clean_as_claimed if engine is None else self.is_clean(engine)

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

    def render_text(self, engine: Engine | None = None) -> str:
        """Return the report as a table, rule by engine, what was found under each rule, and `conclusions`."""
        width = max(len(rule.id) for rule in RULES) + 2
        columns = [max(len(ENGINE_NAMES[each]), 8) + 2 for each in ENGINES]
        head = "rule".ljust(width) + "".join(
            ENGINE_NAMES[each].ljust(size) for each, size in zip(ENGINES, columns, strict=True)
        )
        lines = [f"{self.directory}: {self.layout} layout", "", head.rstrip()]
        for rule in RULES:
            row = [self.verdict(rule.id, each) for each in ENGINES]
            marks = "".join(_MARKS[v.status].ljust(size) for v, size in zip(row, columns, strict=True))
            lines.append((rule.id.ljust(width) + marks).rstrip())
            for message, names in _by_message(row).items():
                lines += textwrap.wrap(
                    f"{', '.join(names)}: {message}", _TEXT_WIDTH, initial_indent="    ", subsequent_indent="      "
                )
        return "\n".join([*lines, "", *self.conclusions(engine)])

    def conclusions(self, engine: Engine | None = None) -> list[str]:
        """Return one line an engine, clean or how many problems, and what `passes` says of which engines."""
        lines = []
        for each in ENGINES:
            problems = len(self.problems(each))
            state = f"{problems} problem{'s' if problems > 1 else ''}" if problems else "clean"
            meant = "" if each in self.claimed else " (not meant for it)"
            lines.append(f"{ENGINE_NAMES[each]}: {state}{meant}")
        return [*lines, self._verdict_line(engine)]

    def _verdict_line(self, engine: Engine | None) -> str:
        if engine is None and not self._has_serving_engine:
            return f"verdict: not clean, none of {_names(SERVING_ENGINES)} serves this kind of draft"
        covered = _names(self.claimed if engine is None else (engine,))
        return f"verdict: {'clean' if self.passes(engine) else 'not clean'} (covers {covered})"


def _names(engines: tuple[Engine, ...]) -> str:
    return ", ".join(ENGINE_NAMES[engine] for engine in engines)


def _by_message(row: list[Verdict]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for verdict in row:
        if verdict.status in ("problem", "note") and verdict.message:
            found.setdefault(verdict.message, []).append(ENGINE_NAMES[verdict.engine])
    return found
