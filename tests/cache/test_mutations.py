"""Random damage gives the right answer or an error of ours: never another exception, a crash, a hang, wrong data."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import xxhash

from tests import builders
from tests.cache import forgeries, mutations
from tests.cache.conftest import NARROW
from tests.cache.forgeries import Forged
from tests.cache.mutations import Mutation, Odd

SHARE, MANY = 160, 6000  # mutations of one kind of file, by default and under `slow`
KINDS = ("manifest.json", "commit-*.json", "shard-*.arrow")
BESIDE = ("head.safetensors", "embeddings.safetensors", "vocab/*", "tokens/*", "target/*")


def files(cache: Path, patterns: str | tuple[str, ...]) -> list[str]:
    found = [
        path.relative_to(cache).as_posix()
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        for path in sorted(cache.glob(pattern))
        if path.stat().st_size
    ]
    assert found
    return found


def surveyed(
    cache: Path, work: Path, patterns: str | tuple[str, ...], count: int, seed: int, *, data: bool = True
) -> list[tuple[mutations.Mutation, dict[str, str]]]:
    expected = mutations.everything(cache)
    drawn = mutations.mutations(cache, files(cache, patterns), count, seed)

    def look(directory: Path) -> dict[str, str]:
        found = mutations.read(directory, expected)
        return {
            "read": "another head or vocabulary" if found == "WRONG DATA" and not data else found,
            "inspect": mutations.inspect(directory, verify=False),
            "verify": mutations.inspect(directory, verify=True),
        }

    return list(zip(drawn, mutations.survey(cache, work, drawn, look), strict=True))


def orderly(outcome: str) -> bool:
    return outcome in ("same", "refused", "clean", "noticed", "another head or vocabulary")


def check_orderly(results: list[tuple[mutations.Mutation, dict[str, str]]]) -> None:
    disorderly = [
        f"{how} {outcome} after {mutation.what}"
        for mutation, found in results
        for how, outcome in found.items()
        if not orderly(outcome)
    ]
    kinds = Counter(line.split(" after ")[0][:60] for line in disorderly)
    assert not disorderly, f"{len(disorderly)} of {len(results)}: {kinds.most_common(12)}; the first: {disorderly[:3]}"


COUNTS = [SHARE, pytest.param(MANY, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_to_cache_files_is_refused_or_harmless(
    narrow: Path, tmp_path: Path, kind: str, count: int
) -> None:
    results = surveyed(narrow, tmp_path, kind, count, seed=count)
    check_orderly(results)
    assert sum(found.get("read") == "refused" for _, found in results) > count / 2


@pytest.mark.parametrize("count", COUNTS)
def test_random_damage_to_what_comes_beside_is_orderly(narrow: Path, tmp_path: Path, count: int) -> None:
    results = surveyed(narrow, tmp_path, BESIDE, count, seed=count, data=False)
    check_orderly(results)
    unnoticed = [mutation.what for mutation, found in results if found.get("verify") != "noticed"]
    assert not unnoticed, f"{len(unnoticed)} of {count} not noticed by --verify: {unnoticed[:3]}"


@pytest.mark.parametrize("count", COUNTS)
def test_random_damage_to_larger_shards_is_refused_or_harmless(whole: Path, tmp_path: Path, count: int) -> None:
    check_orderly(surveyed(whole, tmp_path, "shard-*.arrow", count // 5, seed=count))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_damage_that_changes_an_answer_is_noticed_by_verify(
    narrow: Path, tmp_path: Path, kind: str, count: int
) -> None:
    results = surveyed(narrow, tmp_path, kind, count, seed=count + 1)
    unnoticed = [m.what for m, found in results if found.get("verify") == "clean" and found.get("read") != "same"]
    assert not unnoticed, f"{len(unnoticed)} of {count}: {unnoticed[:3]}"


# Every encoding in both formats, an index beside the records.
ENCODED: dict[str, dict[str, Any]] = {
    "planes": {},
    "bits": {"mantissa_bits": 3, "target_encoding": "dense"},
    "raw": {"state_encoding": "raw", "dtype": "fp16"},
    "fp8": {"state_encoding": "fp8", "target_encoding": "topk", "top_k": 4},
    "zarr-planes": {"format": "zarr"},
    "zarr-bits": {"format": "zarr", "mantissa_bits": 2},
    "zarr-raw": {"format": "zarr", "state_encoding": "raw", "dtype": "fp32", "target_encoding": "dense"},
    "zarr-fp8": {
        "format": "zarr",
        "compressor": "blosc",
        "state_encoding": "fp8",
        "target_encoding": "topk",
        "top_k": 4,
    },
}
FORGED = {"arrow": 150, "zarr": 100}  # of each of four caches, a thousand together; ten times as many under `slow`
MEMORY_BYTES = 512 << 20  # more than a reader of a few kilobytes may touch


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Four tiny samples in two shards, by the name of how they are stored; never to be changed."""
    directory, made = tmp_path_factory.mktemp("encoded"), {}
    rows = [
        {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "bc" * n}]}
        for n in (1, 2, 3, 1)
    ]
    chat = builders.write_jsonl(directory / "chat.jsonl", rows)

    def cache(name: str) -> Path:
        if name not in made:
            target = builders.shared_target("Llama", changes=NARROW)
            made[name] = builders.make_cache(directory / name, target, chat, shard_size=2, **ENCODED[name])
        return made[name]

    return cache


