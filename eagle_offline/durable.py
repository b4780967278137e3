"""Files that are either there in full or not there at all.

Everything the project writes goes through here: to a sibling name first, made durable, then put in place. A crash
leaves a sibling with the temporary mark in its name, which no reader ever looks at.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eagle_offline.errors import EagleOfflineError, SpaceError, UsageError

TEMPORARY_MARK = ".partial-"

# A temporary file of another machine is taken for abandoned after this long.
ABANDONED_SECONDS = 24 * 3600


@contextmanager
def explained_os_errors(path: Path | str) -> Iterator[None]:
    """Turn what an operating system says about writing below ``path`` into one line with the way out.

    Raises:
        SpaceError: no space left, or the quota is used up.
        EagleOfflineError: no permission, or a read-only file system.
    """
    try:
        yield
    except EagleOfflineError:
        raise
    except OSError as error:
        raise _explained(path, error) from error
    except Exception as error:
        # Libraries that write from Rust have errors of their own, with the system's number in words.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise _explained(path, OSError(int(number[1]), os.strerror(int(number[1])))) from error


def _explained(path: Path | str, error: OSError) -> EagleOfflineError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpaceError(
            f"{path}: {error.strerror}; nothing committed is lost: free some space and run again with --resume"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return EagleOfflineError(f"{path}: cannot write: {error.strerror}; choose another directory")
    return EagleOfflineError(f"{path}: {error.strerror or error}")


def temporary_sibling(path: Path) -> Path:
    """Return an unused name beside ``path`` that says which process of which host writes it."""
    return path.with_name(f".{path.name}{TEMPORARY_MARK}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def fsync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Create ``directory`` and its parents.

    Raises:
        EagleOfflineError: not permitted, or something else stands in the way.
    """
    with explained_os_errors(directory):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise EagleOfflineError(f"{directory}: a file stands where a directory is needed") from error


def require_writable(directory: Path, flag: str) -> None:
    """Make ``directory`` and see that files can be made in it; ``flag`` is where the user gave it.

    Raises:
        UsageError: it cannot be written. SpaceError: no room left.
    """
    try:
        make_directory(directory)
        with explained_os_errors(directory), tempfile.TemporaryFile(dir=directory):
            pass
    except SpaceError:
        raise
    except EagleOfflineError as error:
        raise UsageError(f"{flag} {directory}: cannot be written ({error}); choose another") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a sibling name to write; on success its content durably replaces ``path``, on failure it is removed."""
    sibling = temporary_sibling(path)
    try:
        with explained_os_errors(path):
            yield sibling
            fsync_file(sibling)
            os.replace(sibling, path)
            fsync_directory(path.parent)
    finally:
        with suppress(OSError):  # in a directory that may not be written any more it stays, and is cleared away later
            sibling.unlink(missing_ok=True)


@contextmanager
def exclusive(directory: Path, doing: str) -> Iterator[None]:
    """Hold ``directory`` for one process of a host; the kernel lets go of it however the process ends.

    Raises:
        UsageError: another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        # Network file systems may not lock directories; then two runs in one place are the user's to avoid.
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"{directory}: another process is {doing} here; wait for it, or choose another --output-dir"
                ) from error
        yield
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of ``path`` durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_in_place(sibling: Path, path: Path) -> None:
    """Rename a file or a directory to ``path``; what stands there goes, and whoever has it open keeps it."""
    if not (path.is_dir() and sibling.is_dir()):
        os.replace(sibling, path)
        return
    former = temporary_sibling(path)
    os.rename(path, former)
    os.rename(sibling, path)
    remove(former)


def write_bytes(path: Path, content: bytes) -> None:
    """Durably replace ``path`` by ``content``."""
    with replacing(path) as sibling:
        sibling.write_bytes(content)


def create_exclusively(path: Path, content: bytes) -> bool:
    """Durably create ``path`` with ``content`` unless it is there; return whether this call created it.

    A hard link carries the whole content under the final name in one step and fails if the name is taken.
    """
    sibling = temporary_sibling(path)
    with explained_os_errors(path):
        try:
            sibling.write_bytes(content)
            fsync_file(sibling)
            os.link(sibling, path)
        except FileExistsError:
            return False
        finally:
            sibling.unlink(missing_ok=True)
        fsync_directory(path.parent)
    return True


def remove_abandoned(directory: Path) -> None:
    """Remove temporary files and directories whose writer is gone: dead on this host, or a day old."""
    # Not by `rglob`, which fails when a directory of a live writer gets its name meanwhile.
    below = (Path(root, name) for root, folders, files in os.walk(directory) for name in (*folders, *files))
    for path in [path for path in below if is_abandoned(path)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_abandoned(path: Path) -> bool:
    """Say whether a name is of unfinished work whose writer is gone: dead on this host, or silent for a day."""
    if not path.name.startswith(".") or TEMPORARY_MARK not in path.name:
        return False
    host, _, process = path.name.rpartition(TEMPORARY_MARK)[2].rpartition("-")[0].rpartition("-")
    if host == socket.gethostname() and process.isdigit():
        return not is_alive(int(process))
    return age_seconds(path) > ABANDONED_SECONDS


def age_seconds(path: Path) -> float:
    """Return how long ago anything of a file, or below a directory, was written; 0 for what is gone."""
    below = [os.path.join(root, name) for root, folders, files in os.walk(path) for name in (*folders, *files)]
    written = []
    for entry in [str(path), *below]:
        with suppress(FileNotFoundError):  # a live writer gives it its name meanwhile
            written.append(os.lstat(entry).st_mtime)
    return time.time() - max(written, default=time.time())


def is_alive(process_id: int) -> bool:
    """Say whether a process of this host runs."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
