"""States that travel as stored hold the values that were stored, and merge to them row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eagle_offline.cache import codec, encodings
from eagle_offline.cache.layout import FieldLayout
from eagle_offline.cache.stored_states import StoredStates, merge_rows, merged_layout, num_bytes

# More rows than are merged at a time, twice, and not a multiple of it.
MANY_ROWS = 2 * encodings.MERGED_VALUES // 64 + 37


def layout(name: str, width: int, encoding: str = "planes") -> FieldLayout:
    return FieldLayout(name=name, width=width, dtype="bf16", encoding=encoding, rows="tokens")  # type: ignore[arg-type]


def values_of(num_rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-32768, 32768, (num_rows, width), generator=generator).to(torch.int16).view(torch.bfloat16)


def planes_of(field: FieldLayout, values: torch.Tensor) -> list[np.ndarray]:
    return codec.unpack(field, [memoryview(column) for column in codec.encode(field, values)], len(values))


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int16)


@pytest.mark.parametrize("encodings", [("planes", "planes"), ("raw", "raw"), ("planes", "raw")])
@pytest.mark.parametrize("counts", [(0,), (1,), (5, 0, 9), (MANY_ROWS, 3)])
def test_rows_put_side_by_side_merge_to_their_values(encodings, counts):
    fields = tuple(layout(f"aux_{number}", 64 - 13 * number, encoding) for number, encoding in enumerate(encodings))
    parts = [[values_of(count, field.width, 7 * place) for field in fields] for place, count in enumerate(counts)]
    expected = torch.cat([torch.cat(part, dim=-1) for part in parts])
    stored = StoredStates(fields, sum(counts), torch.full((num_bytes(fields, sum(counts)),), 99, dtype=torch.uint8))
    held = (merged_layout(fields),)
    merged = StoredStates(held, sum(counts), torch.full((num_bytes(held, sum(counts)),), 99, dtype=torch.uint8))
    start = 0
    for part, count in zip(parts, counts, strict=True):
        for number, (field, values) in enumerate(zip(fields, part, strict=True)):
            for place, plane in zip(
                stored.places(start, start + len(values), number), planes_of(field, values), strict=True
            ):
                place[...] = plane
            merge_rows(merged, start, fields, number, planes_of(field, values))
        start += count
    assert torch.equal(bits(stored.merge()), bits(expected))
    assert torch.equal(bits(merged.merge()), bits(expected))
    assert merged.merge().untyped_storage().data_ptr() == merged.content.data_ptr() or not sum(counts)


def test_merging_on_a_cpu_and_as_a_device_does_are_the_same_bits():
    field = layout("aux_0", 64)
    values = values_of(MANY_ROWS, 64, 1)
    planes = [torch.from_numpy(plane.copy()) for plane in planes_of(field, values)]
    assert torch.equal(bits(codec.merge(field, planes)), bits(values))
    assert torch.equal(bits(encodings.encoding_of(field).merge(field, planes)), bits(values))


def test_every_plane_begins_where_any_value_may():
    fields = (layout("aux_0", 3), layout("aux_1", 5, "raw"))
    states = StoredStates(fields, 7, torch.zeros(num_bytes(fields, 7), dtype=torch.uint8))
    starts = [plane.storage_offset() for _, planes in states.planes() for plane in planes]
    assert starts == [0, 64, 128]
    assert num_bytes(fields, 7) == 256  # 7 rows of 10 bytes, and what is left of two lines


def test_fields_of_several_dtypes_do_not_merge_into_one():
    other = FieldLayout(name="aux_1", width=4, dtype="fp32", encoding="raw", rows="tokens")
    with pytest.raises(ValueError, match=r"bf16.*fp32"):
        merged_layout((layout("aux_0", 4), other))
