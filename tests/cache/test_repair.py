"""`eagle-offline repair`: what is damaged goes aside, and the command that it prints makes the cache what it was."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from eagle_offline import open_cache
from eagle_offline.cache import aside as setting_aside
from eagle_offline.cache import repair as repairing
from eagle_offline.cache.repair import repair_cache
from eagle_offline.durable import ABANDONED_SECONDS, exclusive
from eagle_offline.errors import DataError, UsageError
from tests import builders
from tests.cache.mutations import resealed

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"


def make(place: Path, data: Path, **flags: Any) -> Path:
    return builders.make_cache(place, None, data, **{"shard_size": 2, **flags})


def content(directory: Path) -> dict[str, str]:
    """A digest of every file of a cache but what tells of runs and of repairs."""
    files = builders.tree(directory)
    return {name: digest for name, (_, digest) in files.items() if not name.startswith("aside/")}


class Place:
    """A directory with a cache that a test may damage, and beside it the cache as it was made."""

    def __init__(self, directory: Path, **flags: Any):
        rows = [*builders.conversations(5), {"messages": []}]  # one goes into quarantine
        self.data = builders.write_jsonl(directory / "chat.jsonl", rows)
        self.cache, self.whole = directory / "cache", directory / "whole"
        make(self.cache, self.data, **flags)
        shutil.copytree(self.cache, self.whole)

    def reset(self) -> Path:
        shutil.rmtree(self.cache)
        shutil.copytree(self.whole, self.cache)
        return self.cache


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("repair"))


@pytest.fixture
def cache(made: Place) -> Path:
    return made.reset()


def repair(cache: Path, *flags: str) -> dict[str, Any]:
    ended = builders.run_cli("repair", cache, "--json", *flags)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def run_command(command: str) -> builders.Ended:
    program, *arguments = shlex.split(command)
    assert program == "eagle-offline"
    return builders.run_cli(*arguments)


def check_made_whole(made: Place, said: dict[str, Any]) -> None:
    """Run the command that was printed, if any; the cache is then what it was."""
    if said["command"] is not None:
        assert said["command"] == f"eagle-offline precompute --config {made.cache / 'config.json'} --resume"
        ended = run_command(said["command"])
        assert ended.code == 0, ended.err
        remade = {record for record in builders.record_contents(made.cache) if not_as_it_was(made, record)}
        assert remade == {f"commit-{shard:06d}.json" for shard in said["shards_to_make_again"]}
    assert content(made.cache) == content(made.whole)
    assert builders.run_cli("verify", made.cache).code == 0
    again = repair(made.cache)
    assert (again["set_aside"], again["command"]) == ([], None)


def not_as_it_was(made: Place, name: str) -> bool:
    ours, theirs = (made.cache / name).stat(), (made.whole / name).stat()
    return ours.st_mtime_ns != theirs.st_mtime_ns


def shard_of(cache: Path, number: int) -> Path:
    return cache / json.loads((cache / f"commit-{number:06d}.json").read_bytes())["file"]


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(resealed(document)))


KINDS = [
    "shard-000001-*", "commit-000001.json", "index-*", "config.json", "head.safetensors", "embeddings.safetensors",
    "vocab/*", "target/config.json", "target/tokenizer.json", "tokens/tokens.arrow", "tokens/tokens.json",
    "tokens/quarantine.jsonl",
]  # fmt: skip


def flip(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[random.Random(path.name).randrange(len(changed))] ^= 1 << 4
    path.write_bytes(changed)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def unlink(path: Path) -> None:
    path.unlink()


def replace_by_directory(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


DAMAGES = [flip, truncate, empty, unlink, replace_by_directory]
# One kind of damage to each kind of file by default, each damage several times; all pairs are `slow`.
PAIRS = [
    pytest.param(kind, damage, marks=() if number % len(DAMAGES) == place else pytest.mark.slow)
    for number, kind in enumerate(KINDS)
    for place, damage in enumerate(DAMAGES)
]


@pytest.mark.parametrize(("kind", "damage"), PAIRS)
def test_damage_to_any_file_is_made_good(made: Place, cache: Path, kind: str, damage: Callable[[Path], None]) -> None:
    path = next(cache.glob(kind))
    damage(path)
    damaged = content(cache)
    assert builders.run_cli("verify", cache).code == (0 if kind == "index-*" and damage is unlink else 4)
    said = repair(cache)
    if damage is not unlink:
        aside = Path(said["aside"]) / path.relative_to(cache)
        assert aside.exists()
        if aside.is_file():
            assert content(aside.parent)[aside.name] == damaged[path.relative_to(cache).as_posix()]
    assert said["shards_to_make_again"] == ([1] if kind.startswith(("shard", "commit")) else [])
    assert (said["command"] is None) == (kind in ("index-*", "config.json"))
    check_made_whole(made, said)


def swap_shards(cache: Path, _: Place) -> None:
    one, other = shard_of(cache, 0), shard_of(cache, 1)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def swap_records(cache: Path, _: Place) -> None:
    (cache / "commit-000000.json").rename(cache / "kept")
    (cache / "commit-000001.json").rename(cache / "commit-000000.json")
    (cache / "kept").rename(cache / "commit-000001.json")


def record_of_another_shard(cache: Path, _: Place) -> None:
    shutil.copy(cache / "commit-000000.json", cache / "commit-000001.json")


def foreign(made: Place) -> Path:
    place = made.cache.with_name("foreign")
    if not place.exists():
        make(place, builders.write_jsonl(place.with_name("foreign.jsonl"), builders.conversations(5, seed=9)))
    return place


def shard_and_record_of_another_cache(cache: Path, made: Place) -> None:
    shard_of(cache, 1).unlink()
    shutil.copy(shard_of(foreign(made), 1), cache)
    shutil.copy(foreign(made) / "commit-000001.json", cache)


def shard_of_another_cache_that_claims_to_be_ours(cache: Path, made: Place) -> None:
    ours = json.loads((cache / "commit-000000.json").read_bytes())["identity_digest"]
    shard_and_record_of_another_cache(cache, made)
    edit(cache / "commit-000001.json", lambda record: record.update(identity_digest=ours))


def shard_of_another_cache_under_our_name(cache: Path, made: Place) -> None:
    shutil.copy(shard_of(foreign(made), 1), shard_of(cache, 1))


def record_under_another_manifest(cache: Path, _: Place) -> None:
    edit(cache / "commit-000001.json", lambda record: record.update(identity_digest="0" * 32))


def index_of_another_cache(cache: Path, made: Place) -> None:
    next(cache.glob("index-*")).unlink()
    shutil.copy(next(foreign(made).glob("index-*")), cache)


def everything_at_once(cache: Path, made: Place) -> None:
    for kind in KINDS:
        flip(next(cache.glob(kind)))
    (cache / "commit-000000.json").write_text("{")
    shard_of(cache, 2).unlink()


WHOLES: list[tuple[Callable[[Path, Place], None], list[int]]] = [
    (swap_shards, [0, 1]),
    (swap_records, [0, 1]),
    (record_of_another_shard, [1]),
    (shard_and_record_of_another_cache, [1]),
    (shard_of_another_cache_that_claims_to_be_ours, [1]),
    (shard_of_another_cache_under_our_name, [1]),
    (record_under_another_manifest, [1]),
    (index_of_another_cache, []),
    (everything_at_once, [0, 1, 2]),
]


@pytest.mark.parametrize(("damage", "shards"), WHOLES)
def test_what_is_not_in_its_place_is_made_good(
    made: Place, cache: Path, damage: Callable[[Path, Place], None], shards: list[int]
) -> None:
    damage(cache, made)
    assert builders.run_cli("verify", cache).code == 4
    said = repair(cache)
    assert said["shards_to_make_again"] == shards
    check_made_whole(made, said)


def test_deleted_records_leave_their_shards_to_be_made_again(made: Place, cache: Path) -> None:
    for record in cache.glob("commit-*"):
        record.unlink()
    said = repair(cache)
    assert said["shards_to_make_again"] == [0, 1, 2]
    assert [file["path"] for file in said["set_aside"]] == [next(made.whole.glob("index-*")).name]
    check_made_whole(made, said)


def test_a_record_beyond_the_manifest_goes_aside_and_is_not_made_again(made: Place, cache: Path) -> None:
    shutil.copy(cache / "commit-000001.json", cache / "commit-000007.json")
    edit(cache / "commit-000007.json", lambda record: record.update(shard=7))
    said = repair(cache)
    assert "commit-000007.json" in [file["path"] for file in said["set_aside"]]
    assert said["command"] is None
    check_made_whole(made, said)


def test_a_whole_cache_is_left_alone(made: Place, cache: Path) -> None:
    before = builders.tree(cache, without=())
    ended = builders.run_cli("repair", cache)
    assert (ended.code, ended.out) == (0, f"{cache}: nothing is damaged\n")
    assert builders.tree(cache, without=()) == before


def test_a_dry_run_says_the_same_and_changes_nothing(made: Place, cache: Path) -> None:
    everything_at_once(cache, made)
    before = builders.tree(cache, without=())
    would = repair(cache, "--dry-run")
    assert builders.tree(cache, without=()) == before
    assert would["aside"] is None
    said = repair(cache)
    for name in ("set_aside", "shards_to_make_again", "companions_to_make_again"):
        assert would[name] == said[name]


def test_what_is_printed_ends_with_the_command(made: Place, cache: Path) -> None:
    flip(shard_of(cache, 1))
    unlink(cache / "head.safetensors")
    lines = builders.run_cli("repair", cache).out.splitlines()
    assert [line.split(": ")[0] for line in lines[:2]] == [
        "set aside commit-000001.json", f"set aside {shard_of(made.whole, 1).name}",
    ]  # fmt: skip
    assert lines[-2] == "to be made again: shards 1, head.safetensors"
    assert lines[-1] == f"eagle-offline precompute --config {cache}/config.json --resume"


def test_reasons_follow_their_schema_and_name_every_file(made: Place, cache: Path) -> None:
    everything_at_once(cache, made)
    said = repair(cache)
    aside = Path(said["aside"])
    reasons = json.loads((aside / "reasons.json").read_bytes())
    jsonschema.validate(reasons, json.loads((SCHEMAS / "aside-reasons.schema.json").read_text()))
    assert reasons["files"] == said["set_aside"]
    there = {path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()}
    assert there == {"reasons.json", *(file["kept_as"] for file in reasons["files"])}
    assert all(file["reason"] for file in reasons["files"])


# Kills


class Killed(BaseException):
    pass


STEPS = ["mkdir", "rename", "write_bytes", "drop_indexes", "write_config", "ensure_index"]


def kill_at(monkeypatch: pytest.MonkeyPatch, step: str, number: int) -> None:
    """End a repair before the given call of a step."""
    place: Any = {"mkdir": Path, "rename": os, "write_bytes": setting_aside}.get(step, repairing)
    original, calls = getattr(place, step), []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        if len(calls) == number:
            raise Killed
        return original(*arguments, **named)

    monkeypatch.setattr(place, step, counted)


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_moment_it_leaves_what_is_refused_and_a_second_repair_ends_well(made: Place, step: str) -> None:
    for number in range(1, 40):
        cache = made.reset()
        flip(shard_of(cache, 0))
        flip(cache / "commit-000001.json")
        (cache / ".shard-000002.partial-elsewhere-1-00000000").write_text("x")
        os.utime(cache / ".shard-000002.partial-elsewhere-1-00000000", (0, 0))
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step, number)
            try:
                repair_cache(cache)
            except Killed:
                pass
            else:
                break
        with pytest.raises(DataError):
            list(open_cache(cache))
        said = repair(cache)
        assert said["shards_to_make_again"] == [0, 1]
        if number in (1, 3):
            check_made_whole(made, said)
    assert number > 1, "the step was never taken"


def test_a_record_goes_before_its_shard(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        flip(shard_of(cache, number))
    moved: list[str] = []
    rename = os.rename

    def noted(source: Path, place: Path) -> None:
        moved.append(source.name)
        rename(source, place)

    monkeypatch.setattr(os, "rename", noted)
    repair_cache(cache)
    kinds = [name.split("-")[0] for name in moved]
    assert kinds == ["commit"] * 3 + ["shard"] * 3


# Others at work


def test_what_a_live_writer_put_in_place_meanwhile_stays(
    made: Place, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shard_of(cache, 1)
    flip(shard)
    check = repairing.check_cache

    def check_beside_a_writer(*arguments: Any, **named: Any) -> Any:
        found = check(*arguments, **named)
        shutil.copy(made.whole / shard.name, cache / "new")
        os.replace(cache / "new", shard)
        return found

    monkeypatch.setattr(repairing, "check_cache", check_beside_a_writer)
    said = repair_cache(cache)
    assert [file.path for file in said.files] == ["commit-000001.json"]
    assert said.shards == [1]
    shutil.copy2(made.whole / "commit-000001.json", cache)  # the writer commits
    assert builders.run_cli("verify", cache).code == 0


def test_a_shard_that_no_record_names_goes_aside_once_it_is_a_day_old(cache: Path) -> None:
    young, old = (cache / f"shard-000001-{digit * 32}.arrow" for digit in "01")
    for path in (young, old):
        path.write_text("x")
    os.utime(old, (time.time() - ABANDONED_SECONDS - 60,) * 2)
    said = repair(cache)
    assert [file["path"] for file in said["set_aside"]] == [old.name]
    assert young.exists()
    assert said["command"] is None


def test_unfinished_work_goes_aside_when_its_process_is_gone_and_stays_there(made: Place, cache: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = socket.gethostname()
    dead = f".shard-000001.partial-{host}-{ended.pid}-00000000"
    alive = f".shard-000001.partial-{host}-{os.getpid()}-00000000"
    beside = f"tokens/.tokens.arrow.partial-{host}-{ended.pid}-00000000"
    for name in (dead, alive, beside):
        (cache / name).write_text("x")
    said = repair(cache)
    assert {file["path"] for file in said["set_aside"]} == {dead, beside}
    assert (cache / alive).exists()
    (cache / alive).unlink()
    assert builders.precompute(cache, None, made.data, shard_size=2, resume=True).code == 0
    assert (Path(said["aside"]) / dead.lstrip(".")).exists()


def test_two_repairs_at_once_are_refused(cache: Path) -> None:
    with exclusive(cache, "repairing"), pytest.raises(UsageError, match="another process is repairing"):
        repair_cache(cache)
    assert builders.run_cli("repair", cache).code == 0


def test_what_is_aside_disturbs_nobody(made: Place, cache: Path) -> None:
    flip(shard_of(cache, 1))
    said = repair(cache)
    assert not list(cache.glob("index-*"))
    with pytest.raises(DataError, match="1 of 3 shards are missing"):
        open_cache(cache)
    assert len(open_cache(cache, allow_partial=True)) == 3
    assert run_command(said["command"]).code == 0
    assert len(open_cache(cache)) == 5
    assert builders.run_cli("inspect-manifest", cache, "--verify").code == 0
    assert Path(said["aside"]).is_dir()
    # Even where nothing else is left of the cache.
    for path in cache.iterdir():
        if path.name not in ("aside", "config.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (cache / "config.json").unlink()
    assert builders.precompute(cache, None, made.data, shard_size=2, resume=True).code == 0


# What cannot be repaired


@pytest.mark.parametrize("damage", [flip, truncate, empty, unlink])
def test_a_damaged_manifest_is_to_be_restored_from_a_copy(cache: Path, damage: Callable[[Path], None]) -> None:
    damage(cache / "manifest.json")
    before = builders.tree(cache, without=())
    ended = builders.run_cli("repair", cache)
    assert ended.code in (3, 4)
    assert len(ended.errors) == 1
    assert "manifest.json" in ended.errors[0]
    assert ended.code == 3 or "restore it from a copy" in ended.errors[0]
    assert builders.tree(cache, without=()) == before


@pytest.fixture
def read_only(made: Place) -> Iterator[Path]:
    directory = builders.SCRATCH / "read-only"
    directory.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(directory)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        cache = shutil.copytree(made.whole, directory / "cache")
        flip(shard_of(cache, 1))
        subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
        yield cache
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_cache_on_a_read_only_mount_is_one_line(read_only: Path) -> None:
    ended = builders.run_cli("repair", read_only)
    assert (ended.code, len(ended.errors)) == (1, 1)
    assert "cannot be written" in ended.errors[0]
    assert repair(read_only, "--dry-run")["shards_to_make_again"] == [1]


# The command


def test_the_settings_are_saved_once_and_never_changed(made: Place, cache: Path) -> None:
    config = json.loads((cache / "config.json").read_bytes())
    assert config["output_dir"] == str(cache)
    assert config["aux_layer_ids"] == builders.DEFAULT_AUX_LAYER_IDS
    assert not {"resume", "dry_run", "process_index", "process_count"} & config.keys()
    before = builders.tree(cache)["config.json"]
    unlink(cache / "commit-000001.json")
    target = builders.shared_target()
    moved = shutil.copytree(target, cache.with_name("elsewhere") / target.name)
    ended = builders.precompute(cache, moved, made.data, shard_size=2, resume=True)
    assert ended.code == 0, ended.err
    assert builders.tree(cache)["config.json"] == before


@pytest.mark.parametrize("complete", [False, True])
def test_a_run_that_goes_on_saves_the_settings_where_a_kill_had_left_none(
    made: Place, cache: Path, complete: bool
) -> None:
    unlink(cache / "config.json")
    if not complete:
        unlink(cache / "commit-000001.json")
    assert builders.precompute(cache, None, made.data, shard_size=2, resume=True).code == 0
    assert content(cache) == content(made.whole)


FLAGS: list[dict[str, Any]] = [
    {"aux_layer_ids": [0, 2], "shuffle_seed": 3, "split": "[:4]", "seq_length": 64, "compute_dtype": "bf16"},
    {"target_encoding": "topk", "top_k": 5, "state_encoding": "raw", "dtype": "fp32", "draft_vocab_size": None},
    {"mantissa_bits": 3, "on_bad_row": "quarantine", "chat_template": "template of 'mine'.jinja"},
]


@pytest.mark.parametrize("without_config", [False, True])
@pytest.mark.parametrize("flags", FLAGS)
def test_the_command_knows_settings_that_are_not_the_defaults(
    flags: dict[str, Any], without_config: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given as paths from here, run from elsewhere, in directories with names that shells take apart.
    here = tmp_path / "with ünusual 'name'"
    data = builders.write_jsonl(here / "chat 1.jsonl", builders.conversations(5))
    (here / "template of 'mine'.jinja").write_text(builders.CHATML)
    monkeypatch.chdir(here)
    if without_config and "chat_template" in flags:
        pytest.skip("a manifest of old does not say which template was given")
    cache = builders.make_cache(Path("cache"), None, data.name, **{"shard_size": 2, **flags})
    whole = content(cache)
    cache = cache.absolute()
    if without_config:  # as a program wrote it that saved two inputs only
        edit(cache / "manifest.json", keep_two_inputs)
        whole = content(cache)
        unlink(cache / "config.json")
        del whole["config.json"]
    flip(shard_of(cache, 1))
    unlink(cache / "head.safetensors")
    monkeypatch.chdir(tmp_path if not without_config else here)
    said = repair(cache)
    assert ("--config" in said["command"]) != without_config
    ended = run_command(said["command"])
    assert ended.code == 0, ended.err
    assert content(cache) == whole


def keep_two_inputs(manifest: dict[str, Any]) -> None:
    inputs = manifest["environment"]["inputs"]
    manifest["environment"]["inputs"] = {name: inputs[name] for name in ("target_model", "input_data")}


def test_a_cache_that_was_moved_is_filled_where_it_is_now(made: Place, cache: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(cache, moved)
    unlink(moved / "commit-000001.json")
    before = builders.tree(cache)
    said = repair(moved)
    assert "config.json" in [file["path"] for file in said["set_aside"]]
    assert run_command(said["command"]).code == 0
    assert len(open_cache(moved)) == 5
    assert builders.tree(cache) == before


# Other kinds of caches


@pytest.fixture(scope="session", params=["zstd", pytest.param("blosc", marks=pytest.mark.slow)])
def made_of_zarr(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("zarr"), format="zarr", compressor=request.param)


def first_object(shard: Path) -> Path:
    return next(path for path in sorted(shard.glob("aux_*/c*")) if path.is_file())


def more_in_it(shard: Path) -> None:
    (shard / "more").write_text("x")


def a_file_in_its_place(shard: Path) -> None:
    shutil.rmtree(shard)
    shard.write_text("x")


ZARR_DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped value": lambda shard: flip(first_object(shard)),
    "flipped document": lambda shard: flip(shard / "zarr.json"),
    "truncated object": lambda shard: truncate(first_object(shard)),
    "empty object": lambda shard: empty(first_object(shard)),
    "missing object": lambda shard: unlink(first_object(shard)),
    "missing array": lambda shard: shutil.rmtree(shard / "input_ids"),
    "missing shard": shutil.rmtree,
    "another file": more_in_it,
    "a file": a_file_in_its_place,
}


@pytest.mark.parametrize("damage", ZARR_DAMAGES)
def test_damage_inside_a_zarr_shard_is_made_good(made_of_zarr: Place, damage: str) -> None:
    cache = made_of_zarr.reset()
    shard = shard_of(cache, 1)
    ZARR_DAMAGES[damage](shard)
    assert builders.run_cli("verify", cache).code == 4
    said = repair(cache)
    assert said["shards_to_make_again"] == [1]
    assert (Path(said["aside"]) / shard.name).exists() == (damage != "missing shard")
    check_made_whole(made_of_zarr, said)


def test_swapped_zarr_shards_are_made_good(made_of_zarr: Place) -> None:
    cache = made_of_zarr.reset()
    one, other = shard_of(cache, 0), shard_of(cache, 1)
    one.rename(cache / "kept")
    other.rename(one)
    (cache / "kept").rename(other)
    said = repair(cache)
    assert said["shards_to_make_again"] == [0, 1]
    check_made_whole(made_of_zarr, said)


def test_a_converted_cache_is_made_whole_by_converting_again(made: Place, cache: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    ended = builders.run_cli("convert", cache, "--output-dir", converted, "--state-encoding", "raw")
    assert ended.code == 0, ended.err
    whole = content(converted)
    flip(shard_of(converted, 1))
    unlink(converted / "head.safetensors")
    said = repair(converted)
    assert said["command"] == f"eagle-offline convert --config {converted / 'config.json'} --resume"
    assert run_command(said["command"]).code == 0
    assert content(converted) == whole
    unlink(converted / "commit-000000.json")
    unlink(converted / "config.json")
    assert repair(converted)["command"] == f"eagle-offline convert --config {converted}/config.json --resume"
