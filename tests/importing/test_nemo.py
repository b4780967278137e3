"""What NeMo AutoModel dumped trains as our own `dense` cache of the same probabilities; what it lacks is absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_offline import open_cache
from tests import builders
from tests.importing import written
from tests.importing.test_speculators import assert_refused
from tests.importing.written import LAYERS, Forward, run_import, write_nemo
from tests.training import caches

NUM_SAMPLES = 24  # enough to hold some out


def chat() -> Path:
    return builders.shared_chat(NUM_SAMPLES)


def rows(dtype: str = "fp32") -> tuple[Forward, ...]:
    return written.forwards(builders.shared_target(), chat(), dtype)


@cache
def dump(dtype: str = "fp32", top_k: int = 0) -> Path:
    """A dump that no test changes, of a vocabulary in no order."""
    place = builders.SCRATCH / f"nemo-{dtype}-{top_k}"
    return write_nemo(place, rows(dtype), written.unsorted_vocabulary(), dtype, top_k=top_k)


@pytest.fixture
def states(tmp_path: Path) -> Path:
    return shutil.copytree(dump(), tmp_path / "states")


def imported(cache: Path, states: Path | None = None, **flags: Any) -> Path:
    ended = run_import(states or dump(), cache, None, chat(), **flags)
    assert ended.code == 0, ended.err
    return cache


def expected_probs(row: Forward, dtype: torch.dtype) -> torch.Tensor:
    """Of each position, the probabilities over the vocabulary in ascending order, as NeMo rounds them."""
    vocabulary = written.unsorted_vocabulary()
    probs = row.logits[:, vocabulary].float().softmax(dim=-1).to(dtype)
    return torch.stack([probs[:, vocabulary.index(token)] for token in sorted(vocabulary)], dim=-1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_position_comes_out_of_the_slot_frame_where_it_belongs(dtype: str, tmp_path: Path) -> None:
    stored = {"dtype": "fp32", "state_encoding": "raw"} if dtype == "fp32" else {}
    cache = open_cache(imported(tmp_path / "cache", dump(dtype), **stored))
    vocabulary = set(written.unsorted_vocabulary())
    assert cache.selected_token_ids.tolist() == sorted(vocabulary)
    assert cache.manifest.identity.capture.target_statistics == "in_vocabulary"
    assert cache.manifest.identity.capture.target_encoding == "dense"
    assert len(cache) == NUM_SAMPLES
    inside = outside = 0
    for number, sample_id in enumerate(cache.sample_ids):
        row, sample = rows(dtype)[sample_id], cache[number]
        assert sample.input_ids.tolist() == row.input_ids
        assert sample.loss_mask.int().tolist() == row.loss_mask
        aux = torch.cat([row.layers[layer] for layer in LAYERS], dim=-1)
        assert torch.equal(sample.aux_hidden_states, aux.to(written.DTYPES[dtype]))
        probs = expected_probs(row, written.DTYPES[dtype])
        for place, position in enumerate(sample.supervision.positions.tolist()):
            stored_probs = sample.supervision.target_probs[place]
            choice = int(sample.supervision.target_argmax[place])
            assert torch.equal(stored_probs, probs[position])
            if row.loss_mask[position] and int(row.logits[position].argmax()) in vocabulary:
                inside += 1
                best = row.logits[position].float()[sorted(vocabulary)].max()
                ties = {token for token in vocabulary if row.logits[position][token].float() == best}
                rounded = {sorted(vocabulary)[i] for i in (probs[position] == probs[position].max()).nonzero()[:, 0]}
                assert choice == min(ties | rounded)
            else:
                outside += 1
                assert choice == -1
        assert not sample.supervision.target_log_normalizer.any()
    assert inside > 20
    assert outside > 20


def nemo_of_cache(directory: Path, cache_directory: Path) -> Path:
    """A dump of what our own dense cache holds: its probabilities and argmax, in NeMo's frame and a random order."""
    cache = open_cache(cache_directory)
    ids = cache.selected_token_ids
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(2))
    slots = 96
    samples = []
    for number in range(len(cache)):
        sample = cache[number]
        length = len(sample.input_ids)

        def framed(values: torch.Tensor, shift: int, length: int = length) -> torch.Tensor:
            padded = values.new_zeros(slots, *values.shape[1:])
            padded[: length - shift] = values[shift:]
            return padded

        where = sample.supervision.positions
        probs = torch.full((length, len(ids)), 1 / len(ids), dtype=sample.supervision.target_probs.dtype)
        probs[where] = sample.supervision.target_probs
        inside = torch.zeros(length, dtype=torch.bool)
        inside[where] = cache.selected_token_mask[sample.supervision.target_argmax] & sample.loss_mask[where]
        filler = framed(probs, 1)
        filler[length - 1 :] = 1 / len(ids)
        samples.append(
            {
                "input_ids": framed(sample.input_ids, 1),
                "attention_mask": framed(torch.ones(length, dtype=torch.int64), 0),
                "loss_mask": framed(sample.loss_mask.long(), 1),
                "aux_hidden_states": framed(sample.aux_hidden_states, 0),
                "position_mask": framed(inside, 1).unsqueeze(-1),
                "target_probs": filler[:, order],
            }
        )
    directory.mkdir()
    shard_size = 5
    capture = cache.manifest.identity.capture
    manifest = {
        "format_version": 2, "target_vocab_size": builders.VOCAB_SIZE, "draft_vocab_size": len(ids),
        "seq_length": slots, "dtype": capture.dtype, "num_samples": len(samples), "shard_size": shard_size,
        "target_probs_topk": 0, "aux_hidden_dim": samples[0]["aux_hidden_states"].shape[-1],
        "aux_layer_ids": capture.aux_layer_ids, "selected_token_ids": ids[order].tolist(),
    }  # fmt: skip
    (directory / "manifest.json").write_text(json.dumps(manifest))
    for start in range(0, len(samples), shard_size):
        some = samples[start : start + shard_size]
        tensors = {name: torch.stack([sample[name] for sample in some]) for name in some[0]}
        save_file(tensors, directory / f"shard-{start // shard_size:06d}.safetensors")
    return directory


