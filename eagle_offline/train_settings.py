"""Settings of training: the draft, the objective, the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, field_validator, model_validator

from eagle_offline.config import Location, Settings, listed, setting
from eagle_offline.errors import UsageError

REPORTERS = ("tensorboard", "wandb")


class RunSettings(Settings):
    """What is trained on, for how long, and what is written."""

    cache: tuple[Location, ...] = setting(
        ...,
        "Cache to train from, a directory or URL; several of one target are mixed.",
        flags=("--cached-target-path",),
        min_length=1,
    )
    cache_weights: tuple[float, ...] | None = setting(
        None, "How often an epoch goes through each cache, such as 1 0.5; default once through all."
    )
    output_dir: Path = setting(..., "Where checkpoints and metrics go.")
    heldout_cache: Location | None = setting(None, "Cache to validate on instead of a share of --cache.")
    heldout_share: float = setting(
        0.02, "Share of the documents kept out of training, unless --heldout-cache is given.", ge=0, lt=1
    )
    num_epochs: int = setting(10, "Passes over the cache.", flags=("--epochs",), gt=0)
    max_steps: int | None = setting(None, "Stop after this many optimizer steps.", gt=0)
    learning_rate: float = setting(1e-4, "Peak learning rate.", flags=("--lr",), gt=0)
    min_learning_rate_ratio: float = setting(0.1, "Final learning rate as a share of the peak.", ge=0, le=1)
    warmup_ratio: float = setting(0.03, "Share of the steps in which the rate rises.", ge=0, le=1)
    weight_decay: float = setting(0.0, "AdamW weight decay.", ge=0)
    beta1: float = setting(0.9, "AdamW β1.", ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW β2.", ge=0, lt=1)
    max_grad_norm: float = setting(0.5, "Gradients are clipped to this norm.", gt=0)
    tokens_per_batch: int = setting(8192, "Token budget of one pack.", gt=0)
    global_batch: int = setting(1, "Packs an optimizer step.", gt=0)
    seed: int = setting(0, "Order of samples, weights at the start, held-out choice.", ge=0, lt=1 << 31)
    device: str | None = setting(None, "Torch device; default cuda if there is one, else cpu.")
    recompute: bool = setting(
        False, "Recompute each unroll step, or layer of P-EAGLE, when going back: less memory, a third more time."
    )
    deterministic: bool = setting(False, "On CUDA, kernels with a fixed order only, so that resuming is bit-exact.")
    local_cache: Path | None = setting(
        None, "Where shards of a cache in an object store are kept on this machine; default in the user's cache."
    )
    local_cache_size: ByteSize = setting(ByteSize(100 * 10**9), "How much of them, such as 200GB.", gt=0)
    num_workers: int = setting(2, "Threads that read and lay out packs ahead.", gt=0)
    eval_every: int | None = setting(None, "Validate every so many steps; default once an epoch.", gt=0)
    early_stopping: int | None = setting(
        None, "Stop after so many validations in a row without a longer walked accept length.", gt=0
    )
    checkpoint_every: int = setting(500, "Checkpoint every so many steps; also at the end and when stopped.", gt=0)
    checkpoint_minutes: float | None = setting(None, "Checkpoint also after so many minutes without one.", gt=0)
    checkpoint_epochs: bool = setting(False, "Checkpoint also at the end of each epoch.")
    keep_checkpoints: int = setting(2, "How many of the last checkpoints stay, beside the best.", gt=0)
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop", "A step with a loss or gradient that is not finite: stop, or leave it out and record its samples."
    )
    log_every: int = setting(10, "Write a metrics line every so many steps.", gt=0)
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = setting(
        (), "Also report metrics to tensorboard or wandb; metrics.jsonl is always written."
    )
    profile: bool = setting(False, "Record a few steps with the profiler as a trace below the run.")
    verify: bool = setting(True, "Check each sample's digest when it is first read.")
    allow_partial: bool = setting(False, "Train on the shards that are there.")
    resume: bool = setting(False, "Go on from the latest checkpoint; safe on an empty directory.")
    accept_drift: tuple[str, ...] = setting(
        (), "With --resume: settings that may differ from the recorded ones, such as learning-rate."
    )

    @field_validator("cache", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("cache_weights", "report_to", "accept_drift", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return listed(value)


class DraftSettings(Settings):
    """What the draft is made of. Left alone, it is one Llama layer as wide as the target, on all captured layers."""

    num_draft_layers: int | None = setting(None, "Decoder layers of the draft; default 1, of P-EAGLE 4.", gt=0)
    layer_style: Literal["llama", "qwen3"] = setting(
        "llama", "qwen3: queries and keys are normalised; vLLM and speculators load it, SGLang does not."
    )
    draft_hidden_size: int | None = setting(
        None, "Width of the draft; default the target's. Another one is exported in the flat layout only.", gt=0
    )
    draft_intermediate_size: int | None = setting(None, "Width of its feed-forward; default the target's.", gt=0)
    draft_num_attention_heads: int | None = setting(None, "Its attention heads; default the target's.", gt=0)
    draft_num_key_value_heads: int | None = setting(None, "Its key-value heads; default the target's.", gt=0)
    aux_layer_ids: tuple[int, ...] | None = setting(
        None, "Captured layers that the draft reads, 0-based; default all that the cache holds."
    )
    draft_vocab_size: int | None = setting(
        None,
        "Choose the draft's tokens anew, this many, by their count in the cache; default the cache's choice.",
        gt=0,
    )
    draft_vocab: Path | None = setting(
        None, "File of the draft's token ids, one a line, or a cache whose choice is taken over."
    )
    fc_norm: bool = setting(False, "Normalise each aux state before its projection (EAGLE-3.1).")
    norm_output: bool = setting(False, "Feed the normed state to the next step (EAGLE-3.1).")
    train_embeddings: bool = setting(False, "Train the token embeddings, which otherwise stay the target's.")
    head_start: Literal["target", "random"] = setting("target", "What the draft's head starts from.")
    init_from: str | None = setting(
        None, "Start from the weights of this draft: a run, a checkpoint, or a directory that engines load."
    )

    @field_validator("aux_layer_ids", mode="before")
    @classmethod
    def _split_ids(cls, value: Any) -> Any:
        return listed(value)


class ObjectiveSettings(Settings):
    """What is minimised."""

    objective: Literal["eagle3", "peagle"] = setting(
        "eagle3", "What is trained: eagle3 drafts a token a forward, peagle (P-EAGLE) all of them in one."
    )
    ttt_steps: int = setting(7, "EAGLE-3: unroll steps of test-time training.", flags=("--ttt-length",), gt=0, le=32)
    step_decay: float = setting(0.8, "EAGLE-3: weight of an unroll step relative to the one before.", gt=0, le=1)
    num_depths: int = setting(8, "P-EAGLE: tokens predicted in one forward.", gt=0, le=32)
    down_sample_ratio: float = setting(
        0.7, "P-EAGLE: of each depth's positions, this share is trained on at the next depth.", gt=0, le=1
    )
    down_sample_ratio_min: float = setting(0.2, "P-EAGLE: share of the positions that every depth keeps.", ge=0, le=1)
    depth_weights: tuple[float, ...] | None = setting(
        None, "P-EAGLE: weight of a position at each depth, --num-depths numbers; default all 1."
    )
    depth_mean: Literal["elements", "depths"] = setting(
        "elements", "P-EAGLE: one mean over all positions of all depths, or the mean of a mean for each depth."
    )
    sequence_partitions: int | None = setting(
        None,
        "P-EAGLE: a pack's deeper predictions are made in so many parts, one after the other: less memory in about the "
        "same time; default as many as keep a part no larger than the pack.",
        gt=0,
        le=1024,
    )
    mask_token_id: int | None = setting(
        None,
        "P-EAGLE: token that stands for those not known yet; default the target's mask token, or one that is reserved, "
        "beyond its tokenizer's, for padding or otherwise not in the data.",
        ge=0,
    )
    supervision_gate: Literal["input", "predicted", "both"] = setting(
        "input", "Which slots count: those whose input token the assistant wrote, whose predicted one, or both."
    )
    lk_loss_type: Literal["alpha", "lambda"] | None = setting(
        None, "EAGLE-3: LK loss instead of cross-entropy: -log of the overlap, or a blend that turns to the overlap."
    )
    lk_kl_scale: float = setting(1.0, "Largest share of soft cross-entropy in the lambda loss.", ge=0, le=1)
    lk_kl_decay: float = setting(3.0, "How fast that share falls as the overlap grows.", ge=0)

    @property
    def num_steps(self) -> int:
        """How many tokens the draft is trained to predict: unroll steps, or depths."""
        return self.num_depths if self.objective == "peagle" else self.ttt_steps

    @field_validator("depth_weights", mode="before")
    @classmethod
    def _split_weights(cls, value: Any) -> Any:
        return listed(value)


# Settings that one objective alone asks for, beside those of `DraftSettings` that only an unroll can follow.
_OF_EAGLE3 = ("ttt_steps", "step_decay", "lk_loss_type", "lk_kl_scale", "lk_kl_decay", "norm_output")
_OF_PEAGLE = (
    "num_depths", "down_sample_ratio", "down_sample_ratio_min", "depth_weights", "depth_mean", "sequence_partitions",
    "mask_token_id",
)  # fmt: skip


class TrainSettings(ObjectiveSettings, DraftSettings, RunSettings):
    """Training of a draft from a cache; the target is never loaded."""

    @property
    def num_layers(self) -> int:
        """Decoder layers of the draft: 1, or 4 where all tokens come of one forward."""
        return self.num_draft_layers or (4 if self.objective == "peagle" else 1)

    @model_validator(mode="after")
    def _of_the_objective(self) -> TrainSettings:
        others = _OF_EAGLE3 if self.objective == "peagle" else _OF_PEAGLE
        for name in others:
            if getattr(self, name) != type(self).model_fields[name].default:
                other = "eagle3" if self.objective == "peagle" else "peagle"
                raise UsageError(
                    f"train --{name.replace('_', '-')} has no meaning for --objective {self.objective}: leave it out, "
                    f"or give --objective {other}"
                )
        weights = self.depth_weights
        if weights is not None:
            if len(weights) != self.num_depths:
                raise UsageError(
                    f"train --depth-weights has {len(weights)} values for --num-depths {self.num_depths}: give one each"
                )
            if not all(0 <= weight < math.inf for weight in weights) or not weights[0]:
                raise UsageError(
                    "train --depth-weights: expected finite numbers from 0, the first above it: a round that fails at "
                    "its first token accepts nothing"
                )
        return self

    @model_validator(mode="after")
    def _agree(self) -> TrainSettings:
        if self.early_stopping is not None and self.heldout_cache is None and not self.heldout_share:
            raise UsageError("train --early-stopping needs held-out documents: give --heldout-share or --heldout-cache")
        if self.init_from is not None and self.head_start == "random":
            raise UsageError("train --init-from brings a head with it: leave --head-start out")
        if self.draft_vocab is not None and self.draft_vocab_size is not None:
            raise UsageError("train --draft-vocab and --draft-vocab-size: give one of the two")
        return self
