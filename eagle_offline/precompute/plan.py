"""What a precompute run is about, settled and checked before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eagle_offline.cache.choices import EncodingChoice
from eagle_offline.cache.codec import estimated_row_bytes
from eagle_offline.cache.filling import begun_cache
from eagle_offline.cache.given_vocab import read_given_vocab
from eagle_offline.cache.layout import ASIDE_DIRECTORY, CONFIG_FILE, TOKENS_DIRECTORY
from eagle_offline.cache.manifest import (
    AdapterIdentity,
    BatchPlan,
    CaptureIdentity,
    DatasetIdentity,
    Identity,
    Manifest,
    SourceIdentity,
    TargetIdentity,
    TextIdentity,
    read_json_object,
    read_manifest,
    refuse_drift,
)
from eagle_offline.cache.remote import MIRROR_ENTRIES
from eagle_offline.cache.writer import committed_shards, lost_samples
from eagle_offline.capture_settings import PrecomputeSettings, TokenizeSettings
from eagle_offline.devices import resolve_device
from eagle_offline.durable import make_directory
from eagle_offline.errors import DataError, MismatchError, UsageError
from eagle_offline.precompute.batch_probe import CPU_BATCH_TOKENS, LOCK_FILE, STORE_BATCH_TOKENS
from eagle_offline.precompute.environment import refuse_other_environment
from eagle_offline.provenance import digest_checkpoint
from eagle_offline.target.adapters import AdapterSource
from eagle_offline.target.architectures import auto_class, implementations
from eagle_offline.target.batching import SMALL_BATCH_TOKENS, Batching
from eagle_offline.target.layout import default_aux_layer_ids, validate_aux_layer_ids
from eagle_offline.target.load import (
    TargetSource,
    is_quantised,
    load_config,
    resolve_target,
    run_dtype,
)
from eagle_offline.text.rows import Source
from eagle_offline.text.sources import pinned_inputs, resolve_sources
from eagle_offline.text.templates import template_digest, tokenizer_digest
from eagle_offline.text.token_table import META_FILE, SourceRecord, TokenTable
from eagle_offline.vocab import FILE_FLAG, SIZE_FLAG, DraftVocab, choose_draft_vocab, given_draft_vocab, resolve_size

# Whatever else stands in an output directory belongs to somebody else.
OWN_ENTRIES = {TOKENS_DIRECTORY, ASIDE_DIRECTORY, CONFIG_FILE, "status.json", LOCK_FILE}

_MAX_TOKENS_META_BYTES = 64 << 20

# Settings of a run; what it makes does not depend on them.
_OF_A_RUN = {
    "output_dir",
    "staging_dir",
    "store_url",
    "tokens_dir",
    "tokenize_workers",
    "engine",
    "process_index",
    "process_count",
    "ray_address",
    "num_workers",
    "gpus_per_worker",
    "grace_seconds",
    "rehash",
    "resume",
    "accept_environment",
    "dry_run",
}


Amendment = Callable[[Identity], Identity]


def as_captured(identity: Identity) -> Identity:
    """Return the identity of a cache that is made by running the target, as it is."""
    return identity


@dataclass(frozen=True)
class Plan:
    """What a precompute run is about, settled before any weight is loaded.

    Attributes:
        settings: as asked for.
        source: the target's files; config: its config.
        tokenizer: with the chat template in use.
        table: the tokenised corpus.
        vocab: the draft vocabulary.
        identity: what the cache is.
        device: torch device.
    """

    settings: PrecomputeSettings
    source: TargetSource
    config: Any
    tokenizer: Any
    table: TokenTable
    vocab: DraftVocab
    identity: Identity
    device: str

    def estimated_bytes(self) -> int:
        """Return about how many bytes all shards take."""
        return self._estimated(self.table.meta.num_tokens)

    def estimated_shard_bytes(self, shard: int) -> int:
        """Return about how many bytes a shard takes."""
        return self._estimated(self.num_tokens(shard))

    def num_tokens(self, shard: int) -> int:
        """Return the tokens of a shard."""
        return int(self.table.lengths[self.rows(shard)].sum())

    def _estimated(self, num_tokens: int) -> int:
        meta = self.table.meta
        share = meta.num_supervised / max(meta.num_tokens, 1)
        rows = {"tokens": num_tokens, "supervised_positions": num_tokens * share}
        return int(sum(estimated_row_bytes(field) * rows[field.rows] for field in self.identity.capture.fields))

    def rows(self, shard: int) -> np.ndarray:
        """Return int64: the token-table rows of a shard's samples."""
        size = self.identity.capture.shard_size
        return self.sample_order[shard * size : (shard + 1) * size]

    def resolved_settings(self) -> dict[str, Any]:
        """Return the settings that make the same cache again, in whichever directory they are given."""
        settings, capture = self.settings, self.identity.capture
        resolved = settings.model_copy(
            update={
                "target_model": absolute(settings.target_model),
                "input_data": pinned_inputs(settings.input_data, self.table.meta.sources),
                "chat_template": None if settings.chat_template is None else absolute(str(settings.chat_template)),
                "revision": self.source.revision,
                "adapter": None if settings.adapter is None else absolute(settings.adapter),
                "adapter_revision": None if self.source.adapter is None else self.source.adapter.revision,
                "data_revision": None,
                "draft_vocab_size": self.vocab.size if settings.draft_vocab is None else None,
                "draft_vocab": None if settings.draft_vocab is None else absolute(str(settings.draft_vocab)),
                "aux_layer_ids": tuple(capture.aux_layer_ids),
                "batch_size": self.identity.batch_plan.batch_size,
                "max_batch_tokens": self.identity.batch_plan.max_batch_tokens,
                "device": self.identity.batch_plan.device_kind,
            }
        )
        return resolved.model_dump(mode="json", exclude=_OF_A_RUN)

    @property
    def batching(self) -> Batching | None:
        """Return how much goes through the target at once, None while that is to be found out."""
        plan = self.identity.batch_plan
        if plan.batch_size is None and plan.max_batch_tokens is None:
            return None
        # A CPU takes as long for a token of padding as for any other.
        small = 0 if plan.device_kind == "cpu" else SMALL_BATCH_TOKENS
        return Batching(plan.batch_size, plan.max_batch_tokens, small)

    def with_batches(self, batch_size: int | None, max_batch_tokens: int | None) -> Plan:
        """Return the plan with what was found out."""
        found = {"batch_size": batch_size, "max_batch_tokens": max_batch_tokens}
        batch_plan = self.identity.batch_plan.model_copy(update=found)
        return replace(self, identity=self.identity.model_copy(update={"batch_plan": batch_plan}))

    @cached_property
    def sample_order(self) -> np.ndarray:
        """Return int64 ``[N]``: the token-table row of each sample in cache order."""
        order = np.arange(len(self.table))
        if self.settings.shuffle_seed is not None:
            np.random.Generator(np.random.PCG64(self.settings.shuffle_seed)).shuffle(order)
        return order