@pytest.mark.parametrize("gate", ["input", "both"])
def test_training_on_an_import_is_training_on_our_own_dense_cache(gate: str, tmp_path: Path) -> None:
    own = builders.make_cache(
        tmp_path / "own", None, chat(), target_encoding="dense", draft_vocab_size=caches.DRAFT_VOCAB_SIZE, batch_size=1
    )
    states = nemo_of_cache(tmp_path / "states", own)
    cache = imported(tmp_path / "cache", states)
    runs = []
    for place in (own, cache):
        chosen = caches.settings(
            tmp_path / f"run-{place.name}", cache=(place,), supervision_gate=gate, num_epochs=1, tokens_per_batch=400
        )
        caches.train(chosen)
        runs.append(chosen.output_dir)
    ours, theirs = (caches.checkpoint_tensors(run) for run in runs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    one, two = (caches.metrics(run) for run in runs)
    assert one == two
    assert any(row["kind"] == "heldout" for row in one)
    assert one[-1]["loss"] > 0


def test_probabilities_of_a_sample_are_those_of_our_own_cache(tmp_path: Path) -> None:
    own = builders.make_cache(
        tmp_path / "own", None, chat(), target_encoding="dense", draft_vocab_size=caches.DRAFT_VOCAB_SIZE, batch_size=1
    )
    cache = open_cache(imported(tmp_path / "cache", nemo_of_cache(tmp_path / "states", own)))
    theirs = open_cache(own)
    for number in range(len(cache)):
        (probs, mask), (expected, gate) = (held.target_probs(held[number]) for held in (cache, theirs))
        assert torch.equal(probs, expected)
        assert torch.equal(mask, gate)


def test_the_largest_probabilities_come_back_at_their_tokens(tmp_path: Path) -> None:
    cache = open_cache(imported(tmp_path / "cache", dump("fp32", 6), dtype="fp32", state_encoding="raw"))
    capture = cache.manifest.identity.capture
    assert (capture.target_encoding, capture.fields[-1].top_k) == ("topk", 6)
    for number in range(len(cache)):
        row, sample = rows()[cache.sample_ids[number]], cache[number]
        for place, position in enumerate(sample.supervision.positions.tolist()):
            exact = expected_probs(row, torch.float32)[position]
            kept = exact.topk(6)
            expected = torch.zeros_like(exact).scatter(0, kept.indices, kept.values / kept.values.sum())
            assert torch.allclose(sample.supervision.target_probs[place], expected, atol=1e-7)


def test_the_vocabulary_cannot_be_chosen_again(tmp_path: Path) -> None:
    cache = imported(tmp_path / "cache")
    for flags in (["--draft-vocab-size", "32"], ["--draft-vocab", str(builders.SCRATCH / "ids.txt")]):
        ended = builders.run_cli("train", "--cache", cache, "--output-dir", tmp_path / "run", "--device", "cpu", *flags)
        assert_refused(ended, 2, flags[0], "holds probabilities over the draft vocabulary it was made with")


def test_a_gate_that_asks_for_choices_which_are_not_there_is_refused(tmp_path: Path) -> None:
    cache = imported(tmp_path / "cache")
    ended = builders.run_cli(
        "train",
        "--cache",
        cache,
        "--output-dir",
        tmp_path / "run",
        "--device",
        "cpu",
        "--supervision-gate",
        "predicted",
    )
    assert_refused(ended, 2, "--supervision-gate predicted", "imported without the target's choice")


def test_inspection_says_what_is_not_known(tmp_path: Path) -> None:
    cache = imported(tmp_path / "cache")
    said = json.loads(builders.run_cli("inspect-manifest", cache, "--json").out)
    vocabulary = said["draft_vocabulary"]
    assert vocabulary["mass_share"] is None
    supervised = [(row, t) for row in rows() for t, m in enumerate(row.loss_mask) if m]
    inside = sum(int(row.logits[t].argmax()) in written.unsorted_vocabulary() for row, t in supervised)
    assert vocabulary["argmax_share"] == pytest.approx(inside / len(supervised))
    tokens = sum(row.input_ids[t] in written.unsorted_vocabulary() for row, t in supervised)
    assert vocabulary["supervised_tokens_share"] == pytest.approx(tokens / len(supervised))
    page = builders.run_cli("inspect-manifest", cache).out
    assert "not known: the states were imported without it" in page
    assert "imported from" in page


@pytest.mark.parametrize("flags", [{"target_encoding": "topk", "top_k": 4}, {"format": "zarr"}, {"shard_size": 3}])
def test_an_import_verifies_and_converts(flags: dict[str, Any], tmp_path: Path) -> None:
    cache = imported(tmp_path / "cache")
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    ended = builders.run_cli("convert", cache, "--output-dir", tmp_path / "other", *arguments)
    assert ended.code == 0, ended.err
    for place in (cache, tmp_path / "other"):
        ended = builders.run_cli("verify", place)
        assert ended.code == 0, ended.out
    converted = open_cache(tmp_path / "other").manifest.identity
    assert converted.capture.target_statistics == "in_vocabulary"
    assert converted.imported_from == open_cache(cache).manifest.identity.imported_from


def test_an_import_does_not_become_factored(tmp_path: Path) -> None:
    ended = builders.run_cli(
        "convert", imported(tmp_path / "cache"), "--output-dir", tmp_path / "other", "--target-encoding", "factored"
    )
    assert_refused(ended, 2, "--target-encoding factored")


def test_layers_are_stored_low_to_high_and_may_be_chosen(tmp_path: Path) -> None:
    states = write_nemo(tmp_path / "states", rows(), written.unsorted_vocabulary(), layers=[4, 1, 3])
    flags = {"dtype": "fp32", "state_encoding": "raw"}
    cache = open_cache(imported(tmp_path / "cache", states, **flags))
    assert cache.aux_layer_ids == [1, 3, 4]
    some = open_cache(imported(tmp_path / "some", states, aux_layer_ids=[3, 4], **flags))
    assert some.aux_layer_ids == [3, 4]
    row = rows()[cache.sample_ids[0]]
    assert torch.equal(cache[0].aux_hidden_states, torch.cat([row.layers[layer] for layer in (1, 3, 4)], dim=-1))
    assert torch.equal(some[0].aux_hidden_states, torch.cat([row.layers[layer] for layer in (3, 4)], dim=-1))


def pretokenised(tmp_path: Path) -> tuple[Path, tuple[Forward, ...]]:
    """Rows of ids: two that differ in their first token alone, and one supervised from its first token on."""
    model = written.model_of(builders.shared_target(), "fp32")
    ids = [list(range(60, 90)), [7, *range(61, 90)], list(range(100, 130))]
    masks = [[0] * 10 + [1] * 20, [0] * 10 + [1] * 20, [1] * 30]
    data = builders.write_jsonl(
        tmp_path / "ids.jsonl",
        [{"input_ids": row, "loss_mask": mask} for row, mask in zip(ids, masks, strict=True)],
    )
    return data, tuple(written.forward(model, row, mask) for row, mask in zip(ids, masks, strict=True))


def test_rows_that_differ_in_their_first_token_alone_cannot_be_told_apart(tmp_path: Path) -> None:
    data, forwards = pretokenised(tmp_path)
    states = write_nemo(tmp_path / "states", forwards, written.unsorted_vocabulary())
    ended = run_import(states, tmp_path / "cache", None, data)
    assert_refused(ended, 3, "2 of 3 rows of the corpus: rows that differ in their first token alone")
    ended = run_import(states, tmp_path / "cache", None, data, on_mismatch="drop")
    assert ended.code == 0, ended.err
    assert open_cache(tmp_path / "cache").sample_ids.tolist() == [2]


def test_position_0_is_absent_and_no_slot_reads_it(tmp_path: Path) -> None:
    data, forwards = pretokenised(tmp_path)
    states = write_nemo(tmp_path / "states", forwards[2:], written.unsorted_vocabulary())
    lines = data.read_text().splitlines()
    alone = builders.write_jsonl(tmp_path / "alone.jsonl", [json.loads(lines[2])])
    ended = run_import(states, tmp_path / "cache", None, alone, dtype="fp32", state_encoding="raw")
    assert ended.code == 0, ended.err
    sample = open_cache(tmp_path / "cache")[0]
    assert sample.supervision.positions[0] == 0
    assert sample.supervision.target_argmax[0] == -1
    assert not sample.supervision.target_probs[0].any()
    assert torch.equal(sample.supervision.target_probs[1], expected_probs(forwards[2], torch.float32)[1])
    assert builders.run_cli("verify", tmp_path / "cache").code == 0


def spoil(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def spoiled(states: Path) -> None:
        path = states / "shard-000001.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in change(dict(load_file(path))).items()}, path)

    return spoiled


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def rewritten(states: Path) -> None:
        path = states / "manifest.json"
        said = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))

    return rewritten


