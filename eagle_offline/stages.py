"""The whole story as plain calls: tokenize, capture, inspect, train, export, evaluate, report."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eagle_offline.cache.layout import MANIFEST_FILE, TOKENS_DIRECTORY
from eagle_offline.capture_settings import (
    EstimateSettings,
    ImportSettings,
    PrecomputeSettings,
    PreviewSettings,
    TextSettings,
    TokenizeSettings,
)
from eagle_offline.config import (
    DEFAULT_DRAFT_TOKENS,
    CheckSettings,
    ConvertSettings,
    CorpusSettings,
    EvaluateSettings,
    ExampleTargetSettings,
    ExportSettings,
    PlotSettings,
    RepairSettings,
    ReportSettings,
    RewriteSettings,
    VerifySettings,
)
from eagle_offline.durable import exclusive, make_directory, require_writable
from eagle_offline.errors import EagleOfflineError, MismatchError, StoppedEarly, UsageError, printable
from eagle_offline.interrupts import StopRequest
from eagle_offline.launch import read_launch
from eagle_offline.progress import Progress
from eagle_offline.status import reported_status
from eagle_offline.train_settings import TrainSettings

# torch and transformers are imported by the stage that needs them: inspecting a cache needs neither.
if TYPE_CHECKING:
    from eagle_offline.cache.findings import Verification
    from eagle_offline.cache.manifest import Manifest
    from eagle_offline.cache.repair import Repair
    from eagle_offline.draft.origin import DraftOrigin
    from eagle_offline.draft.warm_start import DraftWeights
    from eagle_offline.precompute.estimate_record import Estimate
    from eagle_offline.precompute.fill import Begun, Loader
    from eagle_offline.precompute.plan import Plan
    from eagle_offline.preview import Preview
    from eagle_offline.serving.check import CheckReport
    from eagle_offline.serving.drafts import ServedDraft
    from eagle_offline.serving.results import Evaluation
    from eagle_offline.text.token_table import TokenProgress, TokenTable


def load_text(settings: TextSettings) -> Any:
    """Return the target's tokenizer, with the chat template in use."""
    from eagle_offline.target.load import load_tokenizer, resolve_target

    source = resolve_target(
        settings.target_model,
        settings.revision,
        settings.trust_remote_code,
        weights=False,
        adapter=settings.adapter,
        adapter_revision=settings.adapter_revision,
    )
    return load_tokenizer(source, settings.chat_template)


def tokenize(settings: TokenizeSettings, tokenizer: Any | None = None, stop: StopRequest | None = None) -> TokenTable:
    """Turn chat data into tokens and loss masks below ``output_dir/tokens``, once; later calls reuse them.

    Raises:
        MismatchError: a cache of another corpus or tokenizer was begun there.
        EagleOfflineError: see `eagle_offline.errors`.
    """
    tokenizer = load_text(settings) if tokenizer is None else tokenizer
    if (settings.output_dir / MANIFEST_FILE).exists():
        from eagle_offline.precompute.plan import refuse_other_tokens

        refuse_other_tokens(settings, tokenizer)
    return _tokenize(settings, tokenizer, stop)


def _tokenize(settings: TokenizeSettings, tokenizer: Any, stop: StopRequest | None) -> TokenTable:
    """Return the tokens below ``output_dir/tokens``, made if need be; whether they may be is settled."""
    make_directory(settings.output_dir)
    table = _ensured_table(settings, tokenizer, settings.output_dir / TOKENS_DIRECTORY, settings.on_bad_row, stop)
    say_left_out(table)
    return table


