"""What does a P-EAGLE training step cost, in time and memory, beside the same work done plainly?

Forward and backward over the same elements of the same samples with the same draft and the same target distributions,
ours and others': see `benchmarks.parallel_ways`. Rates are tokens of real text a second; memory is what a step needs on
top of weights and samples. In segments, every way is compared with ours in as many. Where another way does not fit in
the GPU's memory, the row says so instead.

Besides: what is left of the memory of a step when its chains run in segments, kept and recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.harness import Figures
from benchmarks.parallel_ways import Setting, Way, Work
from benchmarks.training_steps import SHAPE_8B, SMALL_SHAPE, median_seconds, peak_bytes

NAME = "parallel_step"
QUESTION = __doc__

OURS = (Way("ours"), Way("ours", 4), Way("ours", 8))
OTHERS = (Way("plain"), Way("plain_by_row"), Way("plain", 8), Way("reference"), Way("reference", 8))

SMALL = Setting(SMALL_SHAPE, draft_vocab_size=4096, num_samples=8, seq_length=512)
LARGE = Setting(SHAPE_8B, draft_vocab_size=32000, num_samples=8, seq_length=2048, chunk=2048, factored=True)
_LAYERS = (1, 4)
# On a GPU also one document of so many thousand tokens.
_DOCUMENT_THOUSANDS = (2, 8, 32)
# Thousands of tokens whose memory is measured, by layers; with all of them it would not fit.
_MEMORY_THOUSANDS = {"cpu": {1: (8, 16, 32, 64), 4: (8,)}, "cuda": {1: (8, 16, 32, 64), 4: (8, 16, 32)}}
_MEMORY_DOCUMENT_TOKENS = 2048
_MEMORY_SEGMENTS = (1, 2, 4, 8, 16)


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return a small shape on a CPU, and the 8B shape on a GPU."""
    kind = device.split(":")[0]
    shape, setting = ("hidden256", SMALL) if kind == "cpu" else ("8b", LARGE)
    found: dict[str, Callable[[], Figures]] = {}
    memory: dict[str, Callable[[], Figures]] = {}
    for num_layers in _LAYERS:
        layered = replace(setting, num_layers=num_layers)
        name = f"{shape}-layers{num_layers}"
        found[name] = partial(measure, device, layered)
        for thousands in () if kind == "cpu" else _DOCUMENT_THOUSANDS:
            found[f"{name}-{thousands}k"] = partial(measure, device, _documents(layered, 1, thousands * 1024))
        for thousands in _MEMORY_THOUSANDS[kind][num_layers]:
            num_documents = thousands * 1024 // _MEMORY_DOCUMENT_TOKENS
            documents = _documents(layered, num_documents, _MEMORY_DOCUMENT_TOKENS)
            memory[f"{name}-memory-{thousands}k"] = partial(measure_memory, device, documents)
    # The longest last.
    return found | dict(sorted(memory.items(), key=lambda case: int(case[0].rpartition("-")[2][:-1])))


def _documents(setting: Setting, count: int, length: int) -> Setting:
    return replace(setting, num_samples=count, seq_length=length, sample_length=length, factored=True)


def measure(device: str, setting: Setting, *, repeats: int = 3) -> Figures:
    """Return real tokens a second and memory of a step, the ratios to the others and those of our segments."""
    work = Work(device, setting)
    losses = {way: work.run(way) for way in OURS}
    left_out = []
    for way in OTHERS:
        try:
            losses[way] = work.run(way)
        except torch.OutOfMemoryError:
            left_out.append(way)
    if max(losses.values()) - min(losses.values()) > 1e-2 * losses[OURS[0]]:
        raise AssertionError(f"not the same step: {losses}")
    seconds = median_seconds({way: partial(work.seconds, way) for way in losses}, repeats)
    extra = {way: peak_bytes(work, way) for way in losses}
    figures: Figures = {}
    for way in OTHERS:
        if way in left_out:
            figures[f"{_label(way)}_out_of_memory"] = 1
            continue
        ours = Way("ours", way.num_segments)
        figures[f"speed_over_{_label(way)}"] = seconds[way] / seconds[ours]
        figures[f"memory_of_{_label(way)}"] = extra[ours] / extra[way]
    whole = OURS[0]
    for way in OURS[1:]:
        figures[f"time_at_{way.num_segments}_segments"] = seconds[way] / seconds[whole]
        figures[f"memory_at_{way.num_segments}_segments"] = extra[way] / extra[whole]
    figures["tokens_per_second"] = work.num_tokens / seconds[whole]
    figures["extra_memory_mb"] = extra[whole] / 1e6
    return figures | _counts(work) | {"padded_slots": setting.num_samples * setting.seq_length}


def measure_memory(device: str, setting: Setting, *, segments: Sequence[int] = _MEMORY_SEGMENTS) -> Figures:
    """Return the memory of our step by segments, kept and recomputed, that of one segment that keeps all being 1."""
    work = Work(device, setting)
    ways = [Way("ours", count, recompute) for recompute in (False, True) for count in segments]
    extra = {way: peak_bytes(work, way) for way in ways}
    whole = extra[ways[0]]
    figures: Figures = {}
    for way in ways[1:]:
        recomputed = "_recomputed" if way.recompute else ""
        figures[f"memory_at_{way.num_segments}_segments{recomputed}"] = extra[way] / whole
    figures["extra_memory_mb"] = whole / 1e6
    return figures | _counts(work) | {"longest_document": max(work.lengths)}


def _label(way: Way) -> str:
    return f"{way.name}_at_{way.num_segments}_segments" if way.num_segments > 1 else way.name


def _counts(work: Work) -> Figures:
    """Return how much there is to do: tokens, and elements that we run, that the plain way runs, that are charged."""
    return {
        "tokens": work.num_tokens,
        "elements": work.num_elements,
        "plain_elements": work.num_plain_elements,
        "charged_elements": work.num_charged,
    }
