"""Samples are captured and encoded ahead of the writer: no further than memory allows, and never past a failure."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eagle_offline import open_cache
from eagle_offline.cache import filling
from eagle_offline.cache.manifest import read_manifest
from eagle_offline.cache.writer import read_record
from eagle_offline.interrupts import StopRequest
from eagle_offline.precompute import batch_probe, fill, plan, stream
from eagle_offline.precompute.batch_probe import begun_by_one, find_batch_tokens, typical_length
from eagle_offline.target.capture import Capture
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.text.token_table import open_token_table
from tests import builders


@pytest.fixture
def target() -> Path:
    return builders.shared_target()


@pytest.fixture
def chat() -> Path:
    return builders.shared_chat(10)


def cache_of(directory: Path, target: Path, chat: Path, **flags: Any) -> Path:
    return builders.make_cache(directory, target, chat, **{"shard_size": 3, "batch_size": None, **flags})


def threads_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes 100 tokens at once, and longer samples by themselves."""
    whole = HFEagle3TargetModel.capture

    def capture(self: HFEagle3TargetModel, input_ids: torch.Tensor, *rest: Any) -> Any:
        if input_ids.numel() > 100 and len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, input_ids, *rest)

    monkeypatch.setattr(HFEagle3TargetModel, "capture", capture)


def test_short_memory_halves_batches_and_the_records_say_so(
    tmp_path: Path, target: Path, chat: Path, little_memory: None
) -> None:
    short = open_cache(cache_of(tmp_path / "short", target, chat, batch_size=3))
    halved = [read_record(short.path, shard).environment.get("samples_of_halved_batches") for shard in range(4)]
    assert halved[:3] == [3, 3, 3], "each shard's samples go together where there is room"


def test_what_comes_of_halves_is_what_comes_of_whole_batches(tmp_path: Path, target: Path, chat: Path) -> None:
    whole = open_cache(cache_of(tmp_path / "whole", target, chat))
    record = read_record(whole.path, 0)
    assert "samples_of_halved_batches" not in record.environment
    by_id = {int(sample.sample_id): sample for sample in whole}
    with pytest.MonkeyPatch.context() as patch:
        little = HFEagle3TargetModel.capture

        def capture(self: HFEagle3TargetModel, input_ids: torch.Tensor, *rest: Any) -> Any:
            if len(input_ids) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return little(self, input_ids, *rest)

        patch.setattr(HFEagle3TargetModel, "capture", capture)
        alone = open_cache(cache_of(tmp_path / "alone", target, chat, dtype="fp32", state_encoding="raw"))
    for sample in alone:
        other = by_id[int(sample.sample_id)]
        assert torch.equal(sample.input_ids, other.input_ids)
        torch.testing.assert_close(sample.aux_hidden_states, other.aux_hidden_states.float(), rtol=1e-2, atol=1e-2)


def test_one_sample_that_does_not_fit_is_named(
    tmp_path: Path, target: Path, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = HFEagle3TargetModel.capture

    def capture(self: HFEagle3TargetModel, input_ids: torch.Tensor, *rest: Any) -> Any:
        if input_ids.shape[1] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, input_ids, *rest)

    monkeypatch.setattr(HFEagle3TargetModel, "capture", capture)
    ended = builders.precompute(tmp_path / "c", target, chat, shard_size=3)
    assert ended.code == 1
    assert "out of memory with one sample of" in ended.errors[-1]
    assert "chat-10-0.jsonl, row " in ended.errors[-1]
    assert not threads_left()


