"""Settings of every stage: typed, frozen, each default in one place. The command line is made from these records."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from eagle_offline.errors import UsageError

# What a chain drafts unless something else is asked for or, of P-EAGLE, the draft was trained for less.
DEFAULT_DRAFT_TOKENS = 5
_DRAFT_TOKENS = f"default {DEFAULT_DRAFT_TOKENS}, fewer for a P-EAGLE draft of fewer depths"


class Settings(BaseModel):
    """A stage's settings.

    ``flags`` in a field's extra names further spellings of its command-line flag; a ``positional`` one is an argument,
    a ``hidden`` one follows from others. Those in ``without`` are of a stage that this one resembles, and not of it.
    """

    without: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_urls(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a URL where a file or directory is needed; as a path it would name a directory called ``s3:``."""
        field = cls.model_fields[info.field_name or ""]
        if field.annotation in (Path, Path | None, tuple[Path, ...]) and not _takes_urls(field):
            for item in value if isinstance(value, list | tuple) else (value,):
                require_path(_as_given(cls, info.field_name or ""), item)
        return value


def setting(
    default: Any,
    description: str,
    *,
    flags: tuple[str, ...] = (),
    positional: bool = False,
    hidden: bool = False,
    **limits: Any,
) -> Any:
    extra: dict[str, Any] = {"flags": list(flags)}
    extra |= {"positional": True} if positional else {}
    extra |= {"hidden": True} if hidden else {}
    return Field(default, description=description, json_schema_extra=extra, **limits)


def require_path(name: str, value: Any) -> None:
    """Refuse the URL of an object store.

    Raises:
        UsageError: it is one.
    """
    if "://" in str(value):
        raise UsageError(
            f"{name} {value}: a file or directory of this machine is needed here, not a URL; copy from or to the store "
            "with its own tool, such as aws s3 sync"
        )


def _as_given(kind: type[BaseModel], name: str) -> str:
    """Return what a setting is called on the command line: ``--output-dir``, or ``CACHE`` for an argument."""
    extra: Any = kind.model_fields[name].json_schema_extra if name in kind.model_fields else None
    plain = name.replace("_", "-")
    return plain.upper() if (extra or {}).get("positional") else f"--{plain}"


def _takes_urls(field: Any) -> bool:
    return any(isinstance(part, BeforeValidator) for part in field.metadata)


def location(value: Any) -> Any:
    """Return a path where a text names one, and a URL as it is."""
    return Path(value) if isinstance(value, str) and "://" not in value else value


# A directory, or the fsspec URL of a cache in an object store.
Location = Annotated[Path | str, BeforeValidator(location)]


def listed(value: Any) -> Any:
    """Return a list setting's items: given one by one, or in one text with commas or spaces between."""
    if isinstance(value, str):
        return tuple(value.replace(",", " ").split())
    if isinstance(value, list | tuple):
        return tuple(part for item in value for part in (listed(item) if isinstance(item, str) else (item,)))
    return value if value is None else (value,)


class ConvertSettings(Settings):
    """A complete cache written anew: other encodings, format, shard size, samples or layers; without the target."""

    cache: Path = setting(..., "Cache to convert; it is only read.", positional=True)
    output_dir: Path = setting(..., "Where the new cache is written.")
    state_encoding: Literal["planes", "raw", "fp8"] | None = setting(
        None, "How states are stored, as for precompute; default as they are."
    )
    mantissa_bits: int | None = setting(
        None, "Planes rounded to this many mantissa bits; default as they are, 7 is exact.", ge=1, le=7
    )
    target_encoding: Literal["factored", "dense", "topk"] | None = setting(
        None, "factored to dense or topk, or dense to topk, which costs acceptance under sampling; default as it is."
    )
    top_k: int | None = setting(None, "Of topk: how many probabilities are kept a position; default 64.", gt=0)
    dtype: Literal["bf16", "fp16", "fp32"] | None = setting(None, "What states are stored in; default as they are.")
    format: Literal["arrow", "zarr"] | None = setting(None, "What shards are; default as they are.")
    compressor: Literal["zstd", "blosc"] | None = setting(None, "Of zarr: what compresses its chunks; default zstd.")
    shard_size: int | None = setting(None, "Samples a shard; default as it is.", gt=0, lt=1 << 62)
    aux_layer_ids: tuple[int, ...] | None = setting(None, "Keep these of the cache's layers only.")
    samples: str | None = setting(
        None,
        "Take FIRST:LAST of the samples, such as 0:1000, counted from 0 through the shards in order and in each as its "
        "file has them; default all.",
    )
    process_index: int = setting(0, "This process's number among those that fill one cache.", ge=0)
    process_count: int = setting(1, "How many processes fill one cache.", gt=0)
    grace_seconds: float = setting(20.0, "After a first signal: finish the shard in hand if it fits this.", ge=0)
    resume: bool = setting(False, "Go on with a conversion that was begun; safe on an empty directory.")
    dry_run: bool = setting(False, "Check everything and print the plan; write nothing.")

    _split_ids = field_validator("aux_layer_ids", mode="before")(listed)


