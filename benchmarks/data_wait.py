"""Does training wait for its data, and does what a token costs depend on how large the cache is?

Without a GPU: what two reader threads deliver at an 8B shape, laid out and planned for a GPU, from a warm page cache,
beside what a step there would ask for: 0.45 of the dense bf16 rate of an H200-class GPU (taken as 800 TFLOP/s), by the
FLOPs that no exact step can do without.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.harness import Figures
from benchmarks.states import chat_lengths
from benchmarks.synthetic_cache import Shape, write_cache
from benchmarks.unroll_ways import necessary_flops
from eagle_offline import open_cache, stages
from eagle_offline.cache.reader import Cache
from eagle_offline.data.feed import feed
from eagle_offline.data.sampler import plan_packs, shuffled_samples
from eagle_offline.data.stored_pack import PackReader
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.objectives.ttt_loss import STEP_DECAY, StepWeights, TTTLoss
from eagle_offline.prefetch import prefetch
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.logbook import read_metrics
from eagle_offline.training.objective import UnrollObjective
from eagle_offline.training.packs import TrainingPack, pack_parts, plan_pack

NAME = "data_wait"
QUESTION = __doc__

# What a step is taken to reach, of the dense bf16 rate that an H200-class GPU is taken to have.
PEAK_FLOPS, REACHED_SHARE = 800e12, 0.45
TTT_STEPS = 7
OBJECTIVE = UnrollObjective(TTTLoss(TTT_STEPS))


SHAPE_8B = Shape(4096, 14336, 32, 8, 32000)
SMALL = Shape(256, 704, 4, 2, 4096)
NARROW = Shape(64, 128, 4, 2, 512)


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return what two cores can show, or a GPU."""
    if device == "cpu":
        return {
            "delivery_8b": lambda: measure_delivery(SHAPE_8B, 192, 8192),
            "train_hidden256": lambda: measure_training(SMALL, 192, 4096),
            "flat_in_cache_size": lambda: measure_sizes(NARROW, (64, 512, 4096), 4096),
        }
    return {"8b": lambda: measure_device(device, SHAPE_8B, 192, 8192)}


def measure_delivery(shape: Shape, num_samples: int, tokens_per_batch: int, repeats: int = 3) -> Figures:
    """Return tokens a second that one and two threads deliver, with digests checked and without, over the demand."""
    figures: Figures = {}
    with _alone(), tempfile.TemporaryDirectory() as directory:
        write_cache(Path(directory), chat_lengths(num_samples, seed=3), shape)
        cache = open_cache(directory)
        packs = _packs(cache, tokens_per_batch)
        loader = _Loader(shape, torch.device("cuda"), pinned=False)
        loader.delivered(cache, packs, 2)  # fills the page cache and the loader's memory
        flops = sum(
            necessary_flops(shape.draft_config(), pack.plan, pack.position_ids, shape.hidden_size)
            for pack in loader.load(cache, packs)
        )
        num_tokens = int(cache.lengths.sum())
        demand = REACHED_SHARE * PEAK_FLOPS / (flops / num_tokens)
        for suffix, verify in (("", False), ("_verified", True)):
            rates: dict[int, list[_Delivery]] = {1: [], 2: []}
            for _ in range(repeats):
                for num_workers, found in rates.items():
                    # A cache that was just opened checks every sample once more.
                    found.append(loader.delivered(open_cache(directory, verify=verify), packs, num_workers))
            # The fastest: the rest is what else the machine did.
            best = {workers: min(found, key=lambda each: each.seconds) for workers, found in rates.items()}
            figures[f"delivery_over_demand{suffix}"] = num_tokens / best[2].seconds / demand
            figures[f"speedup_of_2_threads{suffix}"] = best[1].seconds / best[2].seconds
            figures[f"tokens_per_second{suffix}"] = num_tokens / best[2].seconds
            figures[f"tokens_per_core_second{suffix}"] = num_tokens / best[2].cpu_seconds
            figures[f"cores_used{suffix}"] = best[2].cpu_seconds / best[2].seconds
    figures["demanded_tokens_per_second"] = demand
    figures["gigaflops_per_token"] = flops / num_tokens / 1e9
    figures["tokens"], figures["packs"] = num_tokens, len(packs)
    return figures


