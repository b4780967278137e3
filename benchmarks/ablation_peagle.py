"""Which training options of P-EAGLE lengthen what real decoding accepts, and at which depth?

On the quickstart's target and cache, every option is trained with the same three seeds as the baseline and its draft
then decodes the same held-out conversations, greedily and at temperature 1: the accept length of real speculative
decoding is the judge, and differences are paired by seed; how many rounds accepted each draft token says where they
come from. Work is kept below ``benchmarks/work``, so that a run which was cut short goes on; two runs at a time, a
thread each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import accept_lengths
from benchmarks.accept_lengths import BASELINE, CHAIN, Work, slug, train_and_decode
from benchmarks.harness import ROOT, Figures, code_digest, read_rows, results_file

NAME = "ablation_peagle"
QUESTION = __doc__

WORK = ROOT / "work" / "ablation_peagle"

MAX_STEPS = 300
LEARNING_RATE = 0.004
TOKENS_PER_BATCH = 1024

# What is trained when nothing else is said: a depth for each token of the chain.
TRAINING: dict[str, Any] = {name: value for name, value in accept_lengths.TRAINING.items() if name != "ttt_steps"} | {
    "objective": "peagle",
    "num_depths": CHAIN,
    "num_draft_layers": 4,
    "max_steps": MAX_STEPS,
    "learning_rate": LEARNING_RATE,
    "tokens_per_batch": TOKENS_PER_BATCH,
}

VARIANTS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "depth_mean depths": {"depth_mean": "depths"},
    "depth_weights rising to 2": {"depth_weights": tuple(1 + depth / (CHAIN - 1) for depth in range(CHAIN))},
    "depth_weights 0.8^d": {"depth_weights": tuple(0.8**depth for depth in range(CHAIN))},
    "down_sample_ratio 1.0": {"down_sample_ratio": 1.0},
}


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return one case an option; the first that is asked for starts the work of all that have no row yet."""
    if device != "cpu":
        return {}
    code = code_digest(NAME)
    measured = {row.case for row in read_rows(results_file(NAME, device)) if row.code == code}
    names = (name for name in VARIANTS if name not in measured)
    work = Work(WORK / code[:12], names, measure, training=TRAINING)
    return {name: lambda name=name: work.figures(name) for name in VARIANTS}  # type: ignore[misc]


def measure(example: Path, directory: Path, training: dict[str, Any], name: str, seed: int) -> dict[str, float]:
    """Train one variant with one seed and let its draft decode; what was done before is taken as it is."""
    caches = {"cache": example / "cache", "heldout_cache": example / "heldout-cache"}
    chosen = {**training, **caches, **VARIANTS[name], "seed": seed}
    return train_and_decode(example, directory / f"{slug(name)}-{seed}", chosen)


def table() -> str:
    """Return the committed rows as a Markdown table, differences to the baseline paired by seed."""
    return accept_lengths.table(NAME, VARIANTS, "Option", with_rates=True)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
