"""`eagle-offline precompute` as people type it: spellings that mean the same, and mistakes that cost one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from eagle_offline import open_cache
from tests import builders


def check_refused(ended: builders.Ended, code: int, *parts: str) -> None:
    """One line that begins with `error:`, and the exit code."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    assert len([line for line in ended.errors if not line.lstrip().startswith("Loading weights")]) == 1, ended.err
    assert ended.errors[-1].startswith("error: "), ended.err
    for part in parts:
        assert part in ended.errors[-1], ended.errors[-1]


def plain(output: Path, *more: object) -> builders.Ended:
    return builders.run_cli(*builders.precompute_arguments(output), *more)


def chat_of(path: Path, *rows: Any) -> Path:
    return builders.write_jsonl(path / "chat.jsonl", rows)


def test_the_reference_command_line_works_as_written(tmp_path: Path) -> None:
    ended = builders.run_cli(
        "precompute",
        "--target-model", builders.shared_target(),
        "--input-data", builders.shared_chat(),
        "--output-dir", tmp_path / "cache",
        "--seq-length", "96",
        "--draft-vocab-size", "64",
        "--batch-size", "2",
        "--shard-size", "4",
        "--dtype", "bf16",
        "--resume",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["shards_committed"] == 3
    assert json.loads((tmp_path / "cache" / "status.json").read_text())["state"] == "done"
    assert len(open_cache(tmp_path / "cache")) == 10


@pytest.mark.parametrize(
    "spelling",
    [
        ["--aux-layer-ids", "1", "2", "3"],
        ["--aux-layer-ids", "1,2,3"],
        ["--aux-layer-ids", "1, 2, 3"],
        ["--aux-layer-ids=1,2,3"],
        ["--aux-layer-ids", "1", "--aux-layer-ids", "2", "--aux-layer-ids", "3"],
        ["--aux-layer-ids=1", "2", "--aux-layer-ids", "3"],
    ],
)
def test_layer_ids_mean_the_same_in_every_spelling(spelling: list[str], tmp_path: Path) -> None:
    arguments = builders.precompute_arguments(tmp_path / "cache", data=builders.shared_chat(6))
    middle = len(arguments) // 2 + 1 - len(arguments) // 2 % 2  # between two flags, not between a flag and its value
    ended = builders.run_cli(*arguments[:middle], *spelling, *arguments[middle:])
    assert ended.code == 0, ended.err
    assert open_cache(tmp_path / "cache").aux_layer_ids == [1, 2, 3]


def test_flag_wins_over_file_and_file_over_default(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("shard-size: 5\nbatch_size: 2\naux_layer_ids: [0, 4]\n")
    ended = builders.run_cli(*builders.precompute_arguments(tmp_path / "cache", batch_size=None), "--config", config)
    assert ended.code == 0, ended.err
    identity = open_cache(tmp_path / "cache").manifest.identity
    assert (identity.capture.shard_size, identity.batch_plan.batch_size) == (4, 2)
    assert identity.capture.aux_layer_ids == [0, 4]


def test_aliases_of_peers_are_accepted(tmp_path: Path) -> None:
    ended = builders.run_cli(
        "precompute", "--target-model-path", builders.shared_target(), "--data-path", builders.shared_chat(6),
        "--output-dir", tmp_path / "cache", "--max-length", "96", "--device", "cpu",
    )  # fmt: skip
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("form", ["sharegpt", "json", "parquet", "directory"])
def test_every_form_of_input_gives_the_same_samples(form: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = builders.conversations(5)
    place = tmp_path / "data"
    place.mkdir()
    if form == "sharegpt":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        shared = [
            {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in row["messages"]]}
            for row in rows
        ]
        given = builders.write_jsonl(place / "chat.jsonl", shared)
    elif form == "json":
        given = place / "chat.json"
        given.write_text(json.dumps(rows))
    elif form == "parquet":
        given = place / "chat.parquet"
        parquet.write_table(pa.Table.from_pylist(rows), given)
    else:
        builders.write_jsonl(place / "a.jsonl", rows[:2])
        builders.write_jsonl(place / "b.jsonl", rows[2:])
        given = place
    one = open_cache(builders.make_cache(tmp_path / "cache", None, given))
    other = open_cache(
        builders.make_cache(tmp_path / "plain", None, builders.write_jsonl(tmp_path / "plain.jsonl", rows))
    )
    assert [s.input_ids.tolist() for s in one] == [s.input_ids.tolist() for s in other]
    assert [s.loss_mask.tolist() for s in one] == [s.loss_mask.tolist() for s in other]


# Input


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_missing_or_empty_input_exits_4(content: str | None, tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    if content is not None:
        chat.write_text(content)
    check_refused(builders.precompute(tmp_path / "cache", None, chat), 4, "chat.jsonl")


def test_an_empty_directory_of_input_exits_4(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    check_refused(builders.precompute(tmp_path / "cache", None, tmp_path / "data"), 4, str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"messages": [', "JSON"),
        ("[]", ""),
        ({"messages": []}, "empty"),
        ({"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]}, "wizard"),
        ({"messages": [{"role": "user", "content": "x"}]}, "assistant"),
        ({"text": "x"}, "text"),
    ],
)
def test_a_bad_row_is_named_by_file_and_number_when_asked_to_stop(row: Any, said: str, tmp_path: Path) -> None:
    chat = chat_of(tmp_path, builders.conversations(1)[0], row)
    ended = builders.precompute(tmp_path / "cache", None, chat, on_bad_row="stop")
    check_refused(ended, 4, "chat.jsonl", "row 2", said)
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize("row", ['{"messages": [', {"messages": [{"role": "user", "content": "x"}]}])
def test_input_without_one_usable_row_exits_4_and_names_the_first(row: Any, tmp_path: Path) -> None:
    check_refused(builders.precompute(tmp_path / "cache", None, chat_of(tmp_path, row)), 4, "chat.jsonl", "row 1")


def test_a_split_that_is_not_there_is_refused_not_ignored(tmp_path: Path) -> None:
    check_refused(plain(tmp_path / "cache", "--split", "validation"), 2, "validation")
    check_refused(plain(tmp_path / "cache", "--split", "train[oops"), 2, "train[oops")


# Target


def test_a_target_without_template_says_how_to_pass_one(tmp_path: Path) -> None:
    target = builders.save_target(tmp_path / "target", template=None)
    check_refused(builders.precompute(tmp_path / "cache", target), 3, "--chat-template")
    template = tmp_path / "chatml.jinja"
    template.write_text(builders.CHATML)
    ended = builders.precompute(tmp_path / "cache", target, chat_template=template)
    assert ended.code == 0, ended.err
    assert (tmp_path / "cache" / "target" / "chat_template.jinja").read_text() == builders.CHATML
    check_refused(
        builders.precompute(tmp_path / "other", target, chat_template=tmp_path / "none.jinja"), 2, "none.jinja"
    )
    template.write_text("{% for %}")
    check_refused(builders.precompute(tmp_path / "other", target, chat_template=template), 2, "Jinja")


@pytest.mark.parametrize("num_layers", [1, 4, 6])
def test_a_target_too_shallow_for_three_layers_names_the_flag(num_layers: int, tmp_path: Path) -> None:
    target = builders.shared_target("Llama", changes=(("num_hidden_layers", num_layers),))
    check_refused(builders.precompute(tmp_path / "cache", target), 2, "--aux-layer-ids", str(num_layers))
    assert not (tmp_path / "cache" / "manifest.json").exists()
    ended = builders.precompute(tmp_path / "cache", target, aux_layer_ids=list(range(min(num_layers, 3))))
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("ids", [["3", "1"], ["1", "1"], ["1", "8"], ["-1", "2"], [""], ["one"], ["1.5"]])
def test_layer_ids_that_cannot_be_meant_exit_2(ids: list[str], tmp_path: Path) -> None:
    check_refused(plain(tmp_path / "cache", "--aux-layer-ids", *ids), 2, "--aux-layer-ids")


def test_a_tokenizer_with_more_tokens_than_the_model_exits_3(tmp_path: Path) -> None:
    target = builders.save_target(tmp_path / "target", vocab_size=200)
    check_refused(builders.precompute(tmp_path / "cache", target), 3, "tokenizer", "200")


@pytest.mark.parametrize("size", ["273", "0", "-1", "2", "many", "1e3"])
def test_a_draft_vocabulary_that_cannot_be_exits_2(size: str, tmp_path: Path) -> None:
    arguments = builders.precompute_arguments(tmp_path / "cache", draft_vocab_size=None)
    check_refused(builders.run_cli(*arguments, "--draft-vocab-size", size), 2, "--draft-vocab-size")
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_what_is_no_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_refused(builders.precompute(tmp_path / "cache", tmp_path / "nowhere"), 2, "nowhere")
    check_refused(builders.precompute(tmp_path / "cache", tmp_path / "empty"), 4, "config.json")
    (tmp_path / "empty" / "config.json").write_text("{")
    check_refused(builders.precompute(tmp_path / "cache", tmp_path / "empty"), 4, "empty")


@pytest.mark.parametrize("damage", ["missing file", "missing weight", "truncated", "no tokenizer", "unknown type"])
def test_a_damaged_target_exits_4(damage: str, tmp_path: Path) -> None:
    target = shutil.copytree(builders.shared_target(), tmp_path / "target")
    weights = target / "model.safetensors"
    if damage == "missing file":
        weights.unlink()
    elif damage == "missing weight":
        tensors = load_file(weights)
        del tensors["model.layers.3.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5000])
    elif damage == "no tokenizer":
        for path in target.glob("tokenizer*"):
            path.unlink()
    else:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "model_type": "nothing-we-know"}))
    check_refused(builders.precompute(tmp_path / "cache", target), 4, str(target))
    assert not builders.shard_bytes(tmp_path / "cache")


# Output


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "commit-000000.json", ".git/HEAD", "checkpoints/x"])
def test_an_output_directory_that_holds_something_else_is_left_alone(name: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    (output / name).parent.mkdir(parents=True)
    (output / name).write_text("mine")
    before = builders.tree(output, without=())
    for resume in (False, True):
        check_refused(builders.precompute(output, resume=resume), 3, str(output), "--output-dir")
        assert builders.tree(output, without=()) == before


def test_a_file_where_the_output_directory_should_be_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        ended = builders.precompute(place)
        check_refused(ended, ended.code, "file")
        assert ended.code in (1, 2)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_path_that_no_file_system_takes_is_one_line(tmp_path: Path) -> None:
    ended = builders.precompute(tmp_path / ("x" * 300))
    check_refused(ended, ended.code)
    assert ended.code in (1, 2)


@pytest.mark.parametrize(("change", "code"), [({"version": 99}, 3), ({"format": "other"}, 3), ({"identity": {}}, 4)])
def test_a_cache_of_another_version_or_a_torn_one_is_left_alone(
    change: dict[str, Any], code: int, tmp_path: Path
) -> None:
    cache = builders.make_cache(tmp_path / "cache")
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, **change}))
    before = builders.tree(cache)
    check_refused(builders.precompute(cache, resume=True), code, "manifest.json")
    assert builders.tree(cache) == before


