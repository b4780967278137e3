"""Datasets of the Hugging Face hub: one split, and the commit it was read at.

Knows ids, splits and revisions; what a row holds is not known here.
"""

from __future__ import annotations

import re
from typing import Any

from eagle_offline.errors import DataError, UsageError, one_line
from eagle_offline.provenance import digest_json

DEFAULT_SPLIT = "train"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PINNED_REVISION = re.compile(r"@([0-9a-f]{40})/")


def is_hub_id(text: str) -> bool:
    """Say whether `text` has the form `owner/name`."""
    return _HUB_ID.fullmatch(text) is not None


def load_split(hub_id: str, split: str | None, revision: str | None) -> Any:
    """Load one split of a hub dataset, slice included, as a `datasets.Dataset`.

    Raises:
        DataError: The hub cannot give it.
        UsageError: No such split, or several and none chosen.
    """
    import datasets

    if split is not None and split.startswith("["):
        split = DEFAULT_SPLIT + split
    try:
        loaded = datasets.load_dataset(hub_id, split=split, revision=revision)
    except Exception as error:  # whatever the hub client, the network or a loader raises: the user sees one line
        if "Unknown split" in str(error):
            raise UsageError(f"hub dataset {hub_id}: {one_line(error)}") from error
        raise DataError(
            f"{hub_id}: no such file or directory, and as a hub dataset it could not be loaded ({one_line(error)}); "
            "check the id, the network and access, or pass a local path"
        ) from error
    if not isinstance(loaded, dict):
        return loaded
    if DEFAULT_SPLIT in loaded:
        return loaded[DEFAULT_SPLIT]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise UsageError(f"hub dataset {hub_id}: several splits ({', '.join(loaded)}); choose one with --split")


def identify(hub_id: str, dataset: Any) -> tuple[str | None, str]:
    """Return the commit that a loaded split was fetched at, None if it is not known, and the split's digest."""
    files = sorted((dataset.info.download_checksums or {}).keys())
    pinned = next((match[1] for file in files if (match := _PINNED_REVISION.search(file))), None)
    # Recorded file names carry the commit they were fetched at; without them the fingerprint has to do.
    identity = [hub_id, str(dataset.split), len(dataset), files if pinned else dataset._fingerprint]
    return pinned, digest_json(identity)
