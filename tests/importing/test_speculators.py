"""What vLLM dumped becomes the cache that `precompute` would have made of the same forward passes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_offline import open_cache
from tests import builders
from tests.importing import written
from tests.importing.written import LAYERS, Forward, run_import, write_loss_masks, write_speculators

FLAGS: dict[str, Any] = {"aux_layer_ids": LAYERS, "draft_vocab_size": builders.DRAFT_VOCAB_SIZE}


def rows(target: Path | None = None, dtype: str = "fp32") -> tuple[Forward, ...]:
    return written.forwards(target or builders.shared_target(), builders.shared_chat(), dtype)


@cache
def dump(kind: str = "Llama", dtype: str = "fp32") -> Path:
    """A dump that no test changes."""
    target = builders.shared_target(kind)
    return write_speculators(builders.SCRATCH / f"states-{kind}-{dtype}", rows(target, dtype), dtype)


@pytest.fixture
def states(tmp_path: Path) -> Path:
    return shutil.copytree(dump(), tmp_path / "states")


def imported(cache: Path, states: Path | None = None, **flags: Any) -> Path:
    ended = run_import(states or dump(), cache, **{**FLAGS, **flags})
    assert ended.code == 0, ended.err
    return cache


def assert_same_samples(cache: Path, expected: Path) -> None:
    """Every sample of one cache as the other stores it, byte for byte; normalisers are sums in any order."""
    ours, theirs = open_cache(cache), open_cache(expected)
    assert sorted(ours.sample_ids) == sorted(theirs.sample_ids)
    place = {sample_id: number for number, sample_id in enumerate(theirs.sample_ids)}
    for number, sample_id in enumerate(ours.sample_ids):
        one, two = ours.read_stored(number), theirs.read_stored(place[sample_id])
        for name in ("input_ids", "loss_mask", "target_argmax"):
            assert np.array_equal(getattr(one, name), getattr(two, name)), name
        assert np.allclose(one.target_log_normalizer, two.target_log_normalizer, rtol=1e-6, atol=1e-6)
        assert [bytes(column) for column in one.columns] == [bytes(column) for column in two.columns]
    order = [place[sample_id] for sample_id in ours.sample_ids]
    for name in ("num_in_vocab", "num_supervised"):
        assert np.array_equal(getattr(ours.index, name), getattr(theirs.index, name)[order])
    assert np.allclose(ours.index.vocab_mass, theirs.index.vocab_mass[order], rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        ("fp32", {}),
        ("fp32", {"dtype": "fp32", "state_encoding": "raw"}),
        ("fp32", {"target_encoding": "dense", "mantissa_bits": 4}),
        ("fp32", {"target_encoding": "topk", "top_k": 5, "format": "zarr"}),
        ("bf16", {}),
        ("fp16", {"dtype": "fp16", "state_encoding": "raw", "shuffle_seed": 3}),
    ],
)
def test_the_cache_is_what_precompute_makes(dtype: str, flags: dict[str, Any], tmp_path: Path) -> None:
    compute = {} if dtype == "fp32" else {"compute_dtype": dtype}
    expected = builders.make_cache(tmp_path / "own", batch_size=1, **compute, **flags)
    cache = imported(tmp_path / "cache", dump(dtype=dtype), **flags)
    assert_same_samples(cache, expected)
    ours, theirs = open_cache(cache), open_cache(expected)
    assert ours.manifest.files == theirs.manifest.files  # head, embeddings, vocabulary, tokens, target's files
    identity = ours.manifest.identity
    assert identity.capture == theirs.manifest.identity.capture
    assert identity.imported_from is not None
    assert identity.imported_from.tool == "speculators"
    assert builders.run_cli("verify", cache).code == 0


@pytest.mark.parametrize(
    "kind",
    ["Gemma2", "Cohere", "Granite", *(pytest.param(k, marks=pytest.mark.slow) for k in ("Qwen3", "Olmo2", "Glm4"))],
)
def test_the_final_norm_is_the_targets_own(kind: str, tmp_path: Path) -> None:
    target = builders.shared_target(kind)
    expected = builders.make_cache(tmp_path / "own", target, batch_size=1)
    ended = run_import(dump(kind), tmp_path / "cache", target, **FLAGS)
    assert ended.code == 0, ended.err
    assert_same_samples(tmp_path / "cache", expected)


def test_no_decoder_layer_of_the_target_is_read(tmp_path: Path) -> None:
    target = shutil.copytree(builders.shared_target(), tmp_path / "target")
    tensors = load_file(target / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    ended = run_import(dump(), tmp_path / "cache", target, **FLAGS, check_samples=0)
    assert ended.code == 0, ended.err
    assert_same_samples(tmp_path / "cache", imported(tmp_path / "other"))


def test_a_target_that_does_not_do_without_layers_is_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    own = transformers.LlamaModel.__init__

    def needs_layers(self: Any, config: Any) -> None:
        if not config.num_hidden_layers:
            raise IndexError("no layers")
        own(self, config)

    monkeypatch.setattr(transformers.LlamaModel, "__init__", needs_layers)
    ended = run_import(dump(), tmp_path / "cache", **FLAGS)
    assert ended.code == 0, ended.err
    assert "loading the whole target" in ended.err
    assert_same_samples(tmp_path / "cache", imported_before(tmp_path, monkeypatch))


def imported_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.undo()
    return imported(tmp_path / "other")


def test_samples_are_found_by_their_ids_in_any_order_under_any_name(tmp_path: Path, states: Path) -> None:
    for number, path in enumerate(sorted(states.iterdir())):
        path.rename(states / f"{'ijhgfedcba'[number]}.safetensors")
    assert_same_samples(imported(tmp_path / "cache", states), imported(tmp_path / "other"))


def test_a_sample_that_goes_on_serves_for_a_row_that_was_cut(tmp_path: Path) -> None:
    cache = imported(tmp_path / "cache", seq_length=48, on_mismatch="drop")  # rows cut before their answers are none
    assert_same_samples(cache, builders.make_cache(tmp_path / "own", batch_size=1, seq_length=48))


def test_a_sample_that_goes_on_is_not_taken_where_states_depend_on_the_length(tmp_path: Path) -> None:
    target = shutil.copytree(builders.shared_target(), tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (target / "config.json").write_text(json.dumps(config))
    ended = run_import(dump(), tmp_path / "cache", target, **FLAGS, seq_length=48, on_mismatch="drop")
    assert ended.code == 4, ended.err  # every row was cut, every sample goes on
    assert "holds states of no row of the corpus" in ended.err
    ended = run_import(dump(), tmp_path / "cache", target, **FLAGS, resume=True)
    assert ended.code == 0, ended.err


def test_equal_rows_of_the_corpus_take_equal_samples(tmp_path: Path) -> None:
    lines = builders.shared_chat().read_text().splitlines(keepends=True)
    chat = builders.write_jsonl(tmp_path / "twice.jsonl", [*lines, lines[0]])
    ended = run_import(dump(), tmp_path / "cache", None, chat, **FLAGS)
    assert ended.code == 0, ended.err
    cache = open_cache(tmp_path / "cache")
    numbers = [int(np.flatnonzero(cache.sample_ids == sample_id)[0]) for sample_id in (0, 10)]
    one, two = (cache.read_stored(number) for number in numbers)
    assert [bytes(column) for column in one.columns] == [bytes(column) for column in two.columns]


def assert_refused(ended: builders.Ended, code: int, *parts: str) -> None:
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.err
    for part in parts:
        assert part in errors[0], errors[0]


def test_rows_without_states_and_states_without_rows_are_refused_and_counted(tmp_path: Path, states: Path) -> None:
    (states / "hs_3.safetensors").unlink()
    (states / "hs_7.safetensors").unlink()
    longer = dict(load_file(states / "hs_0.safetensors"))
    longer["token_ids"] = longer["token_ids"].flip(0)
    save_file(longer, states / "hs_11.safetensors")
    ended = run_import(states, tmp_path / "cache", **FLAGS)
    assert_refused(
        ended, 3, "2 of 10 rows of the corpus: no states in the dump (first: chat-10-0.jsonl row 4)",
        "1 of 9 samples of no row (first: hs_11.safetensors)", "--on-mismatch drop",
    )  # fmt: skip
    assert not (tmp_path / "cache" / "manifest.json").exists()

    cache = imported(tmp_path / "cache", states, on_mismatch="drop")
    assert sorted(open_cache(cache).sample_ids) == [0, 1, 2, 4, 5, 6, 8, 9]
    lost = [item for record in builders.record_contents(cache).values() for item in record["lost"]]
    assert sorted(lost, key=lambda item: item["sample_id"]) == [
        {"sample_id": 3, "reason": "no states in the dump"},
        {"sample_id": 7, "reason": "no states in the dump"},
    ]
    assert builders.run_cli("verify", cache).code == 0
    assert "no states in the dump" in builders.run_cli("inspect-manifest", cache).out


def test_a_dump_of_another_corpus_is_refused_even_with_drop(tmp_path: Path) -> None:
    ended = run_import(dump(), tmp_path / "cache", None, builders.shared_chat(5, 9), on_mismatch="drop", **FLAGS)
    assert_refused(ended, 4, "holds states of no row of the corpus")


def test_a_corpus_of_longer_rows_says_which_length_the_dump_may_have(tmp_path: Path) -> None:
    ended = run_import(dump(), tmp_path / "cache", **FLAGS, seq_length=128)
    assert_refused(ended, 3, "more than 96 tokens, which may be the --seq-length to give here")


def test_loss_masks_beside_the_dump_are_compared(tmp_path: Path, states: Path) -> None:
    data = write_loss_masks(tmp_path / "prepared", rows())
    expected = imported(tmp_path / "plain")
    assert_same_samples(imported(tmp_path / "cache", states, loss_masks=data), expected)

    changed = [
        dataclasses.replace(row, loss_mask=[1] * len(row.loss_mask)) if i == 2 else row for i, row in enumerate(rows())
    ]
    other = write_loss_masks(tmp_path / "other", changed)
    ended = run_import(states, tmp_path / "refused", **FLAGS, loss_masks=other)
    assert_refused(ended, 3, "1 of 10 rows of the corpus: another loss mask in the dump (first: chat-10-0.jsonl row 3)")
    cache = imported(tmp_path / "dropped", states, loss_masks=other, on_mismatch="drop")
    assert 2 not in open_cache(cache).sample_ids

    # speculators keeps states below the dataset, where they are found without a flag
    shutil.copytree(dump(), other / "hidden_states")
    ended = run_import(other / "hidden_states", tmp_path / "found", **FLAGS)
    assert_refused(ended, 3, "another loss mask in the dump")


def test_loss_masks_of_other_rows_are_refused(tmp_path: Path, states: Path) -> None:
    data = write_loss_masks(tmp_path / "prepared", rows()[::-1])
    ended = run_import(states, tmp_path / "cache", **FLAGS, loss_masks=data)
    assert_refused(
        ended,
        4,
        "10 of 10 samples with other tokens than --loss-masks has in the row of their number (first: hs_0.safetensors)",
        "leave them the numbers they were dumped with",
    )
    short = write_loss_masks(tmp_path / "short", rows()[:6])
    ended = run_import(states, tmp_path / "cache", **FLAGS, loss_masks=short)
    assert_refused(
        ended,
        3,
        "4 of 10 samples with other tokens than --loss-masks has in the row of their number (first: hs_6.safetensors)",
    )


SPOILED_MASKS: dict[str, tuple[dict[str, list[Any]], str]] = {
    "no masks": ({"input_ids": [[1, 2]]}, "without loss_mask"),
    "no rows": ({"input_ids": [], "loss_mask": []}, "cannot be loaded"),
    "text": ({"input_ids": ["one"], "loss_mask": ["two"]}, "cannot be read"),
    "unequal": ({"input_ids": [[1, 2, 3]], "loss_mask": [[0, 1]]}, "row 0: 3 token ids and a loss mask of 2"),
    "twos": ({"input_ids": [[1, 2]], "loss_mask": [[0, 2]]}, "row 0: loss_mask holds something else than 0 and 1"),
    "below 0": ({"input_ids": [[1, -2]], "loss_mask": [[0, 1]]}, "row 0: its token ids go from -2"),
    "nothing there": ({"input_ids": [None], "loss_mask": [None]}, "cannot be read"),
}


@pytest.mark.parametrize("name", SPOILED_MASKS)
def test_datasets_that_hold_no_loss_masks_cost_one_line(name: str, tmp_path: Path) -> None:
    import datasets

    columns, said = SPOILED_MASKS[name]
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "masks")
    ended = run_import(dump(), tmp_path / "cache", **FLAGS, loss_masks=tmp_path / "masks")
    assert_refused(ended, 4, str(tmp_path / "masks"), said)


def test_a_dataset_that_is_damaged_costs_one_line(tmp_path: Path) -> None:
    masks = write_loss_masks(tmp_path / "masks", rows())
    (data,) = masks.glob("*.arrow")
    content = data.read_bytes()
    for spoiled in (b"", content[:100], b"\x80\x04" + content):
        data.write_bytes(spoiled)
        ended = run_import(dump(), tmp_path / "cache", **FLAGS, loss_masks=masks)
        assert_refused(ended, 4, str(masks))
    data.write_bytes(content)
    (masks / "state.json").write_text("[")
    assert_refused(run_import(dump(), tmp_path / "cache", **FLAGS, loss_masks=masks), 4, str(masks))


def spoil_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        save_file({k: v.contiguous() for k, v in change(dict(load_file(path))).items()}, path)

    return spoil


def with_header(content: bytes, header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
    "no safetensors": (lambda path: path.write_bytes(b"\x93NUMPY" * 40), "not a readable safetensors file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "not a readable safetensors file"),
    "header of another size": (
        lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]), "not a readable safetensors file"
    ),
    "unknown dtype": (
        lambda path: path.write_bytes(
            with_header(b"\0" * 4, {"token_ids": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}})
        ),
        "not a readable safetensors file",
    ),
    "no ids": (spoil_tensors(lambda t: {"hidden_states": t["hidden_states"]}), "expected hidden_states and token_ids"),
    "more": (spoil_tensors(lambda t: {**t, "scale": torch.ones(3)}), "holds hidden_states, scale, token_ids, expected"),
    "other width": (
        spoil_tensors(lambda t: {**t, "hidden_states": t["hidden_states"][..., :-1]}), "expected [96, 4, 32]"
    ),
    "fewer layers": (
        spoil_tensors(lambda t: {**t, "hidden_states": t["hidden_states"][:, 1:]}), "expected [96, 4, 32]"
    ),
    "fewer tokens": (spoil_tensors(lambda t: {**t, "hidden_states": t["hidden_states"][1:]}), "expected [96, 4, 32]"),
    "flat": (spoil_tensors(lambda t: {**t, "hidden_states": t["hidden_states"].flatten(1)}), "expected [96, 4, 32]"),
    "integers": (spoil_tensors(lambda t: {**t, "hidden_states": t["hidden_states"].int()}), "torch.int32"),
    "another dtype": (spoil_tensors(lambda t: {**t, "hidden_states": t["hidden_states"].half()}), "torch.float16"),
    "fp8": (
        spoil_tensors(lambda t: {**t, "hidden_states": t["hidden_states"].to(torch.float8_e4m3fn)}), "float8_e4m3fn"
    ),
    "ids of floats": (spoil_tensors(lambda t: {**t, "token_ids": t["token_ids"].float()}), "expected integers [T]"),
    "ids below 0": (spoil_tensors(lambda t: {**t, "token_ids": t["token_ids"] - 300}), "expected none below 0"),
    "ids beyond": (spoil_tensors(lambda t: {**t, "token_ids": t["token_ids"] + (1 << 40)}), "expected none below 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_of_the_layout_costs_one_line_that_names_it(name: str, tmp_path: Path, states: Path) -> None:
    spoil, said = HOSTILE[name]
    spoil(states / "hs_0.safetensors")
    (states / "hs_0.safetensors").rename(
        states / "hs_5.safetensors"
    )  # not the first one, which the rest is held against
    assert_refused(run_import(states, tmp_path / "cache", **FLAGS), 4, "hs_5.safetensors", said)
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [1, 3])
def test_states_that_are_no_numbers_stop_or_are_left_out(
    value: float, layer: int, tmp_path: Path, states: Path
) -> None:
    tensors = dict(load_file(states / "hs_4.safetensors"))
    supervised = rows()[4].loss_mask.index(1)
    tensors["hidden_states"][supervised, layer, 3] = value
    save_file(tensors, states / "hs_4.safetensors")
    assert_refused(run_import(states, tmp_path / "cache", **FLAGS), 1, "sample 4", "chat-10-0.jsonl, row 5")
    cache = imported(tmp_path / "other", states, on_nonfinite="drop")
    assert 4 not in open_cache(cache).sample_ids
    assert "non-finite states" in builders.run_cli("inspect-manifest", cache).out


def test_a_file_that_changes_while_it_is_imported_is_refused(
    tmp_path: Path, states: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eagle_offline.importing import fill

    own = fill.write_companions

    def change(*arguments: Any) -> Any:
        path = states / "hs_6.safetensors"
        tensors = dict(load_file(path))
        tensors["hidden_states"][0, 0, 0] += 1
        save_file(tensors, path)
        return own(*arguments)

    monkeypatch.setattr(fill, "write_companions", change)
    assert_refused(run_import(states, tmp_path / "cache", **FLAGS), 4, "hs_6.safetensors: was changed")


def test_a_change_that_leaves_size_and_time_as_they_were_is_found_by_its_bytes(
    tmp_path: Path, states: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from eagle_offline.importing import fill

    own = fill.write_companions

    def change(*arguments: Any) -> Any:
        path = states / "hs_6.safetensors"
        status, content = path.stat(), bytearray(path.read_bytes())
        content[-3] ^= 1
        with path.open("r+b") as file:
            file.write(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        return own(*arguments)

    monkeypatch.setattr(fill, "write_companions", change)
    assert_refused(run_import(states, tmp_path / "cache", **FLAGS), 4, "hs_6.safetensors: was changed")


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no layers": ({"aux_layer_ids": None}, 2, "add --aux-layer-ids"),
    "too few layers": ({"aux_layer_ids": [1, 3]}, 4, "expected [96, 3, 32]"),
    "layers beyond": ({"aux_layer_ids": [1, 3, 8]}, 2, "this target has 8 decoder layers"),
    "layers down": ({"aux_layer_ids": [4, 3, 1]}, 2, "strictly increasing"),
    "batches": ({"batch_size": 2}, 2, "No such option '--batch-size'"),
    "a store": ({"output_dir": "s3://bucket/cache"}, 2, "not a URL"),
    "no masks": ({"loss_masks": "/nowhere/at/all"}, 2, "holds no dataset"),
    "planes of fp32": ({"dtype": "fp32"}, 2, "planes stores bf16 only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_meant_cost_one_line(name: str, tmp_path: Path) -> None:
    flags, code, said = REFUSED[name]
    flags = dict(flags)
    place = flags.pop("output_dir", tmp_path / "cache")
    assert_refused(run_import(dump(), place, **{**FLAGS, **flags}), code, said)


def test_settings_of_a_precompute_are_refused_in_a_file_too(tmp_path: Path) -> None:
    config = tmp_path / "import.yaml"
    config.write_text("max_batch_tokens: 4096\n")
    ended = run_import(dump(), tmp_path / "cache", **FLAGS, config=config)
    assert_refused(ended, 2, "--max-batch-tokens: of no use to an import")


def test_directories_that_hold_no_dump_cost_one_line(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "data_0.ckpt").write_bytes(b"\x80\x04.")
    assert_refused(run_import(tmp_path / "nothing", tmp_path / "c", **FLAGS), 2, "holds no states")
    assert_refused(run_import(tmp_path / "pickles", tmp_path / "c", **FLAGS), 2, "data_0.ckpt is a pickle")
    assert_refused(run_import(tmp_path / "nowhere", tmp_path / "c", **FLAGS), 2, "No such file")
    assert_refused(run_import(tmp_path / "nothing", tmp_path / "c", **FLAGS, tool="nemo"), 2, "holds no states")
    assert_refused(run_import(dump(), tmp_path / "c", **FLAGS, tool="nemo"), 2, "--from nemo", "a dump of speculators")
    (tmp_path / "nothing" / "shard-000000.safetensors").write_bytes(b"")
    assert_refused(run_import(tmp_path / "nothing", tmp_path / "c", **FLAGS), 2, "without their manifest.json")
    assert_refused(run_import(tmp_path / "pickles", tmp_path / "c", **FLAGS, tool="speculators"), 2, "is a pickle")


def test_a_dry_run_writes_tokens_alone(tmp_path: Path) -> None:
    ended = run_import(dump(), tmp_path / "cache", **FLAGS, dry_run=True)
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)
    assert (said["samples"], said["samples_without_states"], said["shards_committed"]) == (10, 0, 0)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"tokens", "status.json"}


def test_states_of_the_target_pass_a_trial(tmp_path: Path) -> None:
    ended = run_import(dump(dtype="bf16"), tmp_path / "cache", **FLAGS, check_samples=3)
    assert ended.code == 0, ended.err
    assert "checked 3 rows against the target: states differ by " in ended.err
    assert "check_samples" not in json.loads((tmp_path / "cache" / "config.json").read_text())


def test_layers_that_are_one_off_do_not_pass_a_trial(tmp_path: Path) -> None:
    flags = {**FLAGS, "aux_layer_ids": [2, 4, 5]}  # as vLLM numbers them
    ended = run_import(dump(), tmp_path / "cache", **flags, check_samples=2)
    assert_refused(ended, 3, "its states of layer 2 are those of layer 1", "vLLM's numbers less one")
    assert not (tmp_path / "cache" / "manifest.json").exists()
    ended = run_import(dump(), tmp_path / "cache", **flags)
    assert_refused(ended, 3, "its states of layer 2 are those of layer 1")  # unasked, as well
    ended = run_import(dump(), tmp_path / "other", **flags, check_samples=0)
    assert ended.code == 0, ended.err
    assert "with --check-samples 0 nothing shows whether" in ended.err
    assert "of the layers 2 4 5" in ended.err


def test_an_import_that_goes_on_is_not_checked_again(tmp_path: Path) -> None:
    assert "checked 1 row against the target" in run_import(dump(), tmp_path / "cache", **FLAGS).err
    ended = run_import(dump(), tmp_path / "cache", **FLAGS, resume=True)
    assert ended.code == 0, ended.err
    assert "checked" not in ended.err


def test_samples_of_the_same_tokens_and_other_states_are_refused_or_left_out(tmp_path: Path, states: Path) -> None:
    tensors = dict(load_file(states / "hs_3.safetensors"))
    shutil.copy(states / "hs_3.safetensors", states / "hs_77.safetensors")
    expected = imported(tmp_path / "plain")
    cache = imported(tmp_path / "equal", states)
    assert_same_samples(cache, expected)

    # computed twice in bf16: the same but for rounding
    tensors["hidden_states"] = tensors["hidden_states"].bfloat16().float()
    save_file(tensors, states / "hs_77.safetensors")
    ended = run_import(states, tmp_path / "rounded", **FLAGS)
    assert ended.code == 0, ended.err
    assert "samples of the dump that have the same tokens as another: 1" in ended.err
    assert_same_samples(tmp_path / "rounded", expected)

    tensors["hidden_states"] = tensors["hidden_states"].clone()
    tensors["hidden_states"][:, 1] *= -1
    save_file(tensors, states / "hs_77.safetensors")
    ended = run_import(states, tmp_path / "refused", **FLAGS)
    assert_refused(ended, 3, "hs_3.safetensors and hs_77.safetensors have the same tokens and other states")
    assert not (tmp_path / "refused" / "manifest.json").exists()
    cache = imported(tmp_path / "dropped", states, on_mismatch="drop")
    assert sorted(open_cache(cache).sample_ids) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    (lost,) = [item for record in builders.record_contents(cache).values() for item in record["lost"]]
    assert lost["reason"] == "several states of the same tokens in the dump, which contradict each other"


def test_a_file_that_cannot_be_read_names_the_way_out_which_works(tmp_path: Path, states: Path) -> None:
    (states / "hs_3.safetensors").write_bytes(b"\0" * 5)
    ended = run_import(states, tmp_path / "cache", **FLAGS, on_mismatch="drop")
    assert_refused(ended, 4, "hs_3.safetensors", "delete it and leave its row out with --on-mismatch drop")
    (states / "hs_3.safetensors").unlink()
    (states / "hs_3.pt").write_bytes(b"\x80\x04.")
    ended = run_import(states, tmp_path / "cache", **FLAGS, on_mismatch="drop")
    assert ended.code == 0, ended.err
    assert "pickles are not read: 1 (first: hs_3.pt)" in ended.err
    assert 3 not in open_cache(tmp_path / "cache").sample_ids


@pytest.mark.parametrize("layer", [0, 7])
def test_states_of_other_weights_do_not_pass_a_trial(layer: int, tmp_path: Path) -> None:
    target = shutil.copytree(builders.shared_target(), tmp_path / "target")
    tensors = load_file(target / "model.safetensors")
    tensors[f"model.layers.{layer}.mlp.down_proj.weight"] *= -1
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    ended = run_import(dump(), tmp_path / "cache", target, **FLAGS, check_samples=1)
    assert_refused(ended, 3, f"its states of layer {max(layer, 1)} are ", "another target, revision or adapter")