def test_a_damaged_record_is_named_by_resume(tmp_path: Path) -> None:
    cache = builders.make_cache(tmp_path / "cache")
    (cache / "commit-000001.json").write_text("{")
    ended = builders.precompute(cache, resume=True)
    check_refused(ended, 4, "commit-000001.json")


# Flags


@pytest.mark.parametrize(
    "given",
    [
        ["--no-such-flag"],
        ["--no-such-flag", "7"],
        ["--batch-size"],
        ["surplus"],
        ["--batch-size", "0"],
        ["--batch-size", "two"],
        ["--shard-size", "-4"],
        ["--seq-length", "0"],
        ["--dtype", "int8"],
        ["--state-encoding", "zip"],
        ["--target-encoding", "topk9"],
        ["--dtype", "fp32"],
        ["--dtype", "fp16", "--state-encoding", "planes"],
        ["--device", "abacus"],
        ["--process-index", "2", "--process-count", "2"],
        ["--grace-seconds", "-1"],
        ["--on-bad-row", "cry"],
    ],
)
def test_flags_that_cannot_be_meant_exit_2_before_any_work(given: list[str], tmp_path: Path) -> None:
    ended = plain(tmp_path / "cache", *given)
    check_refused(ended, 2, "raw" if "fp16" in given or "fp32" in given else "")
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--process-index", "3"], "--process-index 3: expected less than --process-count 1"),
        (["--process-count", "2"], "say which of them this is with --process-index, 0 to 1"),
        (["--revision", "main"], "is a directory of this machine; leave --revision out"),
        (["--adapter-revision", "main"], "of no use without --adapter"),
        (["--adapter", "/", "--adapter-revision", "main"], "leave --adapter-revision out"),
        (["--staging-dir", "somewhere"], "of use only where --output-dir is the URL of an object store"),
    ],
)
def test_flags_that_would_be_of_no_effect_exit_2_before_anything_is_made(
    given: list[str], said: str, tmp_path: Path
) -> None:
    check_refused(plain(tmp_path / "cache", *given), 2, said)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("kind", "said"), [("T5", "is an encoder-decoder model"), ("Bert", "is an encoder model")])
