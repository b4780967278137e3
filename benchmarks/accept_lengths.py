"""Drafts trained in several ways on the quickstart's target, judged by the accept length of real decoding.

Every way is trained with the same seeds as the baseline, and its draft decodes the same held-out conversations,
greedily and at temperature 1; differences to the baseline are paired by seed. Work is kept in a directory, so that a
run which was cut short goes on; two runs at a time, a thread each.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, read_rows, results_file

SEEDS = (0, 1, 2)
CHAIN = 5

BASELINE = "baseline"
WAYS = ("greedy", "sampled")

# What is trained when nothing else is said: EAGLE-3 as in the quickstart, cut short; K of a chain of 5.
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

# Example, work directory, settings of training, name of what is trained, seed.
Measure = Callable[[Path, Path, dict[str, Any], str, int], dict[str, float]]


class Work:
    """Trainings and evaluations, two at a time, begun when the first is asked for.

    Args:
        directory: where work is kept.
        names: of what has to be measured.
        measure: trains one with one seed and lets its draft decode; another process calls it.
        prepare: given the example and the work directory, makes what the trainings need.
        training: what is trained when nothing else is said.
    """

    def __init__(
        self,
        directory: Path,
        names: Iterable[str],
        measure: Measure,
        prepare: Callable[[Path, Path], None] = lambda example, directory: None,
        training: Mapping[str, Any] = TRAINING,
    ):
        self._directory, self._names = directory, list(names)
        self._measure, self._prepare, self._training = measure, prepare, dict(training)
        self._pending: dict[tuple[str, int], Future[dict[str, float]]] = {}

    def figures(self, name: str) -> Figures:
        """Return the figures of what has a name, by seed and as means."""
        if not self._pending:
            example = make_example(self._directory)
            self._prepare(example, self._directory)
            pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))
            tasks = [(each, seed) for each in self._names for seed in SEEDS]
            self._pending = {
                task: pool.submit(self._measure, example, self._directory, self._training, *task) for task in tasks
            }
        found = [self._pending[name, seed].result() for seed in SEEDS]
        figures: Figures = {}
        for key in found[0]:
            values = [each[key] for each in found]
            figures[key] = round(statistics.mean(values), 4)
            if key.startswith("accept_length"):
                figures |= {f"{key}_seed{seed}": round(value, 4) for seed, value in zip(SEEDS, values, strict=True)}
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


def train_and_decode(example: Path, run: Path, training: dict[str, Any]) -> dict[str, float]:
    """Train and let the draft decode; what was done before, beside ``run``, is taken as it is.

    Args:
        example: whose target decodes.
        run: where the training goes; it is removed at the end.
        training: its settings; with a held-out cache, its last validation is among the figures.
    """
    import torch

    torch.set_num_threads(1)
    from eagle_offline import stages
    from eagle_offline.config import EvaluateSettings
    from eagle_offline.train_settings import TrainSettings
    from eagle_offline.training.logbook import read_metrics

    done = run.with_name(f"{run.name}.json")
    if done.is_file():
        return json.loads(done.read_text())
    stages.train(TrainSettings(**training, output_dir=run, resume=True))
    figures: dict[str, float] = {}
    if "heldout_cache" in training:
        last = read_metrics(run)[-1]
        figures |= {name: last[name] for name in ("walked_accept_length", "expected_accept_length")}
    for way, temperature in zip(WAYS, (0.0, 1.0), strict=True):
        evaluation = stages.evaluate(
            EvaluateSettings(
                draft=str(run),
                target=str(example / "target"),
                prompts=str(example / "data" / "heldout-rewritten.jsonl"),
                max_prompts=30,
                max_new_tokens=160,
                num_draft_tokens=CHAIN,
                temperature=temperature,
                seed=training["seed"],
                device="cpu",
            )
        )
        trained = evaluation.drafters["trained"]
        figures[f"accept_length_{way}"] = trained.accept_length
        figures |= {_rate_key(way, depth): rate for depth, rate in enumerate(trained.accept_rate, start=1)}
    done.write_text(json.dumps(figures))
    shutil.rmtree(run)
    return figures


def slug(name: str) -> str:
    """Return a name as part of a file's."""
    return name.replace(" ", "-")


def differences(figures: Figures, baseline: Figures, way: str) -> list[float]:
    """Return by how much accept lengths are longer than the baseline's with the same seed."""
    keys = [f"accept_length_{way}_seed{seed}" for seed in SEEDS]
    return [float(figures[key]) - float(baseline[key]) for key in keys]


def table(benchmark: str, names: Iterable[str], title: str, *, with_rates: bool = False) -> str:
    """Return a benchmark's committed rows as a Markdown table, differences to the baseline paired by seed.

    Args:
        benchmark: whose rows. names: of its cases. title: of their column.
        with_rates: say also how many rounds of greedy decoding accepted the first draft token, the second, and so on.
    """
    rows = {row.case: row.figures for row in read_rows(results_file(benchmark, "cpu"))}
    titles = [title, "greedy accept length", "against the baseline", "sampled", "against the baseline"]
    if with_rates:
        titles.append("rounds that accepted draft token " + ", ".join(str(depth) for depth in range(1, CHAIN + 1)))
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in (name for name in names if name in rows):
        cells = [name]
        for way in WAYS:
            cells.append(f"{rows[name][f'accept_length_{way}']:.2f}")
            found = differences(rows[name], rows[BASELINE], way)
            spread = statistics.stdev(found)
            cells.append("" if name == BASELINE else f"{statistics.mean(found):+.2f} ± {spread:.2f}")
        if with_rates:
            cells.append(", ".join(f"{rows[name][_rate_key('greedy', depth)]:.0%}" for depth in range(1, CHAIN + 1)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rate_key(way: str, depth: int) -> str:
    return f"accept_rate_{way}_{depth}"
