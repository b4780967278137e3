"""`eagle-offline estimate` tells before any work what precompute then writes, and touches nothing else."""

from __future__ import annotations

import gc
import json
import shlex
import shutil
import weakref
from collections import namedtuple
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from eagle_offline.cache.codec import losses_of
from eagle_offline.cache.manifest import read_manifest
from eagle_offline.capture_settings import PrecomputeSettings
from eagle_offline.errors import StoppedEarly
from eagle_offline.precompute import probe as probing
from eagle_offline.precompute.estimate import choices
from eagle_offline.precompute.plan import encoding_choice
from eagle_offline.precompute.probe import probe_batches
from eagle_offline.supervision import supervised_positions
from eagle_offline.target.batching import Batching
from eagle_offline.text.token_table import open_token_table
from tests import builders

SCHEMA = json.loads((Path(__file__).parent.parent / "schemas" / "estimate.schema.json").read_text())
DRAFT_VOCAB_SIZE = 128

_Usage = namedtuple("_Usage", "total used free")


def target() -> Path:
    """Wide enough that states outweigh papers, shallow enough to be quick."""
    wide = (("hidden_size", 128), ("num_hidden_layers", 3), ("intermediate_size", 64))
    return builders.shared_target(changes=wide)


def flags(**more: Any) -> dict[str, Any]:
    return {"draft_vocab_size": DRAFT_VOCAB_SIZE, "aux_layer_ids": [0, 1], "shard_size": 20, **more}


def run(output_dir: Path | None, *extra: str, **more: Any) -> builders.Ended:
    arguments = builders.precompute_arguments(
        output_dir or Path("unused"), target(), more.pop("data", builders.shared_chat(60)), **flags(**more)
    )
    if output_dir is None:
        place = arguments.index("--output-dir")
        del arguments[place : place + 2]
    return builders.run_cli("estimate", *arguments[1:], *extra)


def estimate(output_dir: Path | None, *extra: str, **more: Any) -> dict[str, Any]:
    ended = run(output_dir, "--json", *extra, **more)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    jsonschema.validate(found, SCHEMA)
    return found


@cache
def shared_estimate(format_: str = "arrow", *extra: str) -> dict[str, Any]:
    return estimate(builders.SCRATCH / f"estimate-{format_}{''.join(extra)}", *extra, format=format_)


@pytest.fixture(autouse=True)
def _short_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_DISK_PIECES", 1)


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_to(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(count, 0, count))

    return set_to


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(probing, "load_model", load)


def precompute_flags(choice: dict[str, Any]) -> dict[str, Any]:
    names = ("state_encoding", "mantissa_bits", "target_encoding", "top_k")
    return {name: choice[name] for name in names}


def bytes_of(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


def as_made(directory: Path, choice: dict[str, Any], **more: Any) -> Path:
    return builders.make_cache(
        directory, target(), builders.shared_chat(60), **flags(**precompute_flags(choice), **more)
    )


def test_every_choice_is_told() -> None:
    told = [
        (choice["state_encoding"], choice["mantissa_bits"], choice["target_encoding"], choice["top_k"])
        for choice in shared_estimate()["choices"]
    ]
    states = {("planes", bits) for bits in (None, 5, 4, 3, 2)} | {("raw", None), ("fp8", None)}
    targets = {("factored", None), ("dense", None), ("topk", 64)}
    assert len(told) == 21
    assert set(told) == {(*state, *one) for state in states for one in targets}


# Columns do not depend on one another: these hold each kind; the others take longer than they tell.
_TELLING = (*range(8), 8, 14)


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n in _TELLING else pytest.mark.slow) for n in range(21)]
)
def test_a_choice_takes_and_loses_what_was_told(number: int, tmp_path: Path) -> None:
    choice = shared_estimate()["choices"][number]
    cache = as_made(tmp_path / "cache", choice)
    records = [json.loads(path.read_text()) for path in cache.glob("commit-*.json")]
    shards = sum(record["file_bytes"] for record in records)
    assert choice["num_bytes"] == pytest.approx(bytes_of(cache), rel=0.02)
    assert choice["epoch_bytes"] == pytest.approx(shards, rel=0.02)
    assert choice["bytes_per_token"] == choice["epoch_bytes"] / shared_estimate()["corpus"]["num_tokens"]
    layouts = read_manifest(cache).identity.capture.fields
    assert choice["losses"] == list(dict.fromkeys(loss for layout in layouts for loss in losses_of(layout)))
    for name, is_told in (
        ("state_error", lambda field: field != "target_probs"),
        ("target_error", "target_probs".__eq__),
    ):
        errors = [error for record in records for field, error in record["encoding_errors"].items() if is_told(field)]
        size = sum(error["squared_values"] for error in errors)
        expected = (sum(error["squared_error"] for error in errors) / size) ** 0.5 if size else 0.0
        assert (choice[name] or 0.0) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("number", "compressor"), [(0, "zstd"), (15, "blosc")])