def test_what_writes_no_text_from_left_to_right_is_refused_before_tokens_are_made(
    kind: str, said: str, tmp_path: Path
) -> None:
    import transformers

    target = shutil.copytree(builders.shared_target(), tmp_path / "target")
    config = {
        "T5": lambda: transformers.T5Config(
            architectures=["T5ForConditionalGeneration"], vocab_size=272, d_model=32, num_layers=2
        ),
        "Bert": lambda: transformers.BertConfig(architectures=["BertForMaskedLM"], num_hidden_layers=2),
    }[kind]()
    config.save_pretrained(target)
    ended = builders.precompute(tmp_path / "cache", target)
    check_refused(ended, 3, said)
    assert not (tmp_path / "cache" / "tokens").exists()


def test_the_tokens_of_a_cache_are_not_replaced_by_others(tmp_path: Path) -> None:
    cache = builders.make_cache(tmp_path / "cache")
    before = {path.name: path.read_bytes() for path in (cache / "tokens").iterdir()}
    arguments = ["tokenize", "--target-model", str(builders.shared_target()), "--output-dir", str(cache)]
    same = ["--input-data", str(builders.shared_chat()), "--seq-length", "96"]
    for given, said in (
        (["--input-data", str(builders.shared_chat(5, 9)), "--seq-length", "96"], "dataset.sources"),
        ([*same[:-1], "64"], "text.seq_length: recorded 96, now 64"),
        ([*same, "--on-bad-row", "stop"], "begun with --on-bad-row quarantine, now stop"),
    ):
        check_refused(builders.run_cli(*arguments, *given), 3, said)
    check_refused(builders.precompute(cache, resume=True, on_bad_row="stop"), 3, "--on-bad-row quarantine")
    assert {path.name: path.read_bytes() for path in (cache / "tokens").iterdir()} == before
    assert builders.run_cli(*arguments, *same).code == 0
    assert builders.run_cli("verify", cache).code == 0