def _ensured_table(
    settings: TextSettings,
    tokenizer: Any,
    directory: Path | None,
    on_bad_row: Literal["quarantine", "stop"],
    stop: StopRequest | None,
) -> TokenTable:
    """Return the tokens of chat data from ``directory``, or from ``tokens_dir`` alone, and make them if need be."""
    from eagle_offline.text.token_builder import TokenTableSettings, ensure_token_table

    say_splits(settings)
    table_settings = TokenTableSettings(
        input_data=settings.input_data,
        split=settings.split,
        revision=settings.data_revision,
        seq_length=settings.seq_length,
        on_bad_row=on_bad_row,
        num_workers=settings.tokenize_workers,
    )
    with Progress("tokenize", 0, unit="rows") as progress:

        def report(done: TokenProgress) -> None:
            progress.reach(done.rows_read, {"tokens": str(done.num_tokens)})
            if stop is not None and stop.requested:
                raise StoppedEarly("stopped by a signal while tokens were made; run the same command again")

        return ensure_token_table(table_settings, tokenizer, directory, report, tokens_dir=settings.tokens_dir)


def preview(settings: PreviewSettings) -> Preview:
    """Return what becomes of chat data, and some of its samples as text; write a page if asked to.

    Without ``tokens_dir`` only as many rows are read as are asked for; with it, the whole corpus is tokenised there.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`.
    """
    from eagle_offline.preview import preview_rows, preview_table
    from eagle_offline.preview_page import write_html
    from eagle_offline.text.sources import resolve_sources

    if settings.html is not None:
        require_writable(settings.html.parent, "--html")
    tokenizer, target = load_text(settings), settings.target_model
    if settings.tokens_dir is not None:
        with StopRequest(0) as stop:
            table = _ensured_table(settings, tokenizer, None, "quarantine", stop)
        found = preview_table(table, tokenizer, target=target, num_samples=settings.num_samples, seed=settings.seed)
    else:
        say_splits(settings)
        found = preview_rows(
            resolve_sources(settings.input_data, split=settings.split, revision=settings.data_revision, digests=False),
            tokenizer,
            target=target,
            seq_length=settings.seq_length,
            num_rows=settings.num_rows,
            num_samples=settings.num_samples,
            seed=settings.seed,
        )
    if settings.html is not None:
        write_html(found, settings.html)
    return found


def say_splits(settings: TextSettings) -> None:
    """Write one line to stderr if a directory is read with all of its splits."""
    from eagle_offline.text.sources import splits_read_together

    if names := splits_read_together(settings.input_data, settings.split):
        sys.stderr.write(f"note: reads {', '.join(map(printable, names))} together; choose with --split\n")


def say_left_out(table: TokenTable) -> None:
    """Write one line to stderr if input rows were left out, and one if of some something is not rendered."""
    meta = table.meta
    if meta.num_quarantined:
        reasons = ", ".join(f"{count} {reason}" for reason, count in meta.reasons.items())
        total = meta.num_rows + meta.num_quarantined
        where = table.directory / "quarantine.jsonl"
        sys.stderr.write(f"left out {meta.num_quarantined} of {total} rows ({reasons}): see {where}\n")
    if meta.notes:
        notes = ", ".join(f"{note.replace('-', ' ')} in {count}" for note, count in meta.notes.items())
        sys.stderr.write(f"note: of {meta.num_rows} rows the chat template leaves something out: {notes}\n")


def say_vocabulary(plan: Plan) -> None:
    """Write one line to stderr: what the draft vocabulary holds of the corpus, and special tokens that it lacks."""
    from eagle_offline.precompute.plan import required_token_ids
    from eagle_offline.vocab import LOW_COVERAGE

    vocab, held = plan.vocab, set(plan.vocab.selected_token_ids.tolist())
    lacking = sorted(
        {token for token in required_token_ids(plan.source, plan.tokenizer) if token < vocab.vocab_size} - held
    )
    names = ", ".join(f"{printable(str(plan.tokenizer.convert_ids_to_tokens(token)))} ({token})" for token in lacking)
    warning = f"; warning: a draft can never propose {names}, which it lacks" if lacking else ""
    if not vocab.coverage:
        raise UsageError(
            f"the draft vocabulary holds none of the tokens that the corpus's assistant says ({vocab.size} tokens): "
            "a draft would have nothing to learn; give another --draft-vocab, or a --draft-vocab-size instead"
        )
    if vocab.coverage < LOW_COVERAGE:
        warning = f"; warning: the others are lost for acceptance; a larger --draft-vocab-size covers more{warning}"
    sys.stderr.write(f"draft vocabulary: {vocab.size} tokens, {vocab.coverage:.2%} of those supervised{warning}\n")