def measure_training(shape: Shape, num_samples: int, tokens_per_batch: int, max_steps: int | None = None) -> Figures:
    """Return the share of time that real training on this CPU waits for its data, and its rate."""
    with tempfile.TemporaryDirectory() as directory:
        lengths = np.minimum(chat_lengths(num_samples, seed=3), 512)
        write_cache(Path(directory, "cache"), lengths, shape)
        rows = _trained(Path(directory, "cache"), Path(directory, "run"), tokens_per_batch, max_steps)
    return {
        "data_wait_share": statistics.mean(row["data_wait_share"] for row in rows[1:]),
        "largest_data_wait_share": max(row["data_wait_share"] for row in rows[1:]),
        "data_wait_share_of_first_step": rows[0]["data_wait_share"],
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows[1:]),
        "steps": len(rows),
    }


def measure_sizes(
    shape: Shape, counts: Sequence[int], tokens_per_batch: int, num_packs: int = 12, repeats: int = 3
) -> Figures:
    """Return what reading and training cost a token as caches grow, over the smallest, and how long opening takes.

    Sizes take turns, and each one's fastest turn counts: the rest is what else the machine did.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in ("reading", "training", "opening")}

    def note(name: str, count: int, seconds: float) -> None:
        found[name][count] = min(seconds, found[name].get(count, seconds))

    with _alone(), tempfile.TemporaryDirectory() as directory:
        paths = {count: Path(directory, f"cache-{count}") for count in counts}
        for count, path in paths.items():
            write_cache(path, chat_lengths(count, seed=3), shape)
        loader = _Loader(shape, torch.device("cpu"), pinned=False)
        for repeat in range(repeats):
            for count, path in paths.items():
                started = time.perf_counter()
                cache = open_cache(path)
                note("opening", count, time.perf_counter() - started)
                packs = list(islice(cycle(_packs(cache, tokens_per_batch)), num_packs))
                loader.delivered(cache, packs, 1)
                tokens = sum(int(cache.lengths[pack].sum()) for pack in packs)
                note("reading", count, loader.delivered(cache, packs, 1).cpu_seconds / tokens)
                rows = _trained(path, Path(directory, f"run-{count}-{repeat}"), tokens_per_batch, num_packs)
                note("training", count, min(1 / row["tokens_per_second"] for row in rows))
    figures: Figures = {}
    for name in ("training", "reading"):
        for count in counts:
            figures[f"{name}_{count}_over_{counts[0]}"] = found[name][count] / found[name][counts[0]]
        figures[f"{name}_microseconds_per_token"] = found[name][counts[0]] * 1e6
    return {**figures, **{f"open_seconds_{count}": found["opening"][count] for count in counts}}


def measure_device(device: str, shape: Shape, num_samples: int, tokens_per_batch: int, num_steps: int = 24) -> Figures:
    """Return the share of a step in which the device waited: steps that are fed, beside the same on packs at hand."""
    place = torch.device(device)
    with tempfile.TemporaryDirectory() as directory:
        write_cache(Path(directory), chat_lengths(num_samples, seed=3), shape)
        cache = open_cache(directory)
        packs = list(islice(cycle(_packs(cache, tokens_per_batch)), num_steps))
        loader, step = _Loader(shape, place, pinned=place.type == "cuda"), _Step(place, shape, cache)
        at_hand = [pack.to(place) for pack in loader.load(cache, packs[:4])]
        for pack in at_hand:
            step(pack)
        started = _now(place)
        for pack in at_hand * (num_steps // 4):
            step(pack)
        bare = (_now(place) - started) / sum(pack.num_tokens for pack in at_hand * (num_steps // 4))
        del at_hand
        waited, begun, tokens = 0.0, 0.0, 0
        fed = feed(prefetch(loader.pack_of(cache), packs, num_workers=2), place)
        for number in range(num_steps):
            asked = time.perf_counter()
            pack = next(fed)
            if number:
                waited += time.perf_counter() - asked
            else:
                begun = _now(place)
            step(pack)
            tokens += pack.num_tokens
        took = _now(place) - begun
        fed.close()
    return {
        # Packs differ, so rates are compared, not times.
        "share_of_step_the_device_waited": max(0.0, 1 - bare / (took / tokens)),
        "share_the_host_waited": waited / took,
        "tokens_per_second": tokens / took,
        "tokens_per_second_without_loading": 1 / bare,
    }


@dataclass(frozen=True)
class _Delivery:
    seconds: float
    cpu_seconds: float


class _Loader:
    """Reads and plans packs as training does, for a device that need not be there."""

    def __init__(self, shape: Shape, device: torch.device, *, pinned: bool):
        self._device = device
        self._reader = PackReader(merged=device.type == "cpu", pinned=pinned)
        self._mask = torch.ones(shape.draft_vocab_size, dtype=torch.bool)

    def pack_of(self, cache: Cache) -> Callable[[np.ndarray], TrainingPack]:
        def read(indices: np.ndarray) -> TrainingPack:
            stored = self._reader.read([(cache, int(index)) for index in indices])
            return plan_pack(stored, self._mask, OBJECTIVE, self._device)

        return read

    def load(self, cache: Cache, packs: Sequence[np.ndarray], num_workers: int = 2) -> Iterator[TrainingPack]:
        yield from prefetch(self.pack_of(cache), packs, num_workers=num_workers)

    def delivered(self, cache: Cache, packs: Sequence[np.ndarray], num_workers: int) -> _Delivery:
        """Load packs as fast as it goes and let each go at once."""
        started, cpu = time.perf_counter(), time.process_time()
        for _ in self.load(cache, packs, num_workers):
            pass
        return _Delivery(time.perf_counter() - started, time.process_time() - cpu)


class _Step:
    """Forward and backward of a fresh draft."""

    def __init__(self, device: torch.device, shape: Shape, cache: Cache):
        torch.manual_seed(0)
        self._device = device
        self._model = cast(Any, Eagle3DraftModel(shape.draft_config())).to(device)
        self._head = cache.head.to(device)
        self._decays = STEP_DECAY ** torch.arange(TTT_STEPS, dtype=torch.float64, device=device)

    def __call__(self, pack: TrainingPack) -> None:
        self._model.zero_grad(set_to_none=True)
        counts = pack.plan.step_counts.to(self._device).clamp_min(1)
        with torch.autocast("cuda", torch.bfloat16, enabled=self._device.type == "cuda"):
            (part,) = pack_parts(self._model, pack, OBJECTIVE, self._head, StepWeights(self._decays / counts))
            loss, _ = part()
        loss.backward()


def _packs(cache: Cache, tokens_per_batch: int) -> list[np.ndarray]:
    order = shuffled_samples(np.arange(len(cache)), cache.shards, seed=0, epoch=0)
    return plan_packs(order, cache.lengths, tokens_per_batch)


def _trained(cache: Path, run: Path, tokens_per_batch: int, max_steps: int | None) -> list[dict[str, Any]]:
    """Train and return the metrics of every step."""
    settings = TrainSettings(
        cache=(cache,),
        output_dir=run,
        heldout_share=0,
        ttt_steps=TTT_STEPS,
        num_epochs=1 if max_steps is None else max_steps,
        max_steps=max_steps,
        tokens_per_batch=tokens_per_batch,
        log_every=1,
        device="cpu",
    )
    run.mkdir(parents=True, exist_ok=True)
    stages.train(settings)
    return [row for row in read_metrics(run) if row["kind"] == "train"]


@contextmanager
def _alone() -> Iterator[None]:
    """Keep tensor work on the thread that asks for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