def check_output_directory(settings: PrecomputeSettings) -> Manifest | None:
    """Return the manifest of the cache that was begun there, None if there is none.

    Raises:
        UsageError: a cache is there and ``--resume`` was not given.
        MismatchError: something else is there. EagleOfflineError: it cannot be written to.
    """
    directory = settings.output_dir
    make_directory(directory)
    return begun_cache(directory, resume=settings.resume, own_entries=OWN_ENTRIES | MIRROR_ENTRIES)


def absolute(name: str) -> str:
    """Return the whole path of a file or directory; what is not there is the hub's."""
    path = Path(name).expanduser()
    return os.fsencode(path.absolute()).decode(errors="replace") if path.exists() else name


def check_settings(settings: PrecomputeSettings) -> None:
    """Refuse what the target's config alone shows to be impossible, before a corpus is tokenised for it.

    Raises:
        UsageError, MismatchError, DataError: see `eagle_offline.errors`.
    """
    _, config = resolve_config(settings)
    auto_class(config, settings.trust_remote_code)
    text_config = config.get_text_config()
    device_kind = torch.device(resolve_device(settings.device)).type
    encoding_choice(settings)
    draft_vocab_size(settings, text_config.vocab_size)
    _capture_identity(settings, config, vocab_digest="", device_kind=device_kind)


