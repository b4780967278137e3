"""What does a training step cost, in time and memory, beside the steps that others take?

Forward and backward over the same chat-like samples with the same draft and the same target distributions, ours and
two others': see `benchmarks.unroll_ways`. Rates are tokens of real text a second; memory is what a step needs on top of
weights and samples. On a GPU also: the share of the rate of a large bf16 product, measured in the same run, that the
operations which no exact step can do without run at.

Besides: what recomputing steps in the backward pass costs and saves, how the cost of a token grows with the length of
its document, and what sums in a fixed order cost on a GPU.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.harness import Figures
from benchmarks.training_steps import SHAPE_8B, SMALL_SHAPE, median_seconds, peak_bytes
from benchmarks.unroll_ways import RECOMPUTED, WAYS, Setting, Work, matmul_flops_per_second, necessary_flops
from eagle_offline.devices import use_fixed_order

NAME = "train_step"
QUESTION = __doc__

SMALL = Setting(SMALL_SHAPE, draft_vocab_size=4096, num_samples=8, seq_length=512)
LARGE = Setting(SHAPE_8B, draft_vocab_size=32000, num_samples=8, seq_length=1024, chunk=2048)
_LONG_TOKENS = 32768
# Lengths of documents that fill so many tokens.
_FILLED_TOKENS = {"cpu": 4096, "cuda": 16384}
_DOCUMENT_LENGTHS = {"cpu": (64, 256, 1024, 4096), "cuda": (256, 1024, 4096, 16384)}


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return a small shape on a CPU, and the 8B shape on a GPU."""
    if device == "cpu":
        return {
            "hidden256": lambda: measure(device, SMALL),
            "hidden256-recompute": lambda: measure_recomputing(device, SMALL),
            "hidden256-lengths": lambda: measure_lengths(device, SMALL),
        }
    factored = replace(LARGE, factored=True)
    long = replace(factored, num_samples=1, seq_length=_LONG_TOKENS, sample_length=_LONG_TOKENS)
    return {
        "8b": lambda: measure(device, LARGE),
        "8b-32k-recompute": lambda: measure_recomputing(device, long),
        "8b-lengths": lambda: measure_lengths(device, factored),
        "8b-deterministic": lambda: measure_fixed_order(device, factored),
    }


def measure(device: str, setting: Setting, *, repeats: int = 3) -> Figures:
    """Return real tokens a second and memory of a step, ours and the ratios to the others."""
    work = Work(device, setting)
    losses = {way: work.run(way) for way in WAYS}
    if max(losses.values()) - min(losses.values()) > 1e-2 * losses["ours"]:
        raise AssertionError(f"not the same step: {losses}")
    seconds = median_seconds({way: partial(work.seconds, way) for way in WAYS}, repeats)
    extra = {way: peak_bytes(work, way) for way in WAYS}
    figures: Figures = {}
    for way in WAYS[1:]:
        figures[f"speed_over_{way}"] = seconds[way] / seconds["ours"]
        figures[f"memory_of_{way}"] = extra["ours"] / extra[way]
    figures |= _rates(work, seconds["ours"])
    figures["extra_memory_mb"] = extra["ours"] / 1e6
    figures["tokens"], figures["padded_slots"] = work.num_tokens, setting.num_samples * setting.seq_length
    figures["supervised_slots"] = work.num_supervised
    return figures


def measure_recomputing(device: str, setting: Setting, *, repeats: int = 3) -> Figures:
    """Return time and memory of our step that recomputes, and the ratios to the one that does not."""
    work, ways = Work(device, setting), ("ours", RECOMPUTED)
    seconds = median_seconds({way: partial(work.seconds, way) for way in ways}, repeats)
    extra = {way: peak_bytes(work, way) for way in ways}
    figures: Figures = {
        "time_of_keeping_all": seconds[RECOMPUTED] / seconds["ours"],
        "memory_of_keeping_all": extra[RECOMPUTED] / extra["ours"],
    }
    figures |= _rates(work, seconds[RECOMPUTED])
    figures["extra_memory_mb"] = extra[RECOMPUTED] / 1e6
    figures["longest_document"], figures["tokens"] = max(work.lengths), work.num_tokens
    return figures


def measure_lengths(
    device: str,
    setting: Setting,
    *,
    lengths: Sequence[int] | None = None,
    num_tokens: int | None = None,
    repeats: int = 2,
) -> Figures:
    """Return seconds a token by length of documents, those of the shortest being 1."""
    kind = device.split(":")[0]
    lengths = _DOCUMENT_LENGTHS[kind] if lengths is None else lengths
    num_tokens = _FILLED_TOKENS[kind] if num_tokens is None else num_tokens
    works = {
        length: Work(
            device, replace(setting, num_samples=num_tokens // length, seq_length=length, sample_length=length)
        )
        for length in lengths
    }
    seconds = median_seconds({length: partial(work.seconds, "ours") for length, work in works.items()}, repeats)
    figures: Figures = {f"time_at_{length}": seconds[length] / seconds[lengths[0]] for length in lengths[1:]}
    figures["tokens"], figures[f"tokens_per_second_at_{lengths[0]}"] = num_tokens, num_tokens / seconds[lengths[0]]
    return figures


def measure_fixed_order(device: str, setting: Setting, *, repeats: int = 3) -> Figures:
    """Return the time of our step whose sums have a fixed order, as ``train --deterministic`` runs it, over the other.

    Each is measured in a process of its own, since the order is settled before the first kernel runs.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        free = pool.apply(_seconds_in_order, (device, setting, repeats, False))
    with context.Pool(1) as pool:
        fixed = pool.apply(_seconds_in_order, (device, setting, repeats, True))
    return {"time_of_any_order": fixed / free, "step_seconds": fixed}


def _seconds_in_order(device: str, setting: Setting, repeats: int, fixed: bool) -> float:
    if fixed:
        use_fixed_order()
    work = Work(device, setting)
    return median_seconds({"ours": partial(work.seconds, "ours")}, repeats)["ours"]


def _rates(work: Work, seconds: float) -> Figures:
    """Return tokens and necessary operations a second, on a GPU beside a large product's."""
    hidden_size = work.config.hidden_size if work.setting.factored else None
    columns = torch.cat([torch.arange(length) for length in work.lengths]).to(work.device)
    flops = necessary_flops(work.config, work.plan, columns, hidden_size)
    figures: Figures = {
        "tokens_per_second": work.num_tokens / seconds,
        "necessary_gigaflops_per_token": flops / work.num_tokens / 1e9,
        "necessary_gigaflops_per_second": flops / seconds / 1e9,
    }
    if work.device.startswith("cuda"):
        rate = matmul_flops_per_second(work.device)
        figures |= {"share_of_matmul_rate": flops / seconds / rate, "matmul_gigaflops_per_second": rate / 1e9}
    return figures