def say_long_rows(plan: Plan) -> None:
    """Write one line to stderr if rows are longer than the target's rotary positions were made for."""
    from eagle_offline.target.positions import rotary_reach

    reach, longest = rotary_reach(plan.config.get_text_config()), int(plan.table.lengths.max())
    if reach is not None and longest > reach:
        sys.stderr.write(
            f"warning: rows of up to {longest} tokens, and the target's positions were made for {reach}: what it says "
            f"beyond is poor; --seq-length {reach} cuts them\n"
        )


def precompute(settings: PrecomputeSettings) -> dict[str, Any]:
    """Run the target over the corpus once and write the cache; return what stands there in numbers.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`; committed shards always stay.
    """
    if settings.engine == "ray":
        from eagle_offline.precompute.engines.ray_pool import precompute_on_ray

        return say_lost(precompute_on_ray(settings, begun_precompute))
    from eagle_offline.precompute.engines.processes import read_share

    _require_number(settings)
    share = read_share(settings)
    with share.target_loader() as load:
        # Without one, this process has helped another to run its copy of the target, and that is done.
        return {} if load is None else _precompute(share.settings, load, passes_signals=share.launch.size > 1)


def _require_number(settings: PrecomputeSettings) -> None:
    """Refuse one of several processes that does not say which of them it is; torchrun says so by itself.

    Raises:
        UsageError: says so.
    """
    count = settings.process_count
    if count > 1 and "process_index" not in settings.model_fields_set and read_launch().size == 1:
        raise UsageError(f"--process-count {count}: say which of them this is with --process-index, 0 to {count - 1}")


def _precompute(settings: PrecomputeSettings, load: Loader, *, passes_signals: bool) -> dict[str, Any]:
    from eagle_offline.precompute.fill import fill
    from eagle_offline.precompute.plan import summarize

    with (
        StopRequest(settings.grace_seconds, passed_on=passes_signals) as stop,
        begun_precompute(settings, stop, with_status=True) as begun,
    ):
        if not settings.dry_run:
            fill(begun, stop, load)
        found = summarize(begun.plan, begun.plan.settings.output_dir)
        return say_lost({**found, "cache": settings.store_url or str(settings.output_dir)})


@contextmanager
def begun_precompute(settings: PrecomputeSettings, stop: StopRequest, *, with_status: bool) -> Iterator[Begun]:
    """Settle what a precompute is about before any weight is loaded; what goes to a store does so during the block.

    Args:
        with_status: say in ``status.json`` how the block ended.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`.
    """
    from eagle_offline.cache.publishing import Publisher
    from eagle_offline.precompute.engines.processes import first_before_others
    from eagle_offline.precompute.fill import Begun
    from eagle_offline.precompute.plan import OWN_ENTRIES, check_output_directory, plan_cache

    say_top_k_costs(settings.target_encoding)
    with ExitStack() as stack:
        publisher = None
        with first_before_others():
            if settings.store_url is not None:
                # One a process: what one has made and not brought up yet is no business of another.
                staging = settings.output_dir / f"{settings.process_index}-of-{settings.process_count}"
                make_directory(staging)
                stack.enter_context(exclusive(staging, "filling this cache"))
                publisher = Publisher(settings.store_url, staging)
                publisher.take_up(OWN_ENTRIES)
                settings = settings.model_copy(update={"output_dir": staging})
                stack.enter_context(publisher.in_its_name())
                # A dry run leaves no trace in the store.
                if with_status and not settings.dry_run:
                    stack.enter_context(publisher.reported_status())
            recorded = check_output_directory(settings)
        if with_status:
            stack.enter_context(reported_status(settings.output_dir, settings.process_index, settings.process_count))
        tokenizer, table = _tokenize_for(settings, recorded, stop)
        plan = plan_cache(settings, table, tokenizer, recorded)
        say_vocabulary(plan)
        say_long_rows(plan)
        yield Begun(plan, recorded, publisher)


