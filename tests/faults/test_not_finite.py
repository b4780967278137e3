"""A target that gives NaN or infinity for one sample of many: a stop that names it, or a record that it is left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from eagle_offline import open_cache
from tests import builders
from tests.faults.work import leftovers, status

ENCODINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "bits": {"mantissa_bits": 3},
    "fp8": {"state_encoding": "fp8"},
    "raw fp16": {"state_encoding": "raw", "dtype": "fp16"},
    "raw fp32": {"state_encoding": "raw", "dtype": "fp32"},
    "dense": {"target_encoding": "dense"},
    "topk": {"target_encoding": "topk", "top_k": 8},
    "fp8 topk": {"state_encoding": "fp8", "target_encoding": "topk", "top_k": 8},
}
# One format each by default, as they come; both are `slow`.
PAIRS = [
    pytest.param(name, format_, value, marks=() if place % 4 == number % 4 else pytest.mark.slow)
    for number, name in enumerate(ENCODINGS)
    for place, (format_, value) in enumerate(
        [("arrow", "nan"), ("zarr", "inf"), ("arrow", "inf"), ("zarr", "-inf"), ("arrow", "1e6")]
    )
]
POISONED = 3  # of six conversations, the one that says Z


def poison(target: Path, value: str) -> None:
    """Make the embedding of `Z` what no state may be; a large one goes beyond fp16 only."""
    tensors = load_file(target / "model.safetensors")
    token = builders.make_tokenizer()("Z")["input_ids"][0]
    tensors["model.embed_tokens.weight"][token, 0] = float(value)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("encoding", "format_", "value"), PAIRS)
def test_nothing_that_is_not_finite_is_ever_stored(tmp_path: Path, encoding: str, format_: str, value: str) -> None:
    target = Path(shutil.copytree(builders.shared_target(), tmp_path / "target"))
    poison(target, value)
    rows = builders.conversations(6)
    rows[POISONED]["messages"] = [{"role": "user", "content": "Z"}, {"role": "assistant", "content": "one two"}]
    chat = builders.write_jsonl(tmp_path / "chat.jsonl", rows)
    cache = tmp_path / "cache"
    flags = {"shard_size": 2, "batch_size": 2, "format": format_, **ENCODINGS[encoding]}
    stopped = builders.precompute(cache, target, chat, **flags)
    if value == "1e6" and flags.get("dtype") != "fp16":
        assert stopped.code == 0, "large values are within the range of this dtype"
    else:
        assert stopped.code == 1, stopped.err
        assert f"chat.jsonl, row {POISONED + 1}" in stopped.errors[-1]
        assert status(cache) == {
            "state": "failed", "exit_code": 1, "why": stopped.errors[-1].removeprefix("error: "),
        }  # fmt: skip
        assert leftovers(cache) == []
        assert sorted(builders.record_contents(cache)) == ["commit-000000.json"], "what was before it stays"
        dropped = builders.precompute(cache, target, chat, resume=True, on_nonfinite="drop", **flags)
        assert dropped.code == 0, dropped.err
        lost = [sample for record in builders.record_contents(cache).values() for sample in record["lost"]]
        assert lost == [{"sample_id": POISONED, "reason": "non-finite states"}]
        assert "warning: 1 of 6 samples are not in the cache (1 non-finite states): see eagle-offline" in dropped.err
        assert json.loads(dropped.out)["samples_lost"] == {"non-finite states": 1}
        assert status(cache)["state"] == "done"
    opened = open_cache(cache)
    assert len(opened) == (6 if stopped.code == 0 else 5)
    for sample in opened:
        supervision = sample.supervision
        for tensor in (
            sample.aux_hidden_states, supervision.target_log_normalizer,
            supervision.last_hidden_state, supervision.target_probs,
        ):  # fmt: skip
            assert tensor is None or tensor.float().isfinite().all()
    ended = builders.run_cli("verify", cache)
    assert ended.code == 0, ended.out
