"""How a benchmark is run and what a row of its result says.

A benchmark is a module with ``NAME``, ``QUESTION`` and ``cases(device) -> dict[name, callable]``; a case returns its
figures, ours and the alternative's measured in one run, ratios first. Rows are JSON lines that follow `Row`, one
file a benchmark and device kind, written as each case ends; a case that has a row for the same code is not run again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict

from eagle_offline.provenance import describe_environment, digest_bytes

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"

# Shortest first: an hour with a GPU that ends early has still given the most rows.
BENCHMARKS = (
    "startup",
    "open_speed",
    "cache_size",
    "read_speed",
    "data_wait",
    "train_step",
    "parallel_step",
    "tokenize_speed",
    "capture_speed",
    "quickstart",
)

# Those that need an environment of their own or most of an hour, and run when they are named.
SEPARATE = ("interop", "ablation", "ablation_peagle", "accept_by_encoding")

Figures = dict[str, float | int | str]


class Row(BaseModel):
    """One measured case.

    Attributes:
        benchmark, case: what was measured.
        figures: ratios and what they are made of, units in the names.
        environment: device model, library versions, thread count.
        code: digest of the package's and the benchmark's sources; a row of other code is measured anew.
        measured_at: UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    benchmark: str
    case: str
    figures: Figures
    environment: dict[str, Any]
    code: str
    measured_at: str


def alternating_seconds(functions: dict[str, Callable[[], object]], *, repeats: int = 5) -> dict[str, float]:
    """Return each function's median seconds, measured turn by turn so that noise meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if repeat > 0:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def load(name: str) -> ModuleType:
    """Return a benchmark's module."""
    return importlib.import_module(f"benchmarks.{name}")


def code_digest(name: str) -> str:
    """Return the digest of the package's sources, of the benchmark's, and of what benchmarks share."""
    others = {*BENCHMARKS, *SEPARATE} - {name}
    own = (path for path in ROOT.glob("*.py") if path.stem not in others)
    sources = sorted([*(ROOT.parent / "eagle_offline").rglob("*.py"), *own])
    return digest_bytes(b"".join(path.read_bytes() for path in sources))


def results_file(name: str, device: str) -> Path:
    """Return where a benchmark's rows for a kind of device stand."""
    return RESULTS / f"{name}-{device.split(':')[0]}.jsonl"


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a results file."""
    if not path.is_file():
        return []
    return [Row.model_validate_json(line) for line in path.read_text().splitlines()]


def run(name: str, device: str, say: Callable[[str], None] = print) -> list[Row]:
    """Run a benchmark's cases that have no row for this code yet; return all its rows."""
    path, code = results_file(name, device), code_digest(name)
    rows = {row.case: row for row in read_rows(path)}
    for case, function in load(name).cases(device).items():
        if case in rows and rows[case].code == code:
            say(f"{name} {case}: measured already")
            continue
        figures = function()
        measured_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        rows[case] = Row(
            benchmark=name,
            case=case,
            figures=figures,
            environment=describe_environment(device),
            code=code,
            measured_at=measured_at,
        )
        RESULTS.mkdir(exist_ok=True)
        path.write_text("".join(row.model_dump_json() + "\n" for row in rows.values()))
        say(f"{name} {case}: {json.dumps(figures)}")
    return list(rows.values())


def run_python(code: str) -> None:
    """Run a line of Python in a fresh interpreter."""
    import sys

    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Run the benchmarks named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.run")
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, *SEPARATE, []], help="benchmarks to run")
    parser.add_argument("--all", action="store_true", help="run every benchmark")
    parser.add_argument("--device", default="cpu", help="torch device")
    arguments = parser.parse_args()
    for name in BENCHMARKS if arguments.all else arguments.names:
        run(name, arguments.device)
