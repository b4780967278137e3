"""The whole story as plain calls: tokenize, capture, inspect, train. The command line does nothing more than this."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_offline.cache.layout import TOKENS_DIRECTORY
from eagle_offline.config import PrecomputeSettings, TokenizeSettings, TrainSettings
from eagle_offline.durable import make_directory
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


def tokenize(settings: TokenizeSettings, tokenizer: Any | None = None) -> TokenTable:
    """Turn chat data into tokens and loss masks below ``output_dir/tokens``, once; later calls reuse them.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`.
    """
    from eagle_offline.text.token_table import TokenTableSettings, ensure_token_table

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

        tokenizer = load_text(settings) if tokenizer is None else tokenizer
        return ensure_token_table(table_settings, tokenizer, settings.output_dir / TOKENS_DIRECTORY, report)


def precompute(settings: PrecomputeSettings) -> dict[str, Any]:
    """Run the target over the corpus once and write the cache; return what stands there in numbers.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`; committed shards always stay.
    """
    from eagle_offline import precompute as filling

    recorded = filling.check_output_directory(settings)
    with reported_status(settings.output_dir, settings.process_index, settings.process_count):
        tokenizer = load_text(settings)
        if recorded is not None:
            filling.refuse_other_text(settings, tokenizer, recorded)
        table = tokenize(settings, tokenizer)
        plan = filling.plan(settings, table, tokenizer, recorded)
        if not settings.dry_run:
            with StopRequest(settings.grace_seconds) as stop:
                filling.fill(plan, recorded, stop)
        return filling.summarize(plan, settings.output_dir)


def inspect_manifest(cache: Path, *, verify: bool = False) -> dict[str, Any]:
    """Return what a cache is and how complete it is; with ``verify`` also what is wrong with it.

    Raises:
        DataError: no cache there. MismatchError: of another version.
    """
    from eagle_offline.inspection import describe_cache

    return describe_cache(cache, verify=verify)


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train a draft from a cache; return the last validation's metrics.

    Raises:
        EagleOfflineError: see `eagle_offline.errors`.
    """
    from eagle_offline.training.loop import run

    make_directory(settings.output_dir)
    with reported_status(settings.output_dir), StopRequest(settings.grace_seconds) as stop:
        return run(settings, stop)
