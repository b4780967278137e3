"""One builder of a token table at a time, agreed on by a file that several hosts may see.

The file names its holder, who keeps its modification time fresh; one that went stale may be taken over. It only
saves work: nothing breaks should two hold it. Knows nothing of what is built.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eagle_offline.durable import create_exclusively, explained_os_errors, is_alive

LOCK_STALE_SECONDS = 60.0
LOCK_HEARTBEAT_SECONDS = 5.0


def remove_dead_lock(path: Path) -> None:
    """Remove the lock of a holder that died after its work was done."""
    with suppress(OSError):
        if _is_stale(path):
            path.unlink(missing_ok=True)


def acquire_lock(path: Path) -> bytes | None:
    """Create the lock and return its content, or None while another holder seems alive; a dead one's is removed."""
    with explained_os_errors(path):
        if path.exists():
            if _is_stale(path):
                path.unlink(missing_ok=True)
            return None
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}).encode()
        try:
            return content if create_exclusively(path, content) else None
        except BaseException:
            _release(path, content)
            raise


@contextmanager
def held_lock(path: Path, content: bytes) -> Iterator[None]:
    """Keep the lock's modification time fresh during the block; remove it afterwards if it is still ours."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(LOCK_HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="token-table-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _release(path, content)


def _release(path: Path, content: bytes) -> None:
    """Remove the lock if it is still the one with this content."""
    with suppress(OSError):
        if path.read_bytes() == content:
            path.unlink()


def _is_stale(path: Path) -> bool:
    """Say whether the lock's holder has stopped: no heartbeat for long, or its process is gone from this host."""
    try:
        age_seconds = time.time() - path.stat().st_mtime
        holder: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return False
    except ValueError:  # not ours, or torn by a crash: its age has to tell
        holder = None
    if age_seconds > LOCK_STALE_SECONDS:
        return True
    same_host = isinstance(holder, dict) and holder.get("host") == socket.gethostname()
    return same_host and isinstance(holder.get("pid"), int) and not is_alive(holder["pid"])
