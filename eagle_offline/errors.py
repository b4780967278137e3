"""Errors a user can cause, their exit codes, and how the command line ends.

Every error here is shown as one line without a traceback. It says where, what was found, what was expected and
the way out. Anything else that escapes is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_MISMATCH = 3
EXIT_DATA = 4
EXIT_RESUMABLE = 5
EXIT_SPACE = 6


class EagleOfflineError(Exception):
    """A failure with a cause that the user can act on; `exit_code` is the process's exit code."""

    exit_code = EXIT_FAILURE


class UsageError(EagleOfflineError):
    """A flag, a path or a setting that cannot be meant."""

    exit_code = EXIT_USAGE


class MismatchError(EagleOfflineError):
    """Two things that must belong together do not: manifest and settings, tokenizer and model, cache and run."""

    exit_code = EXIT_MISMATCH


class DataError(EagleOfflineError):
    """Input or cache data that is missing, corrupt or unusable."""

    exit_code = EXIT_DATA


class StoppedEarly(EagleOfflineError):
    """The run was asked to stop and did so at a point from which `--resume` goes on."""

    exit_code = EXIT_RESUMABLE


class SpaceError(EagleOfflineError):
    """No room left on the disk, or the quota is used up."""

    exit_code = EXIT_SPACE


_NUMBERED = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


def unreadable(path: object, what: str, error: Exception) -> EagleOfflineError:
    """Return what to raise for something that could not be read: damage, unless this process or machine ran out.

    Args:
        path: of what.
        what: is wrong with it, if it is.
        error: of the operating system, or of a library that passes it on in words.
    """
    number = getattr(error, "errno", None)
    if number is None and (match := _NUMBERED.search(str(error))):
        number = int(match[1] or match[2])
    if number in (errno.EMFILE, errno.ENFILE):
        return EagleOfflineError(f"{path}: {os.strerror(number)}; allow more (ulimit -n 4096) and run again")
    if number == errno.ENOMEM:
        return EagleOfflineError(f"{path}: {os.strerror(number)}; free some memory and run again")
    return DataError(f"{path}: {what}: {one_line(getattr(error, 'strerror', None) or error)}")


def printable(text: str) -> str:
    """Return a text in which nothing steers a terminal: control characters are written as escapes.

    Example:
        >>> printable("a\\x1b[2Jb")
        'a\\\\x1b[2Jb'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """Return the message of `error` as one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
