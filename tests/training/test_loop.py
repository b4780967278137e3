"""A run from the first validation to the last checkpoint: it learns, it says what it does, it refuses bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eagle_offline import open_cache
from eagle_offline.data.sampler import heldout_mask
from eagle_offline.errors import DataError, MismatchError
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.training.logbook import MetricsRow, read_metrics
from eagle_offline.training.trainer import Trainer
from tests.builders import make_cache, run_cli, save_target, shared_chat, tree
from tests.training.caches import copied_cache, latest, metrics, settings, shared_cache, train, trainer_of


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("learned") / "run"
    train(settings(run, num_epochs=12, eval_every=30, log_every=4))
    return run


def rows_of(run: Path, kind: str) -> list[dict]:
    return [row for row in read_metrics(run) if row["kind"] == kind]


def test_loss_goes_down_on_what_is_trained_on_and_on_what_is_not(learned):
    for kind, least in (("train", 1.0), ("heldout", 0.7)):
        losses = [row["loss"] for row in rows_of(learned, kind)]
        assert losses[-1] < losses[0] - least, (kind, losses)


def test_embeddings_stay_the_target_s_bit_for_bit(learned):
    weights = load_file(latest(learned) / "model.safetensors")
    assert torch.equal(weights["embed_tokens.weight"], open_cache(shared_cache()).embeddings.float())


def test_everything_else_moves(learned, tmp_path):
    untrained = trainer_of(settings(tmp_path)).model.state_dict()
    weights = load_file(latest(learned) / "model.safetensors")
    still = {name for name, tensor in weights.items() if torch.equal(tensor, untrained[name])}
    assert still == {"embed_tokens.weight"}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_embeddings_move_when_asked_for(tmp_path):
    train(settings(tmp_path / "run", train_embeddings=True, max_steps=2))
    weights = load_file(latest(tmp_path / "run") / "model.safetensors")
    assert not torch.equal(weights["embed_tokens.weight"], open_cache(shared_cache()).embeddings.float())


def validated(trainer: Trainer) -> dict[str, Any]:
    """A validation as `metrics.jsonl` has it."""
    return trainer.validate().row("heldout", trainer.loss, 0, 0.0).model_dump(exclude_none=True)


def test_there_is_a_validation_before_the_first_step_and_after_the_last(learned):
    found = rows_of(learned, "heldout")
    last = max(row["step"] for row in read_metrics(learned))
    assert [row["step"] for row in found] == sorted({0, *range(30, last + 1, 30), last})
    assert found[0]["epoch"] == 0
    assert found[-1]["epoch"] == 12
    assert all("walked_accept_length" in row for row in found)
    assert json.loads((latest(learned) / "training_state.json").read_text())["standing"]["position"]["step"] == last


def test_the_first_validation_is_of_the_untrained_draft(learned, tmp_path):
    assert metrics(learned)[0] == validated(trainer_of(settings(tmp_path)))


def test_validation_comes_once_an_epoch_unless_told_otherwise(tmp_path):
    run = tmp_path / "run"
    train(settings(run, num_epochs=3))
    assert [row["epoch"] for row in rows_of(run, "heldout")] == [0, 1, 2, 3]


def test_metrics_have_one_row_a_step_in_order(tmp_path):
    run = tmp_path / "run"
    train(settings(run))
    found = rows_of(run, "train")
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert [row["step"] for row in read_metrics(run)] == sorted(row["step"] for row in read_metrics(run))
    for row in read_metrics(run):
        assert MetricsRow.model_validate(row).kind == row["kind"]
    for row in found:
        assert {"learning_rate", "grad_norm", "tokens_per_second", "data_wait_share", "memory_bytes"} <= row.keys()
        assert 0 <= row["data_wait_share"] <= 1
        assert len(row["top1"]) == len(row["conditional_top1"]) == 3
        assert row["simulated_accept_length"] >= 1


def test_a_rarer_line_holds_the_mean_of_its_steps(tmp_path):
    """`--log-every` changes what is written, not what is trained; the means are over supervised slots, not steps."""
    runs = [tmp_path / "each", tmp_path / "fifth"]
    for run, every in zip(runs, (1, 5), strict=True):
        train(settings(run, log_every=every, num_epochs=1))
    each, fifth = (rows_of(run, "train") for run in runs)
    last = each[-1]["step"]
    assert [row["step"] for row in fifth] == sorted({*range(5, last + 1, 5), last})
    weights = [load_file(latest(run) / "model.safetensors") for run in runs]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    losses = [row["loss"] for row in each[:5]]
    assert min(losses) < fifth[0]["loss"] < max(losses)


def test_held_out_documents_are_never_trained_on(tmp_path, monkeypatch):
    seen: set[int] = set()
    original = Trainer.step

    def watched(trainer, loaded, tally):
        seen.update(sample_id for pack in loaded.packs for sample_id in pack.sample_ids)
        return original(trainer, loaded, tally)

    monkeypatch.setattr(Trainer, "step", watched)
    train(settings(tmp_path / "run"))
    ids = open_cache(shared_cache()).sample_ids
    held = set(ids[heldout_mask(ids, 0.2, seed=0)].tolist())
    assert held
    assert seen == set(ids.tolist()) - held


def test_every_epoch_trains_on_every_document_once(tmp_path):
    trainer = trainer_of(settings(tmp_path, global_batch=2, num_epochs=3))
    visited: dict[int, list[int]] = {}
    epoch = 0
    for position, packs in trainer.remaining_steps():
        assert len(packs) == 2 or position.next_pack == 0
        visited.setdefault(epoch, []).extend(int(index) for pack in packs for index in pack)
        epoch = position.epoch
    assert len(visited) == 3
    expected = sorted(trainer.corpus.train_samples[0].tolist())
    assert [sorted(indices) for indices in visited.values()] == [expected] * 3
    assert len({tuple(indices) for indices in visited.values()}) == 3


def test_max_steps_ends_in_the_middle_of_an_epoch(tmp_path):
    train(settings(tmp_path / "run", max_steps=5))
    assert read_metrics(tmp_path / "run")[-1]["kind"] == "heldout"
    assert latest(tmp_path / "run").name == "step-00000005"


def test_a_held_out_cache_takes_the_place_of_the_share(tmp_path):
    chosen = settings(tmp_path / "run", heldout_cache=shared_cache(seed=1), max_steps=1)
    trainer = trainer_of(chosen)
    assert len(trainer.corpus.train_samples[0]) == 24
    assert len(trainer.corpus.heldout_samples) == len(open_cache(shared_cache(seed=1)))
    train(chosen)
    assert len(rows_of(tmp_path / "run", "heldout")) == 2


def test_without_a_share_there_is_no_validation(tmp_path):
    train(settings(tmp_path / "run", heldout_share=0, max_steps=2))
    assert not rows_of(tmp_path / "run", "heldout")


def test_a_share_that_holds_nothing_out_is_refused(tmp_path):
    with pytest.raises(DataError, match="too few to hold 0% out"):
        train(settings(tmp_path / "run", heldout_share=1e-6))


def test_a_held_out_cache_of_another_target_is_refused(tmp_path):
    other = make_cache(
        tmp_path / "cache",
        target=save_target(tmp_path / "target", seed=9),
        data=shared_chat(4),
        draft_vocab_size=200,
    )
    with pytest.raises(MismatchError, match="its target is"):
        train(settings(tmp_path / "run", heldout_cache=other))


def test_a_held_out_cache_of_probabilities_is_refused_where_states_are_trained_on(tmp_path):
    with pytest.raises(MismatchError, match="target encoding"):
        train(settings(tmp_path / "run", heldout_cache=shared_cache("dense", seed=1)))


def test_probabilities_are_validated_on_held_out_states_as_on_held_out_probabilities(tmp_path):
    """Vocabularies are chosen by corpus, so that a held-out cache of probabilities seldom fits."""
    probabilities, trained = shared_cache("dense", "fp32"), tmp_path / "trained"
    run_cli("convert", probabilities, "--output-dir", trained, "--samples", "9:24")
    caches = {"dense": probabilities, "factored": shared_cache("factored", "fp32")}
    found = {}
    for kind, heldout in caches.items():
        other = tmp_path / kind
        run_cli("convert", heldout, "--output-dir", other, "--samples", "0:9")
        trainer = trainer_of(settings(tmp_path / f"run-{kind}", cache=trained, heldout_cache=other))
        found[kind] = trainer.validate().totals.losses
    assert torch.allclose(found["dense"], found["factored"], rtol=1e-5)
    assert found["dense"].sum() > 0


def test_the_same_draft_is_validated_alike_in_packs_of_any_size(tmp_path):
    found = [validated(trainer_of(settings(tmp_path, tokens_per_batch=budget))) for budget in (1, 200, 100_000)]
    for other in found[1:]:
        for name, value in found[0].items():
            if name == "kind":
                continue
            assert other[name] == pytest.approx(value, rel=1e-5), name


def test_supervision_of_held_out_documents_stays_float32_under_autocast(tmp_path, monkeypatch):
    """Only the draft computes in bf16; the target's distribution is taken in float32 when validating, too."""
    trainer = trainer_of(settings(tmp_path, cache=shared_cache(dtype="fp32")))
    seen: list[torch.Tensor] = []
    original = TargetRows.probs

    def watched(rows, start, stop):
        seen.append(original(rows, start, stop))
        return seen[-1]

    monkeypatch.setattr(TargetRows, "probs", watched)
    trainer.validate()
    expected, seen[:] = list(seen), []
    monkeypatch.setattr(Trainer, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
    trainer.validate()
    assert len(seen) == len(expected) > 0
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


# What a user can get wrong, through the command line.


def refused(*arguments: object) -> tuple[int, str]:
    ended = run_cli("train", *arguments)
    assert len(ended.errors) == 1, ended.err
    assert "Traceback" not in ended.err
    return ended.code, ended.errors[0]


def test_a_missing_cache_is_named(tmp_path):
    code, error = refused("--cache", tmp_path / "nothing", "--output-dir", tmp_path / "run")
    assert code == 4
    assert str(tmp_path / "nothing") in error


def test_an_unfinished_cache_is_refused_and_trained_on_when_allowed(tmp_path):
    cache = copied_cache(tmp_path / "cache")
    sorted(cache.glob("commit-*.json"))[1].unlink()
    code, error = refused("--cache", cache, "--output-dir", tmp_path / "run")
    assert code == 4
    assert "1 of 6 shards are missing" in error
    allowed = ("--allow-partial", "--heldout-share", 0.2, "--max-steps", 1)
    ended = run_cli("train", "--cache", cache, "--output-dir", tmp_path / "run", *allowed)
    assert ended.code == 0, ended.err


def test_a_damaged_sample_stops_training_and_names_the_shard(tmp_path):
    cache = copied_cache(tmp_path / "cache")
    shard = sorted(cache.glob("shard-*"))[2]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    code, error = refused("--cache", cache, "--output-dir", tmp_path / "run", "--heldout-share", 0.2)
    assert code == 4
    assert shard.name in error
    assert "eagle-offline repair" in error


def test_a_device_that_is_not_there_is_refused_in_one_line(tmp_path):
    for device in ("cuda:77", "toaster"):
        code, error = refused("--cache", shared_cache(), "--output-dir", tmp_path / "run", "--device", device)
        assert code == 2
        assert f"--device {device}" in error


def test_a_file_as_output_directory_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    code, error = refused("--cache", shared_cache(), "--output-dir", tmp_path / "file")
    assert code == 2
    assert str(tmp_path / "file") in error
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_that_holds_something_else_is_refused_and_left_alone(tmp_path):
    cache, mine = copied_cache(tmp_path / "cache"), tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    for directory in (cache, mine):
        before = tree(directory, without=())
        code, error = refused("--cache", cache, "--output-dir", directory, "--heldout-share", 0.2, "--max-steps", 1)
        assert code == 3  # as precompute does
        assert f"{directory} holds something else" in error
        assert tree(directory, without=()) == before


def test_a_refused_command_does_not_call_a_finished_run_failed(tmp_path):
    run = tmp_path / "run"
    arguments = ("--cache", shared_cache(), "--output-dir", run, "--heldout-share", 0.2, "--max-steps", 1)
    assert run_cli("train", *arguments).code == 0
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    code, _ = refused(*arguments)
    assert code == 2
    assert json.loads((run / "status.json").read_text())["state"] == "done"
