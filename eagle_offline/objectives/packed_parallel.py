"""The P-EAGLE objective as training runs it: the numbers of the plain one, nothing computed twice, memory bounded.

Depth 0 runs once. Its keys, values and outputs are handed to the segments as tensors of their own, so that each
segment's graph ends there and is gone before the next begins; what the segments sent back to them goes through depth 0
at the end, in one pass. Sum of losses and of gradients are those of one forward over everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from eagle_offline.objectives.fused_loss import TargetRows, fused_loss
from eagle_offline.objectives.parallel_plan import ChainSegment, ParallelPlan
from eagle_offline.objectives.ttt import UnrollSums
from eagle_offline.objectives.ttt_loss import StepWeights


class Parallel(Protocol):
    """A draft at work; `eagle_offline.draft.parallel.PackedParallel` is one."""

    def context(self, aux_hidden_states: Tensor) -> Sequence[Tensor]: ...
    def chains(self, segment: ChainSegment, keys_and_values_of_context: Sequence[Tensor]) -> Tensor: ...


# A loss with gradient, and its sums; None for what is sent back through depth 0 and is no loss of its own.
Part = Callable[[], tuple[Tensor, UnrollSums | None]]


class PackedParallelLoss:
    """The loss of a pack, in parts: the loss of each is sent back before the next is asked for.

    Args:
        parallel: a fresh one, of the draft.
        normed: what stands between the draft's output and its head.
        head_weight: ``[Vd, H]``, of the draft's head.
        plan: what to compute.
        aux_hidden_states: gives ``[N, A·H]``.
        targets: the target's supervision.
        weights: what an element of each depth adds to the loss.
    """

    def __init__(
        self,
        parallel: Parallel,
        normed: Callable[[Tensor], Tensor],
        head_weight: Tensor,
        plan: ParallelPlan,
        aux_hidden_states: Callable[[], Tensor],
        targets: TargetRows,
        weights: StepWeights,
    ):
        self._parallel, self._normed, self._head_weight = parallel, normed, head_weight
        self._plan, self._targets, self._weights = plan, targets, weights
        self._aux = aux_hidden_states
        self._boundary: _Boundary | None = None

    def parts(self) -> list[Part]:
        """Return the parts in order: one a segment, and one that ends what gradients began; none without elements."""
        parts: list[Part] = [partial(self._segment, segment) for segment in self._plan.segments]
        return [*parts, self._end] if parts and torch.is_grad_enabled() else parts

    def _segment(self, segment: ChainSegment) -> tuple[Tensor, UnrollSums]:
        if self._boundary is None:
            self._boundary = _Boundary(self._parallel.context(self._aux()))
        first, *context = self._boundary.tensors
        chains = self._parallel.chains(segment, context)
        states = self._normed(torch.cat([first.index_select(0, segment.first_rows), chains]))
        sums = fused_loss(states, self._head_weight, segment.loss_rows, self._targets, self._weights)
        num_depths, num_slots = len(self._plan.step_counts), self._plan.num_slots

        def placed(rows: Tensor) -> Tensor:
            """Return ``[D, 1, N]``: rows at their depths and anchors, 0 elsewhere."""
            flat = torch.zeros(num_depths * num_slots, dtype=rows.dtype, device=rows.device)
            return flat.index_copy_(0, segment.loss_slots, rows).view(num_depths, 1, num_slots)

        overlaps = placed(sums.overlaps * segment.known)
        return sums.loss, UnrollSums(
            losses=sums.losses,
            counts=segment.step_counts,
            hits=placed(sums.hits).sum(dim=(1, 2)),
            overlaps=overlaps.sum(dim=(1, 2)),
            log_overlaps=sums.log_overlaps,
            step_hits=placed(sums.hits & segment.known),
            step_overlaps=overlaps,
            step_valid=placed(torch.ones_like(sums.hits)),
        )

    def _end(self) -> tuple[Tensor, None]:
        assert self._boundary is not None, "segments come before their end"
        return self._boundary.end(), None


class _Boundary:
    """Tensors that other graphs read, in whose stead they get leaves, and the gradients that came back to these.

    Args:
        made: the tensors, with their own graph; without one they are read as they are.

    Attributes:
        tensors: what to read.
    """

    def __init__(self, made: Sequence[Tensor]):
        self._made = made
        self._gradients: list[Tensor | None] = [None] * len(made)
        self.tensors = list(made)
        for place, tensor in enumerate(made):
            if tensor.requires_grad:
                leaf = self.tensors[place] = tensor.detach().requires_grad_()
                # It knows where gradients go and nothing else: a circle would keep a whole pack until Python looks.
                leaf.register_post_accumulate_grad_hook(partial(_take, self._gradients, place))

    def end(self) -> Tensor:
        """Return a scalar, itself 0, whose gradient is what came back."""
        pairs = [pair for pair in zip(self._made, self._gradients, strict=True) if pair[1] is not None]
        return _SentBack.apply([gradient for _, gradient in pairs], *(tensor for tensor, _ in pairs))


def _take(gradients: list[Tensor | None], place: int, leaf: Tensor) -> None:
    """Add a leaf's gradient to what came back before, and free the leaf of it."""
    before, gradient = gradients[place], leaf.grad
    leaf.grad = None
    if before is not None and gradient is not None:
        # Many segments add to one key: their shares are added up wide.
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        gradient = before.to(wide).add_(gradient)
    gradients[place] = gradient


class _SentBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, tensors, strict=True)]
        return gradients[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        return (None, *(gradient * upstream[0].to(gradient.dtype) for gradient in ctx.gradients))