def refuse_other_tokens(settings: TokenizeSettings, tokenizer: Any) -> None:
    """Refuse to put other tokens in the place of those that the cache in ``output_dir`` was begun with.

    Raises:
        MismatchError: names each differing field. DataError: there is no readable manifest.
    """
    recorded = read_manifest(settings.output_dir)
    sources = resolve_sources(settings.input_data, split=settings.split, revision=settings.data_revision)
    dataset = recorded.identity.dataset.model_copy(update={"sources": _source_identities(sources)})
    found = recorded.identity.model_copy(update={"dataset": dataset, "text": _text_identity(settings, tokenizer)})
    refuse_drift(settings.output_dir, recorded.identity, found)
    _refuse_other_bad_rows(settings)


def _refuse_other_bad_rows(settings: TokenizeSettings) -> None:
    """Refuse to make the same tokens under another ``--on-bad-row``, which stands in their description.

    Raises:
        MismatchError: says so.
    """
    path = settings.output_dir / TOKENS_DIRECTORY / META_FILE
    try:
        standing = read_json_object(path, _MAX_TOKENS_META_BYTES).get("on_bad_row")
    except DataError:  # to be made again
        return
    if standing != settings.on_bad_row:
        raise MismatchError(
            f"{settings.output_dir} was begun with --on-bad-row {standing}, now {settings.on_bad_row}; give the "
            "recorded one again, or choose another --output-dir"
        )


def refuse_other_settings(
    settings: PrecomputeSettings, tokenizer: Any, recorded: Manifest, amended: Amendment = as_captured
) -> None:
    """Refuse settings and inputs other than those of a cache that was begun, before anything is tokenised again.

    Args:
        amended: what becomes of the identity of a cache that is not made by running the target.

    Raises:
        MismatchError: names each differing field.
    """
    sources = resolve_sources(settings.input_data, split=settings.split, revision=settings.data_revision)
    dataset = recorded.identity.dataset.model_copy(
        update={"sources": _source_identities(sources), "shuffle_seed": settings.shuffle_seed}
    )
    vocab_digest = recorded.defaults.draft_vocabulary.digest
    found = amended(_identity(settings, tokenizer, dataset, vocab_digest, recorded))
    refuse_other_environment(settings.output_dir, recorded.identity.batch_plan, found.batch_plan)
    refuse_drift(settings.output_dir, recorded.identity, found)
    _refuse_other_bad_rows(settings)


def plan_cache(
    settings: PrecomputeSettings,
    table: TokenTable,
    tokenizer: Any,
    recorded: Manifest | None,
    amended: Amendment = as_captured,
    selected_token_ids: np.ndarray | None = None,
) -> Plan:
    """Settle what the cache is; refuse what cannot be, and what differs from a cache that was begun.

    Args:
        amended: as for `refuse_other_settings`.
        selected_token_ids: int64 ``[Vd]``, ascending, in place of a draft vocabulary that the settings choose.

    Raises:
        UsageError, MismatchError: see `eagle_offline.errors`.
    """
    source, config = resolve_config(settings, weights=True)
    vocab = draft_vocab(settings, table, tokenizer)
    if selected_token_ids is not None:
        vocab = given_draft_vocab(selected_token_ids, table.supervised_counts(), vocab.vocab_size)
    dataset = DatasetIdentity(
        sources=_source_identities(table.meta.sources),
        shuffle_seed=settings.shuffle_seed,
        num_samples=table.meta.num_rows,
        rows_digest=table.meta.rows_digest,
    )
    identity = amended(_identity(settings, tokenizer, dataset, vocab.digest, recorded))
    if recorded is not None:
        refuse_drift(settings.output_dir, recorded.identity, identity)
        default = recorded.defaults.draft_vocabulary
        if default.digest != vocab.digest:
            raise MismatchError(
                f"{settings.output_dir} was begun with another draft vocabulary: --draft-vocab-size recorded "
                f"{default.size}, now {vocab.size}; give the recorded one again, or choose another --output-dir"
            )
    return Plan(settings, source, config, tokenizer, table, vocab, identity, resolve_device(settings.device))


