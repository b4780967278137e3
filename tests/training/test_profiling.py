"""A trace holds the steps it says it holds, is there in full or not at all, and costs nothing when it is off."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eagle_offline.errors import EagleOfflineError
from eagle_offline.training import profiling
from eagle_offline.training.profiling import SKIPPED_STEPS, WARMUP_STEPS, profiled

BEFORE = SKIPPED_STEPS + WARMUP_STEPS


def work(device: str = "cpu") -> None:
    weight = torch.ones(8, 8, requires_grad=True, device=device)
    (weight @ weight).sum().backward()


def profile_steps(directory: Path | None, count: int, num_steps: int = 2, device: str = "cpu") -> None:
    with profiled(directory, num_steps) as step:
        for _ in range(count):
            work(device)
            step()


def trace(directory: Path) -> list[dict]:
    (path,) = (directory / "profile").glob("trace-*.json")
    return json.loads(path.read_text())["traceEvents"]


def steps_in(events: list[dict]) -> set[str]:
    return {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}


def count_of(events: list[dict], name: str) -> int:
    return sum(event.get("name") == name and event.get("ph") == "X" for event in events)


def test_a_trace_holds_the_steps_asked_for_and_no_others(tmp_path):
    profile_steps(tmp_path, BEFORE + 10, num_steps=2)
    events = trace(tmp_path)
    assert steps_in(events) == {f"ProfilerStep#{BEFORE}", f"ProfilerStep#{BEFORE + 1}"}
    assert count_of(events, "aten::mm") == 2 * 3, "one product forward and two back, a step"


def test_a_table_of_operations_stands_beside_it(tmp_path):
    profile_steps(tmp_path, BEFORE + 2)
    (path,) = (tmp_path / "profile").glob("operations-*.txt")
    (beside,) = (tmp_path / "profile").glob("trace-*.json")
    assert path.stem.removeprefix("operations-") == beside.stem.removeprefix("trace-")
    (line,) = [line for line in path.read_text().splitlines() if line.split()[:1] == ["aten::mm"]]
    assert line.split()[-1] == "6", "calls"


def test_it_says_where_the_trace_is(tmp_path, capfd):
    profile_steps(tmp_path, BEFORE + 2)
    (path,) = (tmp_path / "profile").glob("trace-*.json")
    assert str(path) in capfd.readouterr().err


def test_a_run_that_ends_while_recording_leaves_what_was_recorded(tmp_path):
    profile_steps(tmp_path, BEFORE + 1, num_steps=5)
    assert f"ProfilerStep#{BEFORE}" in steps_in(trace(tmp_path))


@pytest.mark.parametrize("count", [0, 1, SKIPPED_STEPS, BEFORE - 1, BEFORE])
def test_a_run_that_is_too_short_says_so_and_leaves_no_trace(count, tmp_path, capfd):
    profile_steps(tmp_path, count)
    assert not list((tmp_path / "profile").iterdir())
    assert f"no trace: recording begins after {BEFORE} steps, {count} were done" in capfd.readouterr().err


def test_an_error_of_training_gets_through_and_what_was_recorded_stays(tmp_path):
    def train() -> None:
        with profiled(tmp_path, 5) as step:
            for _ in range(BEFORE + 2):
                work()
                step()
            raise RuntimeError("not finite")

    with pytest.raises(RuntimeError, match="not finite"):
        train()
    assert count_of(trace(tmp_path), "aten::mm") == 6


def test_a_trace_that_cannot_be_written_is_said_and_training_goes_on(tmp_path, monkeypatch, capfd):
    def fill_the_disk(_, path: str) -> None:
        Path(path).write_text('{"traceEv')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiling.profile, "export_chrome_trace", fill_the_disk)
    profile_steps(tmp_path, BEFORE + 5)
    assert not list((tmp_path / "profile").iterdir())
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("profile:")]
    assert "No space left" in line


def test_a_run_that_is_killed_while_it_writes_leaves_no_torn_trace(tmp_path):
    code = (
        "import os, signal\nfrom pathlib import Path\n"
        "from tests.training.test_profiling import BEFORE, profile_steps, profiling\n"
        "def torn(_, path):\n"
        "    Path(path).write_text('{\"traceEv')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "profiling.profile.export_chrome_trace = torn\n"
        f"profile_steps(Path({str(tmp_path)!r}), BEFORE + 5)"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    left = list((tmp_path / "profile").iterdir())
    assert len(left) == 1, "the kill came before anything was written"
    assert left[0].name.startswith(".")


def test_off_writes_nothing_and_starts_no_profiler(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "profile", None)
    profile_steps(None, BEFORE + 5)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made_is_refused_at_the_start(tmp_path):
    (tmp_path / "profile").write_text("a file")
    with pytest.raises(EagleOfflineError, match="a file stands where a directory is needed"):
        profile_steps(tmp_path, 1)


@pytest.mark.gpu
def test_a_trace_of_a_gpu_holds_its_kernels(tmp_path):
    profile_steps(tmp_path, BEFORE + 2, device="cuda")
    assert any(event.get("cat") == "kernel" for event in trace(tmp_path))
