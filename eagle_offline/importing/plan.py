"""What an import is about, settled and checked before anything but tokens is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from eagle_offline.cache.layout import LostSample
from eagle_offline.cache.manifest import Identity, ImportedStates, Manifest
from eagle_offline.capture_settings import ImportSettings
from eagle_offline.errors import StoppedEarly, UsageError
from eagle_offline.importing.dumps import Dump, detect_tool, say_pickles
from eagle_offline.importing.equals import without_clashes
from eagle_offline.importing.loss_masks import LossMasks, is_dataset
from eagle_offline.importing.matching import Matching, match, refuse_mismatch
from eagle_offline.importing.nemo import MANIFEST_FILE, NemoDump
from eagle_offline.importing.scan import DumpIndex, scan_dump
from eagle_offline.importing.speculators import SpeculatorsDump
from eagle_offline.interrupts import StopRequest
from eagle_offline.precompute import plan
from eagle_offline.precompute.plan import Plan, absolute, resolve_config
from eagle_offline.progress import Progress
from eagle_offline.target.batching import Batching
from eagle_offline.text.token_table import TokenTable

# What a dump's probabilities, in its dtype, hold of values in another: nothing is lost to a wider one but what it lost.
_EXACT = "fp32"


@dataclass(frozen=True)
class Source:
    """A dump, and the settings with everything that follows from it filled in.

    Attributes:
        settings: of the import.
        dump: what is imported.
        selected_token_ids: int64 ``[Vd]``, the draft vocabulary that the dump's probabilities are over; None if it has
            final states.
    """

    settings: ImportSettings
    dump: Dump
    selected_token_ids: np.ndarray | None

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(file.stat().st_size for file in self.dump.files)

    @property
    def tool_layers(self) -> list[int]:
        """The decoder layers that the dump has, in its order."""
        if isinstance(self.dump, NemoDump):
            return self.dump.manifest.aux_layer_ids
        assert self.settings.aux_layer_ids is not None
        return list(self.settings.aux_layer_ids)

    @property
    def aux_places(self) -> list[int]:
        """Of the layers to store, their places among the dump's."""
        assert self.settings.aux_layer_ids is not None
        return [self.tool_layers.index(layer_id) for layer_id in self.settings.aux_layer_ids]


def open_source(settings: ImportSettings) -> Source:
    """Find out what is to be imported, and fill in the settings that follow from it.

    Raises:
        UsageError: settings that the dump cannot follow. DataError, MismatchError: see the tools' dumps.
    """
    _, config = resolve_config(settings)
    text_config = config.get_text_config()
    tool = settings.tool or detect_tool(settings.states_dir)
    if settings.process_index == 0:
        say_pickles(settings.states_dir)
    if tool == "nemo":
        if settings.loss_masks is not None:
            raise UsageError(f"--loss-masks {settings.loss_masks}: NeMo's shards have their own; leave it out")
        if not (settings.states_dir / MANIFEST_FILE).exists():
            # Says what it may be instead.
            other = detect_tool(settings.states_dir)
            raise UsageError(
                f"--from nemo: {settings.states_dir} has no {MANIFEST_FILE}, and looks like a dump of {other}; "
                f"leave --from out"
            )
        return _nemo_source(settings, NemoDump(settings.states_dir, text_config.hidden_size, text_config.vocab_size))
    if settings.aux_layer_ids is None:
        raise UsageError(
            f"{settings.states_dir} does not say of which decoder layers it is: add --aux-layer-ids, 0-based and "
            "without the last one; vLLM's eagle_aux_hidden_state_layer_ids are one more each"
        )
    dump = SpeculatorsDump(settings.states_dir, len(settings.aux_layer_ids), text_config.hidden_size)
    beside = settings.states_dir.absolute().parent
    loss_masks = settings.loss_masks or (beside if is_dataset(beside) else None)
    filled = {
        "tool": tool,
        "target_encoding": settings.target_encoding or "factored",
        "compute_dtype": settings.compute_dtype or dump.dtype,
        "loss_masks": loss_masks,
    }
    return Source(settings.model_copy(update=filled), dump, None)


def _nemo_source(settings: ImportSettings, dump: NemoDump) -> Source:
    manifest, place = dump.manifest, settings.states_dir
    size, top_k, encoding = manifest.draft_vocab_size, manifest.top_k, settings.target_encoding
    if settings.draft_vocab_size not in (None, size):
        raise UsageError(
            f"--draft-vocab-size {settings.draft_vocab_size}: {place} holds probabilities over the {size} tokens it "
            "was made with; leave the flag out"
        )
    if settings.draft_vocab is not None:
        raise UsageError(f"--draft-vocab {settings.draft_vocab}: {place} has a vocabulary of its own; leave it out")
    if encoding == "factored" or (top_k is not None and encoding == "dense"):
        kept = "all probabilities over its draft vocabulary" if top_k is None else f"the {top_k} largest probabilities"
        raise UsageError(
            f"--target-encoding {encoding}: {place} holds {kept} and nothing else of the target's choice; leave the "
            "flag out"
        )
    if top_k is not None and (settings.top_k or 0) > top_k:
        raise UsageError(f"--top-k {settings.top_k}: {place} kept {top_k} only; expected no more")
    if settings.compute_dtype is not None:
        raise UsageError(f"--compute-dtype {settings.compute_dtype}: nothing is computed of NeMo's dump; leave it out")
    layers = settings.aux_layer_ids or tuple(sorted(manifest.aux_layer_ids))
    if missing := sorted(set(layers) - set(manifest.aux_layer_ids)):
        raise UsageError(f"--aux-layer-ids: {place} has the layers {manifest.aux_layer_ids}, not {missing}")
    filled = {
        "tool": dump.tool,
        "target_encoding": encoding or ("dense" if top_k is None else "topk"),
        "top_k": settings.top_k or (top_k if encoding in (None, "topk") else None),
        "draft_vocab_size": size,
        "aux_layer_ids": layers,
    }
    return Source(settings.model_copy(update=filled), dump, dump.selected_token_ids)