def tree_of(cache: Path) -> dict[str, bytes]:
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def judged(
    cache: Path, work: Path, drawn: list[Mutation], *, seconds: int = mutations.SECONDS, outside: bool = True
) -> list[dict[str, str]]:
    """What opening, reading, inspecting, verifying and a trial repair make of each mutation.

    Beside each copy lies another cache, whole, so that a name that leads out of the copy leads to something.
    """
    shutil.copytree(cache, work, dirs_exist_ok=True)
    expected = mutations.everything(cache)
    watching: dict[int, mutations.Outside] = {}
    begun: dict[int, int] = {}

    def look(directory: Path) -> dict[str, str]:
        process = os.getpid()
        if process not in watching:
            watching[process] = mutations.Outside(work, directory)
            begun[process] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        watching[process].found()
        found = {
            "read": mutations.read(directory, expected),
            "inspect": mutations.inspect(directory, verify=False),
            "verify": mutations.command("verify", str(directory), "--json"),
        }
        opened = [path for path in watching[process].found() if outside]
        swollen = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun[process]) << 10
        if opened:
            found["outside"] = f"opened {opened}"
        if swollen > MEMORY_BYTES:
            found["memory"] = f"{swollen} bytes"
        return found

    return mutations.survey(cache, work, drawn, look, seconds)


def outcome(found: dict[str, str]) -> str:
    """One word for what became of a cache, or what went wrong."""
    for how, said in found.items():
        if said not in ("same", "refused", "clean", "noticed", "WRONG DATA"):
            return f"{how}: {said}"
    if found["read"] == "WRONG DATA":
        # Digests that agree with other data make another cache of it, and nobody can tell; without, it is noticed.
        return "another cache, in itself whole" if found["verify"] == "clean" else "other data, noticed by verify"
    if found["read"] == "refused":
        return "an error of ours"
    return "the right answer" if found["verify"] == "clean" else "the right answer, noticed by verify"


ORDERLY = (
    "the right answer",
    "the right answer, noticed by verify",
    "an error of ours",
    "another cache, in itself whole",
    "other data, noticed by verify",
)


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ENCODED)
def test_a_cache_that_an_attacker_made_is_an_error_or_an_answer(
    encoded: Callable[[str], Path], tmp_path: Path, name: str, times: int
) -> None:
    cache = encoded(name)
    count = times * FORGED["zarr" if name.startswith("zarr") else "arrow"]
    tree, rng = tree_of(cache), random.Random(f"{name} {times}")
    drawn = [forgeries.forgery(tree, rng) for _ in range(count)]
    counted: Counter[str] = Counter()
    wrong = []
    for mutation, found in zip(drawn, judged(cache, tmp_path / "work", drawn), strict=True):
        result = outcome(found)
        counted[result if result in ORDERLY else "wrong"] += 1
        if result not in ORDERLY:
            wrong.append(f"{result} after {mutation.what}")
    print(f"{name}: {dict(counted.most_common())}")  # noqa: T201  the counts, for -rP
    assert not wrong, f"{len(wrong)} of {count}: " + "\n".join(line[:300] for line in wrong[:12])
    assert counted["an error of ours"] > count / 4
    assert counted["the right answer"] > count / 20


