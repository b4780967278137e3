"""Rows reach TensorBoard and Weights & Biases as they are, a resumed run's too; neither can stop or slow training."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from eagle_offline.errors import StoppedEarly, UsageError
from eagle_offline.training import reporters
from eagle_offline.training.logbook import MetricsRow
from eagle_offline.training.reporters import closed_at_end, open_reporters, scalars

SETTINGS = {"learning_rate": 1e-4, "cache": ["a", "b"]}


def row(step: int, kind: str = "train", **more: float) -> MetricsRow:
    values = {"loss": 1.0 / (step + 1), **more}
    return MetricsRow(
        kind=kind, step=step, epoch=step / 10, accuracy=0.5, top1=[0.9, 0.75], conditional_top1=[0.9, 0.5],
        simulated_accept_length=1.5, **values,
    )  # fmt: skip


class Collected:
    """A reporter that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[MetricsRow] = []
        self.closed: list[int] = []

    def write(self, row: MetricsRow) -> None:
        self.rows.append(row)

    def close(self, exit_code: int = 0) -> None:
        self.closed.append(exit_code)


@pytest.fixture
def kinds(monkeypatch) -> dict:
    """The reporters there are; all packages count as installed."""
    found: dict = {}
    monkeypatch.setattr(reporters, "_KINDS", found)
    monkeypatch.setattr(reporters, "_require", lambda name: None)
    return found


def report(directory: Path, rows: list[MetricsRow], name: str = "tensorboard", from_step: int = -1) -> None:
    opened = open_reporters([name], directory, SETTINGS, from_step)
    with closed_at_end(opened):
        for each in rows:
            opened[0].write(each)


# TensorBoard


def events(directory: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    found = events(directory)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def next_second() -> None:
    """Event files are ordered by the second in their names."""
    time.sleep(1.01 - time.time() % 1)


def test_tensorboard_reads_back_every_value_of_every_row(tmp_path):
    rows = [row(0, "heldout", walked_accept_length=1.25), row(10, grad_norm=0.5), row(20, tokens_per_second=1e5)]
    report(tmp_path, rows)
    expected: dict[str, list[tuple[int, float]]] = {}
    for each in rows:
        for name, value in scalars(each).items():
            expected.setdefault(name, []).append((each.step, float(np.float32(value))))
    assert curves(tmp_path) == expected


def test_names_say_kind_metric_and_depth():
    assert scalars(row(4, "heldout", walked_accept_length=2.5)) == {
        "heldout/epoch": 0.4, "heldout/loss": 0.2, "heldout/accuracy": 0.5, "heldout/top1/0": 0.9,
        "heldout/top1/1": 0.75, "heldout/conditional_top1/0": 0.9, "heldout/conditional_top1/1": 0.5,
        "heldout/simulated_accept_length": 1.5, "heldout/walked_accept_length": 2.5,
    }  # fmt: skip
    assert {name.split("/")[0] for name in scalars(row(4))} == {"train"}


def test_tensorboard_shows_the_settings(tmp_path):
    report(tmp_path, [])
    (shown,) = events(tmp_path).Tensors("settings/text_summary")
    assert b'"learning_rate": 0.0001' in shown.tensor_proto.string_val[0]


def test_a_row_is_on_disk_soon_and_not_only_when_training_ends(tmp_path):
    pytest.importorskip("tensorboard")
    (reporter,) = open_reporters(["tensorboard"], tmp_path, SETTINGS, -1)
    deadline = time.monotonic() + 20
    for step in (1, 2, 3):
        reporter.write(row(step))
        while len(curves(tmp_path).get("train/simulated_accept_length", [])) < step:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    reporter.close()


def test_a_resumed_run_takes_the_place_of_rows_after_its_checkpoint(tmp_path):
    report(tmp_path, [row(step) for step in range(1, 7)])
    next_second()
    report(tmp_path, [row(step, loss=9.0) for step in (5, 6, 7)], from_step=4)
    losses = curves(tmp_path)["train/loss"]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6, 7]
    assert [value == 9.0 for _, value in losses] == [False] * 4 + [True] * 3


def test_a_run_that_died_before_its_first_checkpoint_leaves_no_rows(tmp_path):
    report(tmp_path, [row(0), row(1), row(2)])
    next_second()
    report(tmp_path, [row(0, loss=9.0)], from_step=-1)
    assert curves(tmp_path)["train/loss"] == [(0, 9.0)]


