"""What a rule's check yields, and the register of checks by rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from eagle_offline.serving.report import Status
from eagle_offline.serving.rules import Engine
from eagle_offline.serving.subject import Subject


@dataclass(frozen=True)
class Finding:
    """A status that is not ok, for the engines named, or for all that the rule concerns when none is."""

    status: Status
    message: str
    engines: tuple[Engine, ...]


Check = Callable[[Subject], Iterator[Finding]]

CHECKS: dict[str, Check] = {}


def checks(rule: str) -> Callable[[Check], Check]:
    """Register a function as the check of a rule."""

    def register(function: Check) -> Check:
        assert rule not in CHECKS, rule
        CHECKS[rule] = function
        return function

    return register


def problem(message: str, *engines: Engine) -> Finding:
    """Return that engines do not serve what was trained."""
    return Finding("problem", message, engines)


def note(message: str, *engines: Engine) -> Finding:
    """Return something that engines ignore or overwrite, at no harm."""
    return Finding("note", message, engines)


def not_applicable(message: str, *engines: Engine) -> Finding:
    """Return that there is nothing to hold the rule against."""
    return Finding("not applicable", message, engines)
