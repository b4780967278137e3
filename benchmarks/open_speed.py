"""How long until a large cache is open, and how much memory does it take?

A cache of 1,000,000 samples in 5,000 shards whose records and index are real and whose shards are empty files (opening
reads none of them), opened in a fresh process: with its index, and from its records alone. Beside it the import that
opening needs, which is the share that no format can change.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.harness import Figures
from benchmarks.synthetic_cache import Shape, identity_of
from eagle_offline.cache.index import drop_indexes
from eagle_offline.cache.layout import FORMAT_VERSION, CommitRecord, SampleTable, record_file, shard_file
from eagle_offline.cache.manifest import Defaults, DraftVocabulary, Identity, Manifest, sealed, write_manifest
from eagle_offline.cache.writer import ensure_index
from eagle_offline.provenance import digest_bytes

NAME = "open_speed"
QUESTION = __doc__

_SHAPE = Shape(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, draft_vocab_size=32000
)

_OPEN = """
import json, sys, time
started = time.perf_counter()
import eagle_offline.cache.reader as reader
imported = time.perf_counter()
cache = reader.open_cache(sys.argv[1])
opened = time.perf_counter()
# Not ru_maxrss, which remembers the process that this one was forked from.
memory = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"samples": len(cache), "tokens": int(cache.lengths.sum()), "import_seconds": imported - started,
                  "open_seconds": opened - imported, "megabytes": memory / 1e6, "torch": "torch" in sys.modules}))
"""


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return the one case; it uses no device."""
    return {"1M-samples": measure} if device == "cpu" else {}


def measure(num_shards: int = 5000, shard_size: int = 200) -> Figures:
    """Return seconds and megabytes of a process that opens the cache, with the index and without."""
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory)
        identity = identity_of(np.full(num_shards * shard_size, 500), _SHAPE, "planes", shard_size)
        _write_cache(cache, identity)
        indexed = _open(cache)
        drop_indexes(cache)
        from_records = _open(cache)
    assert indexed["samples"] == from_records["samples"] == num_shards * shard_size
    assert indexed["tokens"] == from_records["tokens"]
    return {
        "seconds": indexed["open_seconds"],
        "megabytes": indexed["megabytes"],
        "share_of_records_seconds": indexed["open_seconds"] / from_records["open_seconds"],
        "seconds_from_records": from_records["open_seconds"],
        "megabytes_from_records": from_records["megabytes"],
        "import_seconds": indexed["import_seconds"],
        "samples": indexed["samples"],
        "shards": num_shards,
    }


def _open(cache: Path) -> dict[str, float]:
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", _OPEN, cache], check=True, capture_output=True).stdout)
        for _ in range(3)
    ]
    return sorted(runs, key=lambda run: run["open_seconds"])[1]


def _write_cache(cache: Path, identity: Identity) -> None:
    vocabulary = DraftVocabulary(size=_SHAPE.draft_vocab_size, digest="0" * 32, coverage=1.0)
    write_manifest(
        cache, Manifest(identity=identity, defaults=Defaults(draft_vocabulary=vocabulary), files={}, environment={})
    )
    generator = np.random.Generator(np.random.PCG64(0))
    for shard in range(identity.num_shards):
        record = _record(identity, shard, generator)
        (cache / record.file).touch()
        (cache / record_file(shard)).write_text(json.dumps(sealed(record.model_dump(mode="json"))))
    ensure_index(cache, identity)


def _record(identity: Identity, shard: int, generator: np.random.Generator) -> CommitRecord:
    count = identity.shard_samples(shard)
    lengths = generator.integers(16, 2048, count)
    first = shard * identity.capture.shard_size
    samples = SampleTable(
        sample_id=list(range(first, first + count)),
        num_tokens=lengths.tolist(),
        num_supervised=(lengths // 2).tolist(),
        num_target_positions=(lengths // 2 + 1).tolist(),
        num_in_vocab=(lengths // 2).tolist(),
        vocab_mass=(lengths / 2.1).tolist(),
        record_batch=list(range(count)),
        row=[0] * count,
        digest=[f"{value:016x}" for value in generator.integers(0, 1 << 63, count)],
    )
    digest = digest_bytes(str(shard).encode())
    return CommitRecord(
        format="eagle-offline-cache",
        version=FORMAT_VERSION,
        identity_digest=identity.digest,
        shard=shard,
        file=shard_file(shard, digest, "arrow"),
        file_bytes=0,
        digest=digest,
        samples=samples,
        lost=[],
        column_bytes={"aux_1": 0},
        encoding_errors={},
        finite=True,
        environment={},
    )
