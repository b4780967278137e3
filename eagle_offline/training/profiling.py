"""A few training steps recorded with torch's profiler: a trace for a viewer, and the costliest operations as text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from eagle_offline.durable import make_directory, replacing, write_bytes
from eagle_offline.errors import EagleOfflineError, one_line

PROFILE_DIRECTORY = "profile"

# The first steps allocate memory and choose kernels; they are like no other.
SKIPPED_STEPS = 4
# Steps in which the profiler runs and its records are thrown away: it is slow when it starts.
WARMUP_STEPS = 2
RECORDED_STEPS = 3
_UNRECORDED_STEPS = SKIPPED_STEPS + WARMUP_STEPS
_TABLE_ROWS = 40


@contextmanager
def profiled(directory: Path | None, num_steps: int = RECORDED_STEPS) -> Iterator[Callable[[], None]]:
    """Yield a function to call after every training step; a few of the steps are recorded.

    Writes ``profile/trace-TIME-PID.json``, which https://ui.perfetto.dev and chrome://tracing show, and
    ``profile/operations-TIME-PID.txt``. Both are there in full or not at all. When the block ends before enough steps
    were done, those recorded so far are written. What cannot be written is said on stderr; training goes on.

    Args:
        directory: the run's; None records nothing and costs nothing.
        num_steps: steps to record, after those that are skipped.

    Raises:
        EagleOfflineError: ``directory`` cannot be written.
    """
    if directory is None:
        yield _do_nothing
        return
    folder = directory / PROFILE_DIRECTORY
    make_directory(folder)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=0, skip_first=SKIPPED_STEPS, warmup=WARMUP_STEPS, active=num_steps, repeat=1)
    write = partial(_write, folder)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step
    if profiler.step_num <= _UNRECORDED_STEPS:
        _say(f"no trace: recording begins after {_UNRECORDED_STEPS} steps, {profiler.step_num} were done")


def _write(folder: Path, profiler: profile) -> None:
    if profiler.step_num <= _UNRECORDED_STEPS:
        return
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.getpid()}"
    trace, operations = folder / f"trace-{name}.json", folder / f"operations-{name}.txt"
    device = "cuda" if ProfilerActivity.CUDA in profiler.activities else "cpu"
    try:
        with replacing(trace) as sibling:
            profiler.export_chrome_trace(str(sibling))
        table = profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=_TABLE_ROWS)
        write_bytes(operations, f"{table}\n".encode())
    except EagleOfflineError as error:
        _say(f"not all of it was written: {one_line(error)}")
    else:
        _say(f"{trace} (for https://ui.perfetto.dev), {operations}")


def _do_nothing() -> None:
    pass


def _say(line: str) -> None:
    sys.stderr.write(f"profile: {line}\n")
    sys.stderr.flush()
