"""How fast are shuffled samples read into batches, beside a bare memory map, and beside bare zstd?

Three ways. *stored*: planes unpacked and laid where a GPU copies from, as training on a GPU does. *decoded*: values on
the CPU, as `open_cache(path)[i]` gives them. *memory map*: the same number of bytes of the same file copied by plain
NumPy. Compressed encodings also beside the bare decoder on the same frames, and beside that decoder with the bytes that
are not compressed copied as well: nothing can be faster.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import zstandard

from benchmarks.caches import IDENTITY_DIGEST, write_synthetic_shard
from benchmarks.harness import Figures, alternating_seconds
from benchmarks.states import chat_lengths
from eagle_offline.cache import codec
from eagle_offline.cache.arrow import ArrowShardReader
from eagle_offline.cache.choices import EncodingChoice
from eagle_offline.cache.layout import FieldLayout, SampleTable
from eagle_offline.cache.samples import StoredSample, decode_fields, stored_columns
from eagle_offline.cache.stored_states import StoredStates, num_bytes

NAME = "read_speed"
QUESTION = __doc__

_CHOICES = {
    "raw": EncodingChoice(state_encoding="raw"),
    "planes": EncodingChoice(),
    "mantissa4": EncodingChoice(mantissa_bits=4),
    "fp8": EncodingChoice(state_encoding="fp8"),
}


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return one case an encoding, and one of threads; all of it is the CPU's work."""
    if device != "cpu":
        return {}
    single = {name: lambda choice=choice: measure(choice) for name, choice in _CHOICES.items()}
    return {**single, "planes-2-threads": lambda: measure_threads(_CHOICES["planes"], 2), "fp8-over-raw": compare_fp8}


class _Shard:
    """A shard of synthetic samples, open, and room that has been written to before: fresh pages cost more."""

    def __init__(self, directory: Path, choice: EncodingChoice, num_samples: int, hidden_size: int):
        lengths = chat_lengths(num_samples, seed=1, longest=1024)
        self.path = directory / f"shard-{choice.state_encoding}"
        self.tokens, longest = int(lengths.sum()), int(lengths.max())
        self.table: SampleTable
        self.fields: list[FieldLayout]
        self.table, self.num_bytes, self.fields = write_synthetic_shard(self.path, lengths, choice, hidden_size)
        self.order = np.random.Generator(np.random.PCG64(0)).permutation(num_samples)
        self.reader = ArrowShardReader(self.path, self.fields, 0, IDENTITY_DIGEST)
        self._longest = longest
        self._map = np.memmap(self.path, np.uint8, mode="r")
        self._bounds = np.linspace(0, self.num_bytes, num_samples + 1).astype(np.int64)

    def room(self) -> torch.Tensor:
        """Return memory for the values of any sample's field, every page of it touched."""
        sizes = [self.num_bytes]
        for field in self.fields:
            sizes += [field.row_bytes * self._longest, num_bytes((field,), self._longest)]
        return torch.ones(max(sizes), dtype=torch.uint8)

    def samples(self, verify: bool = False) -> Iterator[StoredSample]:
        """Yield the samples, shuffled."""
        for index in self.order:
            stored = self.reader.read(self.table.record_batch[index], self.table.row[index])
            if verify and stored.digest() != self.table.digest[index]:
                raise AssertionError("digest differs")
            yield stored

    def read_stored(self, room: torch.Tensor, verify: bool = False) -> None:
        """Lay every field's planes where a GPU copies from."""
        for stored in self.samples(verify):
            for field, columns in stored_columns(self.fields, stored):
                count = stored.num_rows(field)
                places = StoredStates((field,), count, room).places(0, count, 0)
                codec.unpack_into(field, columns, places, framed=stored.framed)

    def read_decoded(self, room: torch.Tensor, verify: bool = False) -> None:
        """Decode every field and touch its values."""
        for stored in self.samples(verify):
            for values in decode_fields(self.fields, stored).values():
                room[: values.nbytes].copy_(values.view(-1).view(torch.uint8))

    def read_map(self, room: torch.Tensor) -> None:
        """Copy as many bytes of the file, sample by sample."""
        place = room.numpy()
        for index in self.order:
            content = self._map[self._bounds[index] : self._bounds[index + 1]]
            place[: len(content)] = content

    def parts(self) -> tuple[list[tuple[memoryview, int]], list[memoryview]]:
        """Return all frames with the size of their content, and all columns that are not compressed."""
        framed, plain = [], []
        for stored in self.samples():
            for field, columns in stored_columns(self.fields, stored):
                for content, width, name in zip(
                    columns, codec.plane_widths(field), codec.column_names(field), strict=True
                ):
                    if name.endswith(".exponent"):
                        framed.append((content, stored.num_rows(field) * width))
                    else:
                        plain.append(content)
        return framed, plain


