"""The command line: flags made from the settings records, one line for every error a user can cause."""

from __future__ import annotations

import json
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from eagle_offline import __version__
from eagle_offline.cache.layout import CONFIG_FILE, MANIFEST_FILE
from eagle_offline.capture_settings import (
    EstimateSettings,
    ImportSettings,
    PrecomputeSettings,
    PreviewSettings,
    TokenizeSettings,
)
from eagle_offline.config import (
    CheckSettings,
    ConvertSettings,
    EvaluateSettings,
    ExportSettings,
    PlotSettings,
    RepairSettings,
    ReportSettings,
    Settings,
    VerifySettings,
    build,
    location,
    read_yaml,
    require_path,
)
from eagle_offline.errors import (
    EXIT_DATA,
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_MISMATCH,
    EXIT_RESUMABLE,
    DataError,
    EagleOfflineError,
    UsageError,
    printable,
)
from eagle_offline.train_settings import TrainSettings

_METAVARS = {int: "N", float: "X", Path: "PATH"}


class _LocalPath(click.Path):
    """A path of this machine."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if param is not None:
            require_path(param.opts[0] if isinstance(param, click.Option) else param.human_readable_name.upper(), value)
        return super().convert(value, param, ctx)


class _Command(click.Command):
    """A command whose list flags take several values: ``--aux-layer-ids 1 15 28``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _spread_lists(args, self._list_flags()))

    def _list_flags(self) -> set[str]:
        return {flag for param in self.params if getattr(param, "multiple", False) for flag in param.opts}

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.strip().splitlines():
                    formatter.write(f"  {line.strip()}\n")


def _spread_lists(args: list[str], list_flags: set[str]) -> list[str]:
    """Return the arguments with a list flag before each of its values."""
    spread: list[str] = []
    current: str | None = None
    for arg in args:
        flag, _, value = arg.partition("=")
        if flag in list_flags:
            current = flag
            if value:
                spread += [flag, value]
        elif current is not None and not arg.startswith("--"):
            spread += [current, arg]
        else:
            current = None
            spread.append(arg)
    return spread


def settings_command(group: click.Group, name: str, kind: type[Settings], examples: str) -> Callable[..., Any]:
    """Return a decorator that makes a command of ``group`` whose flags are the fields of ``kind``."""

    def decorate(function: Callable[[Any], None]) -> click.Command:
        def callback(config: Path | None, **given: Any) -> None:
            values = {} if config is None else read_yaml(config)
            given = {key: value for key, value in given.items() if value not in (None, ())}
            if config is not None:
                _refuse_moved_config(config, values | given)
            values.update(given)
            settings = build(kind, values, where=f"{name} ")
            function(settings)

        command = _Command(name, callback=callback, help=function.__doc__, epilog=examples)
        for field, info in kind.model_fields.items():
            if not _extra(info).get("hidden") and field not in kind.without:
                command.params.append(_option(field, info))
        config_help = "YAML file of settings; flags win over it."
        command.params.append(click.Option(["--config"], type=_LocalPath(path_type=Path), help=config_help))
        group.add_command(command)
        return command

    return decorate


def _refuse_moved_config(config: Path, values: dict[str, Any]) -> None:
    """Refuse settings that stand in a cache and lead to another place: the cache was moved, and would be made there.

    Raises:
        UsageError: says so.
    """
    place = values.get("output_dir")
    in_cache = config.name == CONFIG_FILE and (config.parent / MANIFEST_FILE).is_file()
    if in_cache and place is not None and Path(str(place)).resolve() != config.parent.resolve():
        raise UsageError(f"--config {config}: was made for {place}; add --output-dir {config.parent} to go on here")


def _extra(info: Any) -> dict[str, Any]:
    return info.json_schema_extra or {}


