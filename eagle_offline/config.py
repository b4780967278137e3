"""Settings of every stage: typed, frozen, each default in one place. The command line is made from these records."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from eagle_offline.errors import UsageError


class Settings(BaseModel):
    """A stage's settings.

    ``flags`` in a field's extra names further spellings of its command-line flag; a ``positional`` one is an argument.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


def _setting(
    default: Any, description: str, *, flags: tuple[str, ...] = (), positional: bool = False, **limits: Any
) -> Any:
    extra: dict[str, Any] = {"flags": list(flags), **({"positional": True} if positional else {})}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class TokenizeSettings(Settings):
    """Chat data to tokens and loss masks. CPU only."""

    target_model: str = _setting(
        ..., "Directory or hub id of the target, a causal LM.", flags=("--target-model-path", "--verifier-name-or-path")
    )
    input_data: str = _setting(
        ..., "JSONL, JSON or Parquet file, a directory of them, or a hub dataset id.", flags=("--data-path",)
    )
    output_dir: Path = _setting(..., "Where the cache is written.")
    split: str | None = _setting(None, "Split or slice to read, such as train or train[:1000].")
    data_revision: str | None = _setting(None, "Revision of a hub dataset.")
    revision: str | None = _setting(None, "Revision of a hub model.")
    seq_length: int = _setting(
        2048, "Longest sample in tokens; longer ones keep their start.", flags=("--max-length",), gt=2
    )
    chat_template: Path | None = _setting(None, "Jinja file to use instead of the tokenizer's chat template.")
    on_bad_row: Literal["quarantine", "stop"] = _setting(
        "quarantine", "Bad input rows: leave them out and say so, or stop at the first."
    )
    trust_remote_code: bool = _setting(False, "Run code that comes with the target.")


class PrecomputeSettings(TokenizeSettings):
    """One pass of the target over the corpus, written as a cache."""

    draft_vocab_size: int | None = _setting(
        None, "Tokens the draft can propose; default 32000, or all if there are fewer.", gt=0
    )
    batch_size: int = _setting(4, "Samples of similar length that go through the target at once.", gt=0)
    shard_size: int = _setting(256, "Samples a shard.", gt=0)
    dtype: Literal["bf16", "fp16", "fp32"] = _setting("bf16", "What states are stored in.")
    compute_dtype: Literal["bf16", "fp16", "fp32"] | None = _setting(
        None, "What the target runs in; default the checkpoint's own, fp32 on a CPU."
    )
    aux_layer_ids: tuple[int, ...] | None = _setting(
        None, "Decoder layers whose outputs are stored, 0-based; default 1, L//2-1, L-4."
    )
    state_encoding: Literal["planes", "raw"] = _setting(
        "planes", "planes: exact, about 30% smaller; raw: values as they are."
    )
    target_encoding: Literal["factored", "dense"] = _setting(
        "factored", "factored: final states plus the head once; dense: the projected probabilities."
    )
    shuffle_seed: int | None = _setting(None, "Shuffle the samples over the shards by this seed.")
    device: str | None = _setting(None, "Torch device; default cuda if there is one, else cpu.")
    on_nonfinite: Literal["stop", "drop"] = _setting(
        "stop", "A sample with NaN or infinite states: stop, or leave it out and record it."
    )
    process_index: int = _setting(0, "This process's number among those that fill one cache.", ge=0)
    process_count: int = _setting(1, "How many processes fill one cache.", gt=0)
    grace_seconds: float = _setting(20.0, "After a first signal: finish the unit in hand if it fits this.", ge=0)
    rehash: bool = _setting(False, "Digest the target's files again instead of trusting remembered digests.")
    resume: bool = _setting(False, "Go on with a cache that was begun; safe on an empty directory.")
    dry_run: bool = _setting(False, "Check everything and print the plan; write nothing but tokens.")

    @field_validator("aux_layer_ids", mode="before")
    @classmethod
    def _split_ids(cls, value: Any) -> Any:
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


