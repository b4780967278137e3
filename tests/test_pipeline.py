"""A pipeline is checked whole before any work starts, runs in order, and costs nothing when it is run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eagle_offline.capture_settings import PrecomputeSettings
from eagle_offline.errors import UsageError
from eagle_offline.pipeline import KINDS, find_pipeline, read_pipeline
from eagle_offline.train_settings import TrainSettings
from tests.builders import run_cli, shared_chat, shared_target, tree

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = sorted((ROOT / "pipelines").glob("*.yaml"))


def write(path: Path, stages: object) -> Path:
    path.write_text(yaml.safe_dump({"stages": stages}))
    return path


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.name)
def test_every_pipeline_that_comes_along_is_valid(path, tmp_path):
    stages = read_pipeline(path, tmp_path / "work")
    assert len({stage.name for stage in stages}) == len(stages)
    for stage in stages:
        given = stage.settings.model_dump(mode="json", exclude_unset=True)
        assert "{work}" not in json.dumps(given)
    assert not (tmp_path / "work").exists()


def test_the_quickstart_is_found_by_name_and_tells_the_whole_story(tmp_path):
    stages = read_pipeline(find_pipeline("quickstart"), tmp_path)
    assert [stage.name for stage in stages] == [
        "make-corpus", "train-target", "rewrite-answers", "precompute", "precompute-heldout", "inspect-manifest",
        "train", "train-parallel", "export", "check-flat", "check-speculators", "export-parallel",
        "check-flat-parallel", "check-speculators-parallel", "evaluate", "report",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="no pipeline called nothing"):
        find_pipeline("nothing")


def test_outputs_of_the_quickstart_are_the_inputs_of_later_stages(tmp_path):
    stages = {stage.name: stage.settings for stage in read_pipeline(find_pipeline("quickstart"), tmp_path)}
    assert Path(stages["precompute"].target_model) == stages["train-target"].output_dir
    assert stages["precompute-heldout"].input_data == (str(stages["rewrite-answers"].output_file),)
    assert stages["train"].cache == (stages["precompute"].output_dir,) == (stages["inspect-manifest"].cache,)
    assert stages["train"].heldout_cache == stages["precompute-heldout"].output_dir
    parallel = stages["train-parallel"]
    assert (parallel.cache, parallel.heldout_cache) == (stages["train"].cache, stages["train"].heldout_cache)
    assert stages["report"].run == stages["train"].output_dir
    assert stages["report"].compare == (parallel.output_dir,) == (stages["export-parallel"].run,)
    assert stages["evaluate"].compare == (str(stages["check-flat-parallel"].directory),)


def test_stages_go_on_where_they_stopped_unless_told_otherwise(tmp_path):
    path = write(
        tmp_path / "p.yaml",
        [
            {"train": {"cache": "{work}/c", "output-dir": "{work}/o"}},
            {"train": {"name": "anew", "cache": "c", "output_dir": "{work}/o2", "resume": False}},
        ],
    )
    first, second = read_pipeline(path, Path("/somewhere"))
    assert first.settings == TrainSettings(cache=Path("/somewhere/c"), output_dir=Path("/somewhere/o"), resume=True)
    assert second.name == "anew"
    assert second.settings.resume is False


TRAIN = {"cache": "c", "output_dir": "o"}
BAD = {
    "unknown stage": ([{"nothing": {}}], "stage 1: no stage 'nothing'; known: make-corpus"),
    "unknown setting": ([{"train": {**TRAIN, "speed": 3}}], "train: --speed: no such setting"),
    "missing setting": ([{"train": {"cache": "c"}}], "train: --output-dir: is required"),
    "out of range": ([{"train": {**TRAIN, "ttt_steps": 0}}], "train: --ttt-steps: "),
    "wrong type": ([{"train": {**TRAIN, "seed": "many"}}], "train: --seed: "),
    "second stage": ([{"train": TRAIN}, {"report": {"name": "second", "runs": "x"}}], "second: --"),
    "two names": ([{"train": TRAIN, "report": {}}], "stage 1: expected one stage name with its settings"),
    "a word": (["train"], "stage 1: expected one stage name with its settings"),
    "no list": ({"train": TRAIN}, "expected a list of stages under 'stages'"),
    "nothing": ([], "expected a list of stages under 'stages'"),
    "a number for settings": ([{"train": 5}], "stage 1: "),
    "a list for settings": ([{"train": ["cache"]}], "stage 1: "),
    "a number for a name": ([{"train": {**TRAIN, 5: 6}}], "train: --5: "),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_in_one_line_before_any_work(case, tmp_path):
    stages, expected = BAD[case]
    path = write(tmp_path / "p.yaml", stages)
    ended = run_cli("run", path, "--work", tmp_path / "work")
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith(f"error: {path}: {expected}"), ended.err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("content", [b"stages: [", b"", b"- a", b"\xff\xfe\x00", b"stages:\n\t- train:", b"7"])
def test_a_file_that_is_no_pipeline_is_named_in_one_line(content, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_bytes(content)
    ended = run_cli("run", path, "--work", tmp_path / "work")
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith(f"error: {path}: ")
    assert not (tmp_path / "work").exists()


def test_a_missing_pipeline_is_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        ended = run_cli("run", path)
        assert ended.code == 2
        assert ended.err.startswith(f"error: {path}: ")


def test_dry_run_lists_resolved_settings_and_does_nothing(tmp_path):
    ended = run_cli("run", ROOT / "pipelines" / "llama-3.1-8b.yaml", "--work", tmp_path / "work", "--dry-run")
    assert ended.code == 0
    shown = json.loads(ended.out)
    assert shown["train"]["cache"] == [str(tmp_path / "work" / "cache")]
    assert shown["train"]["beta2"] == 0.95
    assert not (tmp_path / "work").exists()


def test_every_stage_kind_of_a_pipeline_has_settings_and_a_call():
    assert KINDS["precompute"].settings is PrecomputeSettings
    for name, kind in KINDS.items():
        assert callable(kind.run), name
        assert kind.settings.__doc__, name


def micro(path: Path, **changes: object) -> Path:
    """Cache, held-out cache, inspection, training and report, from the shared target and chats."""
    capture = {"seq_length": 96, "shard_size": 8, "draft_vocab_size": 200, "device": "cpu"}
    capture["target_model"] = str(shared_target())
    return write(
        path,
        [
            {"precompute": {**capture, "input_data": str(shared_chat(16)), "output_dir": "{work}/cache"}},
            {
                "precompute": {
                    **capture, "name": "heldout", "input_data": str(shared_chat(4, 1)), "output_dir": "{work}/heldout",
                }
            },
            {"inspect-manifest": {"cache": "{work}/cache", "verify": True}},
            {
                "train": {
                    "cache": "{work}/cache", "heldout_cache": "{work}/heldout", "output_dir": "{work}/run",
                    "ttt_steps": 2, "num_epochs": 2, "tokens_per_batch": 300, "log_every": 1, "learning_rate": 0.003,
                    **changes,
                }
            },
            {"report": {"run": "{work}/run", "output_dir": "{work}/report", "stages_file": "{work}/stages.json"}},
        ],
    )  # fmt: skip


def test_a_whole_job_runs_and_running_it_again_changes_nothing(tmp_path):
    path, work = micro(tmp_path / "p.yaml"), tmp_path / "work"
    ended = run_cli("run", path, "--work", work)
    assert ended.code == 0, ended.err
    headings = [line for line in ended.err.splitlines() if line.startswith("[")]
    assert headings == [f"[{n}/5] {name}" for n, name in enumerate(
        ["precompute", "heldout", "inspect-manifest", "train", "report"], start=1
    )]  # fmt: skip
    assert "untrained" in ended.out
    assert "trained" in ended.out
    seconds = json.loads((work / "stages.json").read_text())
    assert list(seconds) == ["precompute", "heldout", "inspect-manifest", "train", "report"]
    assert all(value >= 0 for value in seconds.values())

    kept = {name: tree(work / name) for name in ("cache", "heldout", "run/checkpoints")}
    metrics = (work / "run" / "metrics.jsonl").read_bytes()
    again = run_cli("run", path, "--work", work)
    assert again.code == 0, again.err
    assert {name: tree(work / name) for name in kept} == kept
    assert (work / "run" / "metrics.jsonl").read_bytes() == metrics
    added = json.loads((work / "stages.json").read_text())
    assert all(added[name] >= value for name, value in seconds.items())


def test_a_failing_stage_ends_the_job_and_later_ones_are_not_begun(tmp_path):
    path, work = micro(tmp_path / "p.yaml", heldout_cache="{work}/nothing"), tmp_path / "work"
    ended = run_cli("run", path, "--work", work)
    assert ended.code == 4
    assert "nothing" in ended.err
    assert not (work / "report").exists()
    assert "train" in json.loads((work / "stages.json").read_text())
    fixed = run_cli("run", micro(tmp_path / "p.yaml"), "--work", work)
    assert fixed.code == 0, fixed.err


@pytest.mark.slow
def test_the_quickstart_s_stages_work_together_in_small(tmp_path):
    """Every stage kind of the quickstart, with a target of a few steps; it has learned to end no answer yet."""
    work = tmp_path / "work"
    path = write(
        tmp_path / "p.yaml",
        [
            {
                "make-corpus": {
                    "train_file": "{work}/data/train.jsonl", "heldout_file": "{work}/data/heldout.jsonl",
                    "num_conversations": 60, "heldout_conversations": 8,
                }
            },
            {"train-target": {"train_file": "{work}/data/train.jsonl", "output_dir": "{work}/target", "steps": 3}},
            {
                "rewrite-answers": {
                    "target_model": "{work}/target", "input_file": "{work}/data/heldout.jsonl",
                    "output_file": "{work}/data/rewritten.jsonl", "max_new_tokens": 3,
                }
            },
            {
                "precompute": {
                    "target_model": "{work}/target", "input_data": "{work}/data/train.jsonl",
                    "output_dir": "{work}/cache", "seq_length": 256, "shard_size": 16,
                }
            },
            {
                "precompute": {
                    "name": "heldout", "target_model": "{work}/target", "input_data": "{work}/data/heldout.jsonl",
                    "output_dir": "{work}/heldout", "seq_length": 256, "shard_size": 16,
                }
            },
            {"inspect-manifest": {"cache": "{work}/cache", "verify": True}},
            {
                "train": {
                    "cache": "{work}/cache", "heldout_cache": "{work}/heldout", "output_dir": "{work}/run",
                    "ttt_steps": 2, "max_steps": 6, "tokens_per_batch": 1024,
                }
            },
            {"report": {"run": "{work}/run", "output_dir": "{work}/report"}},
        ],
    )  # fmt: skip
    arguments = [sys.executable, "-m", "eagle_offline", "run", str(path), "--work", str(work)]
    kept = []
    for _ in range(2):
        ended = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=False)
        assert ended.returncode == 0, ended.stderr
        assert (work / "report" / "report.html").is_file()
        kept.append({name: tree(work / name) for name in ("cache", "heldout", "target", "run/checkpoints")})
        kept[-1]["data"] = {path.name: path.read_bytes() for path in (work / "data").iterdir()}  # made again, the same
    assert kept[0] == kept[1]
