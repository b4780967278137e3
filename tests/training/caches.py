"""Small caches and training runs that the tests of training share; each cache is made once a process."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eagle_offline.errors import StoppedEarly
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training import loop
from eagle_offline.training.corpus import open_corpus
from eagle_offline.training.logbook import MetricsRow, read_metrics
from eagle_offline.training.trainer import StepOutcome, Trainer
from tests.builders import SCRATCH, make_cache, shared_chat

NUM_SAMPLES = 24
DRAFT_VOCAB_SIZE = 200  # of 272: the target's choice is outside it now and then

# What a row says about the machine and not about the draft.
MEASURED_FIELDS = ("tokens_per_second", "data_wait_share", "memory_bytes")


def shared_cache(
    target_encoding: str = "factored", dtype: str = "bf16", count: int = NUM_SAMPLES, seed: int = 0
) -> Path:
    """A whole cache that no test changes."""
    return _made(target_encoding, dtype, count, seed)


@cache
def _made(target_encoding: str, dtype: str, count: int, seed: int) -> Path:
    return make_cache(
        SCRATCH / f"trained-{target_encoding}-{dtype}-{count}-{seed}",
        data=shared_chat(count, seed),
        target_encoding=target_encoding,
        dtype=dtype,
        state_encoding="raw" if dtype == "fp32" else "planes",
        draft_vocab_size=DRAFT_VOCAB_SIZE,
    )


def settings(output_dir: Path, **changes: Any) -> TrainSettings:
    """A run of about twenty small steps."""
    values = {
        "cache": (shared_cache(),),
        "output_dir": output_dir,
        "heldout_share": 0.2,
        "ttt_steps": 3,
        "num_epochs": 2,
        "learning_rate": 3e-3,
        "tokens_per_batch": 200,
        "log_every": 1,
        "device": "cpu",
    }
    if changes.get("objective") == "peagle":
        values["num_depths"] = values.pop("ttt_steps")
    return TrainSettings(**{**values, **changes})


def flags(chosen: TrainSettings) -> list[str]:
    """The command line that gives these settings."""
    values = chosen.model_dump(mode="json", exclude_unset=True)
    return [
        f"--{name.replace('_', '-')}={item}"
        for name, value in values.items()
        for item in (value if isinstance(value, list) else [value])
    ]


class Stop:
    """Asks to stop once `requested` is set; there is always time left."""

    requested = False

    def leaves_time_for(self, seconds: float) -> bool:
        return True


def train(chosen: TrainSettings, stop: Any = None) -> dict[str, Any]:
    """Train in this process."""
    chosen.output_dir.mkdir(parents=True, exist_ok=True)
    return loop.run(chosen, stop or Stop())


def train_until(chosen: TrainSettings, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process and ask to stop while the optimizer step that ends at `step` is done."""
    stop, original = Stop(), Trainer.step

    def watched(trainer: Trainer, *arguments: Any, **named: Any) -> StepOutcome:
        stop.requested = trainer.position.step + 1 >= step
        return original(trainer, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", watched)
        with pytest.raises(StoppedEarly, match=f"after step {step} of "):
            train(chosen, stop)


def trainer_of(chosen: TrainSettings) -> Trainer:
    return Trainer(chosen, open_corpus(chosen))


def copied_cache(destination: Path, source: Path | None = None) -> Path:
    return Path(shutil.copytree(source or shared_cache(), destination))


def latest(run: Path) -> Path:
    return run / "checkpoints" / (run / "latest").read_text().strip()


def checkpoint_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights, draft vocabulary and optimizer state of the latest checkpoint, by file and name."""
    files = sorted(latest(run).glob("*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` without what the machine adds to them, each checked against its schema."""
    rows = read_metrics(run)
    for row in rows:
        MetricsRow.model_validate(row)
    return [{name: value for name, value in row.items() if name not in MEASURED_FIELDS} for row in rows]


def assert_same_run(run: Path, expected: Path) -> None:
    """Same last checkpoint, bit for bit, and the same metrics, row for row."""
    ours, theirs = checkpoint_tensors(run), checkpoint_tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    states = [json.loads((latest(path) / "training_state.json").read_text()) for path in (run, expected)]
    assert states[0]["standing"] == states[1]["standing"]
    assert metrics(run) == metrics(expected)
