"""What an input is called: a path or a hub id, with a revision and a split of its own where it has them.

Knows the spelling `NAME[@REVISION][:SPLIT]` and what stands on this machine's disk; opens nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eagle_offline.errors import DataError, UsageError
from eagle_offline.text.hub import is_hub_id
from eagle_offline.text.rows import Source, data_suffix

# The shortest name whose rest is a split; a slice has a colon too.
_OWN_SPLIT = re.compile(r"(?P<name>.+?):(?P<split>[\w.-]+|[\w.-]*\[[^\[\]]*\])", re.DOTALL)
_EXPECTED = "pass a file, a directory or a hub id `owner/name`, with `:SPLIT` behind it to take a part"


@dataclass(frozen=True)
class InputName:
    """One input as it was asked for.

    Attributes:
        name: A path as it was written, or a hub id.
        path: The file or directory; None for a hub dataset.
        split: The split or slice that stands behind the name; None where there is none.
        revision: The hub revision that stands behind the name; None where there is none.
    """

    name: str
    path: Path | None
    split: str | None = None
    revision: str | None = None


def listed_inputs(input_data: str | Sequence[str]) -> tuple[str, ...]:
    """Return the inputs one by one; a text is one input."""
    return (input_data,) if isinstance(input_data, str) else tuple(input_data)


def parse_input(text: str) -> InputName:
    """Read `NAME[@REVISION][:SPLIT]`; what exists on disk under the whole text is that, whatever is in its name.

    >>> parse_input("owner/name@main:train_sft[:5%]")
    InputName(name='owner/name', path=None, split='train_sft[:5%]', revision='main')

    Raises:
        DataError: There is nothing of this name.
        UsageError: An empty text, or a revision of a local path.
    """
    if not text.strip():
        raise UsageError(f"the input data is an empty string; {_EXPECTED}")
    for name, split in _readings(text):
        path = Path(name).expanduser()
        if os.path.exists(path):
            return InputName(name, path, split)
    for name, split in _readings(text):
        hub_id, at, revision = name.partition("@")
        if at and os.path.exists(Path(hub_id).expanduser()):
            raise UsageError(f"{text}: a revision ({revision}) belongs to a hub dataset, {hub_id} is a local path")
        if is_hub_id(hub_id) and data_suffix(Path(hub_id)) is None and (revision or not at) and ":" not in revision:
            return InputName(hub_id, None, split, revision or None)
    raise DataError(f"{text}: no such file or directory; {_EXPECTED}")


def _readings(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield (name, split): the whole text first, then what stands before and behind a colon."""
    yield text, None
    if match := _OWN_SPLIT.fullmatch(text):
        yield match["name"], match["split"]


def named_apart(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Give sources of one name names of their own: more of the path, or split and revision of a hub dataset.

    Several parts of one file share its name: row numbers are the file's own.
    """
    names = [source.name for source in sources]
    for depth in range(1, max((_depth(source) for source in sources), default=0) + 1):
        places: dict[str, set[object]] = {}
        for name, source in zip(names, sources, strict=True):
            places.setdefault(name, set()).add(_place(source))
        if all(len(found) == 1 for found in places.values()):
            break
        names = [
            name if len(places[name]) == 1 else _longer_name(source, depth)
            for name, source in zip(names, sources, strict=True)
        ]
    return tuple(replace(source, name=name) for name, source in zip(names, sources, strict=True))


def _place(source: Source) -> object:
    return source.path.absolute() if source.path is not None else (source.hub_id, source.split, source.revision)


def _depth(source: Source) -> int:
    return 2 if source.path is None else len(source.path.absolute().parts)


def _longer_name(source: Source, depth: int) -> str:
    """Return a name that says `depth` more than the plain one."""
    if source.path is not None:
        return "/".join(source.path.absolute().parts[-len(source.name.split("/")) - depth :])
    revision = f"@{source.revision}" if depth > 1 and source.revision else ""
    return f"{source.hub_id}{revision}:{source.split or ''}"