def test_bytes_are_those_of_zarr_too(number: int, compressor: str, tmp_path: Path) -> None:
    told = shared_estimate("zarr", "--compressor", compressor)["choices"][number]
    cache = as_made(tmp_path / "cache", told, format="zarr", compressor=compressor)
    assert told["num_bytes"] == pytest.approx(bytes_of(cache), rel=0.05)


def test_without_a_probe_no_weight_is_loaded_and_what_is_not_known_is_not_told(no_weights: None) -> None:
    told = estimate(None, "--no-probe")
    assert told["probe"] is None
    for choice, measured in zip(told["choices"], shared_estimate()["choices"], strict=True):
        assert choice["hours"] is choice["state_error"] is choice["target_error"] is None
        # Exponents of random weights compress better than typical ones.
        assert choice["num_bytes"] == pytest.approx(measured["num_bytes"], rel=0.15)
    text = run(None, "--no-probe").out
    assert "none: typical compression (44%) is assumed; no times, no errors" in text


def test_counts_are_those_of_the_token_table(tmp_path: Path) -> None:
    told = estimate(tmp_path / "cache", "--no-probe")["corpus"]
    table = open_token_table(tmp_path / "cache" / "tokens")
    masks = [torch.tensor(table[row].loss_mask) for row in range(len(table))]
    assert told == {
        "num_samples": len(table),
        "num_tokens": sum(len(mask) for mask in masks),
        "num_supervised": sum(int(mask.sum()) for mask in masks),
        "num_target_positions": sum(int(supervised_positions(mask).sum()) for mask in masks),
        "num_left_out": 0,
    }


def test_tokens_are_all_that_is_kept_and_precompute_takes_them(tmp_path: Path) -> None:
    estimate(tmp_path / "cache")
    kept = builders.tree(tmp_path / "cache")
    assert set(kept) == {"tokens/tokens.arrow", "tokens/quarantine.jsonl", "tokens/tokens.json"}
    as_made(
        tmp_path / "cache", {"state_encoding": "planes"} | dict.fromkeys(("mantissa_bits", "target_encoding", "top_k"))
    )
    made = builders.tree(tmp_path / "cache")
    assert {name: made[name] for name in kept} == kept


def test_without_a_directory_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.chdir(tmp_path)
    told = estimate(None, "--no-probe")
    assert told["directory"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == [scratch]
    assert list(scratch.iterdir()) == []


def test_the_command_is_one_that_precompute_takes(tmp_path: Path) -> None:
    told = estimate(tmp_path / "a b", "--no-probe", dtype="fp32", state_encoding="raw", top_k=None)
    program, *arguments = shlex.split(told["command"])
    assert program == "eagle-offline"
    assert "--output-dir" in arguments
    assert str(tmp_path / "a b") in arguments
    ended = builders.run_cli(*arguments, "--dry-run")
    assert ended.code == 0, ended.err


def test_the_command_names_the_store_and_the_disk_is_that_of_the_staging_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    url, looked_at = f"file://{tmp_path}/bucket/one", []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: looked_at.append(place) or _Usage(10**12, 0, 10**12))
    arguments = ("estimate", *store_arguments(url), "--no-probe", "--json")
    ended = builders.run_cli(*arguments)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    words = shlex.split(told["command"])
    assert words[words.index("--output-dir") + 1] == url
    assert not {"--store-url", "--staging-dir"} & set(words)
    assert Path(told["directory"]).is_relative_to(tmp_path / "kept" / "eagle_offline" / "staging")
    assert looked_at
    assert all(Path(told["directory"]).is_relative_to(place) for place in looked_at)
    assert not (tmp_path / "bucket").exists()
    dry = builders.run_cli(*words[1:], "--dry-run")
    assert dry.code == 0, dry.err
    # A shard at a time, beside what is no shard.
    assert all(choice["disk_bytes"] < choice["num_bytes"] for choice in told["choices"])
    staged = json.loads(builders.run_cli(*arguments, "--staging-dir", tmp_path / "here").out)
    assert staged["directory"] == str(tmp_path / "here")
    assert f"--staging-dir {tmp_path / 'here'}" in staged["command"]