def _option(field: str, info: Any) -> click.Parameter:
    """Return the flag of a settings field; its default stays with the settings, so that a file can stand between."""
    extra = _extra(info)
    if extra.get("positional"):
        several = typing.get_origin(_plain_type(info.annotation)) is tuple
        return click.Argument([field], required=False, type=str, nargs=-1 if several else 1)
    flag = "--" + field.replace("_", "-")
    help_text = info.description or ""
    if info.is_required():
        help_text += "  [required]"
    elif info.default not in (None, False, ()):
        help_text += f"  [default: {info.default}]"
    kind = _plain_type(info.annotation)
    if kind is bool:
        names = [f"{flag}/--no-{flag[2:]}", *extra.get("flags", [])]
        return click.Option(names, default=None, help=help_text)
    metavar = None
    if typing.get_origin(kind) is Literal:
        metavar = "|".join(typing.get_args(kind))
    elif kind in _METAVARS:
        metavar = _METAVARS[kind]
    several = typing.get_origin(kind) is tuple
    if several:
        item = typing.get_args(kind)[0]
        one = "|".join(typing.get_args(item)) if typing.get_origin(item) is Literal else _METAVARS.get(item, "NAME")
        metavar = f"{one} [{one} …]"
    names = [flag, *extra.get("flags", [])]
    return click.Option(names, type=str, metavar=metavar, help=help_text, multiple=several)


def _plain_type(annotation: Any) -> Any:
    """Return an annotation without its ``| None``."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return kinds[0]
    return annotation


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Cache a frozen LLM's states once, then train EAGLE-3 and P-EAGLE drafts from the cache alone.

    \b
    eagle-offline quickstart                                   the whole job on an embedded example
    eagle-offline preview --target-model M --input-data D      samples of chat data, supervised tokens marked
    eagle-offline precompute --target-model M --input-data D --output-dir C --resume
    eagle-offline import STATES --target-model M --input-data D --output-dir C     what vLLM or NeMo has dumped
    eagle-offline inspect-manifest C --verify
    eagle-offline convert C --output-dir D --state-encoding fp8   the same cache stored otherwise, without the target
    eagle-offline train --cache C --output-dir O --resume
    eagle-offline evaluate --draft O --target M                real decoding with the draft and without
    eagle-offline export O --target M                          directories for vLLM, SGLang and speculators

    \b
    Exit codes: 0 done, 1 failure, 2 usage, 3 manifest or settings do not match, 4 data missing or corrupt,
    5 stopped early (run again with --resume), 6 no space left.
    """


@settings_command(
    cli, "tokenize", TokenizeSettings, "eagle-offline tokenize --target-model M --input-data D --output-dir C"
)
def _tokenize(settings: TokenizeSettings) -> None:
    """Turn chat data into tokens and loss masks (CPU only). `precompute` does this itself when it is not done."""
    from eagle_offline.interrupts import StopRequest
    from eagle_offline.stages import tokenize

    with StopRequest(0) as stop:
        _show(tokenize(settings, stop=stop).meta.model_dump(mode="json"))


@settings_command(
    cli,
    "preview",
    PreviewSettings,
    """
    eagle-offline preview --target-model M --input-data chat.jsonl 'owner/name:train[:5%]'
    eagle-offline preview … --num-samples 10 --seed 1 --html preview.html
    eagle-offline preview … --tokens-dir TOKENS      (all rows, tokenised once for every later command)
    """,
)
def _preview(settings: PreviewSettings) -> None:
    """Show what becomes of chat data: samples with their supervised tokens, and the rows left out, and why."""
    from eagle_offline.preview_page import render_text
    from eagle_offline.stages import preview

    found = preview(settings)
    if settings.as_json:
        # In ASCII: text of a stranger's data may be no Unicode, or act on a terminal.
        click.echo(json.dumps(found.model_dump(mode="json"), indent=2))
    else:
        colour = _colour() if settings.colour is None else settings.colour
        click.echo(_encodable(render_text(found, colour=colour)), color=colour)
    if found.problem is not None:
        raise DataError(found.problem)


