"""Runs are drawn together under names that tell them apart; whatever is missing is said in one line."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path

import pytest

from eagle_offline import run_plots
from eagle_offline.config import PlotSettings
from eagle_offline.run_curves import RunCurves, read_runs, unlike_names
from eagle_offline.run_plots import METRICS, draw, heldout_rows
from tests.builders import run_cli

PNG = b"\x89PNG\r\n\x1a\n"
TOP1 = [0.8, 0.6]


def metrics(scale: float = 1.0) -> list[dict]:
    rows = []
    for step in (0, 10, 20):
        row = {"step": step, "epoch": step / 20, "loss": scale / (step + 1), "accuracy": 0.5, "top1": TOP1}
        row |= {"conditional_top1": TOP1, "simulated_accept_length": 1.5 + step / 10}
        rows.append({"kind": "heldout", **row, "walked_accept_length": 1.25 + step / 10})
        if step:
            rows.append({"kind": "train", **row, "tokens_per_second": 1e4, "data_wait_share": 0.01, "grad_norm": 0.1})
    return rows


def make_run(directory: Path, rows: list[dict] | None = None) -> Path:
    directory.mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in (metrics() if rows is None else rows)]
    (directory / "metrics.jsonl").write_text("".join(lines))
    return directory


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are made; they are not rendered."""
    figure = pytest.importorskip("matplotlib.figure")
    made: list = []

    class Kept(figure.Figure):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

        def savefig(self, file, **options):
            file.write(PNG)  # rendering is what takes time

    monkeypatch.setattr(figure, "Figure", Kept)
    return made


def panels(figure) -> dict[str, list]:
    """The lines of each panel by its title, those without a point left out."""
    return {
        axis.get_title(): [line for line in axis.lines if len(line.get_xdata())]
        for axis in figure.axes
        if axis.get_title()
    }


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def points(line) -> list[tuple]:
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def refused(*arguments: object, code: int) -> str:
    ended = run_cli("plot", *arguments)
    assert ended.code == code, ended
    assert not ended.out
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    return line


# What is drawn


def test_a_picture_is_made_here_unless_told_and_its_place_is_said(here):
    pytest.importorskip("matplotlib")
    ended = run_cli("plot", make_run(here / "run"))
    assert (ended.code, ended.out, ended.err) == (0, "plot: plot.png\n", "")
    assert Path("plot.png").read_bytes().startswith(PNG)
    assert [path.name for path in Path().iterdir()] == ["plot.png"]


def test_each_usual_metric_has_a_panel_with_training_and_held_out_told_apart(here, figures):
    run = make_run(here / "run")
    assert run_cli("plot", run).code == 0
    drawn = panels(figures[0])
    rows = metrics()
    assert list(drawn) == [
        "loss, nats", "walked accept length, tokens a round", "simulated accept length, tokens a round",
        "top-1 by depth at the last validation", "tokens a second", "share of the time spent waiting for data",
    ]  # fmt: skip
    train, heldout = drawn["loss, nats"]
    for line, kind in ((train, "train"), (heldout, "heldout")):
        assert points(line) == [(row["step"], row["loss"]) for row in rows if row["kind"] == kind]
    assert train.get_color() == heldout.get_color()
    assert (train.get_marker(), heldout.get_marker()) == ("None", "o")
    (walked,) = drawn["walked accept length, tokens a round"]
    assert points(walked) == [(0, 1.25), (10, 2.25), (20, 3.25)]
    (depths,) = drawn["top-1 by depth at the last validation"]
    assert points(depths) == [(1, 0.8), (2, 0.6)]
    (speed,) = drawn["tokens a second"]
    assert points(speed) == [(10, 1e4), (20, 1e4)]
    labels = {axis.get_title(): axis.get_xlabel() for axis in figures[0].axes if axis.get_title()}
    assert {title: label for title, label in labels.items() if label != "step"} == {
        "top-1 by depth at the last validation": "depth"
    }
    assert legend(figures[0]) == ["run", "training", "held out"]


