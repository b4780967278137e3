"""Writes the manifest and what comes with it, then makes the missing shards of an import."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial

import torch
from torch import nn

from eagle_offline.cache.filling import ShardLog, ShardWork, fill_shards
from eagle_offline.cache.layout import LostSample
from eagle_offline.cache.manifest import Manifest
from eagle_offline.cache.samples import StoredSample
from eagle_offline.cache.saved_settings import write_config
from eagle_offline.importing.capture import DumpCapture, FromFinalStates, FromProbabilities, Supervision
from eagle_offline.importing.nemo import NemoDump
from eagle_offline.importing.plan import ImportPlan
from eagle_offline.interrupts import StopRequest
from eagle_offline.precompute.environment import say_other_environment, shard_environment
from eagle_offline.precompute.fill import STORE_LESS, Begun, finish, missing_shards, write_companions
from eagle_offline.precompute.stream import SampleStream
from eagle_offline.progress import Progress
from eagle_offline.supervision import Head
from eagle_offline.target.final_norm import find_final_norm, load_without_layers
from eagle_offline.target.layout import input_embeddings, read_head
from eagle_offline.target.load import DTYPES


def fill(plan: ImportPlan, recorded: Manifest | None, stop: StopRequest) -> None:
    """Make every missing shard of this process.

    Raises:
        StoppedEarly: asked to stop; committed shards stay. EagleOfflineError: see `eagle_offline.errors`.
    """
    settings, begun = plan.settings, Begun(plan, recorded, None)
    missing = missing_shards(begun)
    if recorded is not None and not missing and begun.is_whole:
        write_config(settings.output_dir, recorded)
        finish(plan)
        return
    environment = shard_environment(settings, plan.device)
    if recorded is not None:
        say_other_environment(recorded.environment, environment)
    model = load_without_layers(plan.source, plan.device, settings.compute_dtype)
    if isinstance(plan.index.dump, NemoDump):
        plan.index.dump.check_embeddings(input_embeddings(model).weight)
    head = read_head(model).to(plan.device, DTYPES[settings.dtype])
    write_companions(plan, model, head, environment)
    capture = DumpCapture(
        plan.index, plan.matching, plan.origin.aux_places, DTYPES[settings.dtype], _supervision(plan, model, head)
    )
    stream = SampleStream(plan, capture, missing, stop)

    def samples(shard: int, log: ShardLog) -> Iterator[StoredSample | LostSample]:
        yield from stream.of_shard(shard, log)
        yield from plan.lost(shard)

    work = [
        ShardWork(shard, plan.num_tokens(shard), plan.estimated_shard_bytes(shard), partial(samples, shard))
        for shard in missing
    ]
    total = sum(item.num_tokens for item in work)
    with (
        Progress("import", total, unit="tok", enabled=settings.process_index == 0) as progress,
        closing(stream),
    ):
        fill_shards(settings.output_dir, plan.identity, work, stop, progress, environment, STORE_LESS)
    finish(plan)


def _supervision(plan: ImportPlan, model: nn.Module, head: Head) -> Supervision:
    """Return what makes the target's side of a sample."""
    selected = torch.from_numpy(plan.vocab.selected_token_ids)
    if plan.origin.selected_token_ids is not None:
        return FromProbabilities(selected)
    assert plan.settings.compute_dtype is not None
    return FromFinalStates(
        find_final_norm(model),
        DTYPES[plan.settings.compute_dtype],
        head,
        selected,
        with_probs=plan.settings.target_encoding != "factored",
    )