def draft_vocab(settings: PrecomputeSettings, table: TokenTable, tokenizer: Any) -> DraftVocab:
    """Return the draft vocabulary of a corpus.

    Raises:
        UsageError: too small for the special tokens. MismatchError: tokens that the target does not have.
    """
    source, config = resolve_config(settings)
    vocab_size = config.get_text_config().vocab_size
    if table.meta.max_token_id >= vocab_size:
        raise MismatchError(
            f"the tokenizer gives token {table.meta.max_token_id}, the model has {vocab_size} tokens only: "
            f"tokenizer and model of {settings.target_model} do not belong together"
        )
    if settings.draft_vocab is not None:
        digest = tokenizer_digest(tokenizer)
        ids = read_given_vocab(settings.draft_vocab, vocab_size, digest, settings.target_model)
        return given_draft_vocab(ids, table.supervised_counts(), vocab_size)
    return choose_draft_vocab(
        table.supervised_counts(),
        required_token_ids(source, tokenizer),
        resolve_size(settings.draft_vocab_size, vocab_size),
        vocab_size,
    )


def draft_vocab_size(settings: PrecomputeSettings, vocab_size: int) -> int:
    """Return how many tokens a draft can propose, of a target that has ``vocab_size``.

    Raises:
        UsageError: more than there are, or asked for in two ways. DataError, MismatchError: see `read_given_vocab`.
    """
    if settings.draft_vocab is None:
        return resolve_size(settings.draft_vocab_size, vocab_size)
    if settings.draft_vocab_size is not None:
        raise UsageError(f"{SIZE_FLAG} and {FILE_FLAG} exclude each other: give one of them")
    return len(read_given_vocab(settings.draft_vocab, vocab_size, None, settings.target_model))


def resolve_config(settings: PrecomputeSettings, *, weights: bool = False) -> tuple[TargetSource, Any]:
    """Return the target's files, its weights among them if asked for, and its config; no weight is loaded.

    Raises:
        UsageError, DataError: see `resolve_target`.
    """
    source = resolve_target(
        settings.target_model,
        settings.revision,
        settings.trust_remote_code,
        weights=weights,
        adapter=settings.adapter,
        adapter_revision=settings.adapter_revision,
    )
    return source, load_config(source)


def _identity(
    settings: PrecomputeSettings,
    tokenizer: Any,
    dataset: DatasetIdentity,
    vocab_digest: str,
    recorded: Manifest | None,
) -> Identity:
    """Return what the cache is; no weight is loaded for it."""
    source, config = resolve_config(settings, weights=True)
    text_config = config.get_text_config()
    device_kind = torch.device(resolve_device(settings.device)).type
    return Identity(
        target=TargetIdentity(
            id=source.id,
            revision=source.revision,
            checkpoint_digest=digest_checkpoint(source.directory, rehash=settings.rehash),
            adapter=None if source.adapter is None else _adapter_identity(source.adapter),
            architecture=(config.architectures or [config.model_type])[0],
            num_layers=text_config.num_hidden_layers,
            hidden_size=text_config.hidden_size,
            vocab_size=text_config.vocab_size,
        ),
        text=_text_identity(settings, tokenizer),
        dataset=dataset,
        capture=_capture_identity(settings, config, vocab_digest, device_kind),
        batch_plan=_batch_plan(settings, config, device_kind, recorded),
    )


def _text_identity(settings: TokenizeSettings, tokenizer: Any) -> TextIdentity:
    return TextIdentity(
        tokenizer_digest=tokenizer_digest(tokenizer),
        template_digest=template_digest(tokenizer),
        seq_length=settings.seq_length,
    )


def _adapter_identity(adapter: AdapterSource) -> AdapterIdentity:
    return AdapterIdentity(id=adapter.id, revision=adapter.revision, digest=adapter.digest())