@settings_command(
    cli,
    "estimate",
    EstimateSettings,
    """
    eagle-offline estimate --target-model meta-llama/Llama-3.1-8B-Instruct --input-data chat.jsonl --output-dir C
    eagle-offline estimate … --no-probe             (no weights are loaded: typical sizes, no hours)
    eagle-offline estimate … --json
    """,
)
def _estimate(settings: EstimateSettings) -> None:
    """Tell what a precompute would cost, before it is begun: bytes and hours of every choice, and the free disk."""
    from eagle_offline.estimate_page import render_text
    from eagle_offline.stages import estimate

    estimated = estimate(settings)
    if settings.as_json:
        _show(estimated.model_dump(mode="json"))
    else:
        click.echo(render_text(estimated))


@settings_command(
    cli,
    "precompute",
    PrecomputeSettings,
    """
    eagle-offline precompute --target-model meta-llama/Llama-3.1-8B-Instruct --input-data chat.jsonl --output-dir C
    eagle-offline precompute … --output-dir C --resume              (after any interruption)
    torchrun --nproc-per-node 8 -m eagle_offline precompute … --output-dir C    (a copy of the target a GPU)
    torchrun --nproc-per-node 8 -m eagle_offline precompute … --tensor-parallel-size 4      (two copies, four GPUs each)
    eagle-offline precompute … --process-index $SLURM_ARRAY_TASK_ID --process-count 8 --resume       (a job array)
    eagle-offline precompute … --engine ray --ray-address auto                  (a Ray cluster)
    eagle-offline precompute … --aux-layer-ids 1 15 28 --dry-run    (check and plan, write no shard)
    """,
)
def _precompute(settings: PrecomputeSettings) -> None:
    """Run the target over chat data once and write its states as a cache."""
    from eagle_offline.launch import read_launch
    from eagle_offline.stages import precompute

    result = precompute(settings)
    if read_launch().rank == 0:
        _show(result)


@settings_command(
    cli,
    "import",
    ImportSettings,
    """
    eagle-offline import hidden_states --target-model M --input-data chat.jsonl --output-dir C --aux-layer-ids 1 15 28
    eagle-offline import nemo_cache --from nemo --target-model M --input-data chat.jsonl --output-dir C
    eagle-offline import … --on-mismatch drop --resume
    """,
)
def _import(settings: ImportSettings) -> None:
    """Write a cache from states that vLLM (speculators) or NeMo AutoModel has dumped; the target does not run."""
    from eagle_offline.stages import import_states

    _show(import_states(settings))


@settings_command(
    cli,
    "convert",
    ConvertSettings,
    """
    eagle-offline convert C --output-dir D --state-encoding fp8
    eagle-offline convert C --output-dir D --format zarr --shard-size 64
    eagle-offline convert C --output-dir D --samples 0:1000 --aux-layer-ids 1 15
    """,
)
def _convert(settings: ConvertSettings) -> None:
    """Write a cache anew: other encodings, format, shard size, samples or layers; the target is not needed."""
    from eagle_offline.stages import convert

    _show(convert(settings))


@settings_command(
    cli,
    "train",
    TrainSettings,
    """
    eagle-offline train --cache C --output-dir O
    eagle-offline train --cache C --output-dir O --resume
    eagle-offline train --cache C --output-dir P --objective peagle
    eagle-offline train --config train.yaml --learning-rate 5e-5
    torchrun --nproc-per-node 8 -m eagle_offline train --cache C --output-dir O --global-batch 8
    """,
)
def _train(settings: TrainSettings) -> None:
    """Train an EAGLE-3 or P-EAGLE draft from a cache, without the target. Start it with torchrun for several GPUs."""
    from eagle_offline.stages import train

    result = train(settings)
    if os.environ.get("RANK", "0") == "0":
        _show(result)