@pytest.mark.parametrize("name", ["planes", "zarr-planes"])
def test_links_pipes_devices_and_holes_in_the_place_of_files_do_no_harm(
    encoded: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    cache, secret = encoded(name), tmp_path / "secret"
    secret.write_text(f"{mutations.CANARY}\n")
    files = [file for file in tree_of(cache) if ".zarr/" not in file or file.endswith(("zarr/zarr.json", "ids/c.0.0"))]
    places = [
        Odd("link", str(secret)),
        Odd("link", "/dev/zero"),
        Odd("link", "/dev/full"),
        Odd("pipe"),
        Odd("directory"),
        Odd("hole", str(1 << 40)),
    ]
    drawn = [Mutation(file, odd, f"{file}: {odd}") for file in files for odd in [*places, None]]
    drawn += [Mutation(file, Odd("link", file.split("/")[-1]), f"{file}: a link to itself") for file in files]
    results = judged(cache, tmp_path / "work", drawn, seconds=10, outside=False)
    wrong = [
        f"{said} after {m.what}"
        for m, found in zip(drawn, results, strict=True)
        if (said := outcome(found)) not in ORDERLY
    ]
    assert not wrong, f"{len(wrong)} of {len(drawn)}: {wrong[:5]}"


def forged(tree: dict[str, bytes], change: Callable[[Forged], Any], what: str) -> Mutation:
    """One deliberate change of a cache without an index, digests true."""
    cache = Forged.of(tree)
    change(cache)
    files = cache.settle(random.Random(0))
    files = {name: content for name, content in files.items() if not name.startswith("index-")}
    changes: dict[str, bytes | Odd | None] = {name: None for name in tree if name not in files}
    changes |= {name: content for name, content in files.items() if tree.get(name) != content}
    return Mutation.of(changes, what)


def nested(depth: int, inner: Any = None) -> Any:
    for _ in range(depth):
        inner = {"a": inner}
    return inner


def converted(depth: int) -> Any:
    inner = None
    for _ in range(depth):
        inner = {"identity_digest": "0" * 32, "samples": None, "earlier": inner}
    return inner


def at(document: str, *keys: str | int) -> Callable[[Forged], Any]:
    """What leads to a place in the manifest or in the first record."""

    def find(cache: Forged) -> Any:
        node: Any = cache.manifest if document == "manifest" else cache.records["commit-000000.json"]
        for key in keys:
            node = node[key]
        return node

    return find


def put(document: str, *path: Any) -> Callable[[Forged], Any]:
    """A change: the last of ``path`` is put where the others lead."""
    *keys, last, value = path
    return lambda cache: at(document, *keys)(cache).__setitem__(last, value)


CAPTURE = ("identity", "capture")
NOTHING = {"num_bytes": 1, "digest": "0" * 32}
NAMED: dict[str, tuple[Callable[[Forged], Any], str | None]] = {
    **{f"environment {n} deep": (put("manifest", "environment", "deep", nested(n)), None) for n in (200, 300, 600)},
    **{
        f"conversions {n} deep": (put("manifest", "identity", "converted_from", converted(n)), None)
        for n in (50, 300, 500)
    },
    "record 300 deep": (put("record", "environment", "deep", nested(300)), None),
    "no layers": (put("manifest", *CAPTURE, "aux_layer_ids", []), "an error of ours"),
    "another layer": (put("manifest", *CAPTURE, "aux_layer_ids", 2, 5), "an error of ours"),
    "layers of no column": (put("manifest", *CAPTURE, "aux_layer_ids", [1, 3]), "an error of ours"),
    "a layer beyond": (put("manifest", "identity", "target", "num_layers", 4), "an error of ours"),
    "another width": (put("manifest", *CAPTURE, "fields", 0, "width", 9), "an error of ours"),
    "the widest": (put("manifest", *CAPTURE, "fields", 3, "width", 1 << 24), "an error of ours"),
    "rows of another kind": (
        put("manifest", *CAPTURE, "fields", 0, "rows", "supervised_positions"),
        "an error of ours",
    ),
    "another hidden size": (put("manifest", "identity", "target", "hidden_size", 16), "an error of ours"),
    "another vocabulary": (put("manifest", "identity", "target", "vocab_size", 271), "an error of ours"),
    "a vocabulary of terabytes": (put("manifest", "identity", "target", "vocab_size", 1 << 45), "an error of ours"),
    "a vocabulary of 10**400": (put("manifest", "identity", "target", "vocab_size", 10**400), "an error of ours"),
    "a size of 10**400": (
        put("manifest", "identity", "dataset", "sources", 0, "num_bytes", 10**400),
        "an error of ours",
    ),
    "a draft vocabulary of another size": (
        put("manifest", "defaults", "draft_vocabulary", "size", 63),
        "an error of ours",
    ),
    "a shard of 10**400 bytes": (put("record", "file_bytes", 10**400), "an error of ours"),
    "a column of 10**400 bytes": (put("record", "column_bytes", "aux_1.exponent", 10**400), "an error of ours"),
    "2**31 samples": (put("manifest", "identity", "dataset", "num_samples", 1 << 31), "an error of ours"),
    "a shard size of 10**400": (put("manifest", *CAPTURE, "shard_size", 10**400), "an error of ours"),
    "a length of 10**400": (put("manifest", "identity", "text", "seq_length", 10**400), "an error of ours"),
    "another draft vocabulary": (
        put("manifest", "defaults", "draft_vocabulary", "digest", "0" * 32),
        "an error of ours",
    ),
    "a shard outside": (put("record", "file", "../shard-000000-" + "0" * 32 + ".arrow"), "an error of ours"),
    "a shard anywhere": (put("record", "file", "/dev/zero"), "an error of ours"),
    "a shard with Arabic digits": (put("record", "file", "shard-٠٠٠٠٠٠-" + "0" * 32 + ".arrow"), "an error of ours"),
    "a shard, and a line": (put("record", "file", "shard-000000-" + "0" * 32 + ".arrow\n"), "an error of ours"),
    "a companion outside": (put("manifest", "files", "../head.safetensors", NOTHING), "an error of ours"),
    "a companion anywhere": (put("manifest", "files", "/etc/passwd", NOTHING), "an error of ours"),
    "a companion that steers": (put("manifest", "files", "\x1b[2J", NOTHING), "an error of ours"),
    "a companion with a long name": (put("manifest", "files", "a/" * 3000 + "x", NOTHING), None),
    "a companion written backwards": (put("manifest", "files", "\u202e\u2066x", NOTHING), None),
    "five thousand companions": (lambda c: c.manifest["files"].update({f"f{i}": NOTHING for i in range(5_000)}), None),
    "a target that steers": (put("manifest", "identity", "target", "id", "\x1b[2J\nx\x07"), None),
    "inputs that steer": (
        put("manifest", "environment", "inputs", {"input_data": "\x1b[2J", "target_model": "a\nb"}),
        None,
    ),
    "inputs that are a list": (put("manifest", "environment", "inputs", [1]), None),
    "a reason that steers": (
        lambda c: c.records["commit-000000.json"]["lost"].append({"sample_id": 3, "reason": "\x1b[2J\n"}),
        None,
    ),
    "losses that steer": (lambda c: at("manifest", *CAPTURE, "fields", 0, "losses")(c).append("\x1b[2J" * 9999), None),
    "a sample number of 10**400": (put("record", "samples", "sample_id", 0, 10**400), "an error of ours"),
}


def beyond_the_vocabulary(cache: Forged, column: str, token: int) -> None:
    """Put a token that the target does not have into the first sample, its digest true."""
    record = cache.records["commit-000000.json"]
    reader = pa.ipc.open_file(cache.files[record["file"]])
    rows = reader.read_all().to_pylist()
    rows[0][column][0] = token
    record["samples"]["digest"][0] = forgeries.arrow_sample_digest(rows[0], reader.schema.names[5:])
    batch = pa.RecordBatch.from_pylist(rows, schema=reader.schema)
    cache.replace_shard(record, {"": forgeries.ipc_file(reader.schema, [batch])})


for _column in ("input_ids", "target_argmax"):
    for _token in (-1, -(2**31), 272, 2**31 - 1):
        NAMED[f"{_token} among {_column}"] = (
            lambda c, column=_column, token=_token: beyond_the_vocabulary(c, column, token),  # type: ignore[misc]
            "an error of ours",
        )


def settings_elsewhere(cache: Forged, place: Any) -> None:
    settings = {**cache.manifest["environment"]["inputs"], "output_dir": place}
    cache.files["config.json"] = (json.dumps(settings, indent=2) + "\n").encode()


for _place in ("\0", "a\0b", "\x1b[2J\n", "\ud800", "x" * 6000, "~root", None, {"a": 1}):
    NAMED[f"settings at {_place!r:.20}"] = (lambda c, place=_place: settings_elsewhere(c, place), None)  # type: ignore[misc]


@pytest.fixture(scope="session")
def of_names(encoded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    cache = encoded("planes")
    tree = tree_of(cache)
    drawn = [forged(tree, change, what) for what, (change, _) in NAMED.items()]
    return dict(zip(NAMED, judged(cache, tmp_path_factory.mktemp("names") / "work", drawn), strict=True))


@pytest.mark.parametrize("what", NAMED)
def test_one_thing_forged(of_names: dict[str, dict[str, str]], what: str) -> None:
    found = outcome(of_names[what])
    assert found in ORDERLY
    assert NAMED[what][1] in (None, found)


def test_nesting_as_deep_as_can_be_read_is_an_error_or_an_answer(
    encoded: Callable[[str], Path], tmp_path: Path
) -> None:
    cache = encoded("planes")
    for name in ("manifest.json", "commit-000000.json"):
        document = json.loads((cache / name).read_bytes())
        del document["self_digest"]
        document["environment"]["deep"] = "mark"
        canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        drawn = []
        for depth in [*range(700, 1000, 4), 5_000, 50_000]:
            inner = "[" * depth + "]" * depth
            seal = xxhash.xxh3_128_hexdigest(canonical.replace('"mark"', inner).encode())
            text = json.dumps({**document, "self_digest": seal}).replace('"mark"', inner)
            drawn.append(Mutation(name, text.encode(), f"{depth} deep"))
        results = judged(cache, tmp_path / name, drawn)
        found = [(m.what, said) for m, r in zip(drawn, results, strict=True) if (said := outcome(r)) not in ORDERLY]
        assert not found


RECORD_NAMES = {
    "commit-0000000.json": True,
    "commit-٠٠٠٠٠٠.json": True,
    "commit-000000.json\n": True,
    "commit-000000.jsonx": True,
    f"commit-{'9' * 200}.json": True,
    "commit-000002.json": False,
    "commit-2147483648.json": False,
    "commit-9999999999.json": False,
}


def test_a_record_counts_under_one_name_only(encoded: Callable[[str], Path], tmp_path: Path) -> None:
    cache = encoded("planes")
    content = (cache / "commit-000000.json").read_bytes()
    drawn = [Mutation(name, content, repr(name)) for name in RECORD_NAMES]
    results = judged(cache, tmp_path / "work", drawn)
    for (name, ignored), found in zip(RECORD_NAMES.items(), results, strict=True):
        assert outcome(found) == ("the right answer" if ignored else "an error of ours"), (name, found)


@pytest.mark.slow
def test_a_million_missing_shards_are_said_in_time(encoded: Callable[[str], Path], tmp_path: Path) -> None:
    cache = encoded("planes")
    drawn = [forged(tree_of(cache), put("manifest", "identity", "dataset", "num_samples", 1 << 21), "2**21 samples")]
    (found,) = judged(cache, tmp_path / "work", drawn, seconds=60)
    assert outcome(found) == "an error of ours"


def test_files_outside_are_noticed_by_this_test_itself(tmp_path: Path) -> None:
    for name in ("work/outside.json", "reference/own.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    drawn = [Mutation("own.json", b"[]", "nothing")]

    def look(directory: Path) -> dict[str, str]:
        import pyarrow as pa

        watch = mutations.Outside(tmp_path / "work", directory)
        (directory / "own.json").read_bytes()
        inside = watch.found()
        pa.memory_map(str(directory / "../outside.json")).close()
        by_library = watch.found()
        (directory / "../outside.json").read_bytes()
        return {"found": json.dumps([inside, by_library, watch.found()])}

    (found,) = mutations.survey(tmp_path / "reference", tmp_path / "work", drawn, look)
    outside = [str(tmp_path / "work" / "outside.json")]
    assert json.loads(found["found"]) == [[], outside, outside]
