"""A draft directory held against every rule of every engine."""

from __future__ import annotations

from pathlib import Path

from eagle_offline.errors import MismatchError
from eagle_offline.serving import (
    aux_checks,
    config_checks,
    parallel_checks,
    target_checks,
    tensor_checks,
    vocab_checks,
)
from eagle_offline.serving.findings import CHECKS
from eagle_offline.serving.report import CheckReport, Verdict
from eagle_offline.serving.rules import ENGINES, RULES, Engine
from eagle_offline.serving.subject import Subject, read_subject
from eagle_offline.target.adapters import AdapterSource

__all__ = ["CHECKS", "CheckReport", "check_draft"]

# Importing them registers their checks.
_CHECK_MODULES = (aux_checks, config_checks, parallel_checks, target_checks, tensor_checks, vocab_checks)

_LAYOUT_RULE = "layout"
_MEANT_FOR: dict[str, tuple[Engine, ...]] = {
    "flat": ("vllm", "sglang", "eagle"),
    "speculators": ("vllm", "speculators"),
}


def check_draft(
    directory: Path, *, target: Path | None = None, adapter: AdapterSource | None = None, layout: str | None = None
) -> CheckReport:
    """Return one verdict for every rule and engine.

    Reads headers, the draft vocabulary and small tensors; other weights piece by piece, to see that they are finite.

    Args:
        directory: a draft in the flat or the speculators layout, made by anyone.
        target: a local directory of the target, for the rules that compare the two.
        adapter: what is to be merged into the target.
        layout: the layout that is expected.

    Raises:
        DataError: not a draft directory, or files that cannot be read.
        MismatchError: another layout than expected, or a training checkpoint.
    """
    subject = read_subject(directory, target, adapter)
    if layout is not None and layout != subject.config.layout:
        raise MismatchError(f"{directory}: expected the {layout} layout, found {subject.config.layout}")
    verdicts: dict[tuple[str, Engine], Verdict] = {}
    unread = {engine for engine in ENGINES if engine not in _MEANT_FOR[subject.config.layout]}
    for rule in RULES:
        for engine in ENGINES:
            concerned = engine in rule.effects and (rule.id == _LAYOUT_RULE or engine not in unread)
            verdicts[rule.id, engine] = Verdict(rule.id, engine, "ok" if concerned else "not applicable")
        for finding in CHECKS[rule.id](subject):
            for engine in finding.engines or ENGINES:
                former = verdicts[rule.id, engine]
                if former.status not in ("ok", "note") or former.status == finding.status == "note":
                    continue
                effect = rule.effects[engine] if finding.status == "problem" else None
                verdicts[rule.id, engine] = Verdict(rule.id, engine, finding.status, finding.message, effect)
    found = tuple(verdicts[rule.id, engine] for rule in RULES for engine in ENGINES)
    return CheckReport(str(directory), subject.config.layout, found, _claimed(subject, found))


def _claimed(subject: Subject, verdicts: tuple[Verdict, ...]) -> tuple[Engine, ...]:
    """Return the engines that this layout is meant for, without those that do not serve this kind of draft."""
    features = {rule.id for rule in RULES if rule.is_feature}
    unserved = {verdict.engine for verdict in verdicts if verdict.status == "problem" and verdict.rule in features}
    return tuple(engine for engine in _MEANT_FOR[subject.config.layout] if engine not in unserved)