@cli.command(
    "inspect-manifest",
    cls=_Command,
    epilog="""
    eagle-offline inspect-manifest C
    eagle-offline inspect-manifest C --verify
    eagle-offline inspect-manifest C --sample 12 --json
    """,
)
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.option("--verify", is_flag=True, help="Read the whole cache and check every digest.")
@click.option("--sample", type=int, metavar="N", help="The sample to show as text, by its number in the cache, from 0.")
@click.option(
    "--colour/--no-colour",
    default=None,
    help="Colour instead of marks.  [default: on a terminal, unless NO_COLOR is set]",
)
def _inspect(cache: str, as_json: bool, verify: bool, sample: int | None, colour: bool | None) -> None:
    """Show what a cache is, how complete it is, what it takes on disk, and one of its samples as text."""
    from eagle_offline.stages import inspect_manifest

    description = inspect_manifest(location(cache), verify=verify, sample=sample)
    if as_json:
        # In ASCII: text of a stranger's cache may be no Unicode, or act on a terminal.
        click.echo(json.dumps(description, indent=2))
    else:
        from eagle_offline.inspection_page import render_text

        colour = _colour() if colour is None else colour
        click.echo(_encodable(render_text(description, colour=colour)), color=colour)
    if description["problems"]:
        raise SystemExit(EXIT_DATA)


def _colour() -> bool:
    """Say whether stdout is to be coloured unasked."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _encodable(text: str) -> str:
    """Return text as far as stdout can write it."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


@settings_command(
    cli,
    "verify",
    VerifySettings,
    """
    eagle-offline verify C
    eagle-offline verify C --json --num-workers 16
    """,
)
def _verify(settings: VerifySettings) -> None:
    """Read a whole cache and say what in it is not as it was written."""
    from eagle_offline.stages import verify

    found = verify(settings)
    if settings.as_json:
        _show(found.to_json())
    else:
        click.echo(found.render_text())
    if found.problems:
        raise SystemExit(EXIT_DATA)


@settings_command(
    cli,
    "repair",
    RepairSettings,
    """
    eagle-offline repair C --dry-run
    eagle-offline repair C
    """,
)
def _repair(settings: RepairSettings) -> None:
    """Set everything damaged in a cache aside, and say which command makes it again; nothing is deleted."""
    from eagle_offline.stages import repair

    done = repair(settings)
    if settings.as_json:
        _show(done.to_json())
    else:
        click.echo(done.render_text())


@settings_command(
    cli,
    "evaluate",
    EvaluateSettings,
    """
    eagle-offline evaluate --draft O --target meta-llama/Llama-3.1-8B-Instruct
    eagle-offline evaluate --draft O/export/flat --target M --prompts questions.jsonl --max-prompts 80 --output-dir E
    eagle-offline evaluate --draft O --target M --temperature 0.7 --top-p 0.9
    """,
)
def _evaluate(settings: EvaluateSettings) -> None:
    """Decode prompts with a draft and without: real accept length, time, and what training had promised."""
    from eagle_offline.evaluation_page import render_text
    from eagle_offline.stages import evaluate

    click.echo(render_text(evaluate(settings)))
    if settings.output_dir is not None:
        click.echo(f"\npage: {settings.output_dir / 'evaluation.html'}")


@settings_command(
    cli,
    "export",
    ExportSettings,
    """
    eagle-offline export O --target meta-llama/Llama-3.1-8B-Instruct       (both layouts, below O/export)
    eagle-offline export O --to flat --output-dir D
    eagle-offline export --check D/flat --target M                         (any draft, also another's)
    eagle-offline export --check D/flat --engine sglang
    """,
)
def _export(settings: ExportSettings) -> None:
    """Write a trained draft as the directories that vLLM, SGLang and speculators load, or check such a directory."""
    from eagle_offline.stages import check, export

    if (settings.check is None) == (settings.run is None):
        raise UsageError("export: give the run to export, or --check DIR to check a draft directory, one of the two")
    if settings.check is None:
        _show(export(settings))
        return
    layout = None if settings.to == "both" else settings.to
    report = check(
        CheckSettings(
            directory=settings.check,
            target=settings.target,
            adapter=settings.adapter,
            adapter_revision=settings.adapter_revision,
            layout=layout,
        )
    )
    click.echo(report.render_text(settings.engine))
    if not report.passes(settings.engine):
        raise SystemExit(EXIT_MISMATCH)


