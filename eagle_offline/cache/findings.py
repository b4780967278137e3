"""What a look at a whole cache found, as records: problems, harmless notes, and how much was read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Something in a cache that is not as it was written: where, what, and the way out; of a shard, its number."""

    where: str
    what: str
    way_out: str
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.way_out}"


@dataclass(frozen=True)
class Note:
    """Something beside a cache that does it no harm."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Verification:
    """What was found in a cache, and how much was read for it.

    Attributes:
        problems: in the order of files, then of shards.
        notes: what does no harm.
        num_shards, num_samples: that are sound.
        num_bytes: read, of files and shards.
        seconds: it took.
    """

    problems: list[Problem]
    notes: list[Note]
    num_shards: int
    num_samples: int
    num_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it as `verify --json` prints it."""
        problems = [{"where": p.where, "what": p.what, "way_out": p.way_out} for p in self.problems]
        return {**asdict(self), "problems": problems}

    def render_text(self) -> str:
        """Return it as lines to read: problems, notes, and what was read."""
        found = f"{len(self.problems)} problems" if self.problems else "no problems"
        read = f"{self.num_bytes / 1e6:.1f} MB read in {self.seconds:.1f} s"
        return "\n".join(
            [
                *map(str, self.problems),
                *(f"note: {note}" for note in self.notes),
                f"{found}; {self.num_shards} shards with {self.num_samples} samples are sound; {read}",
            ]
        )