class TrainSettings(Settings):
    """EAGLE-3 training from a cache; the target is never loaded."""

    cache: Path = _setting(..., "Cache to train from.", flags=("--cached-target-path",))
    output_dir: Path = _setting(..., "Where checkpoints and metrics go.")
    heldout_cache: Path | None = _setting(None, "Cache to validate on instead of a share of --cache.")
    heldout_share: float = _setting(
        0.02, "Share of the documents kept out of training, unless --heldout-cache is given.", ge=0, lt=1
    )
    objective: Literal["eagle3"] = _setting("eagle3", "What is trained.")
    ttt_steps: int = _setting(7, "Unroll steps of test-time training.", flags=("--ttt-length",), gt=0, le=32)
    num_draft_layers: int = _setting(1, "Decoder layers of the draft.", gt=0)
    fc_norm: bool = _setting(False, "Normalise each aux state before its projection (EAGLE-3.1).")
    norm_output: bool = _setting(False, "Feed the normed state to the next step (EAGLE-3.1).")
    train_embeddings: bool = _setting(False, "Train the token embeddings, which otherwise stay the target's.")
    num_epochs: int = _setting(10, "Passes over the cache.", flags=("--epochs",), gt=0)
    max_steps: int | None = _setting(None, "Stop after this many optimizer steps.", gt=0)
    learning_rate: float = _setting(1e-4, "Peak learning rate.", flags=("--lr",), gt=0)
    min_learning_rate_ratio: float = _setting(0.1, "Final learning rate as a share of the peak.", ge=0, le=1)
    warmup_ratio: float = _setting(0.03, "Share of the steps in which the rate rises.", ge=0, le=1)
    weight_decay: float = _setting(0.0, "AdamW weight decay.", ge=0)
    beta1: float = _setting(0.9, "AdamW β1.", ge=0, lt=1)
    beta2: float = _setting(0.95, "AdamW β2.", ge=0, lt=1)
    max_grad_norm: float = _setting(0.5, "Gradients are clipped to this norm.", gt=0)
    tokens_per_batch: int = _setting(8192, "Token budget of one pack.", gt=0)
    global_batch: int = _setting(1, "Packs an optimizer step.", gt=0)
    seed: int = _setting(0, "Order of samples, weights at the start, held-out choice.", ge=0)
    device: str | None = _setting(None, "Torch device; default cuda if there is one, else cpu.")
    eval_every: int | None = _setting(None, "Validate every so many steps; default once an epoch.", gt=0)
    checkpoint_every: int = _setting(500, "Checkpoint every so many steps; also at the end and when stopped.", gt=0)
    keep_checkpoints: int = _setting(2, "How many of the last checkpoints stay.", gt=0)
    log_every: int = _setting(10, "Write a metrics line every so many steps.", gt=0)
    verify: bool = _setting(True, "Check each sample's digest when it is first read.")
    allow_partial: bool = _setting(False, "Train on the shards that are there.")
    resume: bool = _setting(False, "Go on from the latest checkpoint; safe on an empty directory.")


class ExportSettings(Settings):
    """A trained draft as the directories that serving engines load."""

    run: Path | None = _setting(None, "Output directory of `train`, or one of its checkpoints.", positional=True)
    check: Path | None = _setting(None, "Write nothing; check this draft directory, ours or another's.")
    to: Literal["flat", "speculators", "both"] = _setting(
        "both", "flat: vLLM, SGLang and the original EAGLE code; speculators: vLLM and speculators."
    )
    output_dir: Path | None = _setting(
        None, "Where the directories go, each under its layout's name; default RUN/export."
    )
    engine: Literal["vllm", "sglang", "speculators", "eagle"] | None = _setting(
        None, "With --check: the engine that has to be clean; default all that the layout is meant for."
    )
    target: str | None = _setting(
        None, "What engines are to load as the target; default the hub id it was captured from."
    )
    num_draft_tokens: int = _setting(5, "Tokens to draft a round, in the serve commands.", flags=("--num-steps",), gt=0)
    dtype: Literal["bf16", "fp16", "fp32"] = _setting("bf16", "What the weights are stored in.")


class CheckSettings(Settings):
    """Whether engines would load a draft and read it as it was trained."""

    directory: Path = _setting(..., "Draft to check, ours or another's.")
    target: str | None = _setting(None, "Directory or hub id of the target, to check the draft against it.")
    layout: Literal["flat", "speculators"] | None = _setting(None, "The layout it must have.")
    engine: Literal["vllm", "sglang", "speculators", "eagle"] | None = _setting(
        None, "The engine that has to be clean."
    )


