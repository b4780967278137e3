"""``status.json``: how the last run in a directory ended, for launchers that hide exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eagle_offline.cache.layout import STATUS_FILE
from eagle_offline.durable import write_bytes
from eagle_offline.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESUMABLE, EagleOfflineError, MismatchError, UsageError

_STATES = {EXIT_DONE: "done", EXIT_RESUMABLE: "resumable"}


@contextmanager
def reported_status(directory: Path, process_index: int = 0, process_count: int = 1) -> Iterator[None]:
    """Write how the block ended to ``status.json``, or to a file of its own for one of several processes.

    A refusal (`UsageError`, `MismatchError`) begins nothing, so it leaves the status of what is there as it is.
    """
    name = STATUS_FILE if process_count == 1 else f"status-{process_index:04d}.json"
    try:
        yield
    except (UsageError, MismatchError):
        raise
    except EagleOfflineError as error:
        _write(directory / name, error.exit_code, str(error))
        raise
    except BaseException as error:
        _write(directory / name, EXIT_FAILURE, f"{type(error).__name__}: {error}")
        raise
    _write(directory / name, EXIT_DONE, "")


def _write(path: Path, exit_code: int, why: str) -> None:
    state = _STATES.get(exit_code, "failed")
    content = json.dumps({"state": state, "exit_code": exit_code, "why": why}, indent=2) + "\n"
    # A full or read-only disk must not hide the error that is being reported; the exit code still says it.
    with suppress(EagleOfflineError, OSError):
        write_bytes(path, content.encode())
