"""Files of a model or an adapter from the hub, kept where its client keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eagle_offline.errors import UsageError, one_line

CONFIG_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "*.py")

# In the order of preference.
WEIGHT_FILES = (("*.safetensors",), ("*.bin",))

# The same weights in another form, kept beside those that transformers loads.
_DUPLICATES = ("*/*.safetensors", "*/*.bin", "consolidated*")


def fetch(name: str, revision: str | None, patterns: Sequence[str], flag: str) -> Path:
    """Return a directory that has those files of a repository that match.

    Args:
        name: hub id.
        revision: branch, tag or commit; None for the main branch.
        patterns: such as ``*.json``.
        flag: where ``name`` was given.

    Raises:
        UsageError: not a hub id, or the hub does not give it.
    """
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(f"{flag} {name}: no such directory, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_DUPLICATES))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UsageError(
            f"{flag} {name}{at}: no such directory, and the hub does not give it; check the id, the network "
            f"and access (HF_TOKEN), or pass a local directory: {one_line(error)}"
        ) from error