def store_arguments(url: str) -> list[str]:
    """The flags of an estimate whose cache goes to a store."""
    # As a path it would lose a slash.
    arguments = builders.precompute_arguments(Path("PLACE"), target(), builders.shared_chat(60), **flags())[1:]
    return [url if argument == "PLACE" else str(argument) for argument in arguments]


def test_what_was_asked_for_comes_first_and_the_smallest_exact_choice_after_it(no_weights: None) -> None:
    asked = {"mantissa_bits": 4, "target_encoding": "topk", "top_k": 8, "format": "zarr"}
    *_, first, own, other, suggested = run(None, "--no-probe", **asked).out.splitlines()
    assert first == "go on with what the flags say (→):"
    assert "--mantissa-bits 4 --target-encoding topk --top-k 8 --format zarr" in own
    assert other.startswith("or go on with ")
    assert other.endswith(", the smallest that loses nothing and fits:")
    assert "--mantissa-bits" not in suggested
    assert "--format zarr" in suggested


def test_what_was_asked_for_is_told_once_where_it_is_the_smallest(no_weights: None) -> None:
    exact = [choice for choice in estimate(None, "--no-probe")["choices"] if not choice["losses"]]
    smallest = min(exact, key=lambda choice: choice["num_bytes"])
    assert smallest["state_encoding"] == "planes"
    asked = {"mantissa_bits": 7, "target_encoding": smallest["target_encoding"]}
    told = estimate(None, "--no-probe", **asked)
    assert told["asked"] == told["command"]
    assert run(None, "--no-probe", **asked).out.count("eagle-offline precompute") == 1


def test_what_does_not_fit_is_not_told_to_go_on_with(free_bytes: Callable[[int], None], no_weights: None) -> None:
    free_bytes(600_000)
    assert estimate(None, "--no-probe")["asked"] is None


def test_the_smallest_exact_choice_that_fits_is_the_way_on(free_bytes: Callable[[int], None]) -> None:
    exact = [choice for choice in shared_estimate()["choices"] if not choice["losses"]]
    smallest = min(exact, key=lambda choice: choice["num_bytes"])
    free_bytes(smallest["num_bytes"] + 60_000)
    told = estimate(None)
    assert f"--target-encoding {smallest['target_encoding']}" in told["command"] + " --target-encoding factored"
    assert "--mantissa-bits" not in told["command"]
    assert [c["fits"] for c in told["choices"]] == [c["num_bytes"] <= told["free_bytes"] for c in told["choices"]]
    assert len({choice["fits"] for choice in told["choices"]}) == 2


def test_where_nothing_exact_fits_the_smallest_loss_that_does_is_named(
    free_bytes: Callable[[int], None], no_weights: None
) -> None:
    typical = estimate(None, "--no-probe")["choices"]
    bits = {
        choice["mantissa_bits"]: choice["num_bytes"] for choice in typical if choice["target_encoding"] == "factored"
    }
    free_bytes(bits[4])
    told = estimate(None, "--no-probe")
    assert told["advice"].startswith("nothing exact fits: ")
    assert "--mantissa-bits 4" in told["command"]


def test_where_nothing_fits_the_way_out_is_told(free_bytes: Callable[[int], None], no_weights: None) -> None:
    free_bytes(600_000)
    ended = run(None, "--no-probe")
    assert ended.code == 0
    assert "nothing fits: the smallest, planes 2 bits + " in ended.out
    assert "600.0 kB free at " in ended.out
    assert "another --output-dir" in ended.out
    assert "--split" in ended.out
    assert "eagle-offline precompute" not in ended.out


