"""What a run achieved stands beside what the untrained draft did, on the terminal and on a page."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from eagle_offline.inspection import describe_cache
from eagle_offline.training.logbook import read_metrics
from tests.builders import run_cli
from tests.training.caches import copied_cache, settings, shared_cache, train

PNG = b"\x89PNG\r\n\x1a\n"
BY_DEPTH = {"step_loss": [1.5, 2.5, 3.5], "survival": [0.75, 0.5, 0.25]}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("reported") / "run <&>"
    train(settings(directory, num_epochs=3))
    return directory


@pytest.fixture(scope="module")
def reported(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report") / "page"
    ended = run_cli("report", "--run", run, "--output-dir", directory)
    assert ended.code == 0, ended.err
    return directory, ended


def heldout(run: Path) -> list[dict]:
    return [row for row in read_metrics(run) if row["kind"] == "heldout"]


def test_the_table_has_an_untrained_and_a_trained_column(run, reported):
    _, ended = reported
    first, last = heldout(run)[0], heldout(run)[-1]
    lines = ended.out.splitlines()
    heading = next(line for line in lines if "untrained" in line)
    assert heading.split()[-2:] == ["untrained", "trained"]
    table = {line[:26].strip(): line[26:].split() for line in lines[lines.index(heading) + 1 :]}
    assert table["held-out loss"] == [f"{first['loss']:.3f}", f"{last['loss']:.3f}"]
    for depth in range(3):
        assert table[f"top-1 at depth {depth + 1}"] == [f"{row['top1'][depth]:.1%}" for row in (first, last)]
    for name in ("simulated accept length", "walked accept length"):
        assert table[name] == [f"{row[name.replace(' ', '_')]:.2f}" for row in (first, last)]
    assert first["loss"] != last["loss"]


def test_the_table_says_what_the_cache_takes(reported):
    _, ended = reported
    described = describe_cache(shared_cache())
    assert str(shared_cache()) in ended.out
    assert f"{described['samples']:,}" in ended.out
    assert f"{described['bytes_per_token']:.0f}" in ended.out


def test_the_page_its_numbers_and_its_plots_are_on_disk(run, reported):
    directory, ended = reported
    assert str(directory / "report.html") in ended.out
    summary = json.loads((directory / "report.json").read_text())
    assert summary["untrained"] == heldout(run)[0]
    assert summary["trained"] == heldout(run)[-1]
    assert summary["cache"]["samples"] == 24
    pictures = sorted(directory.glob("*.png"))
    assert pictures
    assert all(path.read_bytes().startswith(PNG) for path in pictures)
    page = (directory / "report.html").read_text()
    shown = re.findall(r'<img src="([^"]+)"', page)
    assert shown == [path.name for path in pictures]
    assert f"{summary['trained']['loss']:.3f}" in page
    assert html.escape(str(run)) in page
    assert "<&>" not in page, "a path was not escaped"


def test_without_matplotlib_the_page_has_its_tables_and_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = run_cli("report", "--run", run, "--output-dir", tmp_path / "page")
    assert ended.code == 0, ended.err
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Install the extra" in page
    assert "<img" not in page
    assert "held-out loss" in page


def test_seconds_of_stages_are_shown_when_given(run, tmp_path):
    (tmp_path / "stages.json").write_text('{"precompute": 12.25, "train": 3.5}')
    ended = run_cli("report", "--run", run, "--output-dir", tmp_path / "p", "--stages-file", tmp_path / "stages.json")
    assert re.search(r"^precompute +12\.2$", ended.out, re.MULTILINE)
    assert "12.2" in (tmp_path / "p" / "report.html").read_text()


def test_a_report_can_be_made_again_and_while_training_goes_on(run, tmp_path):
    for _ in range(2):
        ended = run_cli("report", "--run", run, "--output-dir", tmp_path / "p")
        assert ended.code == 0, ended.err
    assert not list((tmp_path / "p").glob(".*"))


def other_run(source: Path, directory: Path, **changes: object) -> Path:
    """A copy of a run whose settings say something else, and its last validation a loss of 1.25."""
    shutil.copytree(source, directory)
    shutil.rmtree(directory / "checkpoints")
    chosen = json.loads((directory / "train.json").read_text())
    (directory / "train.json").write_text(json.dumps({**chosen, **changes}))
    last = {**heldout(source)[-1], "loss": 1.25, **BY_DEPTH}
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(last) + "\n")
    return directory


def test_other_runs_stand_beside_it_on_the_terminal_and_on_the_page(run, tmp_path):
    beside = other_run(run, tmp_path / "beside <&>", num_draft_layers=2)
    apart = other_run(run, tmp_path / "apart", seed=7)
    ended = run_cli("report", "--run", run, "--output-dir", tmp_path / "p", "--compare", beside, apart)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    (head,) = (number for number, line in enumerate(lines) if line.endswith("run <&>    beside <&>"))
    table = {line[:26].strip(): line[26:].split() for line in lines[head + 1 : lines.index("", head)]}
    assert table["draft layers"] == ["1", "2"]
    assert table["loss"] == [f"{heldout(run)[-1]['loss']:.3f}", "1.250"]
    assert table["loss at depth 3"][1] == "3.500"
    assert table["survival to depth 2"][1] == "50.0%"
    (said,) = (line for line in lines if line.startswith("apart is left out: it was validated on 20% of"))
    assert "seed 7" in said
    summary = json.loads((tmp_path / "p" / "report.json").read_text())
    assert [entry["run"] for entry in summary["comparison"]["runs"]] == [str(run), str(beside)]
    assert summary["comparison"]["apart"] == [said]
    page = (tmp_path / "p" / "report.html").read_text()
    assert html.escape(said) in page
    assert '<img src="comparison.png"' in page
    assert (tmp_path / "p" / "comparison.png").read_bytes().startswith(PNG)
    assert "<&>" not in page


def test_without_other_runs_nothing_is_said_of_them(reported):
    directory, _ = reported
    assert json.loads((directory / "report.json").read_text())["comparison"] is None
    assert "Beside other runs" not in (directory / "report.html").read_text()


@pytest.mark.parametrize(("first", "last"), [(BY_DEPTH, BY_DEPTH), ({}, BY_DEPTH), ({}, {})])
def test_loss_and_survival_by_depth_are_shown_where_a_run_has_them(run, tmp_path, first, last):
    other = other_run(run, tmp_path / "run")
    plain = [{name: value for name, value in row.items() if name not in BY_DEPTH} for row in heldout(other)]
    rows = [plain[0] | first, *plain[1:-1], plain[-1] | last]
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = run_cli("report", "--run", other, "--output-dir", tmp_path / "p")
    assert ended.code == 0, ended.err
    found = [line.split() for line in ended.out.splitlines() if line.startswith(("loss at depth", "survival to"))]
    assert [line[-2:] for line in found] == [
        [f"{value:{form}}"] * 2
        for name, form in (("step_loss", ".3f"), ("survival", ".1%"))
        for value in BY_DEPTH[name]
    ][: 6 * bool(first)]


def test_another_run_that_is_none_is_refused(run, tmp_path):
    code, error = refused("--run", run, "--output-dir", tmp_path / "p", "--compare", tmp_path)
    assert code == 4
    assert f"{tmp_path}: no metrics here" in error
    code, error = refused("--run", run, "--output-dir", tmp_path / "p", "--compare", "s3://bucket/run")
    assert code == 2


def refused(*arguments: object) -> tuple[int, str]:
    ended = run_cli("report", *arguments)
    assert len(ended.err.splitlines()) == 1, ended.err
    assert not ended.out
    return ended.code, ended.err


def test_a_directory_without_a_run_is_refused(tmp_path):
    code, error = refused("--run", tmp_path, "--output-dir", tmp_path / "p")
    assert code == 4
    assert "no training run here" in error
    assert not (tmp_path / "p").exists()


def test_a_run_without_validation_is_refused(tmp_path):
    train(settings(tmp_path / "run", heldout_share=0, max_steps=1))
    code, error = refused("--run", tmp_path / "run", "--output-dir", tmp_path / "p")
    assert code == 4
    assert "--heldout-share 0" in error


def test_a_run_whose_cache_is_gone_is_refused(tmp_path):
    cache = copied_cache(tmp_path / "cache")
    train(settings(tmp_path / "run", cache=cache, max_steps=1))
    cache.rename(tmp_path / "elsewhere")
    code, error = refused("--run", tmp_path / "run", "--output-dir", tmp_path / "p")
    assert code == 4
    assert str(cache) in error


def test_settings_of_a_run_that_are_damaged_are_refused(run, tmp_path):
    for content in ("{", "[]", "{}"):
        damaged = tmp_path / "run"
        damaged.mkdir(exist_ok=True)
        (damaged / "train.json").write_text(content)
        (damaged / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
        code, error = refused("--run", damaged, "--output-dir", tmp_path / "p")
        assert code == 4
        assert str(damaged) in error