def _batch_plan(settings: PrecomputeSettings, config: Any, device_kind: str, recorded: Manifest | None) -> BatchPlan:
    """Return how samples go through the target: as asked for, else as a cache was begun, else what is known before."""
    batch_size, max_batch_tokens = settings.batch_size, settings.max_batch_tokens
    if batch_size is None and max_batch_tokens is None:
        if recorded is not None:
            batch_size = recorded.identity.batch_plan.batch_size
            max_batch_tokens = recorded.identity.batch_plan.max_batch_tokens
        elif device_kind == "cpu":
            max_batch_tokens = CPU_BATCH_TOKENS
        elif settings.store_url is not None and settings.process_count > 1:
            max_batch_tokens = STORE_BATCH_TOKENS
    tensor_parallel_size = settings.tensor_parallel_size
    if settings.accept_environment and recorded is not None:
        # Records of shards say where each was made in truth.
        device_kind = recorded.identity.batch_plan.device_kind
        tensor_parallel_size = recorded.identity.batch_plan.tensor_parallel_size
    chosen = implementations(
        config, device_kind, run_dtype(config, device_kind, settings.compute_dtype) or torch.float32
    )
    return BatchPlan(
        batch_size=batch_size,
        max_batch_tokens=max_batch_tokens,
        order="length",
        attention_implementation=chosen.attention,
        experts_implementation=chosen.experts,
        tensor_parallel_size=tensor_parallel_size,
        device_kind=device_kind,
    )


def required_token_ids(source: TargetSource, tokenizer: Any) -> list[int]:
    """Return the special tokens that every draft vocabulary holds: bos, eos, pad, unk and all that end a generation."""
    from transformers import GenerationConfig

    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    if (source.directory / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(source.directory).eos_token_id
        ids.extend(eos if isinstance(eos, list) else [eos])
    return [token for token in ids if token is not None]


def _source_identities(sources: Sequence[Source | SourceRecord]) -> list[SourceIdentity]:
    return [SourceIdentity.model_validate(source, from_attributes=True) for source in sources]


def _capture_identity(
    settings: PrecomputeSettings, config: Any, vocab_digest: str, device_kind: str
) -> CaptureIdentity:
    text_config = config.get_text_config()
    ids = aux_layer_ids(settings, text_config.num_hidden_layers)
    choice = encoding_choice(settings)
    own_dtype = "fp32" if device_kind == "cpu" and not is_quantised(config) else "checkpoint"
    return CaptureIdentity(
        aux_layer_ids=ids,
        dtype=settings.dtype,
        compute_dtype=settings.compute_dtype or own_dtype,
        state_encoding=settings.state_encoding,
        target_encoding=settings.target_encoding,
        target_statistics="full",
        draft_vocab_digest=None if settings.target_encoding == "factored" else vocab_digest,
        shard_size=settings.shard_size,
        format=settings.format,
        compressor=choice.zarr_compressor,
        fields=choice.fields(ids, text_config.hidden_size, draft_vocab_size(settings, text_config.vocab_size)),
    )


def aux_layer_ids(settings: PrecomputeSettings, num_layers: int) -> list[int]:
    """Return the decoder layers whose outputs are stored.

    Raises:
        UsageError: not layers of the target, or none given for one that is too shallow for the default.
    """
    if settings.aux_layer_ids is None:
        return default_aux_layer_ids(num_layers)
    return validate_aux_layer_ids(settings.aux_layer_ids, num_layers)


def encoding_choice(settings: PrecomputeSettings) -> EncodingChoice:
    """Return how states and distributions are to be stored.

    Raises:
        UsageError: choices that exclude one another.
    """
    return EncodingChoice(
        dtype=settings.dtype,
        state_encoding=settings.state_encoding,
        mantissa_bits=settings.mantissa_bits,
        target_encoding=settings.target_encoding,
        top_k=settings.top_k,
        format=settings.format,
        compressor=settings.compressor,
    )


def summarize(plan: Plan, directory: Path) -> dict[str, Any]:
    """Return what stands in the cache, in numbers, for the log and for the caller."""
    done = len(committed_shards(directory))
    return {
        "cache": str(directory),
        "samples": len(plan.table),
        "samples_lost": lost_samples(directory, plan.identity),
        "tokens": plan.table.meta.num_tokens,
        "supervised_tokens": plan.table.meta.num_supervised,
        "rows_left_out": plan.table.meta.reasons,
        "rows_shortened": plan.table.meta.truncated_rows,
        "shards": plan.identity.num_shards,
        "shards_committed": done,
        "estimated_bytes": plan.estimated_bytes(),
        "draft_vocab_size": plan.vocab.size,
        "draft_vocab_coverage": plan.vocab.coverage,
    }
