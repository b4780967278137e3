"""Which encodings a cache is to have: what a user may choose, and the columns that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eagle_offline.cache.layout import (
    EXACT_MANTISSA_BITS,
    LAST_HIDDEN_STATE,
    STORED_DTYPES,
    TARGET_PROBS,
    FieldLayout,
    aux_field,
)
from eagle_offline.errors import UsageError

StateEncoding = Literal["planes", "raw", "fp8"]
TargetEncoding = Literal["factored", "dense", "topk"]
ShardFormat = Literal["arrow", "zarr"]
Compressor = Literal["zstd", "blosc"]

DEFAULT_TOP_K = 64
DEFAULT_COMPRESSOR: Compressor = "zstd"


@dataclass(frozen=True)
class EncodingChoice:
    """How a cache stores what it stores.

    Attributes:
        dtype: of states and probabilities before they are encoded.
        state_encoding: of aux and final states, see `eagle_offline.cache.encodings`.
        mantissa_bits: of ``planes``, None for exact, which is what 7 becomes.
        target_encoding: what stands for the target's distribution.
        top_k: of ``topk``, None for the default.
        format, compressor: of the shards; a compressor for ``zarr`` only, None for the default.

    Raises:
        UsageError: choices that exclude one another; names the flags.
    """

    dtype: str = "bf16"
    state_encoding: StateEncoding = "planes"
    mantissa_bits: int | None = None
    target_encoding: TargetEncoding = "factored"
    top_k: int | None = None
    format: ShardFormat = "arrow"
    compressor: Compressor | None = None

    def __post_init__(self) -> None:
        encoding, dtype, bits = self.state_encoding, self.dtype, self.mantissa_bits
        if encoding == "planes" and dtype != "bf16":
            raise UsageError(f"--state-encoding planes stores bf16 only, not {dtype}: use --state-encoding raw")
        if bits is not None and encoding != "planes":
            raise UsageError(f"--mantissa-bits {bits} is for --state-encoding planes, not {encoding}: leave it out")
        if self.top_k is not None and self.target_encoding != "topk":
            raise UsageError(f"--top-k {self.top_k} is for --target-encoding topk: leave it out")
        if self.compressor is not None and self.format != "zarr":
            raise UsageError(f"--compressor {self.compressor} is for --format zarr: leave it out")
        if bits == EXACT_MANTISSA_BITS:
            object.__setattr__(self, "mantissa_bits", None)

    @property
    def zarr_compressor(self) -> Compressor | None:
        """What Zarr compresses with; None for another format."""
        return (self.compressor or DEFAULT_COMPRESSOR) if self.format == "zarr" else None

    def fields(self, aux_layer_ids: Sequence[int], hidden_size: int, draft_vocab_size: int) -> list[FieldLayout]:
        """Return the float columns of a cache.

        Raises:
            UsageError: more probabilities are to be kept than the draft vocabulary has tokens.
        """
        aux = [self._states(aux_field(layer_id), hidden_size, "tokens") for layer_id in aux_layer_ids]
        return [*aux, self._target(hidden_size, draft_vocab_size)]

    def _states(self, name: str, width: int, rows: Literal["tokens", "supervised_positions"]) -> FieldLayout:
        return FieldLayout(
            name=name,
            width=width,
            dtype=self._dtype(),
            encoding=self.state_encoding,
            rows=rows,
            mantissa_bits=EXACT_MANTISSA_BITS if self.mantissa_bits is None else self.mantissa_bits,
        )

    def _target(self, hidden_size: int, draft_vocab_size: int) -> FieldLayout:
        if self.target_encoding == "factored":
            return self._states(LAST_HIDDEN_STATE, hidden_size, "supervised_positions")
        top_k = (self.top_k or DEFAULT_TOP_K) if self.target_encoding == "topk" else None
        if self.top_k is not None and self.top_k > draft_vocab_size:
            raise UsageError(f"--top-k {self.top_k}: the draft vocabulary has {draft_vocab_size} tokens only")
        return FieldLayout(
            name=TARGET_PROBS,
            width=draft_vocab_size,
            dtype=self._dtype(),
            # Probabilities are never rounded as states may be.
            encoding="topk" if top_k else "planes" if self.state_encoding == "planes" else "raw",
            rows="supervised_positions",
            top_k=min(top_k, draft_vocab_size) if top_k else None,
        )

    def _dtype(self) -> Literal["bf16", "fp16", "fp32"]:
        assert self.dtype in STORED_DTYPES
        return self.dtype  # type: ignore[return-value]
