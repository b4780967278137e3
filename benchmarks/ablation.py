"""Which training options lengthen what real decoding accepts, and so deserve to be defaults?

On the quickstart's target and cache, every option is trained with the same three seeds as the baseline and its draft
then decodes the same held-out conversations, greedily and at temperature 1: the accept length of real speculative
decoding is the judge, and differences are paired by seed. Work is kept below ``benchmarks/work``, so that a run which
was cut short goes on; two runs at a time, a thread each.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Figures, code_digest, read_rows, results_file

NAME = "ablation"
QUESTION = __doc__

WORK = ROOT / "work" / "ablation"
SEEDS = (0, 1, 2)
CHAIN = 5

BASELINE = "baseline"

# What is trained when nothing else is said: the quickstart's run, cut short; K of a chain of 5.
TRAINING: dict[str, Any] = {
    "ttt_steps": 5,
    "num_epochs": 2,
    "max_steps": 120,
    "learning_rate": 0.002,
    "tokens_per_batch": 2048,
    "eval_every": 1000,
    "device": "cpu",
    "num_workers": 1,
}

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
    work = _Work(WORK / code[:12], [name for name in VARIANTS if name not in measured], SEEDS, TRAINING)
    return {name: lambda name=name: work.figures(name) for name in VARIANTS}  # type: ignore[misc]


class _Work:
    """Trainings and evaluations of variants, two at a time, begun when the first is asked for."""

    def __init__(self, directory: Path, names: list[str], seeds: tuple[int, ...], training: dict[str, Any]):
        self._directory, self._names, self._seeds, self._training = directory, names, seeds, training
        self._pending: dict[tuple[str, int], Future[dict[str, float]]] = {}

    def figures(self, name: str) -> Figures:
        """Return a variant's figures, by seed and as means."""
        if not self._pending:
            example = make_example(self._directory)
            pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))
            tasks = [(variant, seed) for variant in self._names for seed in self._seeds]
            self._pending = {
                task: pool.submit(measure, example, self._directory, self._training, *task) for task in tasks
            }
        found = [self._pending[name, seed].result() for seed in self._seeds]
        figures: Figures = {}
        for key in found[0]:
            values = [each[key] for each in found]
            figures[key] = round(statistics.mean(values), 4)
            if key.startswith("accept_length"):
                figures |= {
                    f"{key}_seed{seed}": round(value, 4) for seed, value in zip(self._seeds, values, strict=True)
                }
        return figures


def make_example(directory: Path) -> Path:
    """Make the quickstart's corpus, target and caches, once; return where they are."""
    from eagle_offline.pipeline import find_pipeline, read_pipeline

    example = directory / "example"
    for stage in read_pipeline(find_pipeline("quickstart"), example):
        if stage.name == "inspect-manifest":
            break
        sys.stderr.write(f"{stage.name}\n")
        stage.kind.run(stage.settings)
    return example


def measure(example: Path, directory: Path, training: dict[str, Any], name: str, seed: int) -> dict[str, float]:
    """Train one variant with one seed and let its draft decode; what was done before is taken as it is."""
    import torch

    torch.set_num_threads(1)
    from eagle_offline import stages
    from eagle_offline.config import EvaluateSettings
    from eagle_offline.train_settings import TrainSettings
    from eagle_offline.training.logbook import read_metrics

    run = directory / f"{name.replace(' ', '-')}-{seed}"
    done = directory / f"{run.name}.json"
    if done.is_file():
        return json.loads(done.read_text())
    chosen = {**training, **_placed(VARIANTS[name], example), "seed": seed}
    caches = {"cache": example / "cache", "heldout_cache": example / "heldout-cache"}
    stages.train(TrainSettings(**caches, output_dir=run, resume=True, **chosen))
    last = read_metrics(run)[-1]
    figures = {
        "walked_accept_length": last["walked_accept_length"],
        "expected_accept_length": last["expected_accept_length"],
    }
    for way, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        evaluation = stages.evaluate(
            EvaluateSettings(
                draft=str(run),
                target=str(example / "target"),
                prompts=str(example / "data" / "heldout-rewritten.jsonl"),
                max_prompts=30,
                max_new_tokens=160,
                num_draft_tokens=CHAIN,
                temperature=temperature,
                seed=seed,
                device="cpu",
            )
        )
        figures[f"accept_length_{way}"] = evaluation.drafters["trained"].accept_length
    done.write_text(json.dumps(figures))
    shutil.rmtree(run)
    return figures


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
    rows = {row.case: row.figures for row in read_rows(results_file(NAME, "cpu"))}
    lines = [
        "| Option | greedy accept length | against the baseline | sampled | against the baseline |",
        "|---|---|---|---|---|",
    ]
    for name in (name for name in VARIANTS if name in rows):
        cells = [name]
        for way in ("greedy", "sampled"):
            key = f"accept_length_{way}"
            cells.append(f"{rows[name][key]:.2f}")
            differences = [
                float(rows[name][f"{key}_seed{seed}"]) - float(rows[BASELINE][f"{key}_seed{seed}"]) for seed in SEEDS
            ]
            spread = statistics.stdev(differences)
            cells.append("" if name == BASELINE else f"{statistics.mean(differences):+.2f} ± {spread:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
