"""Caches written when format 2 was frozen open in every later version with these values, or are refused by number.

``python -m tests.cache.test_golden DIRECTORY`` writes such caches anew, for a new format version.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle_offline import open_cache
from eagle_offline.cache.layout import FORMAT_VERSION
from eagle_offline.cache.verify import verify_cache
from eagle_offline.errors import DataError, MismatchError
from tests import builders
from tests.cache.conftest import NARROW
from tests.cache.forgeries import digest_of

GOLDEN = Path(__file__).parent.parent / "golden"
MAX_BYTES = 150_000
VALUES = "values.json"

CACHES: dict[str, dict[str, Any]] = {
    "arrow-exact": {"shard_size": 2},
    "arrow-lossy": {
        "shard_size": 4, "split": "[:2]", "state_encoding": "fp8", "target_encoding": "topk", "top_k": 4,
        "aux_layer_ids": "1,4",
    },
    "zarr": {"shard_size": 4, "split": "[:2]", "format": "zarr", "mantissa_bits": 3, "aux_layer_ids": "2"},
}  # fmt: skip


def hexadecimal(tensor: torch.Tensor | None) -> Any:
    """A tensor's dtype, shape and bytes."""
    if tensor is None:
        return None
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype), list(tensor.shape), content.hex()]


def values_of(path: Path) -> dict[str, Any]:
    """All that a cache says, as plain JSON."""
    cache = open_cache(path)
    samples = []
    for index in range(len(cache)):
        sample = cache[index]
        told = sample.supervision
        samples.append(
            {
                "sample_id": sample.sample_id,
                "input_ids": sample.input_ids.tolist(),
                "loss_mask": sample.loss_mask.int().tolist(),
                "aux_hidden_states": hexadecimal(sample.aux_hidden_states),
                "positions": told.positions.tolist(),
                "last_hidden_state": hexadecimal(told.last_hidden_state),
                "target_probs": hexadecimal(told.target_probs),
                "target_argmax": told.target_argmax.tolist(),
                "target_log_normalizer": hexadecimal(told.target_log_normalizer),
            }
        )
    head = cache.head
    return {
        "identity_digest": cache.manifest.identity.digest,
        "selected_token_ids": cache.selected_token_ids.tolist(),
        "head": [head.scale, head.soft_cap, hexadecimal(head.bias), _sha256(head.weight)],
        "embeddings": _sha256(cache.embeddings),
        "samples": samples,
    }


def readable(values: dict[str, Any]) -> str:
    """JSON with a value, or a sample, a line."""
    samples = ",\n".join(json.dumps(sample, separators=(",", ":")) for sample in values.pop("samples"))
    lines = [f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))},\n" for name, value in values.items()]
    return "{\n" + "".join(lines) + f'"samples": [\n{samples}\n]\n}}\n'


def _sha256(tensor: torch.Tensor) -> list[Any]:
    dtype, shape, content = hexadecimal(tensor)
    return [dtype, shape, hashlib.sha256(bytes.fromhex(content)).hexdigest()]


def write_golden(directory: Path) -> None:
    """Write the caches and what they say."""
    rows = [
        {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "bc" * n}]}
        for n in (1, 2, 3, 1)
    ]
    chat = builders.write_jsonl(directory / "chat.jsonl", rows)
    target = builders.shared_target("Llama", torch.bfloat16, changes=NARROW)
    for name, flags in CACHES.items():
        cache = builders.make_cache(directory / name, target, chat, **flags)
        (directory / f"{name}.{VALUES}").write_text(readable(values_of(cache)))
    chat.unlink()
    (directory / ".gitattributes").write_text("# Digests cover every byte: git changes no line end.\n* binary\n")


@pytest.mark.parametrize("name", CACHES)
def test_a_golden_cache_opens_with_the_values_of_the_day_it_was_written(name: str) -> None:
    before = builders.tree(GOLDEN)
    expected = json.loads((GOLDEN / f"{name}.{VALUES}").read_bytes())
    if json.loads((GOLDEN / name / "manifest.json").read_bytes())["version"] != FORMAT_VERSION:
        with pytest.raises(MismatchError, match="cache version 2"):
            open_cache(GOLDEN / name)
        return
    assert values_of(GOLDEN / name) == expected
    assert verify_cache(GOLDEN / name) == []
    assert len(expected["samples"]) == (4 if name == "arrow-exact" else 2)
    assert builders.tree(GOLDEN) == before


@pytest.mark.parametrize("name", CACHES)
def test_a_golden_cache_opens_without_its_index(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / name)
    for index in (tmp_path / name).glob("index-*"):
        index.unlink()
    assert values_of(tmp_path / name) == json.loads((GOLDEN / f"{name}.{VALUES}").read_bytes())


@pytest.mark.parametrize("version", [1, 2, 4, 10**9, -3, "3", 3.5, None])
@pytest.mark.parametrize("name", CACHES)
def test_another_version_is_refused_by_number(name: str, version: Any, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_bytes())
    manifest.pop("self_digest")
    manifest["version"] = version
    (tmp_path / "c" / "manifest.json").write_text(json.dumps({**manifest, "self_digest": digest_of(manifest)}))
    with pytest.raises(MismatchError) as refused:
        open_cache(tmp_path / "c")
    said = str(refused.value)
    assert f"version {version!r}, this program reads version {FORMAT_VERSION}" in said
    assert "\n" not in said
    ended = builders.run_cli("inspect-manifest", tmp_path / "c")
    assert (ended.code, len(ended.errors)) == (3, 1)


def test_a_record_of_another_version_is_refused_in_a_line(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "arrow-exact", tmp_path / "c")
    next((tmp_path / "c").glob("index-*")).unlink()
    record = json.loads((tmp_path / "c" / "commit-000001.json").read_bytes())
    record.pop("self_digest")
    record["version"] = 2
    (tmp_path / "c" / "commit-000001.json").write_text(json.dumps({**record, "self_digest": digest_of(record)}))
    with pytest.raises(DataError, match=r"commit-000001.json: version: [^\n]*3[^\n]*$"):
        open_cache(tmp_path / "c")


def test_golden_files_are_small_and_git_leaves_them_as_they_are() -> None:
    files = sorted(path for path in GOLDEN.rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    root = GOLDEN.parent.parent
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    names = [path.relative_to(root).as_posix() for path in files if path.name != ".gitattributes"]
    asked = subprocess.run(
        ["git", "check-attr", "text", "--stdin"],
        input="\n".join(names),
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout.splitlines() == [f"{name}: text: unset" for name in names]
    ignored = subprocess.run(
        ["git", "check-ignore", "--stdin"],
        input="\n".join(names),
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not ignored.stdout


if __name__ == "__main__":
    write_golden(Path(sys.argv[1]))
