"""How much accept length does a smaller cache cost?

A draft is trained from each encoding of one cache, the quickstart's, with the same three seeds; it then decodes the
same held-out conversations with the target as it is, greedily and at temperature 1. Nothing is validated meanwhile: a
cache of probabilities could not be validated on the exact one. The baseline is the exact default, ``planes``. Work is
kept below ``benchmarks/work``, so that a run which was cut short goes on; two runs at a time, a thread each.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import accept_lengths
from benchmarks.accept_lengths import BASELINE, WAYS, Work, differences, slug, train_and_decode
from benchmarks.harness import ROOT, Figures, code_digest, read_rows, results_file

NAME = "accept_by_encoding"
QUESTION = __doc__

WORK = ROOT / "work" / "accept_by_encoding"

ENCODINGS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    **{f"{bits} mantissa bits": {"mantissa_bits": bits} for bits in (5, 4, 3, 2)},
    "fp8": {"state_encoding": "fp8"},
    "top 64": {"target_encoding": "topk", "top_k": 64},
    "top 8": {"target_encoding": "topk", "top_k": 8},
    "dense": {"target_encoding": "dense"},
}


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return one case an encoding; the first that is asked for starts the work of all that have no row yet."""
    if device != "cpu":
        return {}
    code = code_digest(NAME)
    measured = {row.case for row in read_rows(results_file(NAME, device)) if row.code == code}
    # The baseline is needed whatever is measured; what it took is in the work directory.
    names = [name for name in ENCODINGS if name == BASELINE or name not in measured]
    work = Work(WORK / code[:12], names, measure, lambda example, directory: make_caches(example, directory, names))
    return {name: lambda name=name: figures_of(name, work) for name in ENCODINGS}  # type: ignore[misc]


def figures_of(name: str, work: Work) -> Figures:
    """Return an encoding's accept lengths, and their differences to the baseline's by seed, mean and deviation."""
    figures, baseline = work.figures(name), work.figures(BASELINE)
    paired: Figures = {}
    for way in WAYS if name != BASELINE else ():
        found = differences(figures, baseline, way)
        paired[f"difference_{way}"] = round(statistics.mean(found), 4)
        paired[f"difference_{way}_deviation"] = round(statistics.stdev(found), 4)
        paired |= {f"difference_{way}_seed{seed}": round(value, 4) for seed, value in enumerate(found)}
    return {**paired, **figures}


def make_caches(example: Path, directory: Path, names: list[str]) -> None:
    """Convert the example's cache to the other encodings, each once."""
    from eagle_offline import stages
    from eagle_offline.config import ConvertSettings

    for name in names:
        if ENCODINGS[name]:
            sys.stderr.write(f"{name}\n")
            output_dir = _cache(example, directory, name)
            settings = {"cache": example / "cache", "output_dir": output_dir, "resume": True, **ENCODINGS[name]}
            stages.convert(ConvertSettings(**settings))


def measure(example: Path, directory: Path, training: dict[str, Any], name: str, seed: int) -> dict[str, float]:
    """Train on one encoding with one seed and let the draft decode; what was done before is taken as it is."""
    chosen = {**training, "cache": _cache(example, directory, name), "heldout_share": 0, "seed": seed}
    return train_and_decode(example, directory / f"{slug(name)}-{seed}", chosen)


def _cache(example: Path, directory: Path, name: str) -> Path:
    return directory / f"cache-{slug(name)}" if ENCODINGS[name] else example / "cache"


def table() -> str:
    """Return the committed rows as a Markdown table, differences to the baseline paired by seed."""
    return accept_lengths.table(NAME, ENCODINGS, "Encoding")


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