def import_states(settings: ImportSettings) -> dict[str, Any]:
    """Write a cache from states that another tool has dumped; return what stands there in numbers.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`; committed shards always stay.
    """
    from eagle_offline.importing.fill import fill
    from eagle_offline.importing.plan import open_source, plan_import, refuse_other_settings, scan_source
    from eagle_offline.precompute.plan import check_output_directory, check_settings, summarize

    _require_number(settings)
    recorded = check_output_directory(settings)
    with (
        reported_status(settings.output_dir, settings.process_index, settings.process_count),
        StopRequest(settings.grace_seconds) as stop,
    ):
        source = open_source(settings)
        settings = source.settings
        say_top_k_costs(settings.target_encoding)
        check_settings(settings)
        tokenizer = load_text(settings)
        # A corpus shows what is wrong with it sooner than a dump; one that was begun is compared before its tokens.
        table = _tokenize(settings, tokenizer, stop) if recorded is None else None
        with Progress("read", source.num_bytes, unit="B", enabled=settings.process_index == 0) as progress:
            index = scan_source(source, stop, progress)
        if recorded is not None:
            refuse_other_settings(source, tokenizer, index, recorded)
        table = _tokenize(settings, tokenizer, stop) if table is None else table
        plan = plan_import(source, index, table, tokenizer, recorded)
        if settings.process_index == 0:
            from eagle_offline.importing.trial import check_samples

            if equal := sum(len(samples) - 1 for samples in plan.matching.equals.values()):
                sys.stderr.write(f"samples of the dump that have the same tokens as another: {equal}\n")

            # One that was begun has been checked, or was not to be.
            check_samples(plan, (recorded is None) if settings.check_samples is None else settings.check_samples)
        if not settings.dry_run:
            fill(plan, recorded, stop)
        return say_lost({**summarize(plan, settings.output_dir), "samples_without_states": plan.num_lost})


def say_lost(summary: dict[str, Any]) -> dict[str, Any]:
    """Write one line to stderr if samples of a cache were lost on the way into it; return what stands there in numbers.

    Raises:
        EagleOfflineError: none is left.
    """
    lost = summary["samples_lost"]
    if lost:
        said = (
            f"{sum(lost.values())} of {summary['samples']} samples are not in the cache "
            f"({', '.join(f'{count} {reason}' for reason, count in lost.items())})"
        )
        if sum(lost.values()) == summary["samples"]:
            raise EagleOfflineError(f"{summary['cache']}: {said}: nothing can be trained from it")
        sys.stderr.write(f"warning: {said}: see eagle-offline inspect-manifest {summary['cache']}\n")
    return summary


def say_top_k_costs(target_encoding: str | None) -> None:
    """Write one line to stderr if a cache is to keep the largest probabilities alone."""
    if target_encoding == "topk":
        sys.stderr.write(
            "warning: --target-encoding topk keeps the largest probabilities only; a draft trained on them has fewer "
            "tokens accepted under sampling than one trained on factored or dense\n"
        )


def convert(settings: ConvertSettings) -> dict[str, Any]:
    """Write a complete cache anew, in another encoding, format or shard size, or a part of it; return it in numbers.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`; committed shards always stay.
    """
    from eagle_offline.cache.convert import check_output_directory, convert_cache, plan_conversion, summarize

    recorded = check_output_directory(settings)
    if settings.dry_run:
        return summarize(plan_conversion(settings, recorded))
    with (
        reported_status(settings.output_dir, settings.process_index, settings.process_count),
        StopRequest(settings.grace_seconds) as stop,
    ):
        plan = plan_conversion(settings, recorded)
        say_top_k_costs(plan.settings.target_encoding)
        convert_cache(plan, recorded, stop)
        return summarize(plan)