class EvaluateSettings(Settings):
    """Real speculative decoding of prompts, with a draft and without."""

    draft: str = _setting(..., "Run, checkpoint or exported draft; a directory or hub id.")
    target: str = _setting(..., "Directory or hub id of the target.", flags=("--target-model",))
    prompts: str | None = _setting(
        None, "JSONL, JSON or Parquet of messages, turns or prompt; default sixteen general questions."
    )
    split: str | None = _setting(None, "Split or slice of the prompts, such as [:100].")
    max_prompts: int | None = _setting(None, "Take no more conversations than this.", gt=0)
    num_draft_tokens: int = _setting(5, "Tokens drafted a round.", flags=("--num-steps",), gt=0, le=64)
    temperature: float = _setting(0.0, "0 decodes greedily.", ge=0)
    top_p: float = _setting(1.0, "Probability mass that tokens are drawn from.", gt=0, le=1)
    max_new_tokens: int = _setting(256, "Longest answer.", gt=0)
    batch_size: int = _setting(8, "Prompts answered together.", gt=0)
    seed: int = _setting(0, "Of sampled decoding; the batch size has a say in the answers too.", ge=0, lt=1 << 31)
    compare_untrained: bool = _setting(False, "Decode with an untrained draft of the same shape too.")
    any_target: bool = _setting(False, "Accept a target of the same shape with other weights than the draft's.")
    output_dir: Path | None = _setting(None, "Write evaluation.json and a page with plots here.")
    chat_template: Path | None = _setting(None, "Jinja file to use instead of the tokenizer's chat template.")
    revision: str | None = _setting(None, "Revision of a hub target.")
    trust_remote_code: bool = _setting(False, "Run code that comes with the target.")
    device: str | None = _setting(None, "Torch device; default cuda if there is one, else cpu.")
    compute_dtype: Literal["bf16", "fp16", "fp32"] | None = _setting(
        None, "What target and draft run in; default the checkpoint's own, fp32 on a CPU."
    )


class CorpusSettings(Settings):
    """The embedded example's chat corpus, made by a generator of ours."""

    train_file: Path = _setting(..., "JSONL file to train on.")
    heldout_file: Path = _setting(..., "JSONL file of conversations that the other does not hold.")
    num_conversations: int = _setting(2400, "Conversations in --train-file.", gt=0)
    heldout_conversations: int = _setting(120, "Conversations in --heldout-file.", gt=0)
    seed: int = _setting(0, "Seed of the generator.", ge=0)


class ExampleTargetSettings(Settings):
    """The embedded example's target: a small Llama trained on the corpus once."""

    train_file: Path = _setting(..., "JSONL corpus.")
    output_dir: Path = _setting(..., "Where model and tokenizer are saved.")
    steps: int = _setting(560, "Optimizer steps.", gt=0)


class RewriteSettings(Settings):
    """Answers written anew by the target, greedily, so that held-out text is the target's own."""

    target_model: Path = _setting(..., "Directory of the target.")
    input_file: Path = _setting(..., "JSONL conversations.")
    output_file: Path = _setting(..., "JSONL conversations with the target's answers.")
    max_new_tokens: int = _setting(256, "Longest answer; turns that do not end within it are left out.", gt=0)
    batch_size: int = _setting(32, "Conversations generated together.", gt=0)


class InspectSettings(Settings):
    """A look at a cache."""

    cache: Path = _setting(..., "Cache to look at.")
    verify: bool = _setting(False, "Read the whole cache and check every digest.")


class ReportSettings(Settings):
    """What a run achieved, as a table and as a page with plots."""

    run: Path = _setting(..., "Output directory of `train`.")
    output_dir: Path = _setting(..., "Where the page is written.")
    stages_file: Path | None = _setting(None, "Seconds of each stage, as `run` records them.")
    evaluation: Path | None = _setting(None, "Output directory of `evaluate`: real decoding joins the page.")


S = TypeVar("S", bound=BaseModel)


def build(kind: type[S], values: dict[str, Any], where: str = "") -> S:
    """Validate ``values`` as settings of ``kind``.

    Raises:
        UsageError: unknown, missing or out of range, named as a flag.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else "settings"
        said = f"{problem['msg']} (found {problem['input']!r})"
        if problem["type"] == "missing":
            said = "is required"
        elif problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, kind.model_fields, n=1)
            said = f"no such setting; did you mean {close[0]}?" if close else "no such setting"
        raise UsageError(f"{where}--{name.replace('_', '-')}: {said}; see --help") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UsageError: missing, not YAML, or not a mapping.
    """
    import yaml

    try:
        value = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected a mapping of settings, found a {type(value).__name__}")
    return {str(key).replace("-", "_"): item for key, item in value.items()}