@pytest.mark.parametrize("missing", ["--target-model", "--input-data", "--output-dir"])
def test_missing_flags_are_named(missing: str, tmp_path: Path) -> None:
    arguments = builders.precompute_arguments(tmp_path / "cache")
    at = arguments.index(missing)
    check_refused(builders.run_cli(*arguments[:at], *arguments[at + 2 :]), 2, missing)


@pytest.mark.parametrize(
    "content",
    [None, b"shard_size: [", b"- a\n- b\n", b"no_such_setting: 1\n", b"shard_size: many\n", b"\xff\xfe\x00", b"7"],
)
def test_a_wrong_config_file_exits_2(content: bytes | None, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    if content is not None:
        config.write_bytes(content)
    arguments = builders.precompute_arguments(tmp_path / "cache", shard_size=None)
    check_refused(builders.run_cli(*arguments, "--config", config), 2)
    check_refused(builders.run_cli(*arguments, "--config", tmp_path), 2)


def test_an_unknown_command_and_inspecting_nothing_are_one_line(tmp_path: Path) -> None:
    check_refused(builders.run_cli("precomptue"), 2)
    check_refused(builders.run_cli("inspect-manifest"), 2)
    check_refused(builders.run_cli("inspect-manifest", tmp_path / "nowhere"), 4, "nowhere")


def test_results_go_to_stdout_and_everything_else_to_stderr(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "eagle_offline", *builders.precompute_arguments(tmp_path / "cache")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shards_committed"] == 3
    assert "Loading weights" not in done.stderr
    assert "Warning" not in done.stderr
    failed = subprocess.run(
        [sys.executable, "-m", "eagle_offline", "precompute", "--target-model", "/nowhere", "--input-data", "x",
         "--output-dir", str(tmp_path / "other")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1


def test_rows_left_out_are_said_in_one_line_and_in_the_summary(tmp_path: Path) -> None:
    good = [json.loads(line) for line in builders.shared_chat(3).read_text().splitlines()]
    data = chat_of(tmp_path, *good, {"messages": [{"role": "wizard", "content": "hm"}]}, {"messages": []})
    ended = builders.run_cli(*builders.precompute_arguments(tmp_path / "cache", data=data))
    assert ended.code == 0, ended.err
    said = [line for line in ended.err.splitlines() if line.startswith("left out 2 of 5 rows")]
    assert len(said) == 1, ended.err
    assert "quarantine.jsonl" in said[0]
    assert sum(json.loads(ended.out)["rows_left_out"].values()) == 2


def test_settings_of_a_cache_that_was_moved_are_refused_where_they_would_lead_back(tmp_path: Path) -> None:
    cache = builders.make_cache(tmp_path / "cache")
    moved = cache.rename(tmp_path / "moved")
    next(moved.glob("commit-*")).unlink()
    refused = builders.run_cli("precompute", "--config", moved / "config.json", "--resume")
    assert refused.code == 2
    assert f"add --output-dir {moved}" in refused.err
    assert not cache.exists()
    ended = builders.run_cli("precompute", "--config", moved / "config.json", "--output-dir", moved, "--resume")
    assert ended.code == 0, ended.err
    assert not open_cache(moved).missing_shards


def test_a_cache_inside_a_cache_is_refused(tmp_path: Path) -> None:
    cache = builders.make_cache(tmp_path / "cache")
    refused = builders.precompute(cache / "another")
    assert refused.code == 2
    assert "lies inside the cache" in refused.err


def test_a_switch_in_the_place_of_a_number_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("mantissa_bits: true\n")
    refused = builders.run_cli(*builders.precompute_arguments(tmp_path / "cache", config=config))
    assert refused.code == 2
    assert "--mantissa-bits: found true" in refused.err


def test_rows_beyond_what_the_target_was_made_for_are_said(tmp_path):
    target = builders.save_target(tmp_path / "target", max_position_embeddings=64)
    ended = builders.precompute(tmp_path / "long", target)
    assert ended.code == 0, ended.err
    (said,) = [line for line in ended.errors if line.startswith("warning:")]
    assert "64" in said
    assert "--seq-length" in said
    short = builders.precompute(tmp_path / "short", target, seq_length=64)
    assert short.code == 0, short.err
    assert "warning:" not in short.err
