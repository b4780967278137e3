"""Samples of a dump as if the target had just been run over them: what is stored of them and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from eagle_offline.importing.dumps import DumpedSample
from eagle_offline.importing.matching import Matching, check_same
from eagle_offline.importing.scan import DumpIndex
from eagle_offline.supervision import Head, supervised_positions
from eagle_offline.target.capture import CapturedBatch, TokenSample
from eagle_offline.target.supervise import Supervise


class Supervision(Protocol):
    """What becomes of a dumped sample's target, by name, at the positions it was read for."""

    def __call__(self, sample: DumpedSample) -> dict[str, Tensor]:
        """Return the tensors of a `CapturedBatch` by position."""


class DumpCapture:
    """Takes the place of the target where samples are made.

    Args:
        index: of the dump.
        matching: which of its samples is which row.
        aux_places: of the layers to store, where the dump has them.
        dtype: states are stored in.
        supervision: makes what stands for the target's distribution.
    """

    def __init__(
        self,
        index: DumpIndex,
        matching: Matching,
        aux_places: Sequence[int],
        dtype: torch.dtype,
        supervision: Supervision,
    ):
        self._index, self._matching, self._aux_places = index, matching, aux_places
        self._dtype, self._supervision = dtype, supervision

    def run(self, samples: Sequence[TokenSample]) -> list[CapturedBatch]:
        """Return samples, each by itself.

        Raises:
            DataError: states cannot be read, or are not those of the row.
        """
        return [self._run(sample) for sample in samples]

    def _run(self, tokens: TokenSample) -> CapturedBatch:
        number, first = int(self._matching.place[tokens.sample_id]), self._index.dump.first_position
        positions = supervised_positions(torch.from_numpy(tokens.loss_mask)).nonzero().squeeze(-1)
        sample = self._index.read(number, len(tokens.input_ids), positions)
        name = self._index.name_of(number)
        check_same(name, tokens.input_ids[first:], sample.input_ids, "token ids")
        if sample.loss_mask is not None:
            check_same(name, tokens.loss_mask[first:], sample.loss_mask, "loss mask")
        aux = [sample.aux_hidden_states[place].to(self._dtype) for place in self._aux_places]
        by_tokens = {f"aux_{place}": states for place, states in enumerate(aux)}
        by_tokens["finite"] = torch.stack([states.isfinite().all(dim=-1) for states in aux]).all(dim=0)
        by_positions = self._supervision(sample)
        return CapturedBatch([tokens], [len(positions)], lambda: (by_tokens, by_positions))


class FromFinalStates:
    """Supervision from final states that were dumped before the final norm.

    Args:
        final_norm: of the target, in the dtype that it computes in, which is the dump's.
        head: of the target, in the stored dtype, on the same device.
        selected_token_ids: int64 ``[Vd]``, the draft vocabulary.
        with_probs: probabilities over it are to be stored.
    """

    def __init__(
        self,
        final_norm: Callable[[Tensor], Tensor],
        compute_dtype: torch.dtype,
        head: Head,
        selected_token_ids: Tensor,
        *,
        with_probs: bool,
    ):
        self._final_norm, self._compute_dtype = final_norm, compute_dtype
        self._device, self._dtype = head.weight.device, head.weight.dtype
        self._supervise = Supervise(head, selected_token_ids, with_probs=with_probs)

    def __call__(self, sample: DumpedSample) -> dict[str, Tensor]:
        assert sample.last_hidden_state is not None
        with torch.inference_mode():
            states = sample.last_hidden_state.to(self._device, self._compute_dtype)
            hidden = self._final_norm(states).to(self._dtype)
        return {name: tensor.cpu() for name, tensor in self._supervise(hidden).items()}


class FromProbabilities:
    """Supervision from probabilities over the draft vocabulary, with the mask that says where the argmax lies in it.

    Where the mask is set, the largest probability is the full vocabulary's argmax; elsewhere that is not known, and -1.
    Of position 0 nothing is known: its probabilities are all 0, which no training reads, as it predicts from 1 on.

    Args:
        selected_token_ids: int64 ``[Vd]``, ascending.
    """

    def __init__(self, selected_token_ids: Tensor):
        self._selected_token_ids = selected_token_ids.to(torch.int32)

    def __call__(self, sample: DumpedSample) -> dict[str, Tensor]:
        assert sample.target_probs is not None
        assert sample.position_mask is not None
        probs, inside = sample.target_probs, sample.position_mask
        # The first of equal ones, and ids ascend: ties go to the lower id.
        choice = self._selected_token_ids[probs.argmax(dim=-1)]
        return {
            "hidden": probs.new_empty(len(probs), 0),
            "probs": probs,
            "argmax": torch.where(inside, choice, torch.full_like(choice, -1)),
            "log_normalizer": torch.zeros(len(probs)),
            "mass": torch.zeros(len(probs)),
            "in_vocab": inside,
            "finite": probs.isfinite().all(dim=-1),
        }
