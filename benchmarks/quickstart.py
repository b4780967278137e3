"""What does `make quickstart` take, and what is its draft worth?

Seconds of each stage, peak memory of the process, the cache's size, the held-out metrics of the draft beside those
of the untrained one, and real decoding with both beside decoding without: the row is the README's first table.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures
from eagle_offline.pipeline import find_pipeline

NAME = "quickstart"
QUESTION = __doc__


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return the one case; the example is made for a CPU."""
    return {"cpu": lambda: measure(find_pipeline("quickstart"))} if device == "cpu" else {}


def measure(pipeline: Path) -> Figures:
    """Run a pipeline that ends in a report, in a directory of its own, and return what it took and gave."""
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory) / "work"
        started = time.perf_counter()
        command = [sys.executable, "-m", "eagle_offline", "run", str(pipeline), "--work", str(work)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        report = json.loads((work / "report" / "report.json").read_text())
    figures: Figures = {"seconds": round(seconds, 1)}
    figures |= {f"seconds_{name}": round(value, 1) for name, value in report["seconds"].items()}
    # Linux counts kibibytes, and the largest of all children so far: run this benchmark by itself.
    figures["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 2)
    figures["cache_bytes_per_token"] = round(report["cache"]["bytes_per_token"], 1)
    figures["share_of_raw_states"] = round(report["cache"]["shard_bytes"] / report["raw_bytes"], 3)
    for which in ("untrained", "trained"):
        row = report[which]
        figures[f"{which}_loss"] = round(row["loss"], 3)
        figures[f"{which}_top1_first"] = round(row["top1"][0], 3)
        figures[f"{which}_top1_last"] = round(row["top1"][-1], 3)
        for name in ("simulated_accept_length", "walked_accept_length"):
            figures[f"{which}_{name}"] = round(row[name], 3)
    return {**figures, **_decoding(report["evaluation"])}


def _decoding(evaluation: dict[str, Any] | None) -> Figures:
    """Return what real decoding gave, when the pipeline has it."""
    if evaluation is None:
        return {}
    figures: Figures = {
        "decoded_answers": evaluation["num_answers"],
        "decoded_same_as_without_draft": evaluation["num_identical"],
        "decoded_chain": evaluation["num_draft_tokens"],
    }
    for which, result in evaluation["drafters"].items():
        for name in ("accept_length", "walked_accept_length", "simulated_accept_length", "speedup"):
            figures[f"decoded_{which}_{name}"] = round(result[name], 3)
    trained = evaluation["drafters"]["trained"]
    figures["decoded_real_over_walked"] = round(trained["accept_length"] / trained["walked_accept_length"], 4)
    return figures
