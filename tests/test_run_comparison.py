"""Runs stand beside one another where they were validated on the same documents; the others are named with why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eagle_offline.errors import DataError
from eagle_offline.run_comparison import (
    OBJECTIVES_NOTE,
    compare_runs,
    comparison_notes,
    comparison_rows,
    plot_comparison,
)

PNG = b"\x89PNG\r\n\x1a\n"
OLD = {
    "kind": "heldout", "step": 1240, "epoch": 2.0, "loss": 1.25, "accuracy": 0.5, "top1": [0.8, 0.6],
    "conditional_top1": [0.8, 0.7], "simulated_accept_length": 2.5, "walked_accept_length": 2.75,
}  # fmt: skip
EAGLE = {**OLD, "step_loss": [1.0, 1.5], "survival": [0.8, 0.55]}
PEAGLE = {
    **EAGLE, "step": 600, "loss": 0.5, "top1": [0.7, 0.5, 0.25], "conditional_top1": [0.7, 0.6, 0.5],
    "step_loss": [0.25, 0.5, 0.75], "survival": [0.7, 0.4, 0.125], "walked_accept_length": 2.375,
}  # fmt: skip


def make_run(
    directory: Path, row: dict[str, Any] | None = EAGLE, recorded: dict[str, Any] | None = None, **settings: Any
) -> Path:
    """A run with an untrained validation, a training step and, last, the given validation."""
    directory.mkdir(parents=True)
    content = {"cache": ["C"], "output_dir": str(directory), "heldout_cache": "H", **settings}
    (directory / "train.json").write_text(json.dumps(content))
    rows = [{"kind": "heldout", **OLD, "step": 0}, row, {"kind": "train", "step": 1300, "loss": 9.0, "top1": [0.1]}]
    rows = [own for own in rows if own is not None] if row is not None else rows[2:]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(own) + "\n" for own in rows))
    if recorded is not None:
        checkpoint = directory / "checkpoints" / "step-00000600"
        checkpoint.mkdir(parents=True)
        (checkpoint / "training_state.json").write_text(json.dumps({"fingerprint": recorded}))
    return directory


def peagle(directory: Path, **settings: Any) -> Path:
    return make_run(directory, PEAGLE, objective="peagle", num_depths=3, **settings)


def table(comparison: dict[str, Any]) -> dict[str, list[str]]:
    return {first.strip(): list(others) for first, *others in comparison_rows(comparison)}


def test_runs_stand_beside_one_another_as_they_were_at_their_last_validation(tmp_path):
    found = compare_runs(peagle(tmp_path / "parallel"), [make_run(tmp_path / "chain", ttt_steps=2)], None)
    assert table(found) == {
        "held-out conversations": ["parallel", "chain"],
        "objective": ["peagle", "eagle3"],
        "draft layers": ["4", "1"],
        "tokens predicted": ["3", "2"],
        "optimizer steps": ["600", "1,240"],
        "loss": ["0.500", "1.250"],
        "loss at depth 1": ["0.250", "1.000"],
        "loss at depth 2": ["0.500", "1.500"],
        "loss at depth 3": ["0.750", "–"],
        "top-1 at depth 1": ["70.0%", "80.0%"],
        "top-1 at depth 2": ["50.0%", "60.0%"],
        "top-1 at depth 3": ["25.0%", "–"],
        "survival to depth 1": ["70.0%", "80.0%"],
        "survival to depth 2": ["40.0%", "55.0%"],
        "survival to depth 3": ["12.5%", "–"],
        "simulated accept length": ["2.50", "2.50"],
        "walked accept length": ["2.38", "2.75"],
    }
    assert comparison_notes(found) == [OBJECTIVES_NOTE]
    assert [run["heldout"] for run in found["runs"]] == [PEAGLE, EAGLE]
    assert json.loads(json.dumps(found)) == found


def test_runs_of_one_objective_need_no_word_on_it(tmp_path):
    found = compare_runs(make_run(tmp_path / "one"), [make_run(tmp_path / "two", num_draft_layers=3)], None)
    assert table(found)["draft layers"] == ["1", "3"]
    assert comparison_notes(found) == []


def test_what_no_run_has_is_left_out_and_what_one_lacks_is_a_dash(tmp_path):
    old, older = make_run(tmp_path / "old", OLD), make_run(tmp_path / "older", {**OLD, "walked_accept_length": None})
    rows = table(compare_runs(old, [older], None))
    assert not [label for label in rows if label.startswith(("loss at", "survival"))]
    assert rows["walked accept length"] == ["2.75", "–"]
    rows = table(compare_runs(old, [make_run(tmp_path / "new")], None))
    assert rows["loss at depth 2"] == ["–", "1.500"]
    assert rows["survival to depth 1"] == ["–", "80.0%"]


def test_the_run_in_question_comes_first_and_each_run_once(tmp_path):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    (tmp_path / "link").symlink_to(run)
    found = compare_runs(run, [other, run, tmp_path / "link", other], None)
    assert [(entry["name"], entry["run"]) for entry in found["runs"]] == [("run", str(run)), ("other", str(other))]


def test_a_run_that_was_validated_elsewhere_is_named_and_not_shown(tmp_path):
    run = make_run(tmp_path / "run", heldout_cache="A")
    others = [make_run(tmp_path / "elsewhere", heldout_cache="B"), make_run(tmp_path / "share", heldout_cache=None)]
    found = compare_runs(run, others, None)
    assert [entry["name"] for entry in found["runs"]] == ["run"]
    assert comparison_notes(found) == [
        "elsewhere is left out: it was validated on B, run on A; figures of unlike documents do not compare",
        "share is left out: it was validated on 2% of C, seed 0, run on A; figures of unlike documents do not compare",
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "alike"),
    [
        # Digests, where both runs have them, say it whatever the caches are called.
        ({"heldout_cache": "A", "recorded": {"heldout_cache": ["d1"]}},
         {"heldout_cache": "B", "recorded": {"heldout_cache": ["d1"]}}, True),
        ({"heldout_cache": "A", "recorded": {"heldout_cache": ["d1"]}},
         {"heldout_cache": "A", "recorded": {"heldout_cache": ["d2"]}}, False),
        ({"heldout_cache": "A", "recorded": {"heldout_cache": ["d1"]}}, {"heldout_cache": "A"}, True),
        ({"heldout_cache": "A", "recorded": {"heldout_cache": ["d1"]}}, {"heldout_cache": "B"}, False),
        # By share it is the cache, how much of it there was, the share and the seed.
        ({"heldout_cache": None}, {"heldout_cache": None}, True),
        ({"heldout_cache": None}, {"heldout_cache": None, "seed": 1}, False),
        ({"heldout_cache": None}, {"heldout_cache": None, "heldout_share": 0.1}, False),
        ({"heldout_cache": None}, {"heldout_cache": None, "cache": ["D"]}, False),
        ({"heldout_cache": None, "recorded": {"cache_identity": ["d"], "num_samples": [5]}},
         {"heldout_cache": None, "cache": ["D"], "recorded": {"cache_identity": ["d"], "num_samples": [5]}}, True),
        ({"heldout_cache": None, "recorded": {"cache_identity": ["d"], "num_samples": [5]}},
         {"heldout_cache": None, "recorded": {"cache_identity": ["d"], "num_samples": [4]}}, False),
        ({"heldout_cache": None, "recorded": {"cache_identity": ["d"], "num_samples": [5]}},
         {"heldout_cache": None, "seed": 3, "recorded": {"cache_identity": ["d"], "num_samples": [5]}}, False),
        ({"heldout_cache": None, "recorded": {"cache_identity": ["d"], "num_samples": [5], "heldout_cache": None}},
         {"recorded": {"cache_identity": ["d"], "num_samples": [5], "heldout_cache": ["d"]}}, False),
    ],
)  # fmt: skip
def test_whether_documents_are_the_same_is_told_by_digests_else_by_settings(tmp_path, ours, theirs, alike):
    run, other = make_run(tmp_path / "run", **ours), make_run(tmp_path / "other", **theirs)
    for one, two in ((run, other), (other, run)):
        found = compare_runs(one, [two], None)
        assert len(found["runs"]) == 1 + alike
        assert len(found["apart"]) == (not alike)


def test_a_cache_that_was_made_anew_is_said_to_be_another(tmp_path):
    run, other = (make_run(tmp_path / name, recorded={"heldout_cache": [name]}) for name in ("run", "other"))
    (line,) = compare_runs(run, [other], None)["apart"]
    assert line.startswith("other is left out: it was validated on H as it was then, run on H;")


def evaluation(**drafts: Path | str) -> dict[str, Any]:
    """What `evaluate` writes, as far as it is read: a draft in question, and others."""
    figures = {"tokens_per_second": 100.0}
    drafters = {
        name: {**figures, "accept_length": 2 + place / 4, "speedup": None if place == 1 else 1.5 + place,
               "draft_forwards_per_round": 5.0 / (1 + place)}
        for place, name in enumerate(drafts)
    }  # fmt: skip
    first, *others = drafts
    compared = {name: str(drafts[name]) for name in others}
    return {"draft": str(drafts[first]), "compared": compared, "num_draft_tokens": 5, "drafters": drafters}


def test_real_decoding_joins_the_runs_whose_drafts_were_decoded(tmp_path):
    chain, parallel = make_run(tmp_path / "run"), peagle(tmp_path / "runs" / "parallel")
    third = make_run(tmp_path / "run-2")
    decoded = evaluation(trained=chain / "export" / "flat", untrained="", parallel=parallel)
    del decoded["compared"]["untrained"]  # of no directory
    found = compare_runs(parallel, [chain, third], decoded)
    assert [run["decoding"] and run["decoding"]["drafter"] for run in found["runs"]] == ["parallel", "trained", None]
    rows = table(found)
    assert rows["real accept length"] == ["2.50", "2.00", "–"]
    assert rows["speed-up"] == ["3.50", "1.50", "–"]
    assert rows["draft forwards a round"] == ["1.67", "5.00", "–"]
    assert found["runs"][0]["decoding"]["num_draft_tokens"] == 5


def test_an_older_evaluation_has_no_forwards_and_no_further_drafts(tmp_path):
    run = make_run(tmp_path / "run")
    decoded = evaluation(trained=run)
    del decoded["compared"], decoded["drafters"]["trained"]["draft_forwards_per_round"]
    rows = table(compare_runs(run, [make_run(tmp_path / "other")], decoded))
    assert rows["real accept length"] == ["2.00", "–"]
    assert "draft forwards a round" not in rows


def test_a_picture_shows_every_run_by_depth(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    made: list[Any] = []
    monkeypatch.setattr(pyplot, "close", made.append)
    found = compare_runs(
        peagle(tmp_path / "_p $5 and $6"),
        [
            make_run(tmp_path / "chain"),
        ],
        None,
    )
    assert plot_comparison(found, tmp_path / "page") == "comparison.png"
    assert (tmp_path / "page" / "comparison.png").read_bytes().startswith(PNG)
    drawn = {axis.get_title(): [list(line.get_ydata()) for line in axis.lines] for axis in made[0].axes}
    assert drawn == {
        "top-1, held out": [PEAGLE["top1"], EAGLE["top1"]],
        "right, given all before it were": [PEAGLE["conditional_top1"], EAGLE["conditional_top1"]],
        "all right up to this depth": [PEAGLE["survival"], EAGLE["survival"]],
        "loss, held out": [PEAGLE["step_loss"], EAGLE["step_loss"]],
    }
    labels = [text.get_text() for text in made[0].axes[0].get_legend().get_texts()]
    assert labels == [r" _p \$5 and \$6", "chain"]
    assert [list(axis.get_xticks()) for axis in made[0].axes] == [[1, 2, 3]] * 4
    old = compare_runs(make_run(tmp_path / "old", OLD), [], None)
    plot_comparison(old, tmp_path / "page")
    assert [axis.get_title() for axis in made[1].axes] == list(drawn)[:2]


# What is refused


def test_a_run_that_is_missing_or_was_not_validated_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(DataError, match=r"gone: no such directory"):
        compare_runs(run, [tmp_path / "gone"], None)
    begun = make_run(tmp_path / "begun", row=None)
    with pytest.raises(DataError, match=r"begun: no validation on held-out documents yet; leave it out"):
        compare_runs(run, [begun], None)


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "{}", '{"cache": ["C"], "output_dir": "O", "objective": "other"}',
        '{"cache": ["C"], "output_dir": "O", "objective": "peagle", "ttt_steps": 3}',
    ],
)  # fmt: skip
def test_settings_that_are_damaged_are_named(tmp_path, content):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    (other / "train.json").write_text(content)
    with pytest.raises(DataError, match=r"other: no training run here \(train.json cannot be read\)"):
        compare_runs(run, [other], None)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"fingerprint": 5}'])
def test_a_checkpoint_that_is_damaged_is_named(tmp_path, content):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", recorded={})
    next(other.glob("checkpoints/*/training_state.json")).write_text(content)
    with pytest.raises(DataError, match=r"training_state.json: not readable"):
        compare_runs(run, [other], None)
