"""An estimate as a record: what was counted, what was measured, and what every choice would cost."""

from __future__ import annotations

from pydantic import Field

from eagle_offline.cache.choices import StateEncoding, TargetEncoding
from eagle_offline.cache.layout import Frozen


class Corpus(Frozen):
    """What is counted: samples, tokens, supervised tokens, positions with a stored target, and rows left out."""

    num_samples: int
    num_tokens: int
    num_supervised: int
    num_target_positions: int
    num_left_out: int


class Probe(Frozen):
    """What was measured on how much.

    Attributes:
        num_batches, num_tokens: timed; seconds: what the target took for them.
        num_nonfinite: samples among them with NaN or infinite states, which precompute would not store.
        tokens_per_second: of the target alone.
        disk_bytes_per_second: written durably; None where nothing could be written.
    """

    num_batches: int
    num_tokens: int
    seconds: float
    num_nonfinite: int
    tokens_per_second: float
    disk_bytes_per_second: float | None


class Cost(Frozen):
    """What one choice would cost.

    Attributes:
        state_encoding, mantissa_bits, target_encoding, top_k: the choice, as settings of precompute.
        chosen: it is the settings' own.
        num_bytes: of the whole cache; epoch_bytes: of it, what an epoch of training reads: the shards.
        disk_bytes: of the whole, what the disk has to hold at once: of what goes up to a store a shard only.
        bytes_per_token: of the shards.
        losses: of any column beyond its dtype; empty for an exact choice.
        state_error: root of ``Σ (x̂ − x)² / Σ x²`` over states, None without a probe; target_error: of probabilities.
        compressed_share: what compression left of the columns that compress, None where none does.
        hours: of one process on this device, None without a probe.
        fits: into what is free.
    """

    state_encoding: StateEncoding
    mantissa_bits: int | None
    target_encoding: TargetEncoding
    top_k: int | None
    chosen: bool
    num_bytes: int
    epoch_bytes: int
    disk_bytes: int
    bytes_per_token: float
    losses: list[str]
    state_error: float | None
    target_error: float | None
    compressed_share: float | None
    hours: float | None
    fits: bool

    @property
    def name(self) -> str:
        """Return the choice in words."""
        plural = "s" if self.mantissa_bits != 1 else ""
        bits = "" if self.mantissa_bits is None else f" {self.mantissa_bits} bit{plural}"
        top = "" if self.top_k is None else f" {self.top_k}"
        return f"{self.state_encoding}{bits} + {self.target_encoding}{top}"


class Estimate(Frozen):
    """What a precompute would cost, by every choice.

    Attributes:
        target: as given; device: where it would run.
        aux_layer_ids, hidden_size, draft_vocab_size: of what is stored.
        corpus, probe: what the figures come from; no probe was made when None.
        directory, free_bytes: where the cache would go, and what it may take there.
        fixed_bytes: of every choice: head, embeddings, tokens and the like.
        choices: from what loses nothing to what loses most.
        asked: how to go on with what the settings say; None where it does not fit.
        command: how to go on with the smallest exact choice that fits, else the best one that does; None for none.
        advice: why that one, or the way out.
    """

    target: str
    device: str
    aux_layer_ids: list[int]
    hidden_size: int
    draft_vocab_size: int
    corpus: Corpus
    probe: Probe | None
    directory: str
    free_bytes: int
    fixed_bytes: int
    choices: list[Cost] = Field(min_length=1)
    asked: str | None
    command: str | None
    advice: str
