"""The reading examples of `schemas/README.md` read what the program wrote, without the program's code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagle_offline.cache.layout import FORMAT_VERSION, CommitRecord, FieldLayout, SampleTable
from eagle_offline.cache.manifest import Manifest
from eagle_offline.cache.reader import open_cache
from tests import builders

PAGE = Path(__file__).parent.parent / "schemas" / "README.md"
BLOCKS = [block.split("```")[0] for block in PAGE.read_text().split("```python")[1:]]
BEGIN, ARROW, PLANES, BITS, FP8, TOPK, ZARR = BLOCKS

# Nobody's code but the libraries that the page names.
STRANGER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("eagle_offline", "torch", "tests"):
            raise ImportError(f"{name} is not a stranger's")
sys.meta_path.insert(0, Refuse())
try:
    import eagle_offline
except ImportError:
    pass
else:
    raise SystemExit("the program's code is here")
"""

EXAMPLES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "planes": ([BEGIN, ARROW, PLANES], {}),
    "1 mantissa bit": ([BEGIN, ARROW, BITS], {"mantissa_bits": 1}),
    "2 mantissa bits": ([BEGIN, ARROW, BITS], {"mantissa_bits": 2}),
    "5 mantissa bits": ([BEGIN, ARROW, BITS], {"mantissa_bits": 5}),
    "6 mantissa bits": ([BEGIN, ARROW, BITS], {"mantissa_bits": 6}),
    "fp8": ([BEGIN, ARROW, FP8], {"state_encoding": "fp8"}),
    "fp8 of fp16": ([BEGIN, ARROW, FP8], {"state_encoding": "fp8", "dtype": "fp16"}),
    "topk": ([BEGIN, ARROW, TOPK], {"target_encoding": "topk", "top_k": 7}),
    "topk of fp32": (
        [BEGIN, ARROW, TOPK],
        {"target_encoding": "topk", "top_k": 7, "state_encoding": "raw", "dtype": "fp32"},
    ),
    "zarr": ([BEGIN, ZARR], {"format": "zarr"}),
    "zarr by blosc": ([BEGIN, ZARR], {"format": "zarr", "compressor": "blosc"}),
}


@pytest.fixture(scope="module")
def cache_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small cache, called `C`, as an example wants it; a width that no number of bits divides."""
    changes = (("hidden_size", 12), ("num_attention_heads", 2), ("num_key_value_heads", 1), ("head_dim", 6))
    target = builders.shared_target("Llama", changes=changes)

    def made(name: str) -> Path:
        directory = tmp_path_factory.mktemp("page")
        return builders.make_cache(directory / "C", target, builders.shared_chat(5), **EXAMPLES[name][1])

    return made


def run(blocks: list[str], directory: Path) -> np.ndarray:
    (directory / "read.py").write_text("\n".join([STRANGER, *blocks, "np.save('values.npy', values)"]))
    done = subprocess.run([sys.executable, "-I", "read.py"], cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(directory / "values.npy", allow_pickle=False)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_gives_what_open_cache_gives(cache_of: Callable[[str], Path], name: str) -> None:
    path = cache_of(name)
    values = run(EXAMPLES[name][0], path.parent)
    cache = open_cache(path)
    supervision = cache[0].supervision
    expected = cache[0].aux_hidden_states[:, :12] if name[:4] != "topk" else supervision.target_probs
    assert expected is not None
    assert values.shape == tuple(expected.shape)
    assert np.array_equal(values.astype(np.float32).view(np.uint32), expected.float().numpy().view(np.uint32))


def test_an_example_is_refused_the_program_s_code(tmp_path: Path) -> None:
    for name in ("eagle_offline", "eagle_offline.cache.reader", "torch"):
        with pytest.raises(AssertionError, match="not a stranger's"):
            run([f"import {name}"], tmp_path)


def test_the_page_names_every_field_of_manifest_record_and_layout() -> None:
    page = PAGE.read_text()
    names = {*Manifest.model_fields, *CommitRecord.model_fields, *SampleTable.model_fields, *FieldLayout.model_fields}
    for schema in ("manifest", "commit-record", "aside-reasons"):
        document = json.loads((PAGE.parent / f"{schema}.schema.json").read_bytes())
        names |= set(document["properties"])
        names |= {key for part in document["$defs"].values() for key in part.get("properties", {})}
    missing = sorted(
        name for name in names if f"`{name}`" not in page and f"`{name}." not in page and f".{name}`" not in page
    )
    assert not missing


def test_the_page_is_of_this_version() -> None:
    assert f"# The cache format, version {FORMAT_VERSION}\n" in PAGE.read_text()
    assert f"`version` {FORMAT_VERSION};" in PAGE.read_text()
