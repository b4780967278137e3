"""How far a target's positions reach, and where its rotary frequencies change with the length of a forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from eagle_offline.errors import UsageError
from eagle_offline.target.layout import input_embeddings

# Tables of learned positions may have some rows before the first position.
_MOST_OFFSET_ROWS = 16


@dataclass(frozen=True)
class PositionLimits:
    """What a target's positions allow.

    Attributes:
        longest_row: rows of more tokens cannot be run; None without a bound.
        frequency_switch: rows of more tokens are run with other rotary frequencies (``longrope``), as is all that goes
            through the target with them; None where frequencies are fixed.
    """

    longest_row: int | None = None
    frequency_switch: int | None = None

    def check(self, longest: int) -> None:
        """Refuse a corpus that has longer rows than the target can run.

        Args:
            longest: tokens of the longest row.

        Raises:
            UsageError: there are; says which ``--seq-length`` cuts them.
        """
        if self.longest_row is not None and longest > self.longest_row:
            raise UsageError(
                f"the corpus has rows of up to {longest} tokens, the target's positions reach {self.longest_row}: "
                f"pass --seq-length {self.longest_row}"
            )


def position_limits(model: nn.Module) -> PositionLimits:
    """Return what the positions of ``model`` allow."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    trained = getattr(config, "max_position_embeddings", None)
    if not isinstance(trained, int):
        return PositionLimits()
    if _has_position_table(model, trained):
        return PositionLimits(longest_row=trained)
    for rope in _rope_settings(getattr(config, "rope_parameters", None)):
        # Under "dynamic" every length beyond the trained one has frequencies of its own.
        if rope.get("rope_type") == "dynamic":
            return PositionLimits(longest_row=trained)
        if rope.get("rope_type") == "longrope":
            return PositionLimits(frequency_switch=int(rope.get("original_max_position_embeddings") or trained))
    return PositionLimits()


def rotary_reach(text_config: Any) -> int | None:
    """Return how many rotary positions a target was made for; None without such positions, or without a bound.

    Those with scaled frequencies reach as far as their factor takes the original length, where they name it.
    """
    named = getattr(text_config, "max_position_embeddings", None)
    ropes = list(_rope_settings(getattr(text_config, "rope_parameters", None)))
    if not isinstance(named, int) or not ropes or getattr(text_config, "alibi", False):
        return None
    scaled = [
        int(float(rope.get("factor") or 1.0) * int(rope.get("original_max_position_embeddings") or named))
        for rope in ropes
    ]
    return max(named, *scaled)


def _has_position_table(model: nn.Module, trained: int) -> bool:
    """Return whether positions are looked up: learned ones, or GPT-J's fixed ones."""
    words = input_embeddings(model)
    learned = any(
        isinstance(module, nn.Embedding)
        and module is not words
        and ("position" in name or name.endswith("wpe"))
        and trained <= module.num_embeddings <= trained + _MOST_OFFSET_ROWS
        for name, module in model.named_modules()
    )
    fixed = any(name.endswith("embed_positions") and len(table) == trained for name, table in model.named_buffers())
    return learned or fixed


def _rope_settings(parameters: Any) -> Iterator[dict[str, Any]]:
    """Yield every rotary setting; some architectures have one for each type of layer."""
    if not isinstance(parameters, dict):
        return
    if "rope_type" in parameters:
        yield parameters
        return
    for nested in parameters.values():
        yield from _rope_settings(nested)