def test_the_expected_accept_length_is_drawn_when_a_run_has_it(here, figures):
    rows = [{**row, "expected_accept_length": 2.0} for row in metrics()]
    assert run_cli("plot", make_run(here / "old"), make_run(here / "new", rows)).code == 0
    lines = panels(figures[0])["expected accept length, tokens a round"]
    assert [len(points(line)) for line in lines] == [2, 3]


def test_loss_and_survival_by_depth_are_drawn_when_a_run_has_them(here, figures):
    rows = [{**row, "step_loss": [1.5, 2.5, 3.5], "survival": [0.8, 0.5, 0.4]} for row in metrics()]
    runs = [make_run(here / "old"), make_run(here / "new", rows)]
    assert run_cli("plot", *runs).code == 0
    (survival,) = panels(figures[0])["all right up to this depth, at the last validation"]
    assert points(survival) == [(1, 0.8), (2, 0.5), (3, 0.4)]
    assert run_cli("plot", *runs, "--metric", "step-loss", "survival").code == 0
    (loss,) = panels(figures[1])["loss by depth at the last validation, nats"]
    assert points(loss) == [(1, 1.5), (2, 2.5), (3, 3.5)]
    limits = [axis.get_ylim() for axis in figures[1].axes]
    assert limits[0][1] > 3.5, "a loss is no share"
    assert limits[1] == (0, 1)
    assert "none of these runs has it" in refused(here / "old", "--metric", "survival", code=4)


def test_metrics_asked_for_are_drawn_in_that_order(here, figures):
    run = make_run(here / "run")
    assert run_cli("plot", run, "--metric", "grad-norm", "loss", "--metric", "conditional_top1").code == 0
    titles = ["gradient norm", "loss, nats", "top-1, given all before it were right, at the last validation"]
    assert list(panels(figures[0])) == titles


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_can_be_drawn(metric, here, figures):
    extra = {"learning_rate": 0.1, "memory_bytes": 5, "expected_accept_length": 2.0}
    rows = [{**row, **extra, "step_loss": [1.5, 2.5], "survival": TOP1} for row in metrics()]
    run_plots.plot_runs(PlotSettings(run=make_run(here / "run", rows), metric=metric))
    assert len(panels(figures[0])) == 1


def test_every_metric_of_a_row_is_one_that_can_be_drawn():
    from eagle_offline.training.logbook import MetricsRow

    assert set(METRICS) == MetricsRow.model_fields.keys() - {"kind", "step", "epoch"}


def test_runs_have_colors_of_their_own_and_the_legend_their_names(here, figures):
    names = [f"run {number}" for number in range(12)]
    runs = [make_run(here / name) for name in names]
    for count in (2, 10, 12):
        assert run_cli("plot", *runs[:count], "--metric", "walked_accept_length").code == 0
        lines = panels(figures[-1])["walked accept length, tokens a round"]
        assert len({str(line.get_color()) for line in lines}) == count
        assert legend(figures[-1]) == [*names[:count], "training", "held out"]
        handles = figures[-1].legends[0].legend_handles
        assert [handle.get_color() for handle in handles[:count]] == [line.get_color() for line in lines]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/x/run", "/a/y/run", "/a/z/other"], ["x/run", "y/run", "other"]),
        (["/a/run", "/x/a/run"], ["/a/run", "x/a/run"]),
        (["/a/b/run", "/c/b/run", "/c/d/run"], ["a/b/run", "c/b/run", "d/run"]),
        (["/run"], ["run"]),
    ],
)
def test_names_are_as_short_as_tells_them_apart(paths, names):
    assert unlike_names([Path(path) for path in paths]) == names


def test_a_run_named_twice_is_drawn_once(here):
    run = make_run(here / "run")
    (here / "link").symlink_to(run)
    assert [found.name for found in read_runs([run, here / "here" / ".." / "run", here / "link", run])] == ["run"]


def test_the_working_directory_has_the_name_it_has(here):
    make_run(here / "run")
    assert [found.name for found in read_runs([Path("../run"), Path("../run/.")])] == ["run"]


