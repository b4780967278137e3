"""A fresh draft that goes on from another's weights: what fits is taken over, what cannot fit is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor

from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.draft.layers import head_dim
from eagle_offline.errors import MismatchError

_EMBEDDINGS = "embed_tokens.weight"
_HEAD = "lm_head.weight"
_MASK = "mask_hidden"

# Config fields that decide which parameters there are and what becomes of them, each with the flag that sets it.
_SIZE_FLAGS = {
    "num_hidden_layers": "--num-draft-layers",
    "hidden_size": "--draft-hidden-size",
    "intermediate_size": "--draft-intermediate-size",
    "num_attention_heads": "--draft-num-attention-heads",
    "num_key_value_heads": "--draft-num-key-value-heads",
    "layer_style": "--layer-style",
}
_SWITCH_FLAGS = {"fc_norm": "--fc-norm", "norm_output": "--norm-output"}
_OF_THE_TARGET = ("target_hidden_size", "vocab_size")

# What becomes of the mask's state, and what is said of it.
MaskStart = Literal["taken", "random", "left out"]
_SAID_OF_MASK: Final[dict[MaskStart, str]] = {
    "taken": "mask_hidden its own",
    "random": "mask_hidden random, it is an EAGLE-3 draft",
    "left out": "its mask_hidden left out, it is a P-EAGLE draft",
}

# Fields that come from the target or its data, change no shape, and that training gets used to.
_NOTED = ("rms_norm_eps", "hidden_act", "rope_parameters", "mask_token_id")


@dataclass(frozen=True)
class DraftWeights:
    """A draft to start from, whatever directory it came in.

    Attributes:
        name: what the user called it.
        config: its shape.
        tensors: parameters under our names; without embeddings when they are the target's.
        selected_token_ids: int64 ``[Vd]``, strictly increasing, one a row of its head.
        aux_layer_ids: 0-based outputs of target layers, low first; None when its directory does not say.
    """

    name: str
    config: Eagle3DraftConfig
    tensors: Mapping[str, Tensor]
    selected_token_ids: Tensor
    aux_layer_ids: Sequence[int] | None


@dataclass(frozen=True)
class WarmStart:
    """What a draft took from another.

    Attributes:
        name: what the user called the other.
        parameters: names of those taken, sorted; the head among them if any of its rows was.
        own_embeddings: whether the embeddings are the other's and differ from the target's.
        head_rows: rows of the head that were taken, of ``num_head_rows``; the others keep their start.
        mask_hidden: what became of the mask's state where either is a P-EAGLE draft: ``taken``, ``random`` (the other
            has none), or ``left out`` (this draft has none).
        aux_layers_known: whether the other says which target layers it reads.
        differing: config fields without a shape that differ, as (the other's, this draft's): no obstacle, but what is
            taken computes something else until training has adapted it.
    """

    name: str
    parameters: tuple[str, ...]
    own_embeddings: bool
    head_rows: int
    num_head_rows: int
    aux_layers_known: bool
    differing: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    mask_hidden: MaskStart | None = None

    def describe(self) -> str:
        """Return one line for the log."""
        embeddings = "its own" if self.own_embeddings else "the target's"
        parts = [
            f"start from {self.name}: {self.head_rows} of {self.num_head_rows} head rows taken, embeddings {embeddings}"
        ]
        if self.mask_hidden is not None:
            parts.append(_SAID_OF_MASK[self.mask_hidden])
        if not self.aux_layers_known:
            parts.append("it does not say which target layers it reads, taken to be the same")
        parts += [f"{name} was {theirs}, is {ours}" for name, (theirs, ours) in self.differing.items()]
        return "; ".join(parts)


def warm_start(
    model: Eagle3DraftModel, selected_token_ids: Tensor, aux_layer_ids: Sequence[int], source: DraftWeights
) -> WarmStart:
    """Copy another draft's weights into a fresh one, in the fresh one's dtype; return what was taken.

    Every parameter must be there in the same shape, with three exceptions. Rows of the head are matched by token: those
    of tokens that the other does not propose keep their start. Embeddings that the other does not bring, or that are
    the target's but for rounding, stay the target's. A P-EAGLE and an EAGLE-3 draft start from one another: what the
    mask stands for is random where the other has none, and left out where the fresh one has none.

    Args:
        model: the fresh draft, as `eagle_offline.draft.from_target.initial_draft` makes it; changed in place.
        selected_token_ids: int64 ``[Vd]``, the fresh draft's vocabulary, strictly increasing.
        aux_layer_ids: 0-based outputs of target layers that it will read.
        source: the draft to start from.

    Raises:
        MismatchError: the two are of different kinds; names each field, both values, and the flag that makes them fit.
            The fresh draft is as it was.
    """
    faults = [*_faults(model.config, aux_layer_ids, source)]
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        found = source.tensors.get(name)
        if found is None:
            optional = name == _EMBEDDINGS or (name == _MASK and not source.config.parallel_drafting)
            faults += [] if optional or faults else [f"{name} is missing"]
        elif found.shape[(name == _HEAD) :] != parameter.shape[(name == _HEAD) :] and not faults:
            faults.append(f"{name}: expected shape {list(parameter.shape)}, found {list(found.shape)}")
    if faults:
        raise MismatchError(f"--init-from {source.name}: {'; '.join(faults)}")
    taken = {name: source.tensors[name] for name in parameters if name in source.tensors}
    own_embeddings = _EMBEDDINGS in taken and not _same(parameters[_EMBEDDINGS], taken[_EMBEDDINGS])
    if not own_embeddings:
        taken.pop(_EMBEDDINGS, None)
    ours, theirs = _common_rows(selected_token_ids.cpu(), source.selected_token_ids.cpu())
    rows = taken.pop(_HEAD)
    with torch.no_grad():
        for name, tensor in taken.items():
            parameters[name].copy_(tensor)
        head = parameters[_HEAD]
        head[ours.to(head.device)] = rows[theirs.to(rows.device)].to(head)
    return WarmStart(
        name=source.name,
        parameters=tuple(sorted([*taken, *([_HEAD] if len(ours) else [])])),
        own_embeddings=own_embeddings,
        head_rows=len(ours),
        num_head_rows=len(selected_token_ids),
        aux_layers_known=source.aux_layer_ids is not None,
        differing=_differing(source.config, model.config),
        mask_hidden=_mask_start(model.config, source.config),
    )


def _faults(ours: Eagle3DraftConfig, aux_layer_ids: Sequence[int], source: DraftWeights) -> Iterator[str]:
    """Yield what makes the two drafts different kinds, each with the way out."""
    theirs = source.config
    for name in _OF_THE_TARGET:
        if getattr(ours, name) != getattr(theirs, name):
            yield _fault(name, getattr(ours, name), getattr(theirs, name), "it was made for another target")
    for name, flag in _SIZE_FLAGS.items():
        found = getattr(theirs, name)
        if getattr(ours, name) != found:
            yield _fault(name, getattr(ours, name), found, f"give {flag} {found}")
    if head_dim(ours) != head_dim(theirs):
        heads = theirs.num_attention_heads
        shared = head_dim(theirs) * heads == theirs.hidden_size
        way_out = f"give --draft-num-attention-heads {heads}" if shared else "no flag makes heads of that width"
        yield _fault("head_dim", head_dim(ours), head_dim(theirs), way_out)
    parallel = (ours.parallel_drafting, theirs.parallel_drafting)
    for name, flag in _SWITCH_FLAGS.items():
        found = getattr(theirs, name)
        # A draft that works in parallel feeds nothing back.
        if getattr(ours, name) != found and not (name == "norm_output" and any(parallel)):
            yield _fault(name, getattr(ours, name), found, f"give {flag if found else f'--no-{flag[2:]}'}")
    if source.aux_layer_ids is not None and list(source.aux_layer_ids) != list(aux_layer_ids):
        listed = ",".join(str(layer_id) for layer_id in source.aux_layer_ids)
        way_out = f"give --aux-layer-ids {listed}, of a cache that holds them"
        yield _fault("aux_layer_ids", list(aux_layer_ids), list(source.aux_layer_ids), way_out)
    elif ours.num_aux_hidden_states != theirs.num_aux_hidden_states:
        found = theirs.num_aux_hidden_states
        way_out = f"give --aux-layer-ids with {found} layers"
        yield _fault("num_aux_hidden_states", ours.num_aux_hidden_states, found, way_out)


def _mask_start(ours: Eagle3DraftConfig, theirs: Eagle3DraftConfig) -> MaskStart | None:
    if not ours.parallel_drafting:
        return "left out" if theirs.parallel_drafting else None
    return "taken" if theirs.parallel_drafting else "random"


def _fault(name: str, ours: Any, found: Any, way_out: str) -> str:
    return f"{name}: expected {ours}, found {found} ({way_out})"


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether embeddings are the same once ours are rounded to their dtype."""
    return torch.equal(ours.detach().to(theirs.dtype), theirs.to(ours.device))


def _common_rows(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places int64 ``[C]`` that the ids common to both have in each.

    Example:
        >>> [places.tolist() for places in _common_rows(torch.tensor([1, 4, 6, 9]), torch.tensor([0, 4, 9]))]
        [[1, 3], [1, 2]]
    """
    return torch.isin(ours, theirs).nonzero().flatten(), torch.isin(theirs, ours).nonzero().flatten()


def _differing(theirs: Eagle3DraftConfig, ours: Eagle3DraftConfig) -> dict[str, tuple[Any, Any]]:
    both_parallel = ours.parallel_drafting and theirs.parallel_drafting
    names = [name for name in _NOTED if name != "mask_token_id" or both_parallel]
    pairs = {name: (_plain(getattr(theirs, name)), _plain(getattr(ours, name))) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _plain(value: Any) -> Any:
    """Return a value that compares by meaning: RoPE parameters without the former name of their type."""
    return {key: part for key, part in value.items() if key != "type"} if isinstance(value, Mapping) else value