@pytest.mark.parametrize("place", ["capture", "encode", "write"])
def test_a_failure_on_any_thread_ends_the_run_at_once(
    place: str, tmp_path: Path, target: Path, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    whole = Capture.run

    def run(self: Capture, samples: Any) -> Any:
        begun.append(len(samples))
        if place == "capture" and len(begun) == 3:
            raise MemoryError("capture broke")
        return whole(self, samples)

    calls = []
    encode = stream.encode_fields

    def encode_fields(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if place == "encode" and len(calls) == 5:
            raise MemoryError("encode broke")
        return encode(*arguments, **named)

    write = filling.write_shard

    def write_shard(directory: Path, identity: Any, shard: int, *rest: Any) -> Any:
        if place == "write" and shard == 1:
            raise MemoryError("write broke")
        return write(directory, identity, shard, *rest)

    monkeypatch.setattr(Capture, "run", run)
    monkeypatch.setattr(stream, "encode_fields", encode_fields)
    monkeypatch.setattr(filling, "write_shard", write_shard)
    chat = builders.write_jsonl(tmp_path / "chat.jsonl", builders.conversations(60))
    with pytest.raises(MemoryError, match=f"{place} broke"):
        builders.precompute(tmp_path / "c", target, chat, shard_size=2, batch_size=1)
    assert not threads_left()
    # The writer's two batches ahead, and one that was under way.
    assert len(begun) <= 2 + 2 * 2 + 6, "it went on after it had failed"
    monkeypatch.undo()
    resumed = builders.precompute(tmp_path / "c", target, chat, shard_size=2, batch_size=1, resume=True)
    assert resumed.code == 0, resumed.err
    assert len(open_cache(tmp_path / "c")) == 60


def test_the_target_goes_on_while_a_shard_is_written_but_not_far(
    tmp_path: Path, target: Path, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    whole, write = Capture.run, filling.write_shard
    ahead = []

    def run(self: Capture, samples: Any) -> Any:
        begun.append(len(samples))
        return whole(self, samples)

    def write_shard(directory: Path, identity: Any, shard: int, samples: Any, *rest: Any) -> Any:
        taken = list(samples)
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            time.sleep(0.01)
        ahead.append(sum(begun) - 2 * (shard + 1))
        return write(directory, identity, shard, taken, *rest)

    monkeypatch.setattr(Capture, "run", run)
    monkeypatch.setattr(filling, "write_shard", write_shard)
    chat = builders.write_jsonl(tmp_path / "chat.jsonl", builders.conversations(16))
    cache_of(tmp_path / "c", target, chat, shard_size=2, batch_size=1)
    # Two batches captured, one under way, and what one encoder holds: two samples and the one that was looked at.
    assert max(ahead) <= 3 + 3
    assert min(ahead[:4]) >= 2, "nothing was captured while a shard was written"


def test_what_is_waited_for_the_disk_is_a_share_of_the_time(tmp_path: Path, target: Path, chat: Path) -> None:
    shares: list[float] = []
    whole = stream.SampleStream.waited_share

    def waited_share(self: stream.SampleStream) -> float:
        shares.append(whole(self))
        return shares[-1]

    write = filling.write_shard

    def write_shard(*arguments: Any) -> Any:
        time.sleep(0.2)
        return write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.SampleStream, "waited_share", waited_share)
        cache_of(tmp_path / "quick", target, chat, batch_size=1)
        patch.setattr(filling, "write_shard", write_shard)
        quick, shares[:] = shares[-1], []
        cache_of(tmp_path / "slow", target, chat, batch_size=1)
    assert 0 <= quick < shares[-1] < 1
    assert shares[-1] > 0.4


def test_a_cpu_takes_a_fixed_number_of_tokens_and_resume_takes_what_is_recorded(
    tmp_path: Path, target: Path, chat: Path
) -> None:
    cache = cache_of(tmp_path / "c", target, chat)
    assert read_manifest(cache).identity.batch_plan.max_batch_tokens == batch_probe.CPU_BATCH_TOKENS
    other = cache_of(tmp_path / "other", target, chat, max_batch_tokens=77)
    (other / "commit-000001.json").unlink()
    ended = builders.precompute(other, target, chat, shard_size=3, batch_size=None, resume=True)
    assert ended.code == 0, ended.err
    assert read_manifest(other).identity.batch_plan.max_batch_tokens == 77
    refused = builders.precompute(other, target, chat, shard_size=3, batch_size=None, max_batch_tokens=78, resume=True)
    assert refused.code == 3
    assert "batch_plan.max_batch_tokens: recorded 77, now 78" in refused.errors[-1]
    both = builders.precompute(tmp_path / "no", target, chat, batch_size=2, max_batch_tokens=9)
    assert both.code == 2
    assert "--batch-size 2 and --max-batch-tokens 9: give one of them" in both.errors[-1]


def test_what_is_not_given_is_found_out_once_and_recorded(
    tmp_path: Path, target: Path, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    def find(*_: Any) -> int:
        found.append(1)
        return 123

    monkeypatch.setattr(plan, "CPU_BATCH_TOKENS", None)
    monkeypatch.setattr(fill, "find_batch_tokens", find)
    cache = cache_of(tmp_path / "c", target, chat)
    assert read_manifest(cache).identity.batch_plan.max_batch_tokens == 123
    assert json.loads((cache / "config.json").read_text())["max_batch_tokens"] == 123
    (cache / "commit-000001.json").unlink()
    assert builders.precompute(cache, target, chat, shard_size=3, batch_size=None, resume=True).code == 0
    assert found == [1]
    assert not (cache / batch_probe.LOCK_FILE).exists()


def test_of_several_processes_one_begins_and_the_others_take_its_plan(tmp_path: Path, target: Path, chat: Path) -> None:
    cache = cache_of(tmp_path / "c", target, chat, max_batch_tokens=99)
    manifest = (cache / "manifest.json").read_bytes()
    directory = tmp_path / "begun"
    directory.mkdir()
    plans: list[int | None] = []
    inside = threading.Event()

    def other() -> None:
        inside.wait()
        with begun_by_one(directory, StopRequest(0)) as standing:
            plans.append(standing.max_batch_tokens if standing else None)

    threads = [threading.Thread(target=other) for _ in range(3)]
    for thread in threads:
        thread.start()
    with begun_by_one(directory, StopRequest(0)) as standing:
        assert standing is None
        inside.set()
        time.sleep(0.5)
        assert not plans, "two begin at once"
        (directory / "manifest.json").write_bytes(manifest)
    for thread in threads:
        thread.join()
    assert plans == [99, 99, 99]


@pytest.mark.parametrize(
    ("rates", "largest", "expected"),
    [
        ([100, 150, 200, 204, 300], None, 4096),  # 2% more is not worth it
        ([100, 104, 120, 130, 140, 150, 160], None, 65536),
        ([100, 150, 200], 2048, 2048),
        ([100], None, 1024),
    ],
)
def test_no_more_tokens_go_at_once_than_it_pays_for(
    rates: list[float], largest: int | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = builders.shared_chat(10)
    cache = cache_of(tmp_path / "c", builders.shared_target(), chat)
    table = open_token_table(cache / "tokens")
    length = typical_length(table.lengths)
    speeds = dict(zip(batch_probe._BUDGETS, [*rates, *[rates[-1]] * 7], strict=False))

    def seconds(_capture: Any, _table: Any, row: int, count: int) -> float:
        assert row == length
        budget = min((budget for budget in speeds if count * row <= budget), default=65536)
        if largest is not None and budget > largest:
            raise torch.OutOfMemoryError
        return count * row / speeds[budget]

    monkeypatch.setattr(batch_probe, "_seconds", seconds)
    assert find_batch_tokens(None, table, "cuda") == expected  # type: ignore[arg-type]


def test_the_real_probe_runs_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CPU_BATCH_TOKENS", None)
    monkeypatch.setattr(batch_probe, "_BUDGETS", (256, 512))
    cache = cache_of(tmp_path / "c", builders.shared_target(), builders.shared_chat(10))
    assert read_manifest(cache).identity.batch_plan.max_batch_tokens in (256, 512)


def test_typical_is_where_half_of_the_tokens_are() -> None:
    assert typical_length(np.array([5, 1, 1, 1, 1])) == 5
    assert typical_length(np.array([2, 2, 2, 9, 2, 2, 2])) == 2


def peak_megabytes(arguments: list[str]) -> float:
    """Run a command; return how much memory its process held at most."""
    code = (
        "import resource, sys\n"
        "from eagle_offline.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "sys.stderr.write(f'peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stderr.rpartition("peak ")[2]) / 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 64, "num_attention_heads": 16, "num_key_value_heads": 1}
    target = builders.save_target(tmp_path / "target", **shape)
    rows = [{"input_ids": [number % 250] * 400, "loss_mask": [0] * 10 + [1] * 390} for number in range(64)]
    data = builders.write_jsonl(tmp_path / "data.jsonl", rows)
    flags = {"seq_length": 400, "batch_size": 1, "state_encoding": "raw"}
    small, large = (
        peak_megabytes(builders.precompute_arguments(tmp_path / f"c{size}", target, data, shard_size=size, **flags))
        for size in (2, 64)
    )
    # A shard of all samples takes 200 MB: three or four layers of 1,024 halves for each of 25,600 tokens.
    assert sum(path.stat().st_size for path in (tmp_path / "c64").glob("shard-*")) > 180e6
    assert large < small + 60


def test_a_cache_in_which_nothing_is_left_is_an_error(tmp_path: Path, chat: Path) -> None:
    model = builders.make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "target")
    builders.make_tokenizer().save_pretrained(tmp_path / "target")
    ended = builders.precompute(tmp_path / "c", tmp_path / "target", chat, on_nonfinite="drop")
    assert ended.code == 1
    assert "10 of 10 samples are not in the cache (10 non-finite states): nothing can be trained" in ended.errors[-1]


def test_a_vocabulary_of_which_the_assistant_says_nothing_is_refused(tmp_path: Path, target: Path, chat: Path) -> None:
    (tmp_path / "ids.txt").write_text("256\n257\n")
    ended = builders.precompute(tmp_path / "c", target, chat, draft_vocab=tmp_path / "ids.txt", draft_vocab_size=None)
    assert ended.code == 2
    assert "holds none of the tokens that the corpus's assistant says" in ended.errors[-1]
    (tmp_path / "few.txt").write_text("64\n65\n")
    ended = builders.precompute(tmp_path / "d", target, chat, draft_vocab=tmp_path / "few.txt", draft_vocab_size=None)
    assert ended.code == 0, ended.err
    assert "warning: the others are lost for acceptance" in ended.err
