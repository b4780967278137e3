"""Settings of everything that makes a cache out of chat data and a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from eagle_offline.config import Settings, listed, require_path, setting
from eagle_offline.errors import UsageError
from eagle_offline.provenance import digest_bytes, user_cache_directory


class TextSettings(Settings):
    """Chat data, and the tokenizer and chat template that read it."""

    target_model: str = setting(
        ..., "Directory or hub id of the target, a causal LM.", flags=("--target-model-path", "--verifier-name-or-path")
    )
    input_data: tuple[str, ...] = setting(
        ...,
        "JSONL, JSON or Parquet files, directories of them, or hub dataset ids, in order; each NAME[@REVISION][:SPLIT],"
        " such as chat.jsonl, 'more.parquet:[:1000]' or 'owner/name@main:train[:5%]'.",
        flags=("--data-path",),
        min_length=1,
    )
    split: str | None = setting(
        None, "Split or slice of inputs that say none of their own, such as train or train[:1000]."
    )
    data_revision: str | None = setting(None, "Revision of hub datasets that say none of their own.")
    revision: str | None = setting(None, "Revision of a hub model.")
    adapter: str | None = setting(None, "Directory or hub id of a LoRA adapter, merged into the target.")
    adapter_revision: str | None = setting(None, "Revision of a hub adapter.")
    seq_length: int = setting(
        2048, "Longest sample in tokens; longer ones keep their start.", flags=("--max-length",), gt=2, lt=1 << 31
    )
    chat_template: Path | None = setting(None, "Jinja file to use instead of the tokenizer's chat template.")
    tokens_dir: Path | None = setting(
        None, "Keep tokenised corpora here, by their content, for all caches that are made of them."
    )
    tokenize_workers: int | None = setting(
        None, "Processes that tokenize; default one a CPU, at most 8, and 1 for little data.", gt=0, le=256
    )
    trust_remote_code: bool = setting(False, "Run code that comes with the target.")

    @field_validator("input_data", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _revise_what_is_on_a_hub(self) -> TextSettings:
        for flag, revision, of, name in (
            ("--revision", self.revision, "--target-model", self.target_model),
            ("--adapter-revision", self.adapter_revision, "--adapter", self.adapter),
        ):
            if revision is not None and name is None:
                raise UsageError(f"{flag} {revision}: of no use without {of}; leave it out, or give {of}")
            if revision is not None and name is not None and Path(name).is_dir():
                raise UsageError(f"{flag} {revision}: {of} {name} is a directory of this machine; leave {flag} out")
        return self


class TokenizeSettings(TextSettings):
    """Chat data to tokens and loss masks. CPU only."""

    output_dir: Path = setting(..., "Where the cache is written.")
    on_bad_row: Literal["quarantine", "stop"] = setting(
        "quarantine", "Bad input rows: leave them out and say so, or stop at the first."
    )


class PreviewSettings(TextSettings):
    """A look at chat data before anything is made of it. CPU only, and no weights."""

    num_samples: int = setting(3, "Samples to show.", ge=0)
    num_rows: int = setting(
        256, "Rows to look at in all, the first of each input; with --tokens-dir, all are.", gt=0, lt=1 << 31
    )
    seed: int = setting(0, "Chooses the samples among the rows looked at.", ge=0)
    html: Path | None = setting(None, "Write a page here as well.")
    colour: bool | None = setting(
        None, "Colour supervised tokens instead of marking them; default on a terminal, unless NO_COLOR is set."
    )
    as_json: bool = setting(False, "Print one JSON object.", flags=("--json",))


class PrecomputeSettings(TokenizeSettings):
    """One pass of the target over the corpus, written as a cache."""

    output_dir: Path = setting(..., "Where the cache is written, a directory or the URL of an object store.")
    staging_dir: Path | None = setting(
        None, "With a URL: where shards are made before they go up; default in the user's cache."
    )
    store_url: str | None = setting(
        None, "The URL that --output-dir named; shards are made in a directory.", hidden=True
    )
    draft_vocab_size: int | None = setting(
        None, "Tokens the draft can propose; default 32000, or all if there are fewer.", gt=0
    )
    draft_vocab: Path | None = setting(
        None, "Which tokens these are: a file of ids, one a line or a JSON list, or a cache to take its choice over."
    )
    batch_size: int | None = setting(
        None,
        "Samples that go through the target at once; default as many as have --max-batch-tokens.",
        gt=0,
        lt=1 << 31,
    )
    max_batch_tokens: int | None = setting(
        None,
        "Tokens that go through the target at once, padding included; default found by a probe, 2048 on a CPU.",
        gt=0,
        lt=1 << 31,
    )
    shard_size: int = setting(256, "Samples a shard.", gt=0, lt=1 << 62)
    dtype: Literal["bf16", "fp16", "fp32"] = setting("bf16", "What states are stored in.")
    compute_dtype: Literal["bf16", "fp16", "fp32"] | None = setting(
        None, "What the target runs in; default the checkpoint's own, fp32 on a CPU."
    )
    aux_layer_ids: tuple[int, ...] | None = setting(
        None, "Decoder layers whose outputs are stored, 0-based; default 1, L//2-1, L-4."
    )
    state_encoding: Literal["planes", "raw", "fp8"] = setting(
        "planes", "planes: exact bf16, about 30% smaller; raw: values as they are; fp8: half of raw, lossy."
    )
    mantissa_bits: int | None = setting(
        None, "Of planes: round bf16's 7 mantissa bits to this many, such as 5, 4 or 3; default 7, exact.", ge=1, le=7
    )
    target_encoding: Literal["factored", "dense", "topk"] = setting(
        "factored",
        "factored: final states plus the head once; dense: the projected probabilities; topk: the largest of them, "
        "which costs acceptance under sampling.",
    )
    top_k: int | None = setting(None, "Of topk: how many probabilities are kept a position; default 64.", gt=0)
    format: Literal["arrow", "zarr"] = setting("arrow", "What shards are: Arrow files, or Zarr v3 groups.")
    compressor: Literal["zstd", "blosc"] | None = setting(None, "Of zarr: what compresses its chunks; default zstd.")
    shuffle_seed: int | None = setting(None, "Shuffle the samples over the shards by this seed.", ge=0, lt=1 << 64)
    device: str | None = setting(None, "Torch device; default cuda if there is one, else cpu.")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = setting(
        None, "Spread a target that is larger than one GPU over those of the machine, in one process."
    )
    tensor_parallel_size: int = setting(
        1, "Processes of torchrun that share one copy of the target; more of them make more copies.", gt=0
    )
    on_nonfinite: Literal["stop", "drop"] = setting(
        "stop", "A sample with NaN or infinite states: stop, or leave it out and record it."
    )
    engine: Literal["processes", "ray"] = setting(
        "processes", "Who hands out shards: processes, this one or those of torchrun or a job array; or a Ray cluster."
    )
    process_index: int = setting(
        0, "This process's number among those that fill one cache; torchrun says it by itself.", ge=0
    )
    process_count: int = setting(1, "How many processes fill one cache.", gt=0)
    ray_address: str | None = setting(
        None, "Of ray: the cluster, such as auto or ray://HOST:10001; default one that is started on this machine."
    )
    num_workers: int | None = setting(
        None, "Of ray: how many copies of the target; default as many as there are GPUs for, or one on CPUs.", gt=0
    )
    gpus_per_worker: int = setting(1, "Of ray: GPUs of each copy; with several, --device-map spreads it.", gt=0)
    grace_seconds: float = setting(20.0, "After a first signal: finish the unit in hand if it fits this.", ge=0)
    rehash: bool = setting(False, "Digest the target's files again instead of trusting remembered digests.")
    resume: bool = setting(False, "Go on with a cache that was begun; safe on an empty directory.")
    accept_environment: bool = setting(
        False, "With --resume: go on on another kind of device or with another --tensor-parallel-size."
    )
    dry_run: bool = setting(False, "Check everything and print the plan; write nothing but tokens.")

    @model_validator(mode="after")
    def _share_one_way(self) -> PrecomputeSettings:
        if self.device_map is not None and self.tensor_parallel_size > 1:
            raise UsageError(
                f"--device-map {self.device_map} and --tensor-parallel-size {self.tensor_parallel_size}: each is a way "
                "to spread the target over several GPUs; give one of them"
            )
        if self.adapter is not None and self.tensor_parallel_size > 1:
            raise UsageError(
                f"--adapter {self.adapter}: is not merged into a target that processes share; merge it into a "
                "checkpoint of its own first, or spread the target with --device-map auto"
            )
        only_ray = ("ray_address", "num_workers", "gpus_per_worker")
        only_processes = ("process_index", "process_count", "tensor_parallel_size")
        for name in only_processes if self.engine == "ray" else only_ray:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise UsageError(f"--{name.replace('_', '-')}: not with --engine {self.engine}; see --help")
        if self.gpus_per_worker > 1 and self.device_map is None:
            raise UsageError(f"--gpus-per-worker {self.gpus_per_worker}: say how with --device-map, such as auto")
        return self

    @model_validator(mode="after")
    def _be_one_of_the_processes(self) -> PrecomputeSettings:
        if self.process_index >= self.process_count:
            raise UsageError(
                f"--process-index {self.process_index}: expected less than --process-count {self.process_count}"
            )
        return self

    @model_validator(mode="after")
    def _count_one_way(self) -> PrecomputeSettings:
        if self.batch_size is not None and self.max_batch_tokens is not None:
            raise UsageError(
                f"--batch-size {self.batch_size} and --max-batch-tokens {self.max_batch_tokens}: give one of them"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _stage_what_goes_up(cls, values: Any) -> Any:
        """Take the URL of an object store apart: where it is, and the directory that shards are made in."""
        if not isinstance(values, dict):
            return values
        url, staging = values.get("output_dir"), values.get("staging_dir")
        if not isinstance(url, str) or "://" not in url:
            if staging is not None and values.get("store_url") is None:
                raise UsageError(
                    f"--staging-dir {staging}: of use only where --output-dir is the URL of an object store; leave it "
                    "out"
                )
            return values
        require_path("--staging-dir", staging)
        url = url.rstrip("/")
        staging = staging or user_cache_directory() / "staging" / digest_bytes(url.encode())
        return {**values, "store_url": url, "output_dir": staging}

    _split_ids = field_validator("aux_layer_ids", mode="before")(listed)


class EstimateSettings(PrecomputeSettings):
    """What a precompute would cost, with the settings it would have."""

    output_dir: Path | None = setting(  # type: ignore[assignment]
        None, "Where the cache would go: its disk is looked at, and tokens are kept there for precompute."
    )
    probe: bool = setting(True, "Run the target over a few batches; without, sizes are typical and there are no hours.")
    as_json: bool = setting(False, "Print one JSON object.", flags=("--json",))


class ImportSettings(PrecomputeSettings):
    """States that another tool has dumped, checked against the tokenised corpus and written as a cache."""

    states_dir: Path = setting(
        ..., "Directory of the dump: vLLM's hs_*.safetensors, or NeMo AutoModel's shards.", positional=True
    )
    tool: Literal["speculators", "nemo"] | None = setting(
        None, "Which tool's layout it has; default as it looks.", flags=("--from",)
    )
    loss_masks: Path | None = setting(
        None,
        "Of speculators: the Arrow dataset whose rows number the files, to compare loss masks with; default the "
        "directory above STATES_DIR if it is one.",
    )
    on_mismatch: Literal["stop", "drop"] = setting(
        "stop", "Rows without states, states without a row, other loss masks: stop, or leave them out and record them."
    )
    check_samples: int | None = setting(
        None,
        "Load the whole target once and compare its own states of so many rows, and its layers, with the dump's; "
        "default 1 where an import begins, 0 to leave it out.",
        ge=0,
    )
    output_dir: Path = setting(..., "Where the cache is written.")
    aux_layer_ids: tuple[int, ...] | None = setting(
        None, "Decoder layers of the dump, 0-based outputs: vLLM's numbers are one more. NeMo's says which it has."
    )
    compute_dtype: Literal["bf16", "fp16", "fp32"] | None = setting(
        None, "Of speculators: what the final norm runs in; default what the dump's states are."
    )
    target_encoding: Literal["factored", "dense", "topk"] | None = setting(  # type: ignore[assignment]
        None, "As for precompute; default factored, of NeMo dense or topk as it has them, and nothing finer."
    )
    process_index: int = setting(0, "This process's number among those that fill one cache.", ge=0)
    dry_run: bool = setting(
        False, "Check everything, read the dump through and print the plan; write nothing but tokens."
    )

    # Nothing goes through the target, and shards are made where they stay.
    without: ClassVar[tuple[str, ...]] = (
        "staging_dir", "store_url", "batch_size", "max_batch_tokens", "device_map", "tensor_parallel_size", "engine",
        "ray_address", "num_workers", "gpus_per_worker",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _stage_what_goes_up(cls, values: Any) -> Any:
        """Refuse settings of a precompute that are of no use here."""
        for name in cls.without:
            default = cls.model_fields[name].default
            if isinstance(values, dict) and values.get(name, default) != default:
                raise UsageError(f"--{name.replace('_', '-')}: of no use to an import; leave it out")
        return values

    _split_ids = field_validator("aux_layer_ids", mode="before")(listed)