def _tokenize_for(settings: PrecomputeSettings, recorded: Manifest | None, stop: StopRequest) -> tuple[Any, TokenTable]:
    """Return tokenizer and tokens of a precompute, once its settings are known to be possible."""
    from eagle_offline.precompute.plan import check_settings, refuse_other_settings

    check_settings(settings)
    tokenizer = load_text(settings)
    if recorded is not None:
        refuse_other_settings(settings, tokenizer, recorded)
    return tokenizer, _tokenize(settings, tokenizer, stop)


def estimate(settings: EstimateSettings) -> Estimate:
    """Return what a precompute would cost by every choice; nothing is written but tokens, and those on request.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`.
    """
    from eagle_offline.precompute.estimate import estimate_cache
    from eagle_offline.precompute.plan import check_output_directory

    with StopRequest(0) as stop:
        # What goes to an object store is looked at as what has no place yet.
        if settings.output_dir is not None and settings.store_url is None:
            recorded = check_output_directory(settings)
            tokenizer, table = _tokenize_for(settings, recorded, stop)
            return estimate_cache(settings, table, tokenizer, settings.output_dir, stop)
        with tempfile.TemporaryDirectory(prefix="eagle-offline-") as scratch:
            elsewhere = settings.model_copy(update={"output_dir": Path(scratch)})
            tokenizer, table = _tokenize_for(elsewhere, None, stop)
            return estimate_cache(settings, table, tokenizer, Path.cwd(), stop)


def inspect_manifest(cache: Path | str, *, verify: bool = False, sample: int | None = None) -> dict[str, Any]:
    """Return what a cache is, how complete it is and one sample as text; with ``verify`` also what is wrong.

    Raises:
        DataError: no cache there. MismatchError: of another version. UsageError: no such sample.
    """
    from eagle_offline.inspection import describe_cache

    return describe_cache(cache, verify=verify, sample=sample)


def verify(settings: VerifySettings) -> Verification:
    """Read a whole cache and return what is wrong with it.

    Raises:
        DataError, MismatchError: there is no readable manifest. StoppedEarly: asked to stop.
    """
    from eagle_offline.cache.verify import check_cache

    with _verifying(settings) as arguments:
        return check_cache(settings.cache, **arguments)


def repair(settings: RepairSettings) -> Repair:
    """Set everything damaged in a cache aside; return what was, and which command makes it again.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`.
    """
    from eagle_offline.cache.repair import repair_cache

    with _verifying(settings) as arguments:
        return repair_cache(settings.cache, dry_run=settings.dry_run, **arguments)


