"""Which training options lengthen what real decoding accepts, and so deserve to be defaults?

On the quickstart's target and cache, every option is trained with the same three seeds as the baseline and its draft
then decodes the same held-out conversations, greedily and at temperature 1: the accept length of real speculative
decoding is the judge, and differences are paired by seed. Work is kept below ``benchmarks/work``, so that a run which
was cut short goes on; two runs at a time, a thread each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import accept_lengths
from benchmarks.accept_lengths import BASELINE, Work, slug, train_and_decode
from benchmarks.harness import ROOT, Figures, code_digest, read_rows, results_file

NAME = "ablation"
QUESTION = __doc__

WORK = ROOT / "work" / "ablation"

VARIANTS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "step_decay 1.0": {"step_decay": 1.0},
    "ttt_steps 3": {"ttt_steps": 3},
    "ttt_steps 7": {"ttt_steps": 7},
    "LK alpha": {"lk_loss_type": "alpha"},
    "LK lambda": {"lk_loss_type": "lambda"},
    "gate predicted": {"supervision_gate": "predicted"},
    "gate both": {"supervision_gate": "both"},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "EAGLE-3.1 (both norms)": {"fc_norm": True, "norm_output": True},
    "2 draft layers": {"num_draft_layers": 2},
    "embeddings trained": {"train_embeddings": True},
    "random head": {"head_start": "random"},
    "last aux layer only": {"aux_layer_ids": "last"},
    "half the draft vocabulary": {"draft_vocab_size": 256},
    "half the width": {"draft_hidden_size": "half"},
    "Qwen3-style layer": {"layer_style": "qwen3"},
}


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return one case an option; the first that is asked for starts the work of all that have no row yet."""
    if device != "cpu":
        return {}
    code = code_digest(NAME)
    measured = {row.case for row in read_rows(results_file(NAME, device)) if row.code == code}
    work = Work(WORK / code[:12], (name for name in VARIANTS if name not in measured), measure)
    return {name: lambda name=name: work.figures(name) for name in VARIANTS}  # type: ignore[misc]


def measure(example: Path, directory: Path, training: dict[str, Any], name: str, seed: int) -> dict[str, float]:
    """Train one variant with one seed and let its draft decode; what was done before is taken as it is."""
    caches = {"cache": example / "cache", "heldout_cache": example / "heldout-cache"}
    chosen = {**training, **caches, **_placed(VARIANTS[name], example), "seed": seed}
    return train_and_decode(example, directory / f"{slug(name)}-{seed}", chosen)


def _placed(variant: dict[str, Any], example: Path) -> dict[str, Any]:
    """Return a variant's settings, those in terms of the example's target in numbers."""
    from eagle_offline.cache.manifest import read_manifest

    placed = dict(variant)
    identity = read_manifest(example / "cache").identity
    if placed.get("aux_layer_ids") == "last":
        placed["aux_layer_ids"] = (identity.capture.aux_layer_ids[-1],)
    if placed.get("draft_hidden_size") == "half":
        placed["draft_hidden_size"] = identity.target.hidden_size // 2
    return placed


def table() -> str:
    """Return the committed rows as a Markdown table, differences to the baseline paired by seed."""
    return accept_lengths.table(NAME, VARIANTS, "Option")


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
