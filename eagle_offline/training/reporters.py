"""Metrics rows to TensorBoard and Weights & Biases, beside ``metrics.jsonl``; training never waits for either."""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from eagle_offline.durable import write_bytes
from eagle_offline.errors import EXIT_DONE, EXIT_FAILURE, UsageError, one_line
from eagle_offline.training.logbook import MetricsRow

TENSORBOARD_DIRECTORY = "tensorboard"
WANDB_DIRECTORY = "wandb"
WANDB_ID_FILE = "wandb-run-id"
WANDB_PROJECT = "eagle-offline"

# How long W&B may go on sending when training has ended; a network that is gone must not keep the process.
FINISH_SECONDS = 30.0
# How long any reporter may take to close, W&B's own limit included.
CLOSE_SECONDS = 45.0


class Reporter(Protocol):
    """Takes the rows of one run."""

    def write(self, row: MetricsRow) -> None:
        """Take a row."""

    def close(self, exit_code: int = EXIT_DONE) -> None:
        """Send what is left; ``exit_code`` is how training ended."""


def open_reporters(names: Sequence[str], directory: Path, settings: dict[str, Any], from_step: int) -> list[Reporter]:
    """Return a reporter for each of ``names`` whose service answers.

    Rows are handed to a thread of the reporter's own. One that fails, now or later, is said on stderr and switched
    off; training goes on.

    Args:
        names: ``tensorboard``, ``wandb``.
        directory: the run's.
        settings: of the run, shown beside its curves.
        from_step: the step that training goes on from; TensorBoard drops rows of later steps, which a run that died
            before its checkpoint wrote. -1 drops all. W&B keeps them, and gets them again.

    Raises:
        UsageError: a package is not installed, or there is no login; nothing was opened then.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        _require(name)
    # What settings hold as JSON would: W&B and TensorBoard show nothing else.
    settings = json.loads(json.dumps(settings, default=str))
    opened: list[Reporter] = []
    for name in names:
        try:
            opened.append(_InBackground(name, _KINDS[name](directory, settings, from_step)))
        except UsageError:
            for reporter in opened:
                reporter.close(UsageError.exit_code)
            raise
        except Exception as error:  # A service that cannot be reached, in whatever words: training matters more.
            _say_off(name, error)
    return opened


@contextmanager
def closed_at_end(reporters: Sequence[Reporter]) -> Iterator[None]:
    """Close ``reporters`` when the block ends, with the exit code of the exception that ended it."""
    exit_code = EXIT_DONE
    try:
        yield
    except BaseException as error:
        exit_code = getattr(error, "exit_code", EXIT_FAILURE)
        raise
    finally:
        for reporter in reporters:
            reporter.close(exit_code)


def scalars(row: MetricsRow) -> dict[str, float]:
    """Return a row's values by name.

    ``heldout`` with ``loss=0.5, top1=[0.9, 0.8]`` gives ``heldout/loss``, ``heldout/top1/0`` and ``heldout/top1/1``.
    """
    values: dict[str, float] = {}
    for name, value in row.model_dump(exclude_none=True, exclude={"kind", "step"}).items():
        if isinstance(value, list):
            values.update({f"{row.kind}/{name}/{depth}": item for depth, item in enumerate(value)})
        else:
            values[f"{row.kind}/{name}"] = value
    return values


class _InBackground:
    """Hands rows to a reporter on a thread of its own, and no more after its first failure."""

    def __init__(self, name: str, reporter: Reporter):
        self._name, self._reporter = name, reporter
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"report to {name}", daemon=True)
        self._thread.start()

    def write(self, row: MetricsRow) -> None:
        if self._thread.is_alive():
            self._waiting.put(lambda: self._reporter.write(row))

    def close(self, exit_code: int = EXIT_DONE) -> None:
        self._waiting.put(lambda: self._reporter.close(exit_code))
        self._waiting.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            _say(f"--report-to {self._name}: still busy {CLOSE_SECONDS:.0f} s after training ended; left to itself")

    def _work(self) -> None:
        try:
            while (act := self._waiting.get()) is not None:
                act()
        except Exception as error:  # Whatever a service or its library raises: training must not end for a curve.
            _say_off(self._name, error)


class _TensorBoard:
    """Event files below the run; ``tensorboard --logdir RUN`` shows them."""

    def __init__(self, directory: Path, settings: dict[str, Any], from_step: int):
        from torch.utils.tensorboard import SummaryWriter

        _quieten_tensorboard()
        self._writer = SummaryWriter(str(directory / TENSORBOARD_DIRECTORY), purge_step=from_step + 1)
        shown = "".join(f"    {line}\n" for line in json.dumps(settings, indent=2).splitlines())
        self._writer.add_text("settings", shown, max(from_step, 0))

    def write(self, row: MetricsRow) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row.step)
        # Where TensorFlow is installed its files buffer rows for two minutes; a kill would take those along.
        self._writer.flush()

    def close(self, exit_code: int = EXIT_DONE) -> None:
        self._writer.close()


class _Wandb:
    """A W&B run that goes on under one id however often training is resumed.

    The x axis is our ``step``: W&B's own counts calls and cannot go back to a checkpoint.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], from_step: int):
        import wandb

        run_id, is_first = _wandb_id(directory)
        environment = os.environ
        try:
            self._run = wandb.init(
                project=environment.get("WANDB_PROJECT", WANDB_PROJECT),
                id=run_id,
                # A later run keeps the name, which may have been changed on the site.
                name=environment.get("WANDB_NAME", directory.resolve().name) if is_first else None,
                dir=environment.get("WANDB_DIR", str(directory)),
                resume="allow",
                config=settings,
                allow_val_change=True,
                settings=wandb.Settings(finish_timeout=float(environment.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS))),
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise UsageError(
                f"--report-to wandb: {one_line(error).rstrip('.')}; or set WANDB_MODE=offline and send the run later "
                "with `wandb sync`"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def write(self, row: MetricsRow) -> None:
        self._run.log({**scalars(row), "step": row.step})

    def close(self, exit_code: int = EXIT_DONE) -> None:
        self._run.finish(exit_code=exit_code)


_KINDS: dict[str, Callable[[Path, dict[str, Any], int], Reporter]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}


def _require(name: str) -> None:
    """Import a reporter's package.

    Raises:
        UsageError: unknown, not installed, or broken.
    """
    if name not in _KINDS:
        raise UsageError(f"--report-to {name}: no such reporter; expected {' or '.join(_KINDS)}")
    try:
        if name == "tensorboard":
            import torch.utils.tensorboard  # noqa: F401
        else:
            import wandb  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--report-to {name}: {one_line(error)}; install it with: pip install 'eagle-offline[tracking]'"
        ) from error


def _wandb_id(directory: Path) -> tuple[str, bool]:
    """Return the run's id at W&B and whether it is new; a sweep gives ids of its own in WANDB_RUN_ID."""
    path = directory / WANDB_ID_FILE
    recorded = path.read_text().strip() if path.is_file() else ""
    if recorded:
        return recorded, False
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_bytes(path, f"{run_id}\n".encode())
    return run_id, True


def _quieten_tensorboard() -> None:
    """Keep tensorboard's own writing thread from printing a traceback: what ended it is raised at the next row."""
    earlier = threading.excepthook
    if earlier.__module__ == __name__:
        return

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            earlier(failed)

    threading.excepthook = hook


def _say_off(name: str, error: BaseException) -> None:
    _say(f"--report-to {name} is switched off, training goes on without it: {one_line(error)}")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
