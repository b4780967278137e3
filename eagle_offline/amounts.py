"""Bytes and times in words."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """Return bytes in words.

    Example:
        >>> size(123_456_789)
        '123.5 MB'
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def duration(hours: float) -> str:
    """Return a time in words.

    Example:
        >>> duration(0.25)
        '15 min'
    """
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours >= 1 / 30 else f"{hours * 3600:.0f} s"
