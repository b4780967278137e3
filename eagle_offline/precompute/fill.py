"""Writes the manifest and what comes with it, then makes the missing shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
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
from eagle_offline.precompute.environment import say_other_environment, shard_environment
from eagle_offline.precompute.plan import Plan
from eagle_offline.precompute.stream import SampleStream, token_sample
from eagle_offline.progress import Progress
from eagle_offline.provenance import digest_bytes, digest_file
from eagle_offline.target.capture import Capture, check_capture
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.layout import embedding_rows, read_head
from eagle_offline.target.load import (
    DTYPES,
    TargetSource,
    load_model,
)
from eagle_offline.text.token_table import META_FILE, QUARANTINE_FILE, TOKENS_FILE

STORE_LESS = "--aux-layer-ids, --split, --mantissa-bits"

_TARGET_FILES = ("*.json", "*.model", "*.jinja", "*.txt")


# Loads a target: its files, the device, what it computes in.
Loader = Callable[[TargetSource, str, str | None], torch.nn.Module]


@dataclass(frozen=True)
class Begun:
    """A precompute that is settled, before any weight is loaded.

    Attributes:
        plan: what the cache is.
        recorded: the manifest of the cache that was there before, None if there was none.
        publisher: brings everything up to the store that the cache is in; None for a cache that stays where it is made.
    """

    plan: Plan
    recorded: Manifest | None
    publisher: Publisher | None

    @property
    def is_whole(self) -> bool:
        """Whether all that comes with the cache is there, shards aside."""
        if self.recorded is None:
            return False
        if self.publisher is not None:
            return self.publisher.is_whole(self.recorded)
        return all((self.plan.settings.output_dir / name).is_file() for name in self.recorded.files)


def fill(begun: Begun, stop: StopRequest, load: Loader = load_model) -> int:
    """Make every missing shard of this process; return how many were made.

    Args:
        load: loads the target.

    Raises:
        StoppedEarly: asked to stop; committed shards stay. EagleOfflineError: see `eagle_offline.errors`.
    """
    missing = missing_shards(begun)
    if missing or not begun.is_whole:
        Filler(begun, stop, load).make(missing)
    elif begun.recorded is not None:
        write_config(begun.plan.settings.output_dir, begun.recorded)
    finish(begun.plan, begun.publisher)
    return len(missing)


def missing_shards(begun: Begun) -> list[int]:
    """Return the shards of this process that are not committed yet, once there is room for them.

    Raises:
        SpaceError: there is not. DataError: a committed shard is not there in full.
    """
    plan, publisher = begun.plan, begun.publisher
    settings, directory = plan.settings, plan.settings.output_dir
    remove_abandoned(directory)
    if publisher is not None and begun.recorded is not None:
        publisher.push_left()
    missing = own_shards(
        directory,
        plan.identity,
        settings.process_index,
        settings.process_count,
        begun=begun.recorded is not None and publisher is None,
    )
    needed = [plan.estimated_shard_bytes(shard) for shard in missing]
    # What goes up to a store is dropped here.
    check_free_space(directory, sum(needed) if publisher is None else max(needed, default=0), STORE_LESS)
    return missing


class Filler:
    """The target, loaded once, and the cache begun: makes any shards of it.

    Attributes:
        plan: with what was found out.
        waited_share: which share of its time the target waited for what was written, last time.

    Args:
        begun: what the cache is; how much goes through the target at once is found out if it does not say.
        stop: asked between samples.
        load: as for `fill`.

    Raises:
        StoppedEarly: asked to stop. EagleOfflineError: see `eagle_offline.errors`.
    """

    def __init__(self, begun: Begun, stop: StopRequest, load: Loader = load_model):
        plan, settings = begun.plan, begun.plan.settings
        self._environment = shard_environment(settings, plan.device)
        if begun.recorded is not None and settings.process_index == 0:
            say_other_environment(begun.recorded.environment, self._environment)
        model = load(plan.source, plan.device, settings.compute_dtype)
        target = HFEagle3TargetModel(model, plan.identity.capture.aux_layer_ids)
        target.position_limits.check(int(plan.table.lengths.max()))
        check_capture(target, read_head(model), token_sample(plan.table, 0))
        head = read_head(model).to(plan.device, DTYPES[settings.dtype])
        selected = torch.from_numpy(plan.vocab.selected_token_ids)
        with_probs = settings.target_encoding != "factored"
        capture = Capture(target, head, DTYPES[settings.dtype], selected, with_probs=with_probs)
        self._stop, self._publisher = stop, begun.publisher
        with begun_by_one(settings.output_dir, stop) if plan.batching is None else nullcontext(None) as standing:
            if plan.batching is None:
                if standing is None:
                    plan = plan.with_batches(None, find_batch_tokens(capture, plan.table, plan.device))
                else:
                    plan = plan.with_batches(standing.batch_size, standing.max_batch_tokens)
            manifest = write_companions(plan, model, head, self._environment)
        if begun.publisher is not None:
            begun.publisher.begin(manifest)
        self.plan, self._capture = plan, capture
        self.waited_share = 0.0

    def make(self, shards: Sequence[int]) -> None:
        """Make shards, one after another.

        Raises:
            StoppedEarly: asked to stop; committed shards stay. EagleOfflineError: see `eagle_offline.errors`.
        """
        plan, settings = self.plan, self.plan.settings
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
            self.waited_share = stream.waited_share()

    def _samples(self, shard: int, log: ShardLog) -> Iterator[StoredSample | LostSample]:
        return self._stream.of_shard(shard, log)


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


def target_files(source: TargetSource) -> list[Path]:
    """Return what a cache keeps of a checkpoint: its config, tokenizer and templates, without lists of weights."""
    directories = dict.fromkeys([source.directory, source.text_directory])
    found = [path for place in directories for pattern in _TARGET_FILES for path in sorted(place.glob(pattern))]
    by_name = {path.name: path for path in found if not path.name.endswith(".index.json")}
    return list(by_name.values())


def _companions(plan: Plan, model: torch.nn.Module, head: Any) -> dict[str, bytes]:
    """Return the content of every file that comes with the cache, by its path inside it."""
    weight = embedding_rows(model)
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
    for path in target_files(plan.source):
        contents[f"{TARGET_DIRECTORY}/{path.name}"] = path.read_bytes()
    if plan.source.adapter is not None:
        contents[f"{TARGET_DIRECTORY}/config.json"] = plan.config.to_json_string().encode()
    if plan.settings.chat_template is not None:
        contents[f"{TARGET_DIRECTORY}/chat_template.jinja"] = plan.settings.chat_template.read_bytes()
    return contents