def set_value(name: str, place: tuple[int, ...], value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][place] = value
        return tensors

    return spoil(change)


def first_answer(shard: Path) -> int:
    """The first slot of sample 1 that is supervised."""
    return int(load_file(shard)["loss_mask"][1].argmax())


SHARD = "shard-000001.safetensors"
HOSTILE: dict[str, tuple[Callable[[Path], None], int, tuple[str, ...]]] = {
    "a shard is missing": (lambda p: (p / SHARD).unlink(), 4, ("1 of 6 shards are missing", SHARD)),
    "a shard too many": (
        lambda p: shutil.copy(p / SHARD, p / "shard-000006.safetensors"), 4, ("shard-000006.safetensors is beyond",)
    ),
    "a shard in another's place": (
        lambda p: shutil.copy(p / SHARD, p / "shard-000002.safetensors"), 3, ("no states in the dump",)
    ),
    "truncated": (lambda p: (p / SHARD).write_bytes((p / SHARD).read_bytes()[:-9]), 4, (SHARD, "not a readable")),
    "a field is missing": (
        spoil(lambda t: {k: v for k, v in t.items() if k != "position_mask"}), 4, (SHARD, "lacks position_mask")
    ),
    "a field too many": (spoil(lambda t: {**t, "pixel": torch.ones(2)}), 4, (SHARD, "has beyond pixel")),
    "fewer samples": (spoil(lambda t: {k: v[1:] for k, v in t.items()}), 4, (SHARD, "expected 4 samples")),
    "another width": (
        spoil(lambda t: {**t, "aux_hidden_states": t["aux_hidden_states"][..., 1:]}), 4, (SHARD, "aux_hidden_states is")
    ),
    "another dtype": (spoil(lambda t: {**t, "input_ids": t["input_ids"].int()}), 4, (SHARD, "input_ids is I32")),
    "another dtype of states": (
        spoil(lambda t: {**t, "aux_hidden_states": t["aux_hidden_states"].half()}), 4, (SHARD, "are not fp32")
    ),
    "padding on the left": (
        spoil(lambda t: {**t, "attention_mask": t["attention_mask"].flip(1)}), 4, (SHARD, "padded elsewhere")
    ),
    "a mask of twos": (
        spoil(lambda t: {**t, "loss_mask": t["loss_mask"] * 2}), 4, (SHARD, "something else than 0 and 1")
    ),
    "ids below 0": (set_value("input_ids", (0, 3), -4), 4, (SHARD, "expected none below 0")),
    "other ids": (
        set_value("input_ids", (0, 3), 9), 3, ("no states in the dump", f"of no row (first: {SHARD} sample 0)")
    ),
    "no probabilities": (
        spoil(lambda t: {**t, "target_probs": t["target_probs"] * 0.5}), 4, (SHARD, "do not sum to 1")
    ),
    "negative ones": (
        spoil(lambda t: {**t, "target_probs": 2 / 64 - t["target_probs"]}), 4, (SHARD, "some are negative")
    ),
    "a gate outside the mask": (
        spoil(lambda t: {**t, "position_mask": ~t["position_mask"]}), 4, (SHARD, "position_mask is set where")
    ),
    "states that are no numbers": (set_value("aux_hidden_states", (1, 2, 5), float("nan")), 1, ("NaN or infinite",)),
    "probabilities that are no numbers": (
        lambda p: set_value("target_probs", (1, first_answer(p / SHARD), 5), float("nan"))(p), 1, ("NaN or infinite",)
    ),
    "no JSON": (lambda p: (p / "manifest.json").write_text("{"), 4, ("manifest.json: not JSON",)),
    "a list": (lambda p: (p / "manifest.json").write_text("[]"), 4, ("expected a JSON object",)),
    "another version": (rewrite(format_version=3), 4, ("format_version",)),
    "a key is missing": (rewrite(selected_token_ids=None), 4, ("selected_token_ids",)),
    "ids twice": (rewrite(selected_token_ids=[3] * 64), 4, ("expected 64 different ones below 272",)),
    "ids beyond the target": (rewrite(selected_token_ids=[*range(63), 272]), 4, ("up to 272",)),
    "layers twice": (rewrite(aux_layer_ids=[1, 1, 3]), 4, ("aux_layer_ids [1, 1, 3]",)),
    "layers beyond the target": (rewrite(aux_layer_ids=[1, 3, 9]), 2, ("this target has 8 decoder layers",)),
    "another target": (rewrite(target_vocab_size=300), 3, ("--target-model has 32 and 272",)),
    "more samples": (rewrite(num_samples=200), 4, ("44 of 50 shards are missing",)),
    "a number that is none": (rewrite(num_samples=1e300), 4, ("num_samples",)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_of_the_layout_costs_one_line(name: str, tmp_path: Path, states: Path) -> None:
    change, code, parts = HOSTILE[name]
    change(states)
    assert_refused(run_import(states, tmp_path / "cache", None, chat()), code, *parts)


def test_columns_of_the_largest_probabilities_are_checked(tmp_path: Path) -> None:
    states = shutil.copytree(dump("fp32", 6), tmp_path / "states")
    for value, said in ((64, "go from"), (None, "name a column twice")):
        tensors = dict(load_file(dump("fp32", 6) / SHARD))
        columns = tensors["target_probs_indices"]
        columns[..., 0] = columns[..., 1] if value is None else value
        save_file(tensors, states / SHARD)
        assert_refused(run_import(states, tmp_path / said, None, chat()), 4, SHARD, said)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "factored": ({"target_encoding": "factored"}, "holds all probabilities over its draft vocabulary"),
    "another vocabulary": ({"draft_vocab_size": 32}, "over the 64 tokens it was made with"),
    "a compute dtype": ({"compute_dtype": "bf16"}, "leave it out"),
    "masks": ({"loss_masks": "/tmp"}, "have their own"),
    "other layers": ({"aux_layer_ids": [1, 2]}, "has the layers [1, 3, 4], not [2]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_the_dump_cannot_follow_cost_one_line(name: str, tmp_path: Path) -> None:
    flags, said = REFUSED[name]
    assert_refused(run_import(dump(), tmp_path / "cache", None, chat(), **flags), 2, said)


def test_what_was_left_out_does_not_come_back(tmp_path: Path) -> None:
    for flags, said in (({"target_encoding": "dense"}, "the 6 largest"), ({"top_k": 9}, "kept 6 only")):
        assert_refused(run_import(dump("fp32", 6), tmp_path / "cache", None, chat(), **flags), 2, said)


def test_the_gate_of_choices_keeps_out_what_is_not_known() -> None:
    from eagle_offline.supervision import chosen_inside

    mask = torch.tensor([False, True, True])
    assert chosen_inside(torch.tensor([-1, 0, 1, 2, -1]), mask).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_states_of_a_target_with_other_embeddings_are_refused(dtype: str, tmp_path: Path, states: Path) -> None:
    weight = load_file(builders.shared_target() / "model.safetensors")["model.embed_tokens.weight"]
    save_file({"weight": weight.to(written.DTYPES[dtype]).float()}, states / "target_embeddings.safetensors")
    imported(tmp_path / "cache", states)
    other = weight.clone()
    other[3, 3] += 0.25
    save_file({"weight": other.to(written.DTYPES[dtype]).float()}, states / "target_embeddings.safetensors")
    ended = run_import(states, tmp_path / "other", None, chat())
    assert_refused(ended, 3, "target_embeddings.safetensors: not the embeddings of --target-model")
    assert not (tmp_path / "other" / "manifest.json").exists()


def test_a_shard_that_changes_while_it_is_imported_is_refused(
    tmp_path: Path, states: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eagle_offline.importing import fill

    own = fill.write_companions

    def change(*arguments: Any) -> Any:
        set_value("aux_hidden_states", (2, 5, 7), 0.5)(states)
        return own(*arguments)

    monkeypatch.setattr(fill, "write_companions", change)
    ended = run_import(states, tmp_path / "cache", None, chat())
    assert_refused(ended, 4, f"{SHARD}: was changed after it was matched")