@settings_command(
    cli,
    "report",
    ReportSettings,
    """
    eagle-offline report --run O --output-dir O/report
    eagle-offline report --run O2 --compare O --evaluation E --output-dir O2/report
    """,
)
def _report(settings: ReportSettings) -> None:
    """Show what a run achieved and write it as a page with plots."""
    from eagle_offline.stages import report

    report(settings)


@settings_command(
    cli,
    "plot",
    PlotSettings,
    """
    eagle-offline plot O                                   (plot.png, here)
    eagle-offline plot O1 O2 O3 --output runs.html         (a page in one file)
    eagle-offline plot runs/* --metric loss walked_accept_length
    """,
)
def _plot(settings: PlotSettings) -> None:
    """Draw the metrics of one or several runs together."""
    from eagle_offline.stages import plot

    click.echo(f"plot: {plot(settings)}")


@cli.command("run", cls=_Command, epilog="eagle-offline run pipelines/quickstart.yaml --work quickstart")
@click.argument("pipeline", type=_LocalPath(path_type=Path))
@click.option("--work", type=_LocalPath(path_type=Path), default=Path("work"), help="Takes the place of {work}.")
@click.option("--dry-run", is_flag=True, help="Check every stage's settings and list them.")
def _run(pipeline: Path, work: Path, dry_run: bool) -> None:
    """Run a whole job from one YAML file; run it again to go on after an interruption."""
    from eagle_offline.pipeline import read_pipeline, run_pipeline

    if dry_run:
        _show({stage.name: stage.settings.model_dump(mode="json") for stage in read_pipeline(pipeline, work)})
    else:
        run_pipeline(pipeline, work, _announce)


@cli.command("quickstart", cls=_Command, epilog="eagle-offline quickstart --work quickstart")
@click.option("--work", type=_LocalPath(path_type=Path), default=Path("quickstart"), help="Where everything goes.")
def _quickstart(work: Path) -> None:
    """Run the whole job on an embedded example: corpus, target, cache, draft, report. Resumes when interrupted."""
    from eagle_offline.pipeline import find_pipeline, run_pipeline

    run_pipeline(find_pipeline("quickstart"), work, _announce)


def _announce(line: str) -> None:
    click.echo(line, err=True)


def _show(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def main(argv: list[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    # How long idle OpenMP threads spin before they sleep. Measured on two cores, a training step of small tensors:
    # not at all 0.30 s, this 0.16 s; beside another busy process 0.30 s and 0.41 s, and a hundred times as long 2.0 s.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        cli.main(args=argv, prog_name="eagle-offline", standalone_mode=False)
    except EagleOfflineError as error:
        # What an error says may come from a stranger's cache.
        click.echo(f"error: {printable(str(error))}", err=True)
        raise SystemExit(error.exit_code) from None
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "eagle-offline"
        click.echo(f"error: {error.format_message()} (see {command} --help)", err=True)
        raise SystemExit(error.exit_code) from None
    except click.Abort:
        click.echo("error: stopped by a signal before anything was begun; run the same command again", err=True)
        raise SystemExit(EXIT_RESUMABLE) from None
    except BrokenPipeError:
        # The reader of our output went away; nothing of ours failed.
        sys.stderr.close()
        raise SystemExit(EXIT_FAILURE) from None
    raise SystemExit(EXIT_DONE)


if __name__ == "__main__":
    main()