class ExportSettings(Settings):
    """A trained draft as the directories that serving engines load."""

    run: Path | None = setting(None, "Output directory of `train`, or one of its checkpoints.", positional=True)
    check: Path | None = setting(None, "Write nothing; check this draft directory, ours or another's.")
    to: Literal["flat", "speculators", "both"] = setting(
        "both", "flat: vLLM, SGLang and the original EAGLE code; speculators: vLLM and speculators."
    )
    output_dir: Path | None = setting(
        None, "Where the directories go, each under its layout's name; default RUN/export."
    )
    engine: Literal["vllm", "sglang", "speculators", "eagle"] | None = setting(
        None, "With --check: the engine that has to be clean; default all that the layout is meant for."
    )
    target: str | None = setting(
        None, "What engines are to load as the target; default the hub id it was captured from."
    )
    adapter: str | None = setting(
        None,
        "Directory or hub id of the LoRA adapter that was merged into the target, to check the draft against both.",
    )
    adapter_revision: str | None = setting(None, "Revision of a hub adapter.")
    num_draft_tokens: int | None = setting(
        None, f"Tokens to draft a round, in the serve commands; {_DRAFT_TOKENS}.", flags=("--num-steps",), gt=0
    )
    dtype: Literal["bf16", "fp16", "fp32"] = setting("bf16", "What the weights are stored in.")


class CheckSettings(Settings):
    """Whether engines would load a draft and read it as it was trained."""

    directory: Path = setting(..., "Draft to check, ours or another's.")
    target: str | None = setting(None, "Directory or hub id of the target, to check the draft against it.")
    adapter: str | None = setting(None, "Directory or hub id of a LoRA adapter, merged into the target.")
    adapter_revision: str | None = setting(None, "Revision of a hub adapter.")
    layout: Literal["flat", "speculators"] | None = setting(None, "The layout it must have.")
    engine: Literal["vllm", "sglang", "speculators", "eagle"] | None = setting(None, "The engine that has to be clean.")


