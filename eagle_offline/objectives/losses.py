"""Per-position losses between a draft's logits and the target's distribution, and their means.

Each function here is the plain form; anything fused or chunked must agree with it.
"""

from __future__ import annotations

from torch import Tensor


def soft_cross_entropy(logits: Tensor, target_probs: Tensor) -> Tensor:
    """Return ``[…]``: ``−Σ_v p_v log softmax(logits)_v`` for logits and probabilities ``[…, Vd]``."""
    return -(target_probs * _wide(logits).log_softmax(dim=-1)).sum(dim=-1)


def masked_soft_cross_entropy(logits: Tensor, target_probs: Tensor, position_mask: Tensor) -> Tensor:
    """Return the mean soft cross-entropy over the supervised positions, 0 when there are none.

    Args:
        logits: float ``[B, T, Vd]``, the draft's.
        target_probs: float ``[B, T, Vd]``.
        position_mask: ``[B, T, 1]``, 1 or true where supervised.
    """
    return masked_mean(soft_cross_entropy(logits, target_probs), position_mask.squeeze(-1).bool())


def kl_div_loss(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return ``[…]``: ``KL(softmax(target_logits) ‖ softmax(logits))`` for logits ``[…, Vd]``, in nats."""
    log_target = _wide(target_logits).log_softmax(dim=-1)
    return (log_target.exp() * (log_target - _wide(logits).log_softmax(dim=-1))).sum(dim=-1)


def overlap(logits: Tensor, target_probs: Tensor) -> Tensor:
    """Return ``[…]``: ``α = Σ_v min(p_v, softmax(logits)_v)``, the acceptance rate under sampling.

    Source: LK losses, arXiv 2602.23881.
    """
    return target_probs.minimum(_wide(logits).softmax(dim=-1)).sum(dim=-1)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of ``values`` where ``mask`` is set; whatever stands elsewhere, NaN included, is ignored."""
    return values.masked_fill(~mask, 0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``values`` where ``mask`` is set, 0 when it is set nowhere."""
    return masked_sum(values, mask) / mask.sum().clamp_min(1)


def _wide(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32, float64 kept."""
    return tensor if tensor.dtype.itemsize >= 8 else tensor.float()
