"""The job from chat data to a draft, on each device."""

from __future__ import annotations

import pytest

from benchmarks.caches import small_cache
from eagle_offline import stages
from eagle_offline.cache.reader import open_cache
from eagle_offline.config import EvaluateSettings
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.logbook import read_metrics
from tests.gpu.test_device_twins import DEVICES


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_made_on_a_device_trains_a_draft_that_decodes_there(device, tmp_path):
    cache = small_cache(tmp_path, num_conversations=24, device=device)
    assert open_cache(cache).manifest.identity.batch_plan.device_kind == device
    settings = TrainSettings(
        cache=cache,
        output_dir=tmp_path / "run",
        device=device,
        ttt_steps=3,
        num_epochs=8,
        learning_rate=3e-3,
        tokens_per_batch=1024,
        heldout_share=0.2,
    )
    stages.train(settings)
    heldout = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "heldout"]
    assert heldout[-1]["loss"] < heldout[0]["loss"]
    evaluation = stages.evaluate(
        EvaluateSettings(
            draft=str(tmp_path / "run"), target=str(tmp_path / "target"), device=device, max_prompts=6,
            max_new_tokens=12, batch_size=4, num_draft_tokens=3, compute_dtype="fp32",
        )
    )  # fmt: skip
    assert evaluation.num_answers == 6
    assert evaluation.num_identical == 6, "float32: no near-ties that batches of unlike shape could decide otherwise"
    trained = evaluation.drafters["trained"]
    assert trained.accept_length == pytest.approx(trained.walked_accept_length)
