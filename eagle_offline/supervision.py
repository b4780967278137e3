"""From the target's hidden state to what supervises a draft: the head and the projected distribution.

Capture, cache and objectives all come here, so the numbers that are stored and the numbers that are compared are
made by the same arithmetic: operands as stored, products accumulated and kept in float32, ties to the lower id.
This module knows no model class and no file format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rows of the head multiplied at once: bounds the float32 copy of a bf16 head on a CPU to 32 MiB at H 4096.
HEAD_CHUNK_ROWS = 2048


@dataclass(frozen=True)
class Head:
    """What a target applies to its final hidden state to get logits.

    ``z = f(scale · (W h + b))`` with ``f(x) = soft_cap · tanh(x / soft_cap)`` when ``soft_cap`` is set. Rows that
    are removed by `select` stay in the order of the ids given.

    Attributes:
        weight: float ``[V, H]``, in the dtype it is stored in.
        bias: float ``[V]`` or None.
        scale: factor on the logits (Cohere's ``logit_scale``; Granite's ``1 / logits_scaling``).
        soft_cap: Gemma's final logit soft-capping, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Head:
        """Return the head on ``device``, its tensors cast to ``dtype`` when given."""
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return replace(self, weight=self.weight.to(device, dtype), bias=bias)

    def select(self, token_ids: Tensor) -> Head:
        """Return the head restricted to the rows ``token_ids`` (int64 ``[Vd]``)."""
        ids = token_ids.to(self.weight.device)
        return replace(self, weight=self.weight[ids], bias=None if self.bias is None else self.bias[ids])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 ``[N, V]`` (float64 for a float64 head) for hidden states ``[N, H]``."""
        chunks = range(0, self.vocab_size, HEAD_CHUNK_ROWS)
        rows = [self._chunk_logits(hidden, slice(start, start + HEAD_CHUNK_ROWS)) for start in chunks]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def argmax_and_log_normalizer(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the full vocabulary's int32 ``[N]`` argmax (ties to the lower id) and float32 ``[N]`` log Σ exp z.

        Args:
            hidden: ``[N, H]`` final hidden states as stored. Memory stays at some chunks of ``N × HEAD_CHUNK_ROWS``.
        """
        argmax, log_normalizer, _ = self.statistics(hidden, torch.zeros(self.vocab_size, dtype=torch.bool))
        return argmax, log_normalizer

    def statistics(self, hidden: Tensor, selected_token_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `argmax_and_log_normalizer`, and float32 ``[N]`` the probability inside a vocabulary.

        Args:
            hidden: as there.
            selected_token_mask: bool ``[V]``, true inside.
        """
        count = hidden.shape[0]
        best = torch.full((count,), -torch.inf, device=hidden.device)
        argmax = torch.zeros(count, dtype=torch.int32, device=hidden.device)
        # Σ exp(z - best) over all tokens so far, and over those inside: what both are asked for comes of one exp.
        sums = torch.zeros(count, 2, device=hidden.device)
        inside = selected_token_mask.to(hidden.device)
        counted = torch.stack([torch.ones_like(inside), inside], dim=-1).float()
        num_rows = _statistics_rows(count, hidden.device)
        for start in range(0, self.vocab_size, num_rows):
            chunk = slice(start, start + num_rows)
            logits = self._chunk_logits(hidden, chunk).float()
            top = logits.amax(dim=-1)
            better = top > best
            argmax = torch.where(better, (_lowest_argmax(logits, top) + start).to(torch.int32), argmax)
            highest = torch.where(better, top, best)
            sums = sums * (best - highest).exp().unsqueeze(-1)
            sums += logits.sub_(highest.unsqueeze(-1)).exp_() @ counted[chunk]
            best = highest
        return argmax, best + sums[:, 0].log(), sums[:, 1] / sums[:, 0]

    def _chunk_logits(self, hidden: Tensor, chunk: slice) -> Tensor:
        logits = _matmul_float32(hidden, self.weight[chunk])
        if self.bias is not None:
            logits = logits + self.bias[chunk].to(logits.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits


def _statistics_rows(count: int, device: torch.device) -> int:
    """Return how many rows of the head are multiplied at once with so many states, for their statistics.

    A GPU takes as long to be told of a small product as to do it; its float32 logits stay below half a gigabyte.
    """
    if device.type == "cpu":
        return HEAD_CHUNK_ROWS
    return max(HEAD_CHUNK_ROWS, min(16384, (1 << 27) // max(count, 1)))


def _lowest_argmax(logits: Tensor, maximum: Tensor) -> Tensor:
    """Return int64 ``[N]``: the lowest index that attains the row's maximum, on every device."""
    return (logits == maximum.unsqueeze(-1)).to(torch.uint8).argmax(dim=-1)


def _matmul_float32(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return ``hidden @ weight.T`` accumulated and kept in float32 (float64 when both are)."""
    if hidden.dtype == torch.float64 and weight.dtype == torch.float64:
        return hidden @ weight.T
    half = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    if half and hidden.is_cuda:
        with torch.autocast("cuda", enabled=False):
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    # float32 products here are exact float32, never TF32: that flag is off unless someone turned it on.
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden.float() @ weight.float().T


def compute_target_distribution(
    target_logits: Tensor,
    selected_token_ids: Tensor,
    selected_token_mask: Tensor,
    loss_mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Project full-vocabulary logits to the draft vocabulary and find which positions supervise.

    Args:
        target_logits: float ``[B, T, V]``.
        selected_token_ids: int64 ``[Vd]``, strictly increasing.
        selected_token_mask: bool or integer ``[V]``, 1 on the selected ids.
        loss_mask: ``[B, T]``, 1 where the token was produced by the assistant.

    Returns:
        ``target_probs``: float32 ``[B, T, Vd]`` (float64 for float64 logits), a softmax over the selected ids only;
        ``position_mask``: bool ``[B, T, 1]``, the loss mask where the full-vocabulary argmax is a selected id.
    """
    wide = target_logits if target_logits.dtype == torch.float64 else target_logits.float()
    target_probs = wide[..., selected_token_ids].softmax(dim=-1)
    argmax = _lowest_argmax(wide, wide.max(dim=-1).values)
    position_mask = loss_mask.bool() & selected_token_mask.bool()[argmax]
    return target_probs, position_mask.unsqueeze(-1)


def chosen_inside(target_argmax: Tensor, selected_token_mask: Tensor) -> Tensor:
    """Return bool, like ``target_argmax``: where the target's choice is known to lie inside a vocabulary.

    Args:
        target_argmax: int64 token ids; -1 where the choice is not known, or known to lie outside.
        selected_token_mask: bool ``[V]``, true inside.

    Example:
        >>> chosen_inside(torch.tensor([2, 0, -1]), torch.tensor([False, False, True])).tolist()
        [True, False, False]
    """
    return selected_token_mask[target_argmax.clamp_min(0)] & (target_argmax >= 0)


def supervised_positions(loss_mask: Tensor) -> Tensor:
    """Return bool ``[T]``: where a sample's target supervision is stored, ``m_t ∨ m_{t+1}``.

    Position ``t`` with ``m_{t+1}`` alone predicts the first token of an answer; it is kept so that a gate on that
    token stays possible.

    Example:
        >>> supervised_positions(torch.tensor([0, 0, 1, 1, 0])).int().tolist()
        [0, 1, 1, 1, 0]
    """
    mask = loss_mask.bool()
    following = torch.zeros_like(mask)
    following[:-1] = mask[1:]
    return mask | following