class EvaluateSettings(Settings):
    """Real speculative decoding of prompts, with a draft and without."""

    draft: str = setting(..., "Run, checkpoint or exported draft; a directory or hub id.")
    target: str = setting(..., "Directory or hub id of the target.", flags=("--target-model",))
    prompts: str | None = setting(
        None, "JSONL, JSON or Parquet of messages, turns or prompt; default sixteen general questions."
    )
    split: str | None = setting(None, "Split or slice of the prompts, such as [:100].")
    max_prompts: int | None = setting(None, "Take no more conversations than this.", gt=0)
    num_draft_tokens: int | None = setting(
        None, f"Tokens drafted a round; {_DRAFT_TOKENS}.", flags=("--num-steps",), gt=0, le=64
    )
    temperature: float = setting(0.0, "0 decodes greedily.", ge=0)
    top_p: float = setting(1.0, "Probability mass that tokens are drawn from.", gt=0, le=1)
    max_new_tokens: int = setting(256, "Longest answer.", gt=0)
    batch_size: int = setting(8, "Prompts answered together.", gt=0)
    seed: int = setting(0, "Of sampled decoding; the batch size has a say in the answers too.", ge=0, lt=1 << 31)
    compare: tuple[str, ...] = setting((), "Further drafts of the target to decode with: runs, exports, hub ids.")
    compare_untrained: bool = setting(False, "Decode with an untrained draft of the same shape too.")
    any_target: bool = setting(False, "Accept a target of the same shape with other weights than the draft's.")
    output_dir: Path | None = setting(None, "Write evaluation.json and a page with plots here.")
    chat_template: Path | None = setting(None, "Jinja file to use instead of the tokenizer's chat template.")
    revision: str | None = setting(None, "Revision of a hub target.")
    adapter: str | None = setting(None, "Directory or hub id of a LoRA adapter, merged into the target.")
    adapter_revision: str | None = setting(None, "Revision of a hub adapter.")
    trust_remote_code: bool = setting(False, "Run code that comes with the target.")
    device: str | None = setting(None, "Torch device; default cuda if there is one, else cpu.")
    compute_dtype: Literal["bf16", "fp16", "fp32"] | None = setting(
        None, "What target and draft run in; default the checkpoint's own, fp32 on a CPU."
    )

    @field_validator("compare", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class CorpusSettings(Settings):
    """The embedded example's chat corpus, made by a generator of ours."""

    train_file: Path = setting(..., "JSONL file to train on.")
    heldout_file: Path = setting(..., "JSONL file of conversations that the other does not hold.")
    num_conversations: int = setting(2400, "Conversations in --train-file.", gt=0)
    heldout_conversations: int = setting(120, "Conversations in --heldout-file.", gt=0)
    seed: int = setting(0, "Seed of the generator.", ge=0)


class ExampleTargetSettings(Settings):
    """The embedded example's target: a small Llama trained on the corpus once."""

    train_file: Path = setting(..., "JSONL corpus.")
    output_dir: Path = setting(..., "Where model and tokenizer are saved.")
    steps: int = setting(560, "Optimizer steps.", gt=0)


class RewriteSettings(Settings):
    """Answers written anew by the target, greedily, so that held-out text is the target's own."""

    target_model: Path = setting(..., "Directory of the target.")
    input_file: Path = setting(..., "JSONL conversations.")
    output_file: Path = setting(..., "JSONL conversations with the target's answers.")
    max_new_tokens: int = setting(256, "Longest answer; turns that do not end within it are left out.", gt=0)
    batch_size: int = setting(32, "Conversations generated together.", gt=0)


class InspectSettings(Settings):
    """A look at a cache."""

    cache: Location = setting(..., "Cache to look at, a directory or URL.")
    verify: bool = setting(False, "Read the whole cache and check every digest.")


class VerifySettings(Settings):
    """A check of a whole cache."""

    cache: Path = setting(..., "Cache to read.", positional=True)
    num_workers: int | None = setting(None, "Shards read at a time; default one a CPU, at most 8.", gt=0, le=256)
    as_json: bool = setting(False, "Print one JSON object.", flags=("--json",))


class RepairSettings(VerifySettings):
    """A cache freed of everything damaged."""

    dry_run: bool = setting(False, "Say what would be set aside; change nothing.")


class ReportSettings(Settings):
    """What a run achieved, as a table and as a page with plots."""

    run: Path = setting(..., "Output directory of `train`.")
    output_dir: Path = setting(..., "Where the page is written.")
    stages_file: Path | None = setting(None, "Seconds of each stage, as `run` records them.")
    evaluation: Path | None = setting(None, "Output directory of `evaluate`: real decoding joins the page.")
    compare: tuple[Path, ...] = setting((), "Further runs to show beside it, validated on the same held-out documents.")

    @field_validator("compare", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value


class PlotSettings(Settings):
    """Curves of several runs together."""

    run: tuple[Path, ...] = setting((), "Output directories of `train`.", positional=True)
    output: Path = setting(
        Path("plot.png"), "The picture, .png; or .html: a page of its own, with a table of the last validations."
    )
    metric: tuple[str, ...] = setting((), "What to draw, such as loss or top1; default the usual ones that a run has.")

    @field_validator("run", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("metric", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return listed(value)


S = TypeVar("S", bound=BaseModel)


def build(kind: type[S], values: dict[str, Any], where: str = "") -> S:
    """Validate ``values`` as settings of ``kind``.

    Raises:
        UsageError: unknown, missing or out of range, named as a flag.
    """
    for name, value in values.items():
        field = kind.model_fields.get(name)
        # Python takes true for 1; whoever wrote it did not.
        if isinstance(value, bool) and field is not None and "bool" not in str(field.annotation):
            raise UsageError(
                f"{where}{_as_given(kind, name)}: found {str(value).lower()}, expected a value; see --help"
            )
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
        raise UsageError(f"{where}{_as_given(kind, name)}: {said}; see --help") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; what is called ``.json`` is read as JSON, whose escapes and numbers YAML takes otherwise.

    Raises:
        UsageError: missing, neither YAML nor JSON, or not a mapping.
    """
    import yaml

    try:
        text = path.read_text()
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise UsageError(f"{path}: not {kind}: {' '.join(str(error).split())}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected a mapping of settings, found a {type(value).__name__}")
    return {str(key).replace("-", "_"): item for key, item in value.items()}
