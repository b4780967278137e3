"""Several caches as one corpus: what an epoch visits, in which order, and what cannot be mixed."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagle_offline import open_cache
from eagle_offline.data.mixture import CacheMixture, check_alike
from eagle_offline.data.sampler import heldout_mask
from eagle_offline.errors import DataError, MismatchError, UsageError
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.corpus import open_corpus
from eagle_offline.training.ranks import Ranks
from eagle_offline.training.trainer import Trainer
from tests.builders import make_cache, run_cli, save_target, shared_chat
from tests.oracles.children import command, kill_at_call, run_children
from tests.training.caches import (
    assert_same_run,
    copied_cache,
    latest,
    settings,
    shared_cache,
    train,
    trainer_of,
)

ONE, TWO = 24, 10


def two(output_dir: Path, **changes: Any) -> TrainSettings:
    """Two caches of one target; their sample ids collide: both begin at 0."""
    values = {"cache": (shared_cache(), shared_cache(count=TWO, seed=1)), "heldout_share": 0, "num_epochs": 4}
    return settings(output_dir, **{**values, **changes})


def visits(trainer: Trainer) -> list[Counter[int]]:
    """How often each epoch visits each index of the mixture, by walking through its steps."""
    epochs: list[Counter[int]] = [Counter() for _ in range(trainer.settings.num_epochs)]
    epoch = 0
    for position, packs in trainer.remaining_steps():
        epochs[epoch].update(int(index) for pack in packs for index in pack)
        epoch = position.epoch
    return epochs


def split(counts: Counter[int]) -> tuple[Counter[int], Counter[int]]:
    first = Counter({index: count for index, count in counts.items() if index < ONE})
    return first, Counter({index - ONE: count for index, count in counts.items() if index >= ONE})


def test_without_weights_an_epoch_sees_every_sample_of_every_cache_once(tmp_path):
    for epoch in visits(trainer_of(two(tmp_path))):
        assert epoch == Counter(range(ONE + TWO))


def test_weights_are_passes_an_epoch(tmp_path):
    """Twice through the first; half of the second, another half in the next epoch, so two epochs see all of it."""
    epochs = [split(counts) for counts in visits(trainer_of(two(tmp_path, cache_weights=(2, 0.5))))]
    for first, second in epochs:
        assert first == Counter(dict.fromkeys(range(ONE), 2))
        assert second.total() == TWO // 2
    for start in range(3):
        pair = epochs[start][1] + epochs[start + 1][1]
        assert pair == Counter(range(TWO)), f"epochs {start} and {start + 1}"


@pytest.mark.parametrize("weight", [0.3, 1.25, 1 / 3, 2.9])
def test_over_many_epochs_counts_of_samples_differ_by_one_at_most(weight, tmp_path):
    epochs = [split(c)[1] for c in visits(trainer_of(two(tmp_path, cache_weights=(1, weight), num_epochs=10)))]
    total = sum(epochs, Counter())
    counts = [total[index] for index in range(TWO)]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == round(10 * weight * TWO)
    for epoch in epochs:
        found = [epoch[index] for index in range(TWO)]
        assert max(found) - min(found) <= 1
        assert abs(sum(found) - weight * TWO) <= 1


def plan(chosen: TrainSettings) -> list[list[list[int]]]:
    trainer = trainer_of(chosen)
    return [[pack.tolist() for pack in trainer.stream.packs(epoch)] for epoch in range(3)]


def test_the_order_is_a_function_of_seed_epoch_and_caches(tmp_path):
    chosen = two(tmp_path, cache_weights=(1.5, 0.5))
    first = plan(chosen)
    np.random.seed(3)
    trainer = trainer_of(chosen)
    assert [pack.tolist() for pack in trainer.stream.packs(2)] == first[2]
    assert [pack.tolist() for pack in trainer.stream.packs(0)] == first[0]
    assert plan(chosen) == first
    assert plan(two(tmp_path, cache_weights=(1.5, 0.5), seed=1)) != first
    assert len({json.dumps(epoch) for epoch in first}) == 3


def test_samples_of_both_caches_stand_in_the_same_packs(tmp_path):
    packs = [pack for epoch in plan(two(tmp_path)) for pack in epoch]
    assert any(min(pack) < ONE <= max(pack) for pack in packs)


def test_a_sample_of_the_mixture_is_the_sample_of_its_cache(tmp_path):
    trainer = trainer_of(two(tmp_path))
    caches = [open_cache(path) for path in two(tmp_path).cache]
    for index in (0, ONE - 1, ONE, ONE + TWO - 1):
        ours = trainer.corpus.samples[index]
        theirs = caches[index >= ONE][index - ONE if index >= ONE else index]
        assert ours.sample_id == theirs.sample_id
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
    for index in (-1, ONE + TWO):
        with pytest.raises(IndexError):
            trainer.corpus.samples[index]
    shards = trainer.corpus.samples.shards
    assert not set(shards[:ONE].tolist()) & set(shards[ONE:].tolist())


def test_documents_are_held_out_of_both_and_equal_ids_share_their_fate(tmp_path):
    trainer = trainer_of(two(tmp_path, heldout_share=0.3, cache_weights=(2, 1)))
    ids = [open_cache(path).sample_ids for path in two(tmp_path).cache]
    held = [heldout_mask(each, 0.3, 0) for each in ids]
    expected = np.flatnonzero(np.concatenate(held))
    assert held[0].any()
    assert held[1].any()
    np.testing.assert_array_equal(trainer.corpus.heldout_samples, expected)
    seen = sum(visits(trainer), Counter())
    assert not set(expected.tolist()) & set(seen)
    assert set(expected.tolist()) | set(seen) == set(range(ONE + TWO))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_ranks_sees_every_sample_of_an_epoch_once(size, tmp_path):
    """Each rank by itself, from its loaded steps; the last step of an epoch may leave ranks without packs."""
    chosen = two(tmp_path, global_batch=4, num_epochs=2, cache_weights=(1, 0.5), tokens_per_batch=100)
    seen: list[Counter[tuple[int, int]]] = [Counter(), Counter()]
    empty = 0
    for rank in range(size):
        trainer = Trainer(chosen, open_corpus(chosen), Ranks(rank, size, rank))
        epoch = 0
        for step in trainer.remaining_steps():
            loaded = trainer.stream.load(step)
            empty += not loaded.packs
            assert len(loaded.packs) <= 4 // size
            assert sum(len(pack.sample_ids) for pack in loaded.packs) == len(loaded.samples)
            seen[epoch].update(int(index) for index in loaded.samples)
            epoch = step[0].epoch
    expected = [Counter(epoch) for epoch in visits(trainer_of(chosen))]
    assert seen == expected
    assert empty or size < 4


def test_another_number_of_ranks_in_mid_epoch_sees_the_rest_once(tmp_path):
    chosen = two(tmp_path, global_batch=4, num_epochs=1, tokens_per_batch=100)
    trainer = trainer_of(chosen)
    steps = list(trainer.remaining_steps())
    seen = Counter(int(index) for _, packs in steps[:2] for pack in packs for index in pack)
    for rank in range(2):
        other = Trainer(chosen, open_corpus(chosen), Ranks(rank, 2, rank))
        other.standing = type(other.standing)(steps[1][0])
        seen.update(int(index) for step in other.remaining_steps() for index in other.stream.load(step).samples)
    assert seen == Counter(range(ONE + TWO))


def test_shards_that_are_missing_are_left_out_when_allowed(tmp_path):
    partial = copied_cache(tmp_path / "cache", shared_cache(count=TWO, seed=1))
    sorted(partial.glob("commit-*.json"))[0].unlink()
    chosen = two(tmp_path / "run", cache=(shared_cache(), partial))
    with pytest.raises(DataError, match="shards are missing"):
        trainer_of(chosen)
    trainer = trainer_of(chosen.model_copy(update={"allow_partial": True}))
    left = len(open_cache(partial, allow_partial=True))
    assert 0 < left < TWO
    assert visits(trainer)[0] == Counter(range(ONE + left))


def other_cache(tmp_path: Path, **changes: Any) -> Path:
    return make_cache(tmp_path / "other", data=shared_chat(4), **{"draft_vocab_size": 200, **changes})


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("target", {"target": True}),
        ("aux layers", {"aux_layer_ids": [1, 2, 4]}),
        ("target encoding", {"target_encoding": "dense"}),
        ("stored dtype", {"dtype": "fp16", "state_encoding": "raw"}),
    ],
)
def test_caches_that_are_not_alike_are_refused_by_field(field, changes, tmp_path):
    given = dict(changes)
    if given.pop("target", False):
        given["target"] = save_target(tmp_path / "target", seed=9)
    other = other_cache(tmp_path, **given)
    ended = run_cli(*command(two(tmp_path / "run", cache=(shared_cache(), other))))
    assert ended.code == 3, ended.err
    errors = [line for line in ended.errors if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"its {field} {'are' if field == 'aux layers' else 'is'} " in errors[0]
    assert str(other) in errors[0]
    way_out = errors[0].split("; ", 1)[1]
    if field == "target":
        assert way_out.startswith("no conversion changes that")
        return
    caches = {str(path): path for path in (shared_cache(), other)}
    words = r"make them alike: eagle-offline convert (each of them with|\S+) (--output-dir DIR )?(.+)"
    told = re.fullmatch(words, way_out)
    assert told is not None, way_out
    for name in caches if told[1] == "each of them with" else [told[1]]:
        made = tmp_path / f"alike-{len(list(tmp_path.iterdir()))}"
        assert run_cli("convert", name, "--output-dir", made, *told[3].split()).code == 0, way_out
        caches[name] = made
    check_alike(*map(open_cache, caches.values()))


def test_where_no_conversion_helps_that_is_said(tmp_path):
    others = other_cache(tmp_path, aux_layer_ids=[0, 2]), shared_cache("dense", count=6, seed=2)
    vocabulary = make_cache(tmp_path / "third", data=shared_chat(4), draft_vocab_size=150)
    for one, two in ((shared_cache(), others[0]), (vocabulary, others[1])):
        with pytest.raises(MismatchError, match="; no conversion makes them alike: precompute one of them anew"):
            check_alike(open_cache(one), open_cache(two))


def test_dense_caches_of_other_draft_vocabularies_are_refused(tmp_path):
    one, other = shared_cache("dense"), other_cache(tmp_path, target_encoding="dense", draft_vocab_size=150)
    with pytest.raises(MismatchError, match="dense vocabulary"):
        check_alike(open_cache(one), open_cache(other))
    with pytest.raises(MismatchError, match="dense vocabulary"):
        CacheMixture([open_cache(one), open_cache(other)])


@pytest.mark.parametrize("spelling", ["same", "dotted", "link"])
def test_the_same_cache_twice_is_refused(spelling, tmp_path):
    cache = shared_cache()
    (tmp_path / "link").symlink_to(cache)
    again = {"same": cache, "dotted": cache / ".." / cache.name, "link": tmp_path / "link"}[spelling]
    with pytest.raises(UsageError, match=r"holds 24 of the samples of .*; .*--cache-weights"):
        trainer_of(two(tmp_path, cache=(cache, again)))


def test_a_copy_of_a_cache_beside_it_is_refused_too(tmp_path):
    """Another directory, the same samples: what one of them holds out, the other may not train on unnoticed."""
    copy = copied_cache(tmp_path / "copy")
    with pytest.raises((UsageError, MismatchError)):
        trainer_of(two(tmp_path / "run", cache=(shared_cache(), copy)))


def slice_of(cache: Path, place: Path, samples: str, *flags: str) -> Path:
    ended = run_cli("convert", cache, "--output-dir", place, "--samples", samples, *flags)
    assert ended.code == 0, ended.err
    return place


def test_samples_are_not_trained_on_twice_nor_validated_on_however_they_are_stored(tmp_path):
    """By their ids in one corpus: a conversion is refused, slices that share none are not."""
    cache, trained = shared_cache(), slice_of(shared_cache(), tmp_path / "trained", "0:18")
    again = slice_of(cache, tmp_path / "again", "15:24", "--state-encoding", "fp8")
    apart = slice_of(cache, tmp_path / "apart", "18:24", "--state-encoding", "fp8")
    for ours, other, count in ((cache, again, 9), (trained, again, 3)):
        with pytest.raises(UsageError, match=rf"--cache {other} holds {count} of the samples of {ours}: .*--cache-w"):
            open_corpus(settings(tmp_path / "run", cache=(ours, other)))
        with pytest.raises(UsageError, match=rf"--heldout-cache {other} holds {count} of the samples of {ours}, which"):
            open_corpus(settings(tmp_path / "run", cache=(ours,), heldout_cache=other))
    assert len(open_corpus(settings(tmp_path / "run", cache=(trained, apart))).samples) == 24
    held = open_corpus(settings(tmp_path / "run", cache=(trained,), heldout_cache=apart)).heldout
    assert held.sample_ids.tolist() == open_cache(cache).sample_ids[18:].tolist()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (["1"], "has 1 values for 2 caches"),
        (["1", "2", "3"], "has 3 values for 2 caches"),
        (["0", "1"], "expected numbers above 0"),
        (["1", "-1"], "--cache-weights"),
        (["1", "nan"], "--cache-weights"),
        (["inf", "1"], "--cache-weights"),
        (["1", "much"], "--cache-weights"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused_in_one_line(weights, said, tmp_path):
    ended = run_cli(*command(two(tmp_path / "run")), *(f"--cache-weights={weight}" for weight in weights))
    assert ended.code == 2, ended.err
    errors = [line for line in ended.errors if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_that_leave_epochs_empty_end_all_the_same(tmp_path):
    """A share so small that an epoch may have no sample: the others do, and the run comes to its end."""
    chosen = two(tmp_path / "run", cache=(shared_cache(count=TWO, seed=1),), cache_weights=(0.05,), num_epochs=10)
    (ended,) = run_children(command(chosen), tmp_path, timeout=8)
    assert ended.code in (0, 2, 4), ended.err
    assert "Traceback" not in ended.err
    if ended.code == 0:
        assert latest(tmp_path / "run").is_dir()
    else:
        assert len(ended.errors) == 1


@pytest.mark.slow
def test_killed_on_a_mixture_and_resumed_equals_uninterrupted(tmp_path):
    mixed = {"cache_weights": (0.5, 1.5), "num_epochs": 3, "heldout_share": 0.2, "global_batch": 2}
    run, chosen = tmp_path / "run", two(tmp_path / "run", checkpoint_every=2, resume=True, **mixed)
    for call in (3, 4):
        (killed,) = run_children(command(chosen), tmp_path, prepare=kill_at_call(Trainer, "step", call))
        assert killed.code == -9, killed.err
    train(chosen)
    train(two(tmp_path / "other", **mixed))
    assert_same_run(run, tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cache_weights": (1, 1)}, "cache_weights"),
        ({"cache": "swapped"}, "cache_identity"),
        ({"cache": "first"}, "cache_identity"),
    ],
)
def test_a_mixture_that_changed_is_refused_by_name(changes, field, tmp_path):
    run = tmp_path / "run"
    train(two(run, max_steps=2, cache_weights=(1, 2)))
    one, other = two(run).cache
    caches = {"swapped": (other, one), "first": (one,)}
    given = {"cache_weights": (1, 2), **changes}
    if "cache" in given:
        given["cache"] = caches[given["cache"]]
        given["cache_weights"] = given["cache_weights"][: len(given["cache"])]
    ended = run_cli(*command(two(run, max_steps=2, resume=True, **given)))
    assert ended.code == 3, ended.err
    assert f"{field}: recorded" in ended.err
