"""Every setting that shapes a run is refused by name when it differs, or gone on with when asked to and harmless."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from eagle_offline.errors import MismatchError, UsageError
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training import state
from eagle_offline.training.state import acceptable_drift
from tests.builders import Ended, run_cli, tree
from tests.oracles.children import command
from tests.training.caches import copied_cache, latest, settings, shared_cache, train, trainer_of

# Where things are, how often something is written, how fast it is, when to stop: not what a run comes to. What is in
# the held-out cache and in the draft vocabulary has an entry of its own.
FREE = {
    "cache", "output_dir", "device", "eval_every", "early_stopping", "checkpoint_every", "checkpoint_minutes",
    "checkpoint_epochs", "keep_checkpoints", "log_every", "report_to", "profile", "verify", "num_workers", "recompute",
    "deterministic", "on_nonfinite", "resume", "accept_drift", "heldout_cache", "draft_vocab",
    "local_cache", "local_cache_size", "sequence_partitions",
}  # fmt: skip

# What shapes a run, another value each; harmless: the order of samples, the caches and the draft stay what they are.
HARMLESS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "min_learning_rate_ratio": 0.5,
    "warmup_ratio": 0.5,
    "weight_decay": 0.1,
    "beta1": 0.5,
    "beta2": 0.5,
    "max_grad_norm": 2.0,
    "num_epochs": 3,
    "max_steps": 7,
    "global_batch": 2,
    "step_decay": 0.5,
    "supervision_gate": "both",
    "lk_loss_type": "lambda",
    "lk_kl_scale": 0.5,
    "lk_kl_decay": 1.0,
}
OTHER_RUN: dict[str, Any] = {
    "cache_weights": (2.0,),
    "heldout_share": 0.5,
    "tokens_per_batch": 300,
    "seed": 1,
    "allow_partial": True,
    "ttt_steps": 2,
    "num_draft_layers": 2,
    "layer_style": "qwen3",
    "draft_hidden_size": 16,
    "draft_intermediate_size": 20,
    "draft_num_attention_heads": 2,
    "draft_num_key_value_heads": 1,
    "aux_layer_ids": (1, 3),
    "draft_vocab_size": 150,
    "init_from": "elsewhere",
    "fc_norm": True,
    "norm_output": True,
    "train_embeddings": True,
    "head_start": "random",
    "objective": "peagle",
}
# Of a run of P-EAGLE, whose other settings these are.
PARALLEL: dict[str, Any] = {"objective": "peagle", "num_draft_layers": 1}
HARMLESS_PARALLEL: dict[str, Any] = {
    "down_sample_ratio": 0.5,
    "down_sample_ratio_min": 0.1,
    "depth_weights": [1.0, 2.0, 1.0],
    "depth_mean": "depths",
}
OTHER_PARALLEL_RUN: dict[str, Any] = {"num_depths": 2, "mask_token_id": 262}
STEPS = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(settings(run, max_steps=STEPS, heldout_share=0.2))
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A finished run that the test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def again(run: Path, *accepted: str, **changes: Any) -> Ended:
    chosen = settings(run, **{"max_steps": STEPS, "resume": True, "accept_drift": accepted, **changes})
    return run_cli(*command(chosen))


def one_error(ended: Ended) -> str:
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ended.err
    assert "Traceback" not in ended.err
    return lines[0]


def test_every_setting_is_one_kind_or_the_other():
    kinds = [FREE, set(HARMLESS), set(OTHER_RUN), set(HARMLESS_PARALLEL), set(OTHER_PARALLEL_RUN)]
    assert set().union(*kinds) == set(TrainSettings.model_fields)
    assert sum(map(len, kinds)) == len(TrainSettings.model_fields)


@pytest.mark.parametrize("field", [*HARMLESS, *OTHER_RUN])
def test_each_is_in_the_fingerprint_and_refused_by_name(field, run):
    """At the level of the checkpoint: whatever else a draft of another shape would stumble over."""
    trainer = trainer_of(settings(run, max_steps=STEPS))
    expected = dict(trainer.expected)
    other = settings(run, **{"max_steps": STEPS, field: {**HARMLESS, **OTHER_RUN}[field]})
    now = other.model_dump(mode="json")[field]
    recorded = json.loads((latest(run) / "training_state.json").read_text())["fingerprint"]
    assert field in recorded
    assert recorded[field] != now
    expected[field] = now
    with pytest.raises(MismatchError, match=f"{field}: recorded ") as raised:
        state.load_checkpoint(latest(run), trainer.model, trainer.optimizer, expected)
    assert f"{field}: recorded {recorded[field]!r}, now {now!r}" in str(raised.value)
    offers = f"--accept-drift {field}" in str(raised.value)
    assert offers == (field in HARMLESS)


@pytest.mark.parametrize("field", HARMLESS)
def test_harmless_ones_are_gone_on_with_when_asked_to_and_recorded_then(field, run):
    before = tree(run)
    refused = again(run, **{field: HARMLESS[field]})
    assert refused.code == 3, refused.err
    assert f"--accept-drift {field}" in one_error(refused)
    assert tree(run) == before, "a refusal changes nothing"
    # Steps are left to do, so that a checkpoint under the new settings comes about.
    changes = {"max_steps": STEPS + 2, field: HARMLESS[field]}
    names = {"max_steps", field}
    gone_on = again(run, *(name.replace("_", "-") for name in names), **changes)
    assert gone_on.code == 0, gone_on.err
    recorded = json.loads((latest(run) / "training_state.json").read_text())["fingerprint"]
    assert recorded[field] == HARMLESS[field]
    # It is the run's own setting now.
    assert again(run, **changes).code == 0
    back = again(run, max_steps=changes["max_steps"])
    assert back.code == 3 or field == "max_steps", back.err


@pytest.fixture(scope="module")
def finished_parallel(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "parallel"
    train(settings(run, max_steps=STEPS, **PARALLEL))
    return run


@pytest.mark.parametrize("field", [*HARMLESS_PARALLEL, *OTHER_PARALLEL_RUN])
def test_a_run_of_peagle_goes_on_with_what_is_harmless_when_asked_to(field, finished_parallel, tmp_path):
    run = Path(shutil.copytree(finished_parallel, tmp_path / "run"))
    before = tree(run)
    recorded = json.loads((latest(run) / "training_state.json").read_text())["fingerprint"]
    other = HARMLESS_PARALLEL.get(field, OTHER_PARALLEL_RUN.get(field))
    assert recorded[field] != other
    refused = again(run, **PARALLEL, **{field: other})
    assert refused.code == 3, refused.err
    assert f"{field}: recorded" in one_error(refused)
    assert (f"--accept-drift {field}" in refused.err) == (field in HARMLESS_PARALLEL)
    assert tree(run) == before, "a refusal changes nothing"
    if field in OTHER_PARALLEL_RUN:
        return
    gone_on = again(run, "max_steps", field, **PARALLEL, **{"max_steps": STEPS + 1, field: other})
    assert gone_on.code == 0, gone_on.err
    assert json.loads((latest(run) / "training_state.json").read_text())["fingerprint"][field] == other


def test_a_run_of_peagle_goes_on_in_other_parts(finished_parallel, tmp_path):
    run = Path(shutil.copytree(finished_parallel, tmp_path / "run"))
    assert again(run, "max_steps", **PARALLEL, sequence_partitions=2, max_steps=STEPS + 1).code == 0


@pytest.mark.parametrize("field", ["tokens_per_batch", "ttt_steps", "seed", "num_draft_layers", "heldout_share"])
def test_what_would_make_another_run_of_it_cannot_be_accepted(field, run):
    before = tree(run)
    ended = again(run, field.replace("_", "-"), **{field: OTHER_RUN[field]})
    assert ended.code == 2, ended.err
    error = one_error(ended)
    assert f"--accept-drift {field.replace('_', '-')}" in error or f"--accept-drift {field}" in error
    assert all(name in error for name in HARMLESS), "says which can"
    assert tree(run) == before


@pytest.mark.parametrize("name", ["seed", "cache", "nonsense", "cache_identity", "resume"])
def test_names_that_cannot_be_accepted_are_a_usage_error_on_a_fresh_run_too(name, tmp_path):
    ended = run_cli(*command(settings(tmp_path / "run", max_steps=1, accept_drift=(name,))))
    assert ended.code == 2, ended.err
    assert f"--accept-drift {name}" in one_error(ended)


def test_spellings_of_a_name():
    names = ("--learning-rate", "weight_decay", "beta1")
    assert acceptable_drift(names) == {"learning_rate", "weight_decay", "beta1"}
    with pytest.raises(UsageError, match="--accept-drift seed"):
        acceptable_drift(("learning-rate", "seed"))


def test_the_way_out_is_offered_only_when_it_leads_out(run):
    """With a setting that cannot be accepted among them, accepting the others would not help."""
    error = one_error(again(run, seed=9, learning_rate=1e-3))
    assert "seed: recorded" in error
    assert "learning_rate: recorded" in error
    assert "--accept-drift" not in error
    error = one_error(again(run, learning_rate=1e-3, weight_decay=0.1))
    assert "--accept-drift learning_rate weight_decay" in error


def test_the_way_out_counts_what_is_accepted_already(run):
    """One accepted and harmless, one refused: the way out is about the one that was refused."""
    error = one_error(again(run, "learning-rate", learning_rate=1e-3, seed=9))
    assert "seed: recorded" in error
    assert "learning_rate: recorded" not in error
    assert "--accept-drift" not in error
    error = one_error(again(run, "learning-rate", learning_rate=1e-3, weight_decay=0.1))
    assert "weight_decay: recorded" in error
    assert "--accept-drift" in error
    assert "weight_decay" in error.split("--accept-drift")[1]


def test_a_held_out_cache_that_comes_or_goes_changes_what_is_trained_on(run):
    """With a share, documents are kept out of training; with a cache of their own they are not: another order."""
    before = tree(run)
    ended = again(run, heldout_cache=shared_cache(seed=1))
    assert ended.code == 3, ended.err
    assert "heldout_cache" in one_error(ended)
    assert tree(run) == before


@pytest.mark.parametrize(("field", "value"), [("max_steps", 2), ("num_epochs", 1)])
def test_an_end_that_lies_behind_is_reached_at_once(field, value, tmp_path):
    run = tmp_path / "run"
    train(settings(run, num_epochs=2))
    rows = (run / "metrics.jsonl").read_text()
    ended = run_cli(
        *command(settings(run, **{"num_epochs": 2, field: value, "resume": True, "accept_drift": (field,)}))
    )
    assert ended.code == 0, ended.err
    assert (run / "metrics.jsonl").read_text() == rows


def test_a_held_out_cache_that_moved_is_the_same(tmp_path):
    chosen = settings(tmp_path / "run", max_steps=1, heldout_cache=shared_cache(count=10, seed=1))
    train(chosen)
    moved = copied_cache(tmp_path / "moved", shared_cache(count=10, seed=1))
    train(chosen.model_copy(update={"heldout_cache": moved, "resume": True}))