@dataclass(frozen=True)
class ImportPlan(Plan):
    """What an import is about.

    Attributes:
        origin: the dump.
        index: of its samples.
        matching: which of them is which row.
    """

    origin: Source
    index: DumpIndex
    matching: Matching

    @property
    def batching(self) -> Batching:
        """Return that samples are read one by one."""
        return Batching(batch_size=1)

    def rows(self, shard: int) -> np.ndarray:
        """Return int64: the token-table rows of a shard's samples, without those that have no states."""
        rows = super().rows(shard)
        return rows[self.matching.place[rows] >= 0]

    def lost(self, shard: int) -> list[LostSample]:
        """Return the samples of a shard that have no states, and why."""
        reasons = ((int(row), self.matching.reason(int(row))) for row in super().rows(shard))
        return [LostSample(sample_id=row, reason=reason) for row, reason in reasons if reason is not None]

    @cached_property
    def num_lost(self) -> int:
        """How many rows of the corpus have no states."""
        return int((self.matching.place < 0).sum())

    def resolved_settings(self) -> dict[str, Any]:
        """Return the settings that import the same states again."""
        settings = self.origin.settings
        places = {"states_dir": settings.states_dir, "loss_masks": settings.loss_masks}
        resolved = super().resolved_settings()
        resolved |= {name: None if place is None else absolute(str(place)) for name, place in places.items()}
        # What is imported does not depend on it.
        del resolved["check_samples"]
        return resolved


def refuse_other_settings(source: Source, tokenizer: Any, index: DumpIndex, recorded: Manifest) -> None:
    """Refuse settings, inputs and states other than those of an import that was begun, before a corpus is tokenised.

    Raises:
        MismatchError: names each differing field.
    """
    plan.refuse_other_settings(source.settings, tokenizer, recorded, partial(as_imported, source, index))


def plan_import(
    source: Source, index: DumpIndex, table: TokenTable, tokenizer: Any, recorded: Manifest | None
) -> ImportPlan:
    """Settle what the cache is; refuse a dump that is not of the corpus, and what differs from one that was begun.

    Raises:
        UsageError, MismatchError, DataError: see `eagle_offline.errors`.
    """
    settings = source.settings
    imported = partial(as_imported, source, index)
    settled = plan.plan_cache(settings, table, tokenizer, recorded, imported, source.selected_token_ids)
    matching = without_clashes(match(table, index, whole=depends_on_length(settled.config)), table, index)
    refuse_mismatch(matching, table, index, dropped=settings.on_mismatch == "drop")
    return ImportPlan(**vars(settled), origin=source, index=index, matching=matching)


def depends_on_length(config: Any) -> bool:
    """Say whether a target's rotary frequencies, and so all its states, change with the length of a row.

    Args:
        config: the target's.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # Some architectures have one set for each type of layer.
    several = [one for one in parameters.values() if isinstance(one, dict)] or [parameters]
    return any(one.get("rope_type") in ("longrope", "dynamic") for one in several)


def as_imported(source: Source, index: DumpIndex, identity: Identity) -> Identity:
    """Return what a cache is that was not captured but imported: with what the dump has or has not."""
    capture = identity.capture
    if source.selected_token_ids is not None:
        target = capture.fields[-1]
        # Rounded by the tool that made them, whatever they are stored in now.
        losses = () if index.dump.dtype in (_EXACT, target.dtype) else (index.dump.dtype,)
        capture = capture.model_copy(
            update={
                "target_statistics": "in_vocabulary",
                "compute_dtype": "unknown",
                "fields": [*capture.fields[:-1], target.model_copy(update={"losses": losses})],
            }
        )
    batch_plan = identity.batch_plan.model_copy(
        update={
            "batch_size": None,
            "max_batch_tokens": None,
            "attention_implementation": "unknown",
            "experts_implementation": None,
        }
    )
    imported = ImportedStates(tool=index.dump.tool, digest=index.digest)
    return identity.model_copy(update={"capture": capture, "batch_plan": batch_plan, "imported_from": imported})


def scan_source(source: Source, stop: StopRequest, progress: Progress) -> DumpIndex:
    """Read a dump through; see `scan_dump`.

    Args:
        progress: counts bytes.

    Raises:
        StoppedEarly: asked to stop. DataError: a file is not in the tool's layout. UsageError: no loss masks where they
            were said to be.
    """
    settings = source.settings
    loss_masks = None if settings.loss_masks is None else LossMasks(settings.loss_masks, settings.seq_length)

    def report(num_bytes: int) -> None:
        progress.reach(num_bytes)
        if stop.requested:
            raise StoppedEarly("stopped by a signal while the dump was read; go on with --resume")

    return scan_dump(source.dump, loss_masks, settings.seq_length, report, rehash=settings.rehash)