@contextmanager
def _verifying(settings: VerifySettings) -> Iterator[dict[str, Any]]:
    """Show progress, and listen for signals, while a cache is read; yield what `check_cache` takes for it."""
    from eagle_offline.cache.writer import committed_shards

    num_shards = len(committed_shards(settings.cache)) if settings.cache.is_dir() else 0
    with Progress("verify", num_shards, unit="shards") as progress, StopRequest(0) as stop:
        yield {
            "num_workers": settings.num_workers,
            "report": lambda done, _: progress.reach(done),
            "stopped": lambda: stop.requested,
        }


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train a draft from a cache; return the run, its steps and its last checkpoint.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`.
    """
    from eagle_offline.devices import resolve_device, use_fixed_order
    from eagle_offline.training.loop import check_output_directory, run
    from eagle_offline.training.ranks import joined, read_ranks

    if settings.deterministic:
        use_fixed_order()
    device = resolve_device(settings.device)
    # The step in hand is always finished: it is short.
    stop = StopRequest(0, passed_on=read_ranks().size > 1)

    def source() -> DraftWeights | None:
        name = settings.init_from
        return None if name is None else load_draft(name, "--init-from").weights(name)

    # By every process, before any waits for another that may be refused.
    check_output_directory(settings)
    if not read_ranks().is_first:
        with stop, joined(device) as ranks:
            return run(settings, stop, ranks, source)
    with (
        exclusive(settings.output_dir, "training"),
        reported_status(settings.output_dir),
        stop,
        joined(device) as ranks,
    ):
        return run(settings, stop, ranks, source)


def load_draft(name: str, flag: str) -> ServedDraft:
    """Return the draft of a run (its best checkpoint), of a checkpoint or of an exported directory, or from the hub.

    Raises:
        UsageError: neither a directory nor on the hub. DataError, MismatchError: see `read_draft`.
    """
    from eagle_offline.serving.drafts import read_draft
    from eagle_offline.target.load import resolve_target
    from eagle_offline.training.logbook import METRICS_FILE, read_metrics
    from eagle_offline.training.state import BEST_FILE, STATE_FILE, best_checkpoint, check_files

    directory = Path(name)
    checkpoint = best_checkpoint(directory) if directory.is_dir() else None
    if checkpoint is not None and not (directory / BEST_FILE).is_file():
        sys.stderr.write(f"{flag} {name}: nothing was validated, none is best: {checkpoint.name} is taken\n")
    if checkpoint is None:
        checkpoint = directory if directory.is_dir() else resolve_target(name, flag=flag).directory
    if (checkpoint / STATE_FILE).is_file():
        check_files(checkpoint)
    draft = read_draft(checkpoint)
    run = checkpoint.parent.parent
    if draft.layout == "native" and draft.origin is not None and (run / METRICS_FILE).is_file():
        rows = [row for row in read_metrics(run) if row["kind"] == "heldout" and row["step"] <= draft.origin.step]
        if rows:
            draft = replace(draft, origin=draft.origin.model_copy(update={"heldout": rows[-1]}))
    return draft


def export(settings: ExportSettings) -> dict[str, Any]:
    """Write a trained draft as the directories that engines load; return what each of them is good for.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`.
    """
    from eagle_offline.serving.export import export_draft, reason_against_speculators
    from eagle_offline.target.layout import default_aux_layer_ids
    from eagle_offline.target.load import load_config, resolve_target

    if settings.run is None:
        raise UsageError("export: give the run to export, or --check DIR to check a draft directory, one of the two")
    draft = load_draft(str(settings.run), "RUN")
    origin, target = draft.origin, settings.target
    if target is None:
        if origin is None or "/" not in origin.target_id:
            made_for = "" if origin is None else f" (it was captured from a directory called {origin.target_id})"
            raise UsageError(f"--target: say which hub id or directory engines are to load as the target{made_for}")
        target = origin.target_id
    _check_adapter(settings, origin, target)
    if origin is None or draft.aux_layer_ids is None:
        config = load_config(resolve_target(target, flag="--target", weights=False))
        architectures = list(config.architectures or ())
        layer_ids = draft.aux_layer_ids or default_aux_layer_ids(config.get_text_config().num_hidden_layers)
        draft = replace(draft, aux_layer_ids=layer_ids)
    else:
        architectures = [origin.target_architecture]
    num_draft_tokens = tokens_to_draft({str(settings.run): draft}, settings.num_draft_tokens)
    root = settings.output_dir or settings.run / "export"
    layouts: tuple[Literal["flat", "speculators"], ...] = ("flat", "speculators")
    if settings.to != "both":
        layouts = (settings.to,)
    elif (reason := reason_against_speculators(draft.model.config)) is not None:
        layouts = ("flat",)
        sys.stderr.write(f"export: no speculators directory: {reason}\n")
    require_writable(root, "--output-dir")
    return {
        layout: export_draft(
            draft,
            layout,
            root / layout,
            target_name=target,
            target_architectures=architectures,
            num_draft_tokens=num_draft_tokens,
            dtype=settings.dtype,
        )
        for layout in layouts
    }


def tokens_to_draft(drafts: Mapping[str, ServedDraft], requested: int | None) -> int:
    """Return how many tokens drafts draft a round: as requested, else 5, or what each P-EAGLE draft was trained for.

    One line on stderr names each P-EAGLE draft that is to draft more than that.

    Args:
        drafts: by the names that the user gave them.
        requested: by the user.
    """
    trained = {
        name: draft.origin.num_depths
        for name, draft in drafts.items()
        if draft.origin is not None and draft.origin.num_depths is not None
    }
    if requested is None:
        return min([DEFAULT_DRAFT_TOKENS, *trained.values()])
    for name, depths in trained.items():
        if requested > depths:
            sys.stderr.write(
                f"warning: {name} was trained to draft {depths} tokens a round; those behind them in "
                f"--num-draft-tokens {requested} are hardly ever accepted\n"
            )
    return requested


def _check_adapter(settings: ExportSettings, origin: DraftOrigin | None, target: str) -> None:
    """Compare a target and an adapter with those that a draft was made for; say what engines have to serve.

    Raises:
        MismatchError: it was made for other weights.
    """
    from eagle_offline.target.load import resolve_target, target_digest

    if origin is None:
        return
    if settings.adapter is not None:
        digest = target_digest(
            resolve_target(
                target, flag="--target", adapter=settings.adapter, adapter_revision=settings.adapter_revision
            )
        )
        if digest != origin.target_digest:
            merged = "" if origin.target_adapter is None else f" with the adapter {origin.target_adapter}"
            raise MismatchError(
                f"--adapter {settings.adapter}: merged into {target} it has digest {digest}, but the draft was made "
                f"for {origin.target_id}{merged} of digest {origin.target_digest}"
            )
    elif origin.target_adapter is not None:
        sys.stderr.write(
            f"warning: this draft was trained for {origin.target_id} with the adapter {origin.target_adapter} merged: "
            "engines have to serve the merged model; --adapter compares with both\n"
        )


def check(settings: CheckSettings) -> CheckReport:
    """Return, for every engine and every rule, whether a draft directory keeps it.

    Raises:
        DataError: no draft there. MismatchError: another layout than asked for.
    """
    from eagle_offline.serving.check import check_draft
    from eagle_offline.target.load import resolve_target
    from eagle_offline.training.logbook import METRICS_FILE

    if (settings.directory / METRICS_FILE).is_file():
        raise MismatchError(
            f"{settings.directory}: a run, which no engine reads: export it first, or check what was exported "
            f"({settings.directory / 'export' / 'flat'})"
        )
    if settings.target is None:
        if settings.adapter is not None:
            raise UsageError("--adapter: give --target too, the model that it is merged into")
        return check_draft(settings.directory, layout=settings.layout)
    source = resolve_target(
        settings.target, flag="--target", adapter=settings.adapter, adapter_revision=settings.adapter_revision
    )
    return check_draft(settings.directory, target=source.directory, adapter=source.adapter, layout=settings.layout)


def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Decode prompts with a draft and without; write figures and a page if asked to, and return the figures.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`.
    """
    from eagle_offline.evaluation_page import write_evaluation
    from eagle_offline.serving.evaluate import evaluate_draft

    if settings.output_dir is not None:
        # Before anything is decoded: what cannot be written is not worth waiting for.
        require_writable(settings.output_dir, "--output-dir")
    with StopRequest(0) as stop:
        draft = load_draft(settings.draft, "--draft")
        compared = [load_draft(name, "--compare") for name in settings.compare]
        named = dict(zip((settings.draft, *settings.compare), (draft, *compared), strict=True))
        num_draft_tokens = tokens_to_draft(named, settings.num_draft_tokens)
        evaluation = evaluate_draft(settings, draft, compared, num_draft_tokens, stop)
    if settings.output_dir is not None:
        write_evaluation(evaluation, settings.output_dir)
    return evaluation


def report(settings: ReportSettings) -> dict[str, Any]:
    """Write what a run achieved as a page with plots, print it as a table, and return it.

    Raises:
        DataError: the run has no metrics yet.
    """
    from eagle_offline.reporting import summarize_run, write_report

    summary = summarize_run(settings.run, settings.stages_file, settings.evaluation, settings.compare)
    write_report(summary, settings.run, settings.output_dir)
    return summary


def plot(settings: PlotSettings) -> Path:
    """Draw the metrics of runs together; return the picture or the page.

    Raises:
        UsageError, DataError: see `plot_runs`.
    """
    from eagle_offline.run_plots import plot_runs

    return plot_runs(settings)


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