def measure(choice: EncodingChoice, num_samples: int = 12, hidden_size: int = 4096, repeats: int = 7) -> Figures:
    """Return tokens a second and shares of the bare ways, page cache warm, one thread, values touched."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as directory:
            shard = _Shard(Path(directory), choice, num_samples, hidden_size)
            room = shard.room()
            framed, plain = shard.parts()
            decompressor, place = zstandard.ZstdDecompressor(), room.numpy()

            def bare_zstd() -> None:
                for content, size in framed:
                    with decompressor.stream_reader(content) as stream:
                        stream.readinto(place[:size])

            def bare_zstd_and_copy() -> None:
                bare_zstd()
                for content in plain:
                    place[: len(content)] = np.frombuffer(content, np.uint8)

            ways: dict[str, Callable[[], object]] = {
                "stored": lambda: shard.read_stored(room),
                "stored_verified": lambda: shard.read_stored(room, verify=True),
                "decoded": lambda: shard.read_decoded(room),
                "decoded_verified": lambda: shard.read_decoded(room, verify=True),
            }
            bare: dict[str, Callable[[], object]] = {"memmap": lambda: shard.read_map(room)}
            if framed:
                bare |= {"zstd": bare_zstd, "zstd_and_copy": bare_zstd_and_copy}
            seconds = alternating_seconds({**ways, **bare}, repeats=repeats)
    finally:
        torch.set_num_threads(threads)
    return {
        **{f"share_of_{base}_{way}": seconds[base] / seconds[way] for base in bare for way in ways},
        **{f"tokens_per_second_{way}": shard.tokens / seconds[way] for way in [*ways, *bare]},
        "memmap_gigabytes_per_second": shard.num_bytes / seconds["memmap"] / 1e9,
        "bytes_per_token": shard.num_bytes / shard.tokens,
    }


def measure_threads(
    choice: EncodingChoice, num_threads: int, num_samples: int = 12, hidden_size: int = 4096, repeats: int = 7
) -> Figures:
    """Return how much more several threads read in the same time than one, and what bare copying gains by them."""
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(num_threads) as pool:
        shard = _Shard(Path(directory), choice, num_samples, hidden_size)
        rooms = [shard.room() for _ in range(num_threads)]

        def on_threads(function: Callable[[torch.Tensor], object], count: int) -> None:
            list(pool.map(function, rooms[:count]))

        seconds = alternating_seconds(
            {
                "one": lambda: on_threads(shard.read_stored, 1),
                "several": lambda: on_threads(shard.read_stored, num_threads),
                "map_one": lambda: on_threads(shard.read_map, 1),
                "map_several": lambda: on_threads(shard.read_map, num_threads),
            },
            repeats=repeats,
        )
    return {
        "speedup": num_threads * seconds["one"] / seconds["several"],
        "speedup_of_memmap": num_threads * seconds["map_one"] / seconds["map_several"],
        "threads": num_threads,
        "tokens_per_second": num_threads * shard.tokens / seconds["several"],
    }


def compare_fp8(num_samples: int = 12, hidden_size: int = 4096, repeats: int = 7) -> Figures:
    """Return how many times the tokens of ``raw`` are read in the same time as ``fp8``, as stored."""
    with tempfile.TemporaryDirectory() as directory:
        shards = {name: _Shard(Path(directory), _CHOICES[name], num_samples, hidden_size) for name in ("raw", "fp8")}
        ways: dict[str, Callable[[], object]] = {}
        for name, shard in shards.items():
            room = shard.room()
            ways[name] = lambda shard=shard, room=room: shard.read_stored(room)
            ways[f"{name}_verified"] = lambda shard=shard, room=room: shard.read_stored(room, verify=True)
        seconds = alternating_seconds(ways, repeats=repeats)
    return {
        "stored": seconds["raw"] / seconds["fp8"],
        "stored_verified": seconds["raw_verified"] / seconds["fp8_verified"],
        **{f"seconds_{name}": value for name, value in seconds.items()},
    }