def test_times_are_told_and_the_target_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    load = probing.load_model

    def watched(*arguments: Any) -> Any:
        model = load(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(probing, "load_model", watched)
    told = estimate(None)
    gc.collect()
    assert [model() for model in loaded] == [None]
    assert told["probe"]["num_batches"] == 3
    least = told["corpus"]["num_tokens"] / told["probe"]["tokens_per_second"] / 3600
    assert all(choice["hours"] > least for choice in told["choices"])


def test_a_slow_target_is_probed_with_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "PROBE_SECONDS", 0.0)
    assert estimate(None)["probe"]["num_batches"] == 1


def test_being_stopped_leaves_tokens_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "eagle_offline.interrupts.StopRequest.requested", property(lambda _: (tmp_path / "go").exists())
    )
    load = probing.load_model

    def then_stop(*arguments: Any) -> Any:
        (tmp_path / "go").touch()
        return load(*arguments)

    monkeypatch.setattr(probing, "load_model", then_stop)
    ended = run(tmp_path / "cache")
    assert ended.code == StoppedEarly.exit_code
    assert ended.err.splitlines()[-1].startswith("error: stopped by a signal while the target was probed")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tokens"]


def test_memory_that_does_not_suffice_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    monkeypatch.setattr(probing, "load_model", too_large)
    ended = run(None)
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith("error: cpu: out of memory with --seq-length 96: ")


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ({"draft_vocab_size": 5000}, 2, "--draft-vocab-size 5000"),
        ({"aux_layer_ids": [9]}, 2, "--aux-layer-ids 9"),
        ({"dtype": "fp16"}, 2, "--state-encoding raw"),
        ({"state_encoding": "raw", "mantissa_bits": 4}, 2, "--mantissa-bits 4"),
        ({"data": "nowhere.jsonl"}, 4, "nowhere.jsonl"),
        ({"device": "abacus"}, 2, "--device abacus"),
    ],
)
def test_what_precompute_refuses_is_refused_in_one_line(more: dict[str, Any], code: int, said: str) -> None:
    ended = run(None, **more)
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    assert [line for line in ended.errors if said in line and line.startswith("error: ")], ended.err
    assert ended.out == ""


def test_a_cache_that_stands_there_is_left_alone(tmp_path: Path) -> None:
    made = as_made(tmp_path / "cache", dict.fromkeys(("state_encoding", "mantissa_bits", "target_encoding", "top_k")))
    before = builders.tree(made)
    assert run(made, "--no-probe").code == 2
    assert run(made, "--no-probe", "--resume", seq_length=64).code == 3
    assert estimate(made, "--no-probe", "--resume")["choices"][0]["fits"]
    assert builders.tree(made) == before


def test_the_table_marks_what_the_flags_say() -> None:
    marked = [line for line in run(None, "--no-probe", mantissa_bits=6).out.splitlines() if line.startswith("→ planes")]
    assert len(marked) == 1
    assert marked[0].startswith("→ planes 6 bits + factored ")


def test_the_settings_own_choice_is_among_those_compared() -> None:
    given = {"target_model": "M", "input_data": "D", "output_dir": "C"}
    for own in (
        {},
        {"mantissa_bits": 6},
        {"state_encoding": "raw", "dtype": "fp32"},
        {"target_encoding": "topk", "top_k": 7},
    ):
        settings = PrecomputeSettings.model_validate(given | own)
        compared = choices(settings)
        assert encoding_choice(settings) in compared
        assert len(set(compared)) == len(compared)
        assert all(choice.dtype == settings.dtype for choice in compared)


def test_probed_batches_lie_in_the_middle_and_the_outer_thirds_of_the_tokens() -> None:
    lengths = np.random.default_rng(0).integers(3, 100, 300).astype(np.int32)
    typical, short, long = (lengths[rows] for rows in probe_batches(lengths, Batching(batch_size=4)))
    assert [len(rows) for rows in (typical, short, long)] == [4, 4, 4]
    assert short.max() < typical.min() < typical.max() < long.min()
    below = lengths[lengths < typical.min()].sum() / lengths.sum()
    assert 0.45 < below < 0.5
    assert [rows.tolist() for rows in probe_batches(np.array([9, 2, 5, 7, 5]), Batching(2))] == [[0, 3], [2, 4], [0, 3]]
    assert [rows.tolist() for rows in probe_batches(np.array([9, 2]), Batching(4))] == [[0, 1]] * 3