@pytest.mark.parametrize("name", ["_hidden", "cost $5 and $6", "<&>", r"back\slash", "{brace}"])
def test_odd_names_are_shown_as_they_are(name, here, figures):
    assert run_cli("plot", make_run(here / name), "--output", "page.html").code == 0
    assert legend(figures[0])[0].strip() == name
    assert not legend(figures[0])[0].startswith("_"), "matplotlib 3.9 leaves these out"
    assert not figures[0].legends[0].get_texts()[0].get_parse_math()
    assert "<&>" not in Path("page.html").read_text()


def test_rows_that_lack_fields_or_hold_something_else_are_passed_over(here, figures):
    rows = [{}, {"kind": "train"}, {"step": 3, "loss": 1}, {"kind": "train", "step": 4, "loss": None}]
    rows += [{"kind": "heldout", "step": 5, "loss": "high", "top1": [None]}, {"kind": "train", "step": 6, "loss": 0.5}]
    assert run_cli("plot", make_run(here / "run", rows), "--output", "page.html").code == 0
    assert {title: list(map(points, lines)) for title, lines in panels(figures[0]).items()} == {
        "loss, nats": [[(6, 0.5)]]
    }


def test_a_single_point_of_training_is_seen(here, figures):
    run_cli("plot", make_run(here / "run", [{"kind": "train", "step": 6, "loss": 0.5}]))
    assert panels(figures[0])["loss, nats"][0].get_marker() == "."


def test_a_loss_that_is_not_finite_leaves_a_gap(here):
    pytest.importorskip("matplotlib")
    rows = [{**row, "loss": float("nan") if row["step"] == 10 else float("inf")} for row in metrics()]
    assert run_cli("plot", make_run(here / "run", rows)).code == 0