def test_a_full_disk_is_said_in_one_line_and_training_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    code = (
        "import resource, time\nfrom pathlib import Path\n"
        "from eagle_offline.training.logbook import MetricsRow\n"
        "from eagle_offline.training.reporters import closed_at_end, open_reporters\n"
        f"opened = open_reporters(['tensorboard'], Path({str(tmp_path)!r}), {{}}, -1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "row = MetricsRow(kind='train', step=1, epoch=0, loss=1, accuracy=1, top1=[1], conditional_top1=[1],"
        " simulated_accept_length=1)\n"
        "with closed_at_end(opened):\n    for _ in range(100):\n        opened[0].write(row)\n"
        "        time.sleep(0.002)\n"
        "print('trained')"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert (ended.returncode, ended.stdout) == (0, "trained\n")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("--report-to tensorboard is switched off, training goes on without it: [Errno 27]")


# Weights & Biases


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A user who works without network and has set nothing else."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("NETRC", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    yield
    wandb.teardown()  # it reads the environment once a process


def logged(path: Path) -> Iterator[bytes]:
    """Yield the records of a ``.wandb`` file: LevelDB's log format after a header of 7 bytes."""
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, part = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if part in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def wandb_run(path: Path) -> tuple:
    """Return the run, and the rows that were logged."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process may still be writing what it has acknowledged
    run, rows = None, []
    for content in logged(path):
        record = Record.FromString(content)
        if record.WhichOneof("record_type") == "run":
            run = record.run
        elif record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return run, rows


def run_files(directory: Path) -> list[Path]:
    return sorted((directory / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_gets_every_value_of_every_row_with_its_step(offline, tmp_path):
    directory = tmp_path / "my-run"
    directory.mkdir()
    rows = [row(0, "heldout", walked_accept_length=1.25), row(10, grad_norm=0.5), row(10, "heldout")]
    report(directory, rows, "wandb")
    (path,) = run_files(directory)
    run, found = wandb_run(path)
    assert found == [{**scalars(each), "step": each.step} for each in rows]
    assert (run.project, run.display_name) == ("eagle-offline", "my-run")
    assert run.run_id == (directory / "wandb-run-id").read_text().strip()
    config = {item.key: item.value_json for item in run.config.update}
    assert config["learning_rate"] == "0.0001"
    assert config["cache"].replace(" ", "") == '["a","b"]'


def test_a_resumed_wandb_run_keeps_its_id_and_its_name_on_the_site(offline, tmp_path):
    report(tmp_path, [row(1), row(2)], "wandb")
    recorded = (tmp_path / "wandb-run-id").read_text()
    next_second()  # its directories are named by the second
    report(tmp_path, [row(2), row(3)], "wandb", from_step=1)
    assert (tmp_path / "wandb-run-id").read_text() == recorded
    (first, earlier), (second, later) = map(wandb_run, run_files(tmp_path))
    assert first.run_id == second.run_id == recorded.strip()
    assert first.display_name == tmp_path.name
    assert second.display_name != tmp_path.name
    assert [each["step"] for each in earlier + later] == [1, 2, 2, 3]


def test_wandb_is_as_the_environment_says(offline, tmp_path, monkeypatch):
    for name, value in {
        "PROJECT": "mine",
        "RUN_ID": "sweep7",
        "NAME": "called",
        "DIR": str(tmp_path / "there"),
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "there").mkdir()
    report(tmp_path, [row(1)], "wandb")
    run, _ = wandb_run(*run_files(tmp_path / "there"))
    assert (run.project, run.run_id, run.display_name) == ("mine", "sweep7", "called")
    assert (tmp_path / "wandb-run-id").read_text() == "sweep7\n"


def test_a_wandb_that_is_disabled_writes_nothing(offline, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    report(tmp_path, [row(1)], "wandb")
    assert not run_files(tmp_path)
    assert "switched off" not in capsys.readouterr().err


def test_wandb_without_a_login_is_refused_with_the_way_out(offline, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(UsageError, match="WANDB_MODE=offline") as refused:
        open_reporters(["wandb"], tmp_path, SETTINGS, -1)
    assert "\n" not in str(refused.value)


# Any of them


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_anything_is_opened(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    for module in [module for module in sys.modules if module.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(UsageError, match="pip install 'eagle-offline\\[tracking\\]'") as refused:
        open_reporters([name], tmp_path, SETTINGS, -1)
    assert f"--report-to {name}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_all_packages_are_looked_for_before_the_first_reporter_is_opened(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setitem(reporters._KINDS, "tensorboard", lambda *arguments: opened.append(arguments))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError):
        open_reporters(["tensorboard", "wandb"], tmp_path, SETTINGS, -1)
    assert not opened


def test_an_unknown_reporter_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--report-to mlflow: no such reporter; expected tensorboard or wandb"):
        open_reporters(["mlflow"], tmp_path, {}, -1)


def test_no_reporter_is_asked_for_none_is_opened(tmp_path):
    assert open_reporters([], tmp_path, SETTINGS, -1) == []
    assert not list(tmp_path.iterdir())


def test_a_reporter_named_twice_is_opened_once(kinds, tmp_path):
    kinds["one"] = lambda *_: Collected()
    assert len(open_reporters(["one", "one"], tmp_path, {}, -1)) == 1


def test_a_reporter_that_fails_is_said_once_and_the_others_go_on(kinds, tmp_path, capsys):
    class Failing(Collected):
        def write(self, row: MetricsRow) -> None:
            super().write(row)
            if row.step == 3:
                raise ConnectionError("the network\nis gone")

    failing, other = Failing(), Collected()
    kinds.update(failing=lambda *_: failing, other=lambda *_: other)
    opened = open_reporters(["failing", "other"], tmp_path, {}, -1)
    rows = [row(step) for step in range(1, 11)]
    with closed_at_end(opened):
        for each in rows:
            for reporter in opened:
                reporter.write(each)
            time.sleep(0.005)
    assert other.rows == rows
    assert failing.rows == rows[:3]
    assert (failing.closed, other.closed) == ([], [0])
    said = capsys.readouterr().err
    assert said == "--report-to failing is switched off, training goes on without it: the network is gone\n"


def test_a_reporter_that_fails_when_closed_is_said(kinds, tmp_path, capsys):
    class Failing(Collected):
        def close(self, exit_code: int = 0) -> None:
            raise OSError("gone")

    kinds["failing"] = lambda *_: Failing()
    with closed_at_end(open_reporters(["failing"], tmp_path, {}, -1)):
        pass
    assert capsys.readouterr().err.count("gone") == 1


def test_a_service_that_cannot_be_reached_at_the_start_is_left_out(kinds, tmp_path, capsys):
    def refuse(*_):
        raise TimeoutError("no answer")

    kinds.update(gone=refuse, there=lambda *_: Collected())
    assert len(open_reporters(["gone", "there"], tmp_path, {}, -1)) == 1
    assert capsys.readouterr().err.splitlines() == [
        "--report-to gone is switched off, training goes on without it: no answer"
    ]


def test_what_a_user_has_to_mend_stops_the_start_and_closes_what_was_opened(kinds, tmp_path):
    def refuse(*_):
        raise UsageError("no login")

    opened = Collected()
    kinds.update(one=lambda *_: opened, two=refuse)
    with pytest.raises(UsageError, match="no login"):
        open_reporters(["one", "two"], tmp_path, {}, -1)
    assert opened.closed == [2]


def test_training_never_waits_for_a_reporter_that_hangs(kinds, tmp_path, capsys, monkeypatch):
    released = threading.Event()

    class Hanging(Collected):
        def write(self, row: MetricsRow) -> None:
            released.wait()

    kinds["hanging"] = lambda *_: Hanging()
    monkeypatch.setattr(reporters, "CLOSE_SECONDS", 0.2)
    (reporter,) = open_reporters(["hanging"], tmp_path, {}, -1)
    started = time.monotonic()
    for step in range(1000):
        reporter.write(row(step))
    reporter.close()
    assert time.monotonic() - started < 10
    assert "still busy" in capsys.readouterr().err
    released.set()


@pytest.mark.parametrize(("error", "code"), [(None, 0), (StoppedEarly("stopped"), 5), (ValueError("defect"), 1)])
def test_reporters_are_told_how_training_ended(error, code):
    reporter = Collected()
    with nullcontext() if error is None else pytest.raises(type(error)), closed_at_end([reporter]):
        if error is not None:
            raise error
    assert reporter.closed == [code]
