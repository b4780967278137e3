"""What each encoding keeps of a value, in which bytes, and what comes back: against oracles of exact arithmetic."""

from __future__ import annotations

import math
import random
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline.cache import codec, encodings
from eagle_offline.cache.choices import EncodingChoice
from eagle_offline.cache.layout import FieldLayout
from eagle_offline.errors import DataError
from tests.oracles import encodings as oracle

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Half a unit in the last place, relative: what rounding to the dtype may cost.
HALF_ULP = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}
HALF_SMALLEST = {"bf16": 2.0**-134, "fp16": 2.0**-25, "fp32": 2.0**-150}
MANTISSA_BITS = range(1, 8)


def layout(width: int, encoding: str, dtype: str = "bf16", **more: Any) -> FieldLayout:
    return FieldLayout(name="aux_1", width=width, dtype=dtype, encoding=encoding, rows="tokens", **more)  # type: ignore[arg-type]


def kinds(width: int) -> list[FieldLayout]:
    """Every encoding of every dtype that may have it."""
    return [
        *(layout(width, "raw", dtype) for dtype in TORCH),
        *(layout(width, "planes", mantissa_bits=bits) for bits in MANTISSA_BITS),
        *(layout(width, "fp8", dtype) for dtype in TORCH),
        *(layout(width, "topk", dtype, top_k=k) for dtype in TORCH for k in sorted({1, max(1, width // 2), width})),
    ]


def name_of(field: FieldLayout) -> str:
    bits = f"-{field.mantissa_bits}" if field.encoding == "planes" else ""
    return f"{field.encoding}{bits}-{field.dtype}" + (f"-{field.top_k}-of-{field.width}" if field.top_k else "")


def columns_of(field: FieldLayout, values: torch.Tensor, framed: bool = False) -> list[bytes]:
    return [bytes(column) for column in codec.encode(field, values, framed=framed)]


def planes_of(field: FieldLayout, columns: list[bytes], num_rows: int) -> list[np.ndarray]:
    return codec.unpack(field, [memoryview(column) for column in columns], num_rows, framed=False)


def tensors(planes: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(plane.copy()) for plane in planes]


def there_and_back(field: FieldLayout, values: torch.Tensor) -> torch.Tensor:
    return codec.merge(field, tensors(planes_of(field, columns_of(field, values), len(values))))


def expected_of(field: FieldLayout, columns: list[bytes], num_rows: int) -> torch.Tensor:
    """What the columns mean, by the oracle."""
    dtype = TORCH[field.dtype]
    bits, k = field.mantissa_bits, field.top_k or 0
    return oracle.decoded(field.encoding, columns, num_rows, field.width, dtype, bits, k)


def from_words(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.uint16).view(np.int16).copy()).view(torch.bfloat16)


def to_words(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[other.element_size()]
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))
    )


def finite_words(generator: np.random.Generator, num_rows: int, width: int) -> np.ndarray:
    words = generator.integers(0, 65536, (num_rows, width), dtype=np.uint16)
    return np.where((words & 0x7F80) == 0x7F80, words & 0xBFFF, words)


def states(num_rows: int, width: int, seed: int, dtype: str = "bf16") -> torch.Tensor:
    """Heavy-tailed values with a massive channel."""
    generator = np.random.default_rng(seed)
    values = generator.standard_t(4, (num_rows, width))
    values[:, seed % width] *= 300
    return torch.from_numpy(values).to(TORCH[dtype])


def probabilities(num_rows: int, width: int, seed: int, dtype: str = "fp32", sharpness: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    return logits.softmax(dim=-1).to(TORCH[dtype])


def values_for(field: FieldLayout, num_rows: int, seed: int) -> torch.Tensor:
    make = probabilities if field.encoding == "topk" else states
    return make(num_rows, field.width, seed, field.dtype)


# --- all encodings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 13, 64])
def test_columns_take_the_bytes_that_the_format_promises(width):
    for field in kinds(width):
        item, packed = ITEM_BYTES[field.dtype], oracle.round_up(width) // 8
        bits = field.mantissa_bits + 1
        expected = {
            "raw": (item * width,),
            "planes": (width, width if bits == 8 else packed * bits),
            "fp8": (width, 4),
            "topk": (item * (field.top_k or 0), 2 * (field.top_k or 0), 4),
        }[field.encoding]
        assert codec.plane_widths(field) == expected, name_of(field)
        for num_rows in (0, 1, 5):
            columns = columns_of(field, values_for(field, num_rows, 3))
            assert [len(column) for column in columns] == [size * num_rows for size in expected], name_of(field)
    assert codec.plane_widths(layout(4096, "planes", mantissa_bits=4)) == (4096, 4096 * 5 // 8)


@pytest.mark.parametrize("width", [1, 2, 13, 70])
@pytest.mark.parametrize("num_rows", [0, 1, 6])
def test_every_way_to_merge_gives_the_values_that_the_bytes_mean(width, num_rows):
    """As the oracle reads them, as a tensor's columns, and into rows that stand apart, with nothing else written."""
    for field in kinds(width):
        columns = columns_of(field, values_for(field, num_rows, width))
        expected = expected_of(field, columns, num_rows)
        planes = planes_of(field, columns, num_rows)
        merged = codec.merge(field, tensors(planes))
        assert same_bits(merged, expected), name_of(field)
        assert same_bits(encodings.encoding_of(field).merge(field, tensors(planes)), expected), name_of(field)
        for gap in (0, 3 * ITEM_BYTES[field.dtype]):
            whole = np.full((num_rows + 2, field.row_bytes + 2 * gap), 99, np.uint8)
            before = whole.copy()
            codec.merge_into(field, planes, whole[1 : 1 + num_rows, gap : gap + field.row_bytes])
            before[1 : 1 + num_rows, gap : gap + field.row_bytes] = encodings.bytes_of(expected)
            np.testing.assert_array_equal(whole, before, name_of(field))


@pytest.mark.parametrize("width", [64, 1000])
def test_rows_beyond_a_block_are_merged_like_any_others(width):
    num_rows = 2 * encodings.MERGED_VALUES // width + 37
    for field in (
        *(layout(width, "planes", mantissa_bits=bits) for bits in (7, 4, 2)),
        layout(width, "fp8"),
        layout(width, "fp8", "fp32"),
        layout(width, "topk", top_k=9),
        layout(width, "topk", "fp16", top_k=9),
    ):
        few = values_for(field, 53, 1)
        small = there_and_back(field, few)
        values = few.repeat(num_rows // 53 + 1, 1)[:num_rows]
        expected = small.repeat(num_rows // 53 + 1, 1)[:num_rows]
        planes = planes_of(field, columns_of(field, values), num_rows)
        assert same_bits(codec.merge(field, tensors(planes)), expected), name_of(field)
        whole = np.full((num_rows, field.row_bytes + 8), 99, np.uint8)
        codec.merge_into(field, planes, whole[:, 4:-4])
        np.testing.assert_array_equal(whole[:, 4:-4], encodings.bytes_of(expected), name_of(field))
        assert (whole[:, :4] == 99).all()
        assert (whole[:, -4:] == 99).all()


def test_one_row_wider_than_a_block_is_merged():
    width = encodings.MERGED_VALUES + 9
    for field in (layout(width, "planes", mantissa_bits=3), layout(width, "fp8"), layout(width, "topk", top_k=5)):
        values = values_for(field, 2, 1)
        planes = planes_of(field, columns_of(field, values), 2)
        out = np.zeros((2, field.row_bytes), np.uint8)
        codec.merge_into(field, planes, out)
        np.testing.assert_array_equal(out, encodings.bytes_of(codec.merge(field, tensors(planes))))


@pytest.mark.parametrize("field", kinds(21), ids=name_of)
def test_a_row_is_encoded_alike_in_any_company(field):
    """Bytes are identity: a row alone, among others, and a second time."""
    values = values_for(field, 9, 5)
    values[3] = values[2]
    together = columns_of(field, values)
    assert columns_of(field, values) == together
    alone = [columns_of(field, values[row : row + 1]) for row in range(9)]
    assert [b"".join(parts) for parts in zip(*alone, strict=True)] == together


@pytest.mark.parametrize("field", kinds(21), ids=name_of)
def test_bytes_do_not_depend_on_how_values_lie_in_memory(field):
    values = values_for(field, 9, 5)
    apart = torch.full((18, 50), 0.25, dtype=values.dtype)
    apart[::2, 1:43:2] = values
    for same in (apart[::2, 1:43:2], values.T.contiguous().T):
        assert columns_of(field, same) == columns_of(field, values)


@pytest.mark.parametrize("field", [f for f in kinds(24) if f.encoding in ("raw", "planes")], ids=name_of)
def test_wider_values_are_first_rounded_to_the_dtype(field):
    noise = torch.rand(7, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = (values_for(field, 7, 2).double() * (1 + 1e-3 * noise)).float().double()
    narrow = values.to(TORCH[field.dtype])
    assert narrow.dtype == torch.float32 or not torch.equal(narrow.double(), values)
    for wide in (values, values.float()):
        assert columns_of(field, wide) == columns_of(field, narrow)


@pytest.mark.parametrize("field", kinds(24), ids=name_of)
def test_values_are_left_as_they_were_and_their_bytes_are_copies(field):
    values = values_for(field, 5, 2)
    copy = values.clone()
    columns = codec.encode(field, values, framed=False)
    before = [bytes(column) for column in columns]
    assert same_bits(values, copy)
    values.zero_()
    assert [bytes(column) for column in columns] == before


@pytest.mark.parametrize("field", kinds(24), ids=name_of)
def test_frames_hold_the_plain_columns(field):
    values = values_for(field, 11, 4)
    plain, framed = columns_of(field, values), columns_of(field, values, framed=True)
    for number, (one, other) in enumerate(zip(plain, framed, strict=True)):
        if field.encoding == "planes" and number == 0:
            assert pa.decompress(other, len(one), codec="zstd", asbytes=True) == one
        else:
            assert one == other
    unpacked = codec.unpack(field, [memoryview(column) for column in framed], 11)
    for plane, column in zip(unpacked, plain, strict=True):
        assert plane.tobytes() == column
    for plane, column in zip(planes_of(field, plain, 11), plain, strict=True):
        assert plane.tobytes() == column


@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("field", kinds(9), ids=name_of)
def test_columns_of_another_size_are_refused(field, framed):
    whole = columns_of(field, values_for(field, 5, 6), framed)
    for claimed in (0, 4, 6, 10**6):
        with pytest.raises(DataError, match="aux_1"):
            codec.unpack(field, [memoryview(column) for column in whole], claimed, framed=framed)
    for number in range(len(whole)):
        for wrong in (whole[number][:-1], whole[number] + b"\0", b""):
            columns = [*whole[:number], wrong, *whole[number + 1 :]]
            with pytest.raises(DataError, match="aux_1"):
                codec.unpack(field, [memoryview(column) for column in columns], 5, framed=framed)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@given(st.data())
@settings(max_examples=120, deadline=None)
def test_arbitrary_bytes_of_the_right_size_merge_alike_or_are_refused(data):
    """Nothing outside is written, nothing but a `DataError` is raised, and both ways to merge agree."""
    field = data.draw(st.sampled_from([field for width in (1, 13, 70) for field in kinds(width)]), label="field")
    num_rows = data.draw(st.integers(0, 4), label="rows")
    noise = random.Random(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    columns = [noise.randbytes(size * num_rows) for size in codec.plane_widths(field)]
    try:
        planes = planes_of(field, columns, num_rows)
        merged = encodings.encoding_of(field).merge(field, tensors(planes))
        whole = np.full((num_rows + 2, field.row_bytes + 8), 99, np.uint8)
        codec.merge_into(field, planes, whole[1:-1, 4:-4])
    except DataError:
        return
    assert merged.dtype == TORCH[field.dtype]
    assert merged.shape == (num_rows, field.width)
    assert whole[:, :4].tolist() == whole[:, -4:].tolist() == [[99] * 4] * (num_rows + 2)
    assert (whole[[0, -1]] == 99).all()
    found = encodings.values_of(torch.from_numpy(whole[1:-1, 4:-4].copy()), merged.dtype, field.width)
    torch.testing.assert_close(found, merged, rtol=0, atol=0, equal_nan=True)


def test_e4m3_bytes_that_are_not_numbers_merge_alike_everywhere():
    """None is ever written; a stranger's bytes may hold them."""
    field = layout(2, "fp8")
    planes = planes_of(field, [b"\x7f\xff", struct.pack("<f", 1.0)], 1)
    out = np.zeros((1, 4), np.uint8)
    codec.merge_into(field, planes, out)
    found = encodings.values_of(torch.from_numpy(out), torch.bfloat16, 2)
    expected = encodings.encoding_of(field).merge(field, tensors(planes))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_what_is_lossy_says_so():
    assert codec.losses_of(layout(8, "planes")) == ()
    assert codec.losses_of(layout(8, "raw", "fp16")) == ()
    assert codec.losses_of(layout(8, "fp8")) != ()
    for bits in range(1, 7):
        assert str(bits) in codec.losses_of(layout(8, "planes", mantissa_bits=bits))[-1]
    assert "5" in codec.losses_of(layout(8, "topk", top_k=5))[-1]
    assert codec.losses_of(layout(8, "raw", losses=("fp8",))) == ("fp8",)
    assert codec.losses_of(layout(8, "planes", mantissa_bits=2, losses=("fp8",)))[0] == "fp8"
    assert codec.losses_of(layout(8, "planes", mantissa_bits=1)) == ("1 mantissa bit",)


@pytest.mark.parametrize(
    ("earlier", "is_further"),
    [
        (("3 mantissa bits",), False),
        (("5 mantissa bits",), False),
        (("3 mantissa bits", "fp16"), False),
        (("3 mantissa bits", "6 mantissa bits"), False),
        (("6 mantissa bits",), True),
        (("3 mantissa bits", "fp8"), True),
        (("bf16",), True),
    ],
)
def test_rounding_what_was_rounded_as_far_is_no_further_loss(earlier, is_further):
    rounded = codec.losses_of(layout(8, "planes", mantissa_bits=5, losses=earlier))
    assert rounded == ((*earlier, "5 mantissa bits") if is_further else earlier)


def test_all_mantissa_bits_are_an_exact_choice():
    assert EncodingChoice(mantissa_bits=7) == EncodingChoice()


# --- planes ----------------------------------------------------------------------------------------------------------


FINITE = np.array([word for word in range(65536) if word & 0x7F80 != 0x7F80], np.uint16)


@pytest.mark.parametrize("bits", MANTISSA_BITS)
def test_every_finite_bf16_is_rounded_to_nearest_with_ties_to_even(bits):
    values = from_words(FINITE).reshape(-1, 255)
    found = there_and_back(layout(255, "planes", mantissa_bits=bits), values)
    np.testing.assert_array_equal(to_words(found).reshape(-1), oracle.rounded_words(bits)[FINITE])


def test_the_rounding_by_hand():
    """Carries into the exponent, out of the subnormals, ties both ways, the end of the range, zeros of both signs."""
    cases = {
        (0x3FFF, 3): 0x4000,  # 1.9921875 → 2
        (0x3F88, 3): 0x3F80,  # 1.0625, half of 1/8: to even, down
        (0x3F98, 3): 0x3FA0,  # 1.1875: to even, up
        (0x3F89, 3): 0x3F90,
        (0x007F, 1): 0x0080,  # the largest subnormal → the smallest normal
        (0x0001, 4): 0x0000,  # the smallest subnormal
        (0x0004, 4): 0x0000,  # half a step: to even, zero
        (0x0005, 4): 0x0008,
        (0x000C, 4): 0x0010,
        (0x7F7F, 7): 0x7F7F,
        (0x7F7F, 3): 0x7F70,  # never infinity
        (0x7F7F, 1): 0x7F40,
        (0x7F60, 1): 0x7F40,
        (0x0000, 2): 0x0000,
    }
    for (word, bits), expected in cases.items():
        for sign in (0, 0x8000):
            assert oracle.rounded_word(word | sign, bits) == expected | sign
            back = there_and_back(layout(1, "planes", mantissa_bits=bits), from_words(np.array([[word | sign]])))
            assert int(to_words(back)[0, 0]) == expected | sign, (hex(word | sign), bits)


@pytest.mark.parametrize("bits", MANTISSA_BITS)
def test_the_relative_error_of_normals_is_half_a_unit_of_the_kept_mantissa(bits):
    words = FINITE[(FINITE & 0x7F80) >= 0x0080]
    below = FINITE[(FINITE & 0x7F80) == 0]
    field = layout(1, "planes", mantissa_bits=bits)
    exact = from_words(words)[:, None]
    back = there_and_back(field, exact).double()
    relative = ((back - exact.double()) / exact.double()).abs().squeeze(-1)
    # What would overflow takes the largest value and may be a whole unit away.
    top = (words & 0x7FFF) > (0x7F7F & ~((1 << 7 - bits) - 1))
    assert float(relative[torch.from_numpy(~top)].max()) <= 2.0 ** -(bits + 1)
    assert float(relative.max()) <= 2.0**-bits
    tiny = from_words(below)[:, None]
    moved = (there_and_back(field, tiny).double() - tiny.double()).abs()
    assert float(moved.max()) <= 2.0**-126 * 2.0 ** -(bits + 1) * (bits < 7)
    assert back.isfinite().all()


@pytest.mark.parametrize("bits", MANTISSA_BITS)
@pytest.mark.parametrize("width", [1, 5, 8, 67])
def test_planes_are_exponents_and_packed_low_codes(bits, width):
    words = finite_words(np.random.default_rng(bits), 6, width)
    rounded = oracle.rounded_words(bits)[words]
    rows = [oracle.planes_row(row.tolist(), bits) for row in rounded]
    field = layout(width, "planes", mantissa_bits=bits)
    assert codec.column_names(field) == ["aux_1.exponent", "aux_1.mantissa"]
    assert columns_of(field, from_words(words)) == [b"".join(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("bits", MANTISSA_BITS)
def test_rounding_again_changes_nothing(bits):
    field = layout(255, "planes", mantissa_bits=bits)
    once = there_and_back(field, from_words(FINITE).reshape(-1, 255))
    assert same_bits(there_and_back(field, once), once)
    finer = there_and_back(layout(255, "planes", mantissa_bits=min(bits + 1, 7)), once)
    assert same_bits(finer, once)


@given(st.sampled_from(MANTISSA_BITS), st.integers(0, 4), st.integers(1, 70), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_any_finite_rows_come_back_rounded(bits, num_rows, width, seed):
    words = finite_words(np.random.default_rng(seed), num_rows, width)
    back = there_and_back(layout(width, "planes", mantissa_bits=bits), from_words(words).reshape(num_rows, width))
    np.testing.assert_array_equal(to_words(back), oracle.rounded_words(bits)[words])


@pytest.mark.parametrize("field", [f for f in kinds(4) if f.encoding != "raw"], ids=name_of)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_does_not_crash(field):
    """Capture refuses such values; what they become is not promised."""
    values = torch.tensor([[math.inf, 1.0, -math.inf, 0.25], [math.nan, 0.5, -2.0, 0.0]], dtype=TORCH[field.dtype])
    assert there_and_back(field, values).shape == (2, 4)


# --- fp8 -------------------------------------------------------------------------------------------------------------


def test_the_grid_is_e4m3():
    grid = oracle.E4M3_GRID
    assert grid == sorted(set(grid))
    assert (grid[0], grid[1], grid[8], grid[-1]) == (0.0, 2.0**-9, 2.0**-6, 448.0)
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    theirs = codes.view(torch.float8_e4m3fn).double()
    ours = torch.tensor([oracle.e4m3_value(code) for code in range(256)], dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert [oracle.e4m3_code(oracle.e4m3_value(code)) for code in range(127)] == list(range(127))
    assert [oracle.e4m3_code(value) for value in (1.0625, 1.1875, 500.0, -449.0)] == [0x38, 0x3A, 0x7E, 0xFE]


def test_rows_with_nothing_to_scale_come_back_as_zeros():
    """Where the largest magnitude over 448 is no normal float32 the scale is 1: 5e-36 is lost at most."""
    largest = 448 * 2.0**-126
    for row, is_kept in (([0.0, -0.0], False), ([largest, 0.0], False), ([1.01 * largest, 0.0], True)):
        field = layout(2, "fp8")
        values = torch.tensor([row], dtype=torch.float64).bfloat16()
        assert struct.unpack("<f", columns_of(field, values)[1]) != (0.0,)
        assert bool(there_and_back(field, values).any()) is is_kept


def fp8_rows(dtype: str) -> dict[str, list[float]]:
    """Rows of the kinds that break scales, rounded to the dtype."""
    largest = float(torch.finfo(TORCH[dtype]).max)
    smallest = {"bf16": 2.0**-133, "fp16": 2.0**-24, "fp32": 2.0**-149}[dtype]
    generator = np.random.default_rng(0)
    normal = generator.standard_normal(12).tolist()
    rows = {
        "zeros": [0.0] * 12,
        "zeros of both signs": [0.0, -0.0] * 6,
        "normal": normal,
        "one massive channel": [*normal[:11], 3000.0],
        "one massive negative channel": [-3000.0, *normal[:11]],
        "near the largest": [largest * share for share in (1, -1, 0.999, 0.5, 1e-3, 0, 1e-4, -0.7, 0.3, 0.01, 0.9, 1)],
        "only the largest": [largest] * 12,
        "the grid itself": [448.0, *oracle.E4M3_GRID[1:100:9]],
        "ties": [
            448.0,
            1.0625,
            1.1875,
            -1.0625,
            17.0,
            19.0,
            2.0**-10,
            3 * 2.0**-10,
            432.0,
            464.0 / 2,
            0.0,
            -(2.0**-10),
        ],
        "tiny": [smallest * number for number in (1, 2, 3, 5, 7, 11, 13, -17, 100, 127, 0, -1)],
        "the smallest": [smallest, 0.0, -smallest] * 4,
        "of every size": [2.0**-power for power in (0, 1, 3, 5, 7, 9, 11, 13, 14, 15, 16, 18)],
    }
    return {name: torch.tensor(row, dtype=torch.float64).to(TORCH[dtype]).tolist() for name, row in rows.items()}


def check_fp8(row: list[float], dtype: str, where: str) -> None:
    field = layout(len(row), "fp8", dtype)
    values = torch.tensor([row], dtype=torch.float64).to(TORCH[dtype])
    codes, scale = columns_of(field, values)
    expected, expected_scale = oracle.fp8_row(row)
    assert struct.unpack("<f", scale) == (expected_scale,), where
    for code, value, wanted in zip(codes, row, expected, strict=True):
        assert code & 0x7F != 0x7F, where
        if code != wanted and (code | wanted) & 0x7F:  # the sign of zero is not promised
            assert abs(code - wanted) == 1, where
            assert oracle.is_near_an_e4m3_tie(value / expected_scale), (where, value, code, wanted)
    back = there_and_back(field, values)
    assert back.isfinite().all(), where
    assert same_bits(back, oracle.fp8_values(codes, scale, TORCH[dtype])[None]), where
    # A sixteenth of a value, or half of the grid's first step; then float32 and the dtype round what comes back.
    for value, found in zip(row, back[0].double().tolist(), strict=True):
        bound = max(abs(value) * (2.0**-4 + 2.0**-24), expected_scale * 2.0**-10) * (1 + 2.0**-10)
        bound += HALF_ULP[dtype] * abs(found) + HALF_SMALLEST[dtype] + 2.0**-150
        bound = max(bound, 448 * 2.0**-126) if expected_scale == 1 else bound
        assert abs(found - value) <= bound, (where, value, found)
        assert found == 0 or value == 0 or math.copysign(1, found) == math.copysign(1, value), where


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", fp8_rows("bf16"))
def test_fp8_is_the_nearest_of_e4m3_under_a_scale_a_row(name, dtype):
    check_fp8(fp8_rows(dtype)[name], dtype, name)


@pytest.mark.parametrize("name", fp8_rows("bf16"))
def test_fp8_of_fp32_is_too(name):
    check_fp8(fp8_rows("fp32")[name], "fp32", name)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["bf16", "fp16", "fp32"]), st.integers(-120, 120))
@settings(max_examples=120, deadline=None)
def test_fp8_of_any_rows(seed, dtype, power):
    power = max(-20, min(power, 8)) if dtype == "fp16" else power
    generator = np.random.default_rng(seed)
    row = generator.standard_t(3, generator.integers(1, 40)) * 2.0**power
    check_fp8(torch.from_numpy(row).to(TORCH[dtype]).double().tolist(), dtype, f"{seed}")


@pytest.mark.slow
def test_fp8_of_every_bf16_beside_every_power_of_two():
    """Every finite bf16 as a row's value under scales of its own size and far larger ones."""
    for larger in range(0, 20, 3):
        values = from_words(FINITE[(FINITE > 0x0100) & (FINITE < 0x7000)])
        rows = torch.stack([values, (values.double() * 2.0**larger * 1.37).bfloat16()], dim=1)
        rows = rows[rows.isfinite().all(dim=1)]
        field = layout(2, "fp8")
        columns = columns_of(field, rows)
        assert same_bits(
            codec.merge(field, tensors(planes_of(field, columns, len(rows)))), expected_of(field, columns, len(rows))
        )
        for place, row in enumerate(rows.double().tolist()):
            expected, scale = oracle.fp8_row(row)
            found = columns[0][2 * place : 2 * place + 2]
            for code, wanted, value in zip(found, expected, row, strict=True):
                assert code == wanted or oracle.is_near_an_e4m3_tie(value / scale)


def test_an_error_of_one_row_stays_in_it():
    """A massive row beside a small one does not cost the small one anything."""
    small = states(1, 16, 3)
    field = layout(16, "fp8")
    alone = there_and_back(field, small)
    beside = there_and_back(field, torch.cat([small, 1e30 * torch.ones(1, 16).bfloat16(), small]))
    assert same_bits(beside[[0]], alone)
    assert same_bits(beside[[2]], alone)


# --- topk ------------------------------------------------------------------------------------------------------------


def parts_of(field: FieldLayout, row: torch.Tensor) -> tuple[list[float], list[int], float]:
    """What is stored of one row: kept values, places and tail."""
    kept, places, tail = columns_of(field, row[None])
    values = torch.frombuffer(bytearray(kept), dtype=TORCH[field.dtype]).double().tolist()
    wide = "H" if field.width <= 65536 else "i"
    return values, list(struct.unpack(f"<{field.top_k}{wide}", places)), struct.unpack("<f", tail)[0]


def check_top_k(field: FieldLayout, row: torch.Tensor) -> None:
    k, exact = field.top_k or 0, row.double().tolist()
    kept, places, tail = parts_of(field, row)
    assert places == sorted(set(places))
    assert all(0 <= place < field.width for place in places)
    assert kept == [exact[place] for place in places]
    assert sorted(kept, reverse=True) == sorted(exact, reverse=True)[:k]
    others = sum(value for place, value in enumerate(exact) if place not in set(places))
    assert tail == pytest.approx(others, rel=1e-6, abs=2.0**-20)  # not lost where it counts; see the test below
    back = there_and_back(field, row[None])[0]
    wanted = oracle.spread_row(kept, places, tail, field.width)
    torch.testing.assert_close(
        back.double(),
        torch.tensor(wanted, dtype=torch.float64).float().to(back.dtype).double(),
        rtol=HALF_ULP[field.dtype] * 1e-3 + 1.2e-7 * (field.dtype == "fp32"),
        atol=0,
    )
    for value, place in zip(kept, places, strict=True):
        assert float(back[place]) == value
    rest = [place for place in range(field.width) if place not in set(places)]
    assert len({float(back[place]) for place in rest}) <= 1
    slack = tail * (HALF_ULP[field.dtype] + 2e-7) + len(rest) * HALF_SMALLEST[field.dtype]
    assert abs(float(back.double().sum()) - sum(exact)) <= slack + abs(tail - others) + 1e-15


@given(
    st.integers(1, 60), st.integers(1, 60), st.sampled_from(list(TORCH)), st.integers(0, 2**32 - 1), st.integers(0, 12)
)
@settings(max_examples=150, deadline=None)
def test_top_k_keeps_the_largest_and_spreads_the_rest(width, k, dtype, seed, sharpness):
    field = layout(width, "topk", dtype, top_k=min(k, width))
    for row in probabilities(2, width, seed, dtype, sharpness):
        check_top_k(field, row)


def test_top_k_by_hand():
    row = torch.tensor([0.5, 0.125, 0.0625, 0.0, 0.25, 0.0625])
    field = layout(6, "topk", "fp32", top_k=3)
    assert codec.column_names(field) == ["aux_1.probs", "aux_1.ids", "aux_1.tail"]
    assert parts_of(field, row) == ([0.5, 0.125, 0.25], [0, 1, 4], 0.125)
    third = float(np.float32(0.125) / np.float32(3))
    assert there_and_back(field, row[None]).tolist() == [[0.5, 0.125, third, third, 0.25, third]]


@pytest.mark.parametrize("dtype", TORCH)
def test_keeping_all_is_exact(dtype):
    rows = probabilities(5, 33, 1, dtype)
    field = layout(33, "topk", dtype, top_k=33)
    assert same_bits(there_and_back(field, rows), rows)
    for row in rows:
        _, places, tail = parts_of(field, row)
        assert places == list(range(33))
        assert tail == pytest.approx(0, abs=1e-7)


def rows_with_ties(width: int) -> list[torch.Tensor]:
    """Rows of one value, of two, ties at the edge of what is kept, nothing at all, and all on one place."""
    two = torch.where(torch.arange(width) % 3 == 1, 2.0, 1.0)
    steps = 2.0 ** -(torch.arange(width).flip(0) // 5 % 20).float()
    even = torch.full((width,), 1 / width)
    return [even, two / two.sum(), steps / steps.sum(), torch.zeros(width), torch.eye(width)[3]]


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("width", [7, 64, 300])
def test_ties_are_kept_as_any_values(dtype, width):
    for row in rows_with_ties(width):
        for k in {1, 2, 5, width // 2, width - 1}:
            check_top_k(layout(width, "topk", dtype, top_k=k), row.to(TORCH[dtype]))


@pytest.mark.parametrize("width", [7, 64, 300])
def test_of_equals_the_lower_places_are_kept(width):
    """As everywhere: ties to the lower id, so that what is kept holds the stored argmax."""
    for row in rows_with_ties(width):
        for k in (1, 2, 5, width // 2, width - 1):
            found = parts_of(layout(width, "topk", top_k=k), row.bfloat16())[1]
            assert found == oracle.top_k_row(row.bfloat16().double().tolist(), k)[0]


@pytest.mark.parametrize("others", [1e-5, 1e-6, 1e-8])
def test_a_small_tail_keeps_its_digits(others):
    row = torch.tensor([others / 3, 1 - others, others / 5, others])
    _, places, tail = parts_of(layout(4, "topk", "fp32", top_k=1), row)
    assert places == [1]
    assert tail == pytest.approx(float(row.double().sum() - row[1].double()), rel=1e-5)


@pytest.mark.parametrize(("width", "item"), [(65535, 2), (65536, 2), (65537, 4)])
def test_places_are_as_wide_as_the_vocabulary_needs(width, item):
    row = torch.full((width,), 1e-7)
    for place, value in ((0, 0.25), (32768, 0.125), (width - 1, 0.5)):
        row[place] = value
    field = layout(width, "topk", "fp32", top_k=3)
    assert codec.plane_widths(field) == (12, 3 * item, 4)
    kept, places, tail = parts_of(field, row)
    assert places == [0, 32768, width - 1]
    assert kept == [0.25, 0.125, 0.5]
    assert tail == pytest.approx(1e-7 * (width - 3), rel=1e-4)
    columns = columns_of(field, row[None])
    back = codec.merge(field, tensors(planes_of(field, columns, 1)))
    assert back[0, places].tolist() == kept
    torch.testing.assert_close(back[0], row, rtol=1e-4, atol=0)
    out = np.zeros((1, field.row_bytes), np.uint8)
    codec.merge_into(field, planes_of(field, columns, 1), out)
    np.testing.assert_array_equal(out, encodings.bytes_of(back))


def test_the_divergence_from_the_exact_row_falls_as_more_is_kept():
    rows = probabilities(6, 80, 4, "fp32", 2.0)
    before = torch.full((6,), math.inf, dtype=torch.float64)
    for k in range(1, 81):
        back = there_and_back(layout(80, "topk", "fp32", top_k=k), rows).double()
        assert (back > 0).all()
        divergence = (rows.double() * (rows.double() / back).log()).sum(dim=-1)
        assert (divergence <= before + 1e-6).all(), k
        before = divergence
    assert before.abs().max() <= 1e-6


def ids_out_of_range(width: int) -> list[list[int]]:
    if width <= 65536:
        return [[width, 0], [65535, 1], [0, width]]
    return [[width, 0], [-1, 0], [-width - 1, 3], [2**31 - 1, -(2**31)]]


@pytest.mark.parametrize("width", [10, 65537])
@pytest.mark.parametrize("way", ["merge", "merge_into", "strided"])
def test_places_outside_the_row_write_nothing_outside_it(width, way):
    """A damaged file whose digest was made anew: refused in words, or values of some kind, and nothing else touched."""
    field = layout(width, "topk", "fp32", top_k=2)
    for ids in ids_out_of_range(width):
        columns = [struct.pack("<2f", 0.5, 0.25), struct.pack(f"<2{'H' if width <= 65536 else 'i'}", *ids)]
        columns = [column * 3 for column in (*columns, struct.pack("<f", 0.25))]
        whole = np.full((5, field.row_bytes + 8), 99, np.uint8)
        try:
            planes = planes_of(field, columns, 3)
            if way == "merge":
                assert codec.merge(field, tensors(planes)).shape == (3, width)
            elif way == "merge_into":
                codec.merge_into(field, planes, whole[1:4].reshape(-1)[: 3 * field.row_bytes].reshape(3, -1))
            else:
                codec.merge_into(field, planes, whole[1:4, 4:-4])
        except DataError:
            pass
        if way == "strided":
            assert (whole[:, :4] == 99).all()
            assert (whole[:, -4:] == 99).all()
        assert (whole[[0, 4]] == 99).all()


# --- what a user may choose ------------------------------------------------------------------------------------------


def test_choices_become_the_fields_they_name():
    choice = EncodingChoice(mantissa_bits=4, target_encoding="topk", top_k=10)
    fields = choice.fields([1, 3], 8, 32)
    assert [(field.name, field.encoding, field.mantissa_bits) for field in fields[:2]] == [
        ("aux_1", "planes", 4),
        ("aux_3", "planes", 4),
    ]
    assert (fields[2].encoding, fields[2].top_k, fields[2].width) == ("topk", 10, 32)
    dense = EncodingChoice(mantissa_bits=2, target_encoding="dense").fields([1], 8, 32)[-1]
    assert (dense.encoding, dense.mantissa_bits) == ("planes", 7)  # probabilities are never rounded as states may be
    assert EncodingChoice(state_encoding="fp8", target_encoding="dense").fields([1], 8, 32)[-1].encoding == "raw"
    assert EncodingChoice(target_encoding="topk").fields([1], 8, 32)[-1].top_k == 32
