"""Spends time on a GPU well: every `gpu` test, then every benchmark's GPU rows, shortest first, resumable.

A test that passed, and a case that has its row, for the same code are not run again. A test's parameters run in one
process: most of a small test's time is what Python takes to import PyTorch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch

from benchmarks.harness import BENCHMARKS, RESULTS, ROOT, code_digest, run
from eagle_offline.provenance import describe_environment

_TESTS_FILE = RESULTS / "gpu_tests-cuda.jsonl"


def main() -> int:
    """Run what has no row yet; return 1 if a test failed."""
    if not torch.cuda.is_available():
        sys.stderr.write("no CUDA device here: nothing to measure\n")
        return 1
    failed = _run_tests()
    for name in BENCHMARKS:
        run(name, "cuda")
    return 1 if failed else 0


def _run_tests() -> int:
    code = code_digest("gpu_rows")
    rows = [json.loads(line) for line in _TESTS_FILE.read_text().splitlines()] if _TESTS_FILE.is_file() else []
    passed = {row["test"] for row in rows if row["code"] == code and row["passed"]}
    failed = 0
    for test in _collect():
        if test in passed:
            sys.stdout.write(f"{test}: passed already\n")
            continue
        started = time.perf_counter()
        result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", test], cwd=ROOT.parent, check=False)
        ok = result.returncode == 0
        failed += not ok
        rows = [row for row in rows if row["test"] != test]
        seconds = round(time.perf_counter() - started, 2)
        environment = describe_environment("cuda")
        rows.append({"test": test, "passed": ok, "seconds": seconds, "code": code, "environment": environment})
        RESULTS.mkdir(exist_ok=True)
        _TESTS_FILE.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return failed


def _collect() -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu"]
    listing = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=False).stdout
    # One entry a test function, in the order they are collected.
    return list(dict.fromkeys(line.split("[")[0] for line in listing.splitlines() if "::" in line))


if __name__ == "__main__":
    raise SystemExit(main())
