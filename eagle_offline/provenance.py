"""Where something came from: digests of files and settings, and the environment a result was made in.

Digests are xxh3_128 in hexadecimal: they find accidents (a changed file, a mixed-up cache), not attacks.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import stat
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from eagle_offline.errors import DataError

_READ_BYTES = 4 << 20
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".py", ".jinja")
_RECORDED_PACKAGES = ("eagle-offline", "torch", "transformers", "pyarrow", "zarr", "numcodecs", "zstandard", "numpy")


def digest_bytes(content: bytes) -> str:
    """Return the digest of ``content``."""
    return xxhash.xxh3_128_hexdigest(content)


def digest_json(value: Any) -> str:
    """Return the digest of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return digest_bytes(text.encode(errors="replace"))


def plain_size(path: Path) -> int:
    """Return the size of a plain file, or of the one that a link leads to.

    Raises:
        OSError: a pipe, which would be waited for, or a device, which never ends; or there is nothing.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a plain file")
    return status.st_size


def digest_file(path: Path) -> str:
    """Return the digest of a file's bytes, read in pieces.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    plain_size(path)
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def digest_checkpoint(directory: Path, *, rehash: bool = False) -> str:
    """Return the digest of a local model directory: names and contents of its weights, configs and code.

    Files of a hub snapshot are links to blobs named by their content's hash; that name is taken, nothing is read.
    Other files are digested once, in parallel, and remembered in the user's cache directory by path, size,
    modification time and inode.

    Args:
        directory: the model directory.
        rehash: read every file again.

    Raises:
        DataError: the directory holds no model files.
    """
    files = sorted(
        path for path in directory.iterdir() if path.suffix in _WEIGHT_SUFFIXES and not path.name.startswith(".")
    )
    if not files:
        raise DataError(f"{directory}: no model files found (expected config.json and *.safetensors)")
    remembered = {} if rehash else _read_remembered()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = dict(zip(files, pool.map(lambda path: _content_hash(path, remembered), files), strict=True))
    _remember({file_key(path): digest for path, digest in digests.items()})
    return digest_json({path.name: digest for path, digest in digests.items()})


def digest_merged(checkpoint_digest: str, adapter_digest: str | None) -> str:
    """Return the digest of the weights that run: a checkpoint's, with an adapter merged into them if there is one."""
    return checkpoint_digest if adapter_digest is None else digest_json([checkpoint_digest, adapter_digest])


def _content_hash(path: Path, remembered: dict[str, str]) -> str:
    blob = path.resolve()
    if blob.parent.name == "blobs" and path.is_symlink():
        return blob.name
    return remembered.get(file_key(path)) or digest_file(path)


def file_key(path: Path) -> str:
    """Return what changes with a file: its whole path, size, modification time and inode, with ``|`` between."""
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


def user_cache_directory() -> Path:
    """Return where things are kept that can be made again."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "eagle_offline"


def _remembered_file() -> Path:
    return user_cache_directory() / "file-digests.json"


def _read_remembered() -> dict[str, str]:
    try:
        remembered = json.loads(_remembered_file().read_text())
    except (OSError, ValueError):  # no memory, or a torn one: the files are read again
        return {}
    return remembered if isinstance(remembered, dict) else {}


def _remember(digests: dict[str, str]) -> None:
    file = _remembered_file()
    sibling = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sibling.write_text(json.dumps({**_read_remembered(), **digests}))
        os.replace(sibling, file)
    except OSError:  # only a memory: without it the files are read again next time
        sibling.unlink(missing_ok=True)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that can change a result."""
    versions = {}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def describe_environment(device: str) -> dict[str, Any]:
    """Return what the same bytes can be expected from: device model, library versions, thread count.

    Args:
        device: a torch device string.
    """
    import torch

    kind = torch.device(device).type
    model = torch.cuda.get_device_name(device) if kind == "cuda" else platform.machine()
    return {
        "device_kind": kind,
        "device_model": model,
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": package_versions(),
    }
