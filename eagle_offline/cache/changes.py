"""What a conversion is asked for, and what it makes of each float field and of each sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from eagle_offline.cache import codec
from eagle_offline.cache.choices import EncodingChoice
from eagle_offline.cache.encodings import encoding_of
from eagle_offline.cache.formats import frames_columns
from eagle_offline.cache.layout import LAST_HIDDEN_STATE, TARGET_PROBS, FieldLayout
from eagle_offline.cache.manifest import CaptureIdentity, Manifest
from eagle_offline.cache.reader import Cache
from eagle_offline.cache.samples import EncodingErrors, StoredSample, stored_columns
from eagle_offline.config import ConvertSettings
from eagle_offline.errors import DataError, EagleOfflineError, UsageError

if TYPE_CHECKING:
    import torch

# Whose values each stored dtype holds without rounding.
_HOLDS = {"bf16": {"bf16"}, "fp16": {"fp16"}, "fp32": {"bf16", "fp16", "fp32"}}

# What each target encoding can be made from.
_MADE_FROM = {"factored": {"factored"}, "dense": {"factored", "dense"}, "topk": {"factored", "dense", "topk"}}


@dataclass(frozen=True)
class FieldChange:
    """A float field of a result and the field of the source that it is made from; the same one if nothing changes."""

    source: FieldLayout
    result: FieldLayout

    @property
    def is_kept(self) -> bool:
        return self.source == self.result

    @property
    def is_projected(self) -> bool:
        """Whether probabilities are made from final states."""
        return self.source.name == LAST_HIDDEN_STATE and self.result.name == TARGET_PROBS

    @property
    def rounds(self) -> bool:
        """Whether the source's values do not fit the result's dtype."""
        return self.source.dtype not in _HOLDS[self.result.dtype]

    @property
    def loses(self) -> bool:
        """Whether values may come out other than they went in."""
        own = codec.losses_of(self.result.model_copy(update={"losses": ()}))
        return not self.is_kept and (self.rounds or bool(own))


def choice_of(settings: ConvertSettings, capture: CaptureIdentity) -> EncodingChoice:
    """Return how the result stores what it stores: as asked for, else as the source does.

    Mantissa bits alone ask for planes.

    Raises:
        UsageError: choices that exclude one another, or what the source cannot give any more.
    """
    states, target = capture.fields[0], capture.fields[-1]
    dtype = settings.dtype or capture.dtype
    # Mantissa bits are of planes: who asks for some asks for them.
    as_they_are = capture.state_encoding if settings.mantissa_bits is None else "planes"
    state_encoding = settings.state_encoding or as_they_are
    target_encoding = settings.target_encoding or capture.target_encoding
    format_ = settings.format or capture.format
    if state_encoding == "planes" and settings.dtype is None and dtype != "bf16":
        raise UsageError(
            f"--state-encoding planes stores bf16 only, {settings.cache} has {dtype}: add --dtype bf16, which rounds"
        )
    if capture.target_encoding not in _MADE_FROM[target_encoding]:
        raise UsageError(
            f"--target-encoding {target_encoding}: {settings.cache} has {capture.target_encoding} only, and what that "
            "left out cannot come back; leave the flag out"
        )
    if settings.top_k is not None and target.top_k is not None and settings.top_k > target.top_k:
        raise UsageError(f"--top-k {settings.top_k}: {settings.cache} kept {target.top_k} only; expected no more")
    return EncodingChoice(
        dtype=dtype,
        state_encoding=state_encoding,
        mantissa_bits=settings.mantissa_bits or (states.mantissa_bits if state_encoding == "planes" else None),
        target_encoding=target_encoding,
        top_k=settings.top_k or (target.top_k if target_encoding == "topk" else None),
        format=format_,
        compressor=settings.compressor or (capture.compressor if format_ == "zarr" else None),
    )


def range_of(settings: ConvertSettings, count: int) -> range:
    """Return which of the ``count`` samples of the source are to be taken.

    Raises:
        UsageError: no such range.
    """
    if settings.samples is None:
        return range(count)
    match = re.fullmatch(r"(\d*):(\d*)", settings.samples.strip())
    first, last = (int(match[1] or 0), int(match[2] or count)) if match else (0, 0)
    if not first < last <= count:
        raise UsageError(
            f"--samples {settings.samples}: expected FIRST:LAST with FIRST < LAST, both at most {count}, "
            f"the samples of {settings.cache}"
        )
    return range(first, last)


def layers_of(settings: ConvertSettings, capture: CaptureIdentity) -> list[int]:
    """Return the decoder layers that the result has.

    Raises:
        UsageError: not all of them are in the source.
    """
    if settings.aux_layer_ids is None:
        return capture.aux_layer_ids
    asked = list(settings.aux_layer_ids)
    if not asked or asked != [layer_id for layer_id in capture.aux_layer_ids if layer_id in asked]:
        raise UsageError(
            f"--aux-layer-ids {' '.join(map(str, asked)) or '(none)'}: expected layers of {settings.cache}, strictly "
            f"increasing; it has {' '.join(map(str, capture.aux_layer_ids))}"
        )
    return asked


def field_changes(choice: EncodingChoice, layer_ids: Sequence[int], source: Manifest) -> list[FieldChange]:
    """Return what becomes of the source's float fields, in the result's order.

    Raises:
        UsageError: more probabilities are to be kept than the draft vocabulary has tokens.
    """
    capture = source.identity.capture
    present, target = {field.name: field for field in capture.fields}, capture.fields[-1]
    vocab_size = target.width if target.name == TARGET_PROBS else source.defaults.draft_vocabulary.size
    asked = choice.fields(layer_ids, source.identity.target.hidden_size, vocab_size)
    return [_change(present.get(field.name, target), field) for field in asked]


def _change(source: FieldLayout, asked: FieldLayout) -> FieldChange:
    if asked.model_copy(update={"losses": source.losses}) == source:
        return FieldChange(source, source)
    losses = codec.losses_of(source)
    if FieldChange(source, asked).rounds and losses[-1:] != (asked.dtype,):
        losses = (*losses, asked.dtype)
    return FieldChange(source, asked.model_copy(update={"losses": losses}))


class SampleConverter:
    """Makes samples of the result from samples of the source, one at a time.

    Args:
        source: the cache to convert.
        changes: of every float field of the result, in its order.
        format_: of the result's shards.
    """

    def __init__(self, source: Cache, changes: Sequence[FieldChange], format_: str):
        self._source, self._changes = source, changes
        self._framed = frames_columns(format_)
        projects = any(change.is_projected for change in changes)
        self._head = source.head.select(source.selected_token_ids) if projects else None

    def convert(self, number: int, errors: EncodingErrors) -> StoredSample:
        """Return a sample as the result stores it.

        Args:
            number: of the sample in the source.
            errors: is told what encoding costs against the source's values.

        Raises:
            DataError: the sample is not what the source's record says. EagleOfflineError: it does not fit the dtype.
        """
        index, stored = self._source.index, self._source.read_stored(number)
        own = {field.name: columns for field, columns in stored_columns(self._source_fields, stored)}
        try:
            columns = [
                column
                for change in self._changes
                for column in self._columns(change, stored, own[change.source.name], errors)
            ]
        except DataError as error:
            file = self._source.path / self._source.shard_file(int(self._source.shards[number]))
            raise DataError(f"{file}: sample {stored.sample_id}: {error}") from error
        return replace(
            stored,
            columns=columns,
            framed=self._framed,
            num_in_vocab=int(index.num_in_vocab[number]),
            vocab_mass=float(index.vocab_mass[number]),
        )

    @property
    def _source_fields(self) -> list[FieldLayout]:
        return self._source.manifest.identity.capture.fields

    def _columns(
        self, change: FieldChange, stored: StoredSample, own: list[memoryview], errors: EncodingErrors
    ) -> Sequence[bytes | memoryview]:
        compresses = any(column.compressible for column in encoding_of(change.source).columns(change.source))
        if change.is_kept and (stored.framed == self._framed or not compresses):
            return own
        values = self._values(change, stored, own)
        if change.rounds and not bool(values.to(codec.torch_dtype(change.result)).isfinite().all()):
            raise EagleOfflineError(
                f"sample {stored.sample_id}: {change.source.name} has values beyond the range of "
                f"{change.result.dtype}; choose another --dtype"
            )
        encoded = codec.encode(change.result, values, framed=self._framed)
        if change.loses:
            views = [memoryview(column) for column in encoded]
            errors.add(change.result, codec.unpack(change.result, views, len(values), framed=self._framed), values)
        return encoded

    def _values(self, change: FieldChange, stored: StoredSample, own: list[memoryview]) -> torch.Tensor:
        import torch

        planes = codec.unpack(change.source, own, stored.num_rows(change.source), framed=stored.framed)
        values = codec.merge(change.source, [torch.from_numpy(plane) for plane in planes])
        if not change.is_projected:
            return values
        assert self._head is not None
        with torch.inference_mode():
            return self._head.logits(values).softmax(dim=-1)
