"""Writes the manifest and what comes with it, then makes the missing shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eagle_offline.cache.companions import embeddings_bytes, head_bytes, vocab_bytes, vocab_file
from eagle_offline.cache.filling import ShardLog, ShardWork, check_free_space, ensure_manifest, fill_shards, own_shards
from eagle_offline.cache.layout import (
    EMBEDDINGS_FILE,
    HEAD_FILE,
    TARGET_DIRECTORY,
    TOKENS_DIRECTORY,
    LostSample,
)
from eagle_offline.cache.manifest import (
    CompanionFile,
    Defaults,
    DraftVocabulary,
    Manifest,
)
from eagle_offline.cache.publishing import Publisher
from eagle_offline.cache.samples import StoredSample
from eagle_offline.cache.saved_settings import write_config
from eagle_offline.cache.writer import ensure_index
from eagle_offline.durable import make_directory, remove_abandoned, write_bytes
from eagle_offline.interrupts import StopRequest
from eagle_offline.precompute.batch_probe import begun_by_one, find_batch_tokens
from eagle_offline.precompute.plan import Plan
from eagle_offline.precompute.stream import SampleStream, token_sample
from eagle_offline.progress import Progress
from eagle_offline.provenance import describe_environment, digest_bytes, digest_file
from eagle_offline.target.batching import Batching
from eagle_offline.target.capture import Capture, check_capture
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.layout import input_embeddings, read_head
from eagle_offline.target.load import (
    DTYPES,
    load_model,
)
from eagle_offline.text.token_table import META_FILE, QUARANTINE_FILE, TOKENS_FILE

STORE_LESS = "--aux-layer-ids, --split, --mantissa-bits"

_TARGET_FILES = ("*.json", "*.model", "*.jinja", "*.txt")


def fill(plan: Plan, recorded: Manifest | None, stop: StopRequest, publisher: Publisher | None = None) -> int:
    """Make every missing shard of this process; return how many were made.

    Args:
        publisher: brings everything up to the store that the cache is in; None for a cache that stays where it is made.

    Raises:
        StoppedEarly: asked to stop; committed shards stay. EagleOfflineError: see `eagle_offline.errors`.
    """
    settings, directory = plan.settings, plan.settings.output_dir
    remove_abandoned(directory)
    if publisher is not None and recorded is not None:
        publisher.push_left()
    missing = own_shards(
        directory,
        plan.identity,
        settings.process_index,
        settings.process_count,
        begun=recorded is not None and publisher is None,
    )
    needed = [plan.estimated_shard_bytes(shard) for shard in missing]
    # What goes up to a store is dropped here.
    check_free_space(directory, sum(needed) if publisher is None else max(needed, default=0), STORE_LESS)
    if recorded is not None and not missing and _is_whole(directory, recorded, publisher):
        write_config(directory, recorded)
    else:
        Filler(plan, stop, publisher).make(missing)
    finish(plan, publisher)
    return len(missing)


class Filler:
    """The target, loaded once, and the cache begun: makes any shards of it.

    Args:
        plan: what the cache is; how much goes through the target at once is found out if it does not say.
        stop: asked between samples.
        publisher: as for `fill`.

    Raises:
        StoppedEarly: asked to stop. EagleOfflineError: see `eagle_offline.errors`.
    """

    def __init__(self, plan: Plan, stop: StopRequest, publisher: Publisher | None = None):
        settings = plan.settings
        model = load_model(plan.source, plan.device, settings.compute_dtype)
        target = HFEagle3TargetModel(model, plan.identity.capture.aux_layer_ids)
        check_capture(target, read_head(model), token_sample(plan.table, 0))
        head = read_head(model).to(plan.device, DTYPES[settings.dtype])
        selected = torch.from_numpy(plan.vocab.selected_token_ids)
        with_probs = settings.target_encoding != "factored"
        capture = Capture(target, head, DTYPES[settings.dtype], selected, with_probs=with_probs)
        self._environment = describe_environment(plan.device)
        self._stop, self._publisher = stop, publisher
        with begun_by_one(settings.output_dir, stop) if plan.batching is None else nullcontext(None) as standing:
            if plan.batching is None:
                plan = plan.with_batching(
                    Batching(max_batch_tokens=find_batch_tokens(capture, plan.table, plan.device))
                    if standing is None
                    else Batching(standing.batch_size, standing.max_batch_tokens)
                )
            manifest = write_companions(plan, model, head, self._environment)
        if publisher is not None:
            publisher.begin(manifest)
        self._plan, self._capture = plan, capture

    def make(self, shards: Sequence[int]) -> None:
        """Make shards, one after another.

        Raises:
            StoppedEarly: asked to stop; committed shards stay. EagleOfflineError: see `eagle_offline.errors`.
        """
        plan, settings = self._plan, self._plan.settings
        work = [
            ShardWork(shard, plan.num_tokens(shard), plan.estimated_shard_bytes(shard), partial(self._samples, shard))
            for shard in shards
        ]
        total = sum(item.num_tokens for item in work)
        commit = None if self._publisher is None else self._publisher.commit
        self._stream = SampleStream(plan, self._capture, shards, self._stop)
        with (
            Progress("precompute", total, unit="tok", enabled=settings.process_index == 0) as progress,
            closing(self._stream) as stream,
        ):
            fill_shards(
                settings.output_dir,
                plan.identity,
                work,
                self._stop,
                progress,
                self._environment,
                STORE_LESS,
                commit,
                stream.waited_share,
            )

    def _samples(self, shard: int, log: ShardLog) -> Iterator[StoredSample | LostSample]:
        return self._stream.of_shard(shard, log)


def _is_whole(directory: Path, recorded: Manifest, publisher: Publisher | None) -> bool:
    if publisher is not None:
        return publisher.is_whole(recorded)
    return all((directory / name).is_file() for name in recorded.files)


def finish(plan: Plan, publisher: Publisher | None = None) -> None:
    """Write the index once all shards are there."""
    if publisher is None:
        ensure_index(plan.settings.output_dir, plan.identity)
    else:
        publisher.finish(plan.identity)


def write_companions(plan: Plan, model: torch.nn.Module, head: Any, environment: dict[str, Any]) -> Manifest:
    """Write the manifest unless it is there, then the files it names; return the one that stands there.

    Raises:
        MismatchError: another process began another cache here. DataError: a file came out other than recorded.
    """
    directory = plan.settings.output_dir
    contents = _companions(plan, model, head)
    files = {
        name: CompanionFile(num_bytes=len(content), digest=digest_bytes(content)) for name, content in contents.items()
    }
    for path in (directory / TOKENS_DIRECTORY / name for name in (TOKENS_FILE, QUARANTINE_FILE, META_FILE)):
        name = f"{TOKENS_DIRECTORY}/{path.name}"
        files[name] = CompanionFile(num_bytes=path.stat().st_size, digest=digest_file(path))
    vocabulary = DraftVocabulary(size=plan.vocab.size, digest=plan.vocab.digest, coverage=plan.vocab.coverage)
    manifest = Manifest(
        identity=plan.identity,
        defaults=Defaults(draft_vocabulary=vocabulary),
        files=files,
        environment={**environment, "inputs": plan.resolved_settings()},
    )
    manifest = ensure_manifest(directory, manifest)
    write_config(directory, manifest)
    for name, content in contents.items():
        path = directory / name
        if not path.is_file():
            make_directory(path.parent)
            write_bytes(path, content)
    return manifest


def target_files(directory: Path) -> list[Path]:
    """Return what a cache keeps of a checkpoint: its config, tokenizer and templates, without lists of weights."""
    found = [path for pattern in _TARGET_FILES for path in sorted(directory.glob(pattern))]
    return [path for path in found if not path.name.endswith(".index.json")]


def _companions(plan: Plan, model: torch.nn.Module, head: Any) -> dict[str, bytes]:
    """Return the content of every file that comes with the cache, by its path inside it."""
    weight = input_embeddings(model).weight
    # A checkpoint that was widened for a CPU goes back to its own dtype, exactly.
    stored_dtype = plan.config.dtype if isinstance(plan.config.dtype, torch.dtype) else weight.dtype
    embeddings = weight.detach().to(stored_dtype)
    shared = read_head(model).weight.data_ptr() == weight.data_ptr()
    tied = shared and embeddings.dtype == head.weight.dtype
    contents = {
        HEAD_FILE: head_bytes(head, tied=tied),
        EMBEDDINGS_FILE: embeddings_bytes(embeddings),
        vocab_file(plan.vocab.digest): vocab_bytes(plan.vocab.selected_token_ids),
    }
    for path in target_files(plan.source.directory):
        contents[f"{TARGET_DIRECTORY}/{path.name}"] = path.read_bytes()
    if plan.settings.chat_template is not None:
        contents[f"{TARGET_DIRECTORY}/chat_template.jinja"] = plan.settings.chat_template.read_bytes()
    return contents
