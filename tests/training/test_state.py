"""Checkpoints: whole, plain, named by `latest`, and refused when they are torn or belong to something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from eagle_offline import Eagle3DraftModel, open_cache
from eagle_offline.cache.companions import vocab_bytes, vocab_file
from eagle_offline.cache.manifest import sealed
from eagle_offline.errors import DataError, SpaceError
from eagle_offline.stages import load_draft
from eagle_offline.training import state
from eagle_offline.training.logbook import read_metrics
from eagle_offline.training.tally import Tally
from eagle_offline.vocab import digest_ids
from tests.builders import run_cli, tree
from tests.training.caches import copied_cache, flags, latest, settings, shared_cache, train, trainer_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(settings(run, checkpoint_every=4, keep_checkpoints=2))
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A finished run that the test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def again(run: Path, *more: str, **changes: object):
    """`eagle-offline train` in this process with the settings of the finished run, some of them changed."""
    return run_cli("train", *flags(settings(run, checkpoint_every=4, **changes)), *more)


def one_error(ended) -> str:
    lines = [line for line in ended.errors if not line.startswith("train:")]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_checkpoint_is_a_model_directory_with_the_training_state_beside(finished):
    found = {path.name for path in latest(finished).iterdir()}
    assert {"config.json", "model.safetensors"} <= found
    assert found == {
        "config.json", "model.safetensors", "draft_vocab.safetensors", "origin.json", "optimizer.safetensors",
        "training_state.json",
    }  # fmt: skip


def test_nothing_in_a_run_is_pickled(finished):
    """Every file is text of JSON lines, a safetensors file, or the name in `latest`."""
    for path in filter(Path.is_file, finished.rglob("*")):
        if path.suffix == ".safetensors":
            assert load_file(path)
        elif path.suffix == ".jsonl":
            assert [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            assert json.loads(path.read_text())
        else:
            assert path.name in ("latest", "best")


def test_a_checkpoint_loads_as_a_model_with_the_same_tensors(finished):
    model, report = Eagle3DraftModel.from_pretrained(latest(finished), output_loading_info=True)
    assert not any(report.values()), report
    stored = load_file(latest(finished) / "model.safetensors")
    loaded = model.state_dict()
    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert loaded[name].dtype == torch.float32, name
        assert torch.equal(loaded[name], tensor), name
    assert model.config.draft_vocab_size == len(
        load_file(latest(finished) / "draft_vocab.safetensors")["selected_token_ids"]
    )


def test_a_checkpoint_names_the_draft_vocabulary_it_was_trained_with(finished):
    ids = load_file(latest(finished) / "draft_vocab.safetensors")["selected_token_ids"]
    assert torch.equal(ids, open_cache(shared_cache()).selected_token_ids)


def test_latest_names_the_last_checkpoint_and_old_ones_are_gone(finished):
    steps = max(row["step"] for row in read_metrics(finished))
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    last = [f"step-{step:08d}" for step in (steps - steps % 4 if steps % 4 else steps - 4, steps)]
    assert names == sorted({*last, (finished / "best").read_text().strip()})
    assert latest(finished).name == names[-1]
    assert not list(finished.rglob(".*")), "temporary files stayed"


def test_removing_old_checkpoints_spares_the_one_that_latest_names(run, monkeypatch):
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    for pointer in ("latest", "best"):
        (run / pointer).write_text(names[0] + "\n")
        state.remove_old_checkpoints(run, 1)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [names[0], names[-1]]


def test_an_existing_run_without_resume_is_refused(run):
    before = tree(run)
    ended = again(run)
    assert ended.code == 2
    assert "--resume" in one_error(ended)
    assert tree(run) == before


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "training_state.json"])
def test_a_checkpoint_with_a_missing_file_is_refused_in_one_line(run, name):
    (latest(run) / name).unlink()
    ended = again(run, "--resume")
    assert ended.code == 4
    assert str(latest(run)) in one_error(ended)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "training_state.json"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_torn_checkpoint_is_refused_in_one_line(run, name, keep):
    path = latest(run) / name
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    before = tree(run)
    ended = again(run, "--resume")
    assert ended.code == 4
    assert str(latest(run)) in one_error(ended)
    assert tree(run) == before


@pytest.mark.parametrize(
    "content", ["step-00000099\n", "", "../../elsewhere", ".", "step-00000004/../step-00000008", "ß"]
)
def test_a_latest_that_names_nothing_is_refused_in_one_line(run, content):
    (run / "latest").write_text(content)
    ended = again(run, "--resume")
    assert ended.code == 4
    assert "latest: names" in one_error(ended)


def test_a_latest_that_is_no_text_is_refused_in_one_line(run):
    (run / "latest").write_bytes(b"\xff\xfe\x00step")
    ended = again(run, "--resume")
    assert ended.code == 4
    assert "latest" in one_error(ended)


def test_pointing_latest_at_an_earlier_checkpoint_goes_on_from_there(run, finished):
    earlier = sorted((run / "checkpoints").iterdir())[0]
    (run / "latest").write_text(earlier.name + "\n")
    ended = again(run, "--resume")
    assert ended.code == 0, ended.err
    ours, theirs = (load_file(latest(path) / "model.safetensors") for path in (run, finished))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


DRIFTS = {
    "seed": {"seed": 1},
    "learning_rate": {"learning_rate": 1e-3},
    "global_batch": {"global_batch": 2},
    "tokens_per_batch": {"tokens_per_batch": 300},
    "ttt_steps": {"ttt_steps": 2},
    "num_epochs": {"num_epochs": 3},
    "fc_norm": {"fc_norm": True},
    "num_draft_layers": {"num_draft_layers": 2},
    "train_embeddings": {"train_embeddings": True},
    "heldout_share": {"heldout_share": 0.5},
    "weight_decay": {"weight_decay": 0.1},
    "max_steps": {"max_steps": 5},
}


@pytest.mark.parametrize("field", DRIFTS)
def test_other_settings_are_refused_by_name(run, field):
    before = tree(run)
    (value,) = DRIFTS[field].values()
    switch = [f"--{field.replace('_', '-')}"] if isinstance(value, bool) else []
    ended = again(run, "--resume", *switch, **({} if switch else DRIFTS[field]))
    assert ended.code == 3, ended.err
    error = one_error(ended)
    recorded = settings(run).model_dump(mode="json")[field]
    assert f"{field}: recorded {recorded!r}, now {value!r}" in error
    assert tree(run) == before


def test_several_differing_settings_are_all_named(run):
    error = one_error(again(run, "--resume", seed=9, learning_rate=1e-3, ttt_steps=1))
    assert all(f"{name}: recorded" in error for name in ("seed", "learning_rate", "ttt_steps"))


def test_another_cache_is_refused_by_its_identity(run):
    ended = again(run, "--resume", cache=shared_cache(seed=1))
    assert ended.code == 3
    assert "cache_identity: recorded" in one_error(ended)


def test_a_moved_cache_is_the_same_cache(run, tmp_path):
    ended = again(run, "--resume", cache=copied_cache(tmp_path / "moved"))
    assert ended.code == 0, ended.err


def test_another_draft_vocabulary_is_refused_by_its_digest(run, tmp_path):
    cache = copied_cache(tmp_path / "cache")
    ids = np.arange(200)
    (cache / vocab_file(digest_ids(ids))).write_bytes(vocab_bytes(ids))
    manifest = json.loads((cache / "manifest.json").read_text())
    recorded = manifest["defaults"]["draft_vocabulary"]["digest"]
    manifest["defaults"]["draft_vocabulary"]["digest"] = digest_ids(ids)
    del manifest["self_digest"]
    (cache / "manifest.json").write_text(json.dumps(sealed(manifest)))
    ended = again(run, "--resume", cache=cache)
    assert ended.code == 3, ended.err
    assert f"draft_vocab_digest: recorded {recorded!r}, now {digest_ids(ids)!r}" in one_error(ended)


def test_a_failed_checkpoint_leaves_the_last_one_and_no_rest(run, tmp_path, monkeypatch):
    trainer = trainer_of(settings(run))
    before = latest(run)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    trainer.standing = state.Standing(state.Position(99, 1, 1))
    with pytest.raises(SpaceError, match="--resume"):
        trainer.save(Tally(3))
    assert latest(run) == before
    assert not list(run.rglob(".*"))
    assert not (run / "checkpoints" / "step-00000099").exists()


def test_optimizer_state_comes_back_bit_for_bit(run):
    chosen = settings(run)
    trainer = trainer_of(chosen)
    standing, _ = state.load_checkpoint(latest(run), trainer.model, trainer.optimizer, trainer.expected)
    assert standing.position.step == max(row["step"] for row in read_metrics(run))
    stored = load_file(latest(run) / "optimizer.safetensors")
    names = dict(trainer.model.named_parameters())
    assert stored
    for key, value in stored.items():
        name, _, entry = key.rpartition("/")
        assert torch.equal(trainer.optimizer.state[names[name]][entry], value), key
    trained = {name for name, parameter in names.items() if parameter.requires_grad}
    assert stored.keys() == {f"{name}/{entry}" for name in trained for entry in ("step", "exp_avg", "exp_avg_sq")}


def test_a_run_of_a_cache_that_lost_a_shard_is_refused(run, tmp_path):
    cache = copied_cache(tmp_path / "cache")
    sorted(cache.glob("commit-*.json"))[2].unlink()
    ended = again(run, "--resume", cache=cache)
    assert ended.code == 4
    assert "--allow-partial" in one_error(ended)


def test_loading_a_checkpoint_of_another_shape_is_no_traceback(run):
    """The fingerprint is what guards; a state file without one is damage."""
    path = latest(run) / "training_state.json"
    path.write_text("[]")
    ended = again(run, "--resume")
    assert ended.code == 4
    one_error(ended)
    trainer = trainer_of(settings(run))
    with pytest.raises(DataError):
        state.load_checkpoint(latest(run), trainer.model, trainer.optimizer, trainer.expected)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "draft_vocab.safetensors", "origin.json"]
)
def test_a_flipped_bit_in_a_checkpoint_is_refused(run, name):
    path = latest(run) / name
    content = bytearray(path.read_bytes())
    content[-1 - len(content) // 3] ^= 1
    path.write_bytes(content)
    error = one_error(again(run, "--resume"))
    assert f"{path}: was changed after it was written" in error
    assert "latest" in error
    with pytest.raises(DataError, match="was changed"):
        load_draft(str(run / "checkpoints" / latest(run).name), "--draft")


def test_a_run_whose_latest_is_missing_goes_on_from_the_newest_and_is_never_begun_anew(run, finished):
    (run / "latest").unlink()
    before = tree(run)
    ended = again(run)
    assert ended.code == 2
    assert "already holds a run" in one_error(ended)
    assert tree(run) == before
    ended = again(run, "--resume")
    assert ended.code == 0, ended.err
    assert "latest was missing; going on from step-" in ended.err
    assert (run / "latest").read_text() == (finished / "latest").read_text()
    assert read_metrics(run) == read_metrics(finished)


def test_a_full_disk_in_a_library_that_writes_by_itself_is_told_as_one(run, monkeypatch):
    trainer, before = trainer_of(settings(run)), latest(run)

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state, "save_file", full)
    trainer.standing = state.Standing(state.Position(99, 1, 1))
    with pytest.raises(SpaceError, match="No space left on device; nothing committed is lost"):
        trainer.save(Tally(3))
    assert latest(run) == before


def test_a_run_inside_a_cache_is_refused(tmp_path):
    cache = copied_cache(tmp_path / "cache")
    before = tree(cache, without=())
    ended = run_cli("train", *flags(settings(cache / "runs" / "one")))
    assert ended.code == 3
    assert "lies inside the cache" in one_error(ended)
    assert tree(cache, without=()) == before
