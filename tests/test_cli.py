"""The command line: every setting a flag, flag before file before default, one line and one code for every error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from eagle_offline import errors
from eagle_offline.capture_settings import PrecomputeSettings, PreviewSettings, TokenizeSettings
from eagle_offline.cli import cli
from eagle_offline.config import ReportSettings
from eagle_offline.train_settings import TrainSettings
from tests.builders import run_cli
from tests.training.caches import shared_cache

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, type[BaseModel]] = {
    "tokenize": TokenizeSettings,
    "precompute": PrecomputeSettings,
    "preview": PreviewSettings,
    "train": TrainSettings,
    "report": ReportSettings,
}


def plain(text: str) -> str:
    """Text without its line breaks and indentation."""
    return " ".join(text.split())


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_of_every_command_says_what_it_does_and_shows_it(name):
    ended = run_cli(name, "--help")
    assert ended.code == 0
    command = cli.commands[name]
    assert plain(command.help.split("\n\n")[0]) in plain(ended.out)
    assert f"eagle-offline {name}" in ended.out.split("Examples:")[1], "no example"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert all(flag in ended.out for flag in parameter.opts), parameter.name
            assert parameter.help, f"--{parameter.name} has no help"


@pytest.mark.parametrize("name", SETTINGS)
def test_help_has_every_setting_its_aliases_its_default_and_an_example(name):
    text = run_cli(name, "--help").out
    assert f"eagle-offline {name} --" in text.split("Examples:")[1]
    for field, info in SETTINGS[name].model_fields.items():
        if (info.json_schema_extra or {}).get("hidden"):
            continue
        flag = "--" + field.replace("_", "-")
        assert flag in text, flag
        for alias in (info.json_schema_extra or {}).get("flags", []):
            assert alias in text, alias
        # Each description, however the lines are broken.
        assert plain(info.description).replace(" ", "") in text.replace("\n", "").replace(" ", ""), flag
    assert "--config" in text


def test_help_of_the_whole_names_every_command():
    ended = run_cli("--help")
    assert ended.code == 0
    for name, command in cli.commands.items():
        assert name in ended.out
        assert command.help


def test_version_is_told():
    ended = run_cli("--version")
    assert ended.code == 0
    assert "0.1" in ended.out


@pytest.fixture
def given(monkeypatch) -> list[TrainSettings]:
    """The settings that `train` is called with; no training is done."""
    from eagle_offline import stages

    calls: list[TrainSettings] = []
    monkeypatch.setattr(stages, "train", lambda settings: calls.append(settings) or {})
    return calls


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(given, tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text("cache: from-file\noutput-dir: out\nlearning_rate: 5.0e-5\nseed: 3\nfc_norm: true\n")
    assert run_cli("train", "--config", config, "--seed", 7, "--cache", "from-flag").code == 0
    assert run_cli("train", "--config", config, "--no-fc-norm").code == 0
    first, second = given
    assert (first.cache, second.cache) == ((Path("from-flag"),), (Path("from-file"),))
    assert (first.seed, second.seed) == (7, 3)
    assert first.learning_rate == second.learning_rate == 5e-5
    assert (first.fc_norm, second.fc_norm) == (True, False)
    assert first.ttt_steps == TrainSettings.model_fields["ttt_steps"].default


def test_aliases_of_peers_are_taken(given):
    arguments = ("--cached-target-path", "c", "--output-dir", "o", "--ttt-length", 5, "--epochs", 3, "--lr", "2e-4")
    assert run_cli("train", *arguments).code == 0
    (settings,) = given
    assert (settings.cache, settings.ttt_steps, settings.num_epochs, settings.learning_rate) == (
        (Path("c"),),
        5,
        3,
        2e-4,
    )


def test_settings_in_use_are_saved_with_the_output(tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text("max_steps: 1\nheldout_share: 0.2\n")
    ended = run_cli(
        "train", "--config", config, "--cache", shared_cache(), "--output-dir", tmp_path / "run", "--seed", 4
    )
    assert ended.code == 0, ended.err
    saved = json.loads((tmp_path / "run" / "train.json").read_text())
    assert saved.keys() == TrainSettings.model_fields.keys()
    assert (saved["max_steps"], saved["seed"], saved["beta1"]) == (1, 4, 0.9)
    assert json.loads(ended.out)["steps"] == 1, "results go to stdout"


@pytest.mark.parametrize("ids", [["1", "15", "28"], ["1,15,28"], ["1", "--aux-layer-ids", "15", "28"], ["1 15,28"]])
def test_layer_ids_may_be_listed_repeated_or_separated_by_commas(ids, monkeypatch):
    from eagle_offline import stages

    calls: list[PrecomputeSettings] = []
    monkeypatch.setattr(stages, "precompute", lambda settings: calls.append(settings) or {})
    where = ["--target-model", "m", "--input-data", "d", "--output-dir", "c"]
    for arguments in ([*where, "--aux-layer-ids", *ids, "--resume"], ["--aux-layer-ids", *ids, *where, "--resume"]):
        assert run_cli("precompute", *arguments).code == 0
    assert [(call.aux_layer_ids, call.resume) for call in calls] == [((1, 15, 28), True)] * 2


REQUIRED = ["--cache", "c", "--output-dir", "o"]
USAGE = {
    "missing": (["train", "--output-dir", "o"], "--cache"),
    "unknown flag": (["train", *REQUIRED, "--speed", "3"], "--speed"),
    "unknown command": (["trian"], "trian"),
    "missing value": (["train", "--cache"], "--cache"),
    "missing argument": (["inspect-manifest"], "CACHE"),
    "missing argument of settings": (["convert", "--output-dir", "o"], "convert CACHE: is required"),
    "no number": (["train", *REQUIRED, "--learning-rate", "fast"], "--learning-rate"),
    "below range": (["train", *REQUIRED, "--heldout-share", "-0.1"], "--heldout-share"),
    "above range": (["train", *REQUIRED, "--heldout-share", "1"], "--heldout-share"),
    "no choice": (["train", *REQUIRED, "--objective", "medusa"], "--objective"),
    "zero": (["train", *REQUIRED, "--num-epochs", "0"], "--num-epochs"),
    "no layer": (
        ["precompute", "--target-model", "m", "--input-data", "d", "--output-dir", "c", "--aux-layer-ids", "1", "x"],
        "--aux-layer-ids",
    ),
}


@pytest.mark.parametrize("case", USAGE)
def test_what_cannot_be_meant_is_named_in_one_line_with_code_2(case):
    arguments, name = USAGE[case]
    ended = run_cli(*arguments)
    assert ended.code == errors.EXIT_USAGE == 2
    assert not ended.out
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith("error: ")
    assert name in ended.err


@pytest.mark.parametrize(
    "content", [b"speed: 3", b"{", b"- cache", b"\xff\x00", b"cache: 5\noutput_dir: o", b"seed: many"]
)
def test_a_config_file_that_cannot_be_meant_is_refused_in_one_line(content, tmp_path, given):
    config = tmp_path / "train.yaml"
    config.write_bytes(content)
    flags = REQUIRED if b"cache: 5" not in content else []
    ended = run_cli("train", "--config", config, *flags)
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1, ended.err
    assert not given


def test_an_unknown_key_of_a_file_is_named(tmp_path, given):
    config = tmp_path / "train.yaml"
    config.write_text("speed: 3\n")
    assert "--speed" in run_cli("train", "--config", config, *REQUIRED).err
    assert not given


@pytest.mark.parametrize(
    "kind", [errors.EagleOfflineError, *errors.EagleOfflineError.__subclasses__()], ids=lambda kind: kind.__name__
)
def test_every_error_ends_with_its_code_and_one_line(kind, monkeypatch):
    from eagle_offline import stages

    def fail(_: object) -> None:
        raise kind("x/y: found 3, expected 4; run z")

    monkeypatch.setattr(stages, "train", fail)
    ended = run_cli("train", *REQUIRED)
    assert ended.code == kind.exit_code
    assert ended.err == "error: x/y: found 3, expected 4; run z\n"


def test_exit_codes_are_the_documented_ones():
    assert {kind.__name__: kind.exit_code for kind in errors.EagleOfflineError.__subclasses__()} == {
        "UsageError": 2, "MismatchError": 3, "DataError": 4, "StoppedEarly": 5, "SpaceError": 6,
    }  # fmt: skip
    assert errors.EagleOfflineError.exit_code == 1


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    from eagle_offline import stages

    monkeypatch.setattr(stages, "train", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run_cli("train", *REQUIRED)


def test_inspecting_prints_a_page_or_one_object_to_stdout():
    page, raw = run_cli("inspect-manifest", shared_cache()), run_cli("inspect-manifest", shared_cache(), "--json")
    assert page.code == raw.code == 0
    assert "complete" in page.out
    assert json.loads(raw.out)["complete"] is True
    assert not page.err
    assert not raw.err


def test_a_reader_that_goes_away_leaves_no_traceback():
    command = f"{sys.executable} -m eagle_offline inspect-manifest {shared_cache()} --json | true"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.stderr == ""


def test_the_installed_module_runs_as_the_command():
    ended = subprocess.run(
        [sys.executable, "-m", "eagle_offline", "inspect-manifest", str(ROOT / "nothing")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ),
        check=False,
    )
    assert ended.returncode == 4
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1


def test_a_second_signal_ends_the_process_at_once():
    """Exit code 143 for SIGTERM, 130 for SIGINT, whatever the unit in hand is doing."""
    code = (
        "import os, signal, sys, time\n"
        "from eagle_offline.interrupts import StopRequest\n"
        "number = int(sys.argv[1])\n"
        "with StopRequest(20) as stop:\n"
        "    os.kill(os.getpid(), number)\n"
        "    assert stop.requested and stop.leaves_time_for(1)\n"
        "    os.kill(os.getpid(), number)\n"
        "    time.sleep(30)\n"
    )
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        ended = subprocess.run([sys.executable, "-c", code, str(int(number))], cwd=ROOT, check=False, timeout=20)
        assert ended.returncode == expected
