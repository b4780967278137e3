"""The whole story as plain calls: tokenize, capture, inspect, train, report. The command line adds nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_offline.cache.layout import TOKENS_DIRECTORY
from eagle_offline.config import (
    CorpusSettings,
    ExampleTargetSettings,
    PrecomputeSettings,
    ReportSettings,
    RewriteSettings,
    TokenizeSettings,
    TrainSettings,
)
from eagle_offline.durable import exclusive, make_directory
from eagle_offline.errors import StoppedEarly
from eagle_offline.interrupts import StopRequest
from eagle_offline.progress import Progress
from eagle_offline.status import reported_status

# torch and transformers are imported by the stage that needs them: inspecting a cache needs neither.
if TYPE_CHECKING:
    from eagle_offline.text.token_table import TokenProgress, TokenTable


def load_text(settings: TokenizeSettings) -> Any:
    """Return the target's tokenizer, with the chat template in use."""
    from eagle_offline.target.load import load_tokenizer, resolve_target

    source = resolve_target(settings.target_model, settings.revision, settings.trust_remote_code)
    return load_tokenizer(source, settings.chat_template)


def tokenize(settings: TokenizeSettings, tokenizer: Any | None = None, stop: StopRequest | None = None) -> TokenTable:
    """Turn chat data into tokens and loss masks below ``output_dir/tokens``, once; later calls reuse them.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`.
    """
    from eagle_offline.text.token_builder import TokenTableSettings, ensure_token_table

    make_directory(settings.output_dir)
    table_settings = TokenTableSettings(
        input_data=settings.input_data,
        split=settings.split,
        revision=settings.data_revision,
        seq_length=settings.seq_length,
        on_bad_row=settings.on_bad_row,
    )
    with Progress("tokenize", 0, unit="rows") as progress:

        def report(done: TokenProgress) -> None:
            progress.reach(done.rows_read, {"tokens": str(done.num_tokens)})
            if stop is not None and stop.requested:
                raise StoppedEarly("stopped by a signal while tokens were made; go on with --resume")

        tokenizer = load_text(settings) if tokenizer is None else tokenizer
        return ensure_token_table(table_settings, tokenizer, settings.output_dir / TOKENS_DIRECTORY, report)


def say_left_out(table: TokenTable) -> None:
    """Write one line to stderr if input rows were left out."""
    meta = table.meta
    if meta.num_quarantined:
        reasons = ", ".join(f"{count} {reason}" for reason, count in meta.reasons.items())
        total = meta.num_rows + meta.num_quarantined
        where = table.directory / "quarantine.jsonl"
        sys.stderr.write(f"left out {meta.num_quarantined} of {total} rows ({reasons}): see {where}\n")


def precompute(settings: PrecomputeSettings) -> dict[str, Any]:
    """Run the target over the corpus once and write the cache; return what stands there in numbers.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`; committed shards always stay.
    """
    from eagle_offline.precompute.fill import fill
    from eagle_offline.precompute.plan import (
        check_output_directory,
        check_settings,
        plan_cache,
        refuse_other_settings,
        summarize,
    )

    recorded = check_output_directory(settings)
    with (
        reported_status(settings.output_dir, settings.process_index, settings.process_count),
        StopRequest(settings.grace_seconds) as stop,
    ):
        check_settings(settings)
        tokenizer = load_text(settings)
        if recorded is not None:
            refuse_other_settings(settings, tokenizer, recorded)
        table = tokenize(settings, tokenizer, stop)
        say_left_out(table)
        plan = plan_cache(settings, table, tokenizer, recorded)
        if not settings.dry_run:
            fill(plan, recorded, stop)
        return summarize(plan, settings.output_dir)


def inspect_manifest(cache: Path, *, verify: bool = False) -> dict[str, Any]:
    """Return what a cache is and how complete it is; with ``verify`` also what is wrong with it.

    Raises:
        DataError: no cache there. MismatchError: of another version.
    """
    from eagle_offline.inspection import describe_cache

    return describe_cache(cache, verify=verify)


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train a draft from a cache; return the run, its steps and its last checkpoint.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`.
    """
    from eagle_offline.training.loop import check_output_directory, run

    check_output_directory(settings)
    with (
        exclusive(settings.output_dir, "training"),
        reported_status(settings.output_dir),
        StopRequest(0) as stop,  # the step in hand is always finished: it is short
    ):
        return run(settings, stop)


def report(settings: ReportSettings) -> dict[str, Any]:
    """Write what a run achieved as a page with plots, print it as a table, and return it.

    Raises:
        DataError: the run has no metrics yet.
    """
    from eagle_offline.reporting import summarize_run, write_report

    summary = summarize_run(settings.run, settings.stages_file)
    write_report(summary, settings.run, settings.output_dir)
    return summary


def make_corpus(settings: CorpusSettings) -> None:
    """Write the example's corpus; the same settings give the same bytes."""
    from eagle_offline.example.corpus import write_corpus

    make_directory(settings.train_file.parent)
    make_directory(settings.heldout_file.parent)
    write_corpus(
        settings.train_file,
        settings.heldout_file,
        settings.num_conversations,
        settings.heldout_conversations,
        settings.seed,
    )


def train_example_target(settings: ExampleTargetSettings) -> dict[str, Any]:
    """Train the example's target, or return at once when it is there.

    Raises:
        StoppedEarly: asked to stop; a checkpoint was written.
    """
    from eagle_offline.example.target import ExampleTargetConfig, train_target

    config = ExampleTargetConfig(steps=settings.steps)
    with Progress("train target", settings.steps, unit="step") as progress, StopRequest(0) as stop:

        def show(done: int, _total: int, loss: float) -> None:
            progress.reach(done, {"loss": f"{loss:.3f}"})

        return train_target(settings.train_file, settings.output_dir, config, show, lambda: stop.requested)


def rewrite_answers(settings: RewriteSettings) -> dict[str, Any]:
    """Let the target write every answer anew, or return at once when it has.

    Raises:
        StoppedEarly: asked to stop; what is written so far is kept.
    """
    from eagle_offline.example.rewrite import rewrite_answers as rewrite

    with Progress("rewrite answers", 0, unit="turns") as progress, StopRequest(0) as stop:
        return rewrite(
            settings.target_model,
            settings.input_file,
            settings.output_file,
            settings.max_new_tokens,
            settings.batch_size,
            lambda done, _total, _dropped: progress.reach(done),
            lambda: stop.requested,
        )