def test_a_torn_last_line_of_a_run_that_goes_on_does_no_harm(here):
    pytest.importorskip("matplotlib")
    with (make_run(here / "run") / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    assert run_cli("plot", here / "run").code == 0


# The page


def test_a_page_needs_no_other_file(here):
    pytest.importorskip("matplotlib")
    runs = [make_run(here / name / "run", metrics(scale)) for name, scale in (("one", 1.0), ("two", 2.0))]
    ended = run_cli("plot", *runs, "--output", here / "new" / "page.html")
    assert (ended.code, ended.out) == (0, f"plot: {here / 'new' / 'page.html'}\n")
    assert [path.name for path in (here / "new").iterdir()] == ["page.html"]
    page = (here / "new" / "page.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 1
    kind, _, content = sources[0].partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(content, validate=True).startswith(PNG)
    assert not re.findall(r"https?://|@import|<script", page)


def test_the_page_has_the_last_validation_of_each_run(here):
    pytest.importorskip("matplotlib")
    last = {"expected_accept_length": 2.345}
    runs = [make_run(here / "one"), make_run(here / "two", [*metrics()[:-1], {**metrics()[-2], **last}])]
    runs.append(make_run(here / "three", [row for row in metrics() if row["kind"] == "train"]))
    assert run_cli("plot", *runs, "--output", "page.html").code == 0
    cells = [
        re.findall(r"<t[hd]>(.*?)</t[hd]>", line)
        for line in re.findall(r"<tr>(.*?)</tr>", Path("page.html").read_text())
    ]
    assert cells == [
        ["run", "step", "epoch", "loss", "accuracy", "walked accept length", "simulated accept length",
         "expected accept length", "top-1 by depth"],
        ["one", "20", "1.00", "0.048", "50.0%", "3.25", "3.50", "–", "80% 60%"],
        ["two", "20", "1.00", "0.048", "50.0%", "3.25", "3.50", "2.35", "80% 60%"],
        ["three", *["–"] * 8],
    ]  # fmt: skip


def test_many_runs_fit_their_page():
    pytest.importorskip("matplotlib")
    runs = [RunCurves(f"{number} " + "long name " * 20, metrics()) for number in range(30)]
    assert draw(runs, ["loss"]).startswith(PNG)
    assert len(heldout_rows(runs)) == 31


def test_drawing_needs_no_torch(here):
    pytest.importorskip("matplotlib")
    import subprocess

    code = (
        "import sys\nfrom eagle_offline.config import PlotSettings\nfrom eagle_offline.stages import plot\n"
        f"plot(PlotSettings(run={str(make_run(here / 'run'))!r}))\nassert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(root), "HOME": str(here)})


# What is refused


def test_no_run_is_refused(here):
    assert "eagle-offline plot RUN" in refused(code=2)


def test_a_run_that_is_missing_is_named(here):
    run = make_run(here / "run")
    assert f"{here / 'gone'}: no such directory" in refused(run, here / "gone", code=4)
    assert "no such directory" in refused(run / "metrics.jsonl", code=4)
    assert not list(Path().iterdir())


def test_a_run_without_metrics_is_named(here):
    (here / "empty").mkdir()
    (make_run(here / "begun") / "metrics.jsonl").write_text("")
    for name in ("empty", "begun"):
        line = refused(make_run(here / f"good {name}"), here / name, code=4)
        assert f"{here / name}: no metrics here" in line


@pytest.mark.parametrize("content", ['{"step": 1}\n{"st\n{"step": 2}\n', "5\n", "[]\n{}\n", "\xff\n"])
def test_damaged_metrics_are_named(content, here):
    path = make_run(here / "run") / "metrics.jsonl"
    path.write_bytes(content.encode("latin-1") + b"{}\n")
    assert str(path) in refused(here / "run", code=4)


def test_metrics_that_cannot_be_read_are_named(here):
    path = make_run(here / "run") / "metrics.jsonl"
    path.unlink()
    path.mkdir()
    assert f"{path}: cannot be read" in refused(here / "run", code=4)


def test_an_unknown_metric_is_refused_with_its_likeliest_meaning(here):
    run = make_run(here / "run")
    assert "did you mean loss?" in refused(run, "--metric", "los", code=2)
    assert "expected one of loss, walked_accept_length" in refused(run, "--metric", "perplexity", code=2)


def test_a_run_after_the_metrics_is_told_where_it_belongs(here):
    assert "name the runs before --metric" in refused("--metric", "loss", make_run(here / "run"), code=2)


def test_a_metric_that_no_run_has_is_refused_with_those_there_are(here):
    line = refused(make_run(here / "run"), "--metric", "expected_accept_length", code=4)
    assert "none of these runs has it; they have loss" in line


def test_runs_with_nothing_to_draw_are_refused(here):
    assert "nothing to draw" in refused(make_run(here / "run", [{"kind": "train", "step": 1}]), code=4)


@pytest.mark.parametrize("name", ["plot.pdf", "plot"])
def test_another_kind_of_file_is_refused(name, here):
    line = refused(make_run(here / "run"), "--output", name, code=2)
    assert "expected a name that ends in .png or .html" in line


@pytest.mark.parametrize("name", ["plot.png", "page.html"])
def test_an_output_that_cannot_be_written_is_refused(name, here):
    run = make_run(here / "run")
    Path("file").write_text("")
    assert "cannot be written" in refused(run, "--output", f"file/{name}", code=2)
    Path(name).mkdir()
    assert "a directory is there" in refused(run, "--output", name, code=2)
    assert not list(Path(name).iterdir())


def test_without_matplotlib_the_way_to_it_is_said(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'eagle-offline[plots]'" in refused(make_run(here / "run"), code=2)


def test_a_file_of_settings_may_name_runs_with_spaces(here, figures):
    run = make_run(here / "my run, the second")
    Path("plot.yaml").write_text(f"run: {run}\nmetric: loss, top1\noutput: there.png\n")
    assert run_cli("plot", "--config", "plot.yaml").out == "plot: there.png\n"
    assert legend(figures[0])[0] == "my run, the second"
    assert len(panels(figures[0])) == 2
