"""A draft put to its target: whether they belong together, and the draft ready to run beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.from_target import initial_draft
from eagle_offline.errors import MismatchError
from eagle_offline.serving.drafts import ServedDraft
from eagle_offline.supervision import Head
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.layout import default_aux_layer_ids, read_head
from eagle_offline.target.load import TargetSource, load_config, target_digest


@dataclass(frozen=True)
class Pair:
    """A target and a draft, on one device and in one dtype.

    Attributes:
        target: captures the layers that the draft reads.
        head: the target's.
        draft: the draft, embeddings in place.
        selected_token_ids: int64 ``[Vd]``.
    """

    target: HFEagle3TargetModel
    head: Head
    draft: Eagle3DraftModel
    selected_token_ids: torch.Tensor

    def untrained(self, seed: int = 0) -> Pair:
        """Return the target with a draft of the same shape as training starts from.

        Its embeddings and head rows are the target's, all else is random, the mask's state of P-EAGLE too.
        """
        config = self.draft.config
        embeddings = self.target.get_input_embeddings().weight.detach().float().cpu()
        head = self.head.to("cpu", torch.float32)
        draft = initial_draft(config, embeddings, head, self.selected_token_ids.cpu(), seed=seed)
        return replace(self, draft=_placed(draft, self.head.weight))


def check_belongs(draft: ServedDraft, name: str, source: TargetSource, *, any_checkpoint: bool = False) -> None:
    """See that a draft was made for a target, from the target's config and digests, before weights are loaded.

    Args:
        draft: the draft.
        name: what the user called it.
        source: the target's files.
        any_checkpoint: accept a target of the same shape with other weights.

    Raises:
        MismatchError: another width, vocabulary, depth or checkpoint; names what was found and expected.
    """
    text_config = load_config(source).get_text_config()
    config, origin = draft.model.config, draft.origin
    pairs = [
        ("hidden size", config.target_hidden_size, text_config.hidden_size),
        ("vocabulary size", config.vocab_size, text_config.vocab_size),
    ]
    if origin is not None:
        pairs.append(("number of layers", origin.target_num_layers, text_config.num_hidden_layers))
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise MismatchError(
                f"{name} was made for another target: {what} {ours}, but {source.directory} has {theirs}"
                + (f"; it was made for {origin.target_id}" if origin is not None else "")
            )
    if origin is not None and not any_checkpoint:
        digest = target_digest(source)
        if digest != origin.target_digest:
            raise MismatchError(
                f"{name} was made for {origin.target_id} with digest {origin.target_digest}, but {source.directory} "
                f"has {digest}: its weights, adapter, config, tokenizer or chat template differ; pass --any-target to "
                "go on all the same"
            )


def pair(draft: ServedDraft, model: torch.nn.Module) -> Pair:
    """Return a loaded target and a draft ready to run beside it.

    Raises:
        UsageError: the draft reads layers that the target does not have.
        MismatchError: the draft lacks embeddings that the target's cannot stand in for.
    """
    num_layers = len(HFEagle3TargetModel(model, [0])._get_transformer_layers())
    aux_layer_ids = draft.aux_layer_ids
    target = HFEagle3TargetModel(model, default_aux_layer_ids(num_layers) if aux_layer_ids is None else aux_layer_ids)
    head = read_head(model)
    placed = _placed(draft.model, head.weight)
    if not draft.has_embeddings:
        embeddings = target.get_input_embeddings().weight
        if embeddings.shape != placed.embed_tokens.weight.shape:
            raise MismatchError(
                f"the draft has no token embeddings, and the target's {list(embeddings.shape)} cannot stand in for "
                f"{list(placed.embed_tokens.weight.shape)}"
            )
        with torch.no_grad():
            placed.embed_tokens.weight.copy_(embeddings)
    return Pair(target, head, placed, draft.selected_token_ids.to(head.weight.device))


def _placed(draft: Eagle3DraftModel, like: torch.Tensor) -> Eagle3DraftModel:
    return cast(Any, draft).to(device=like.device, dtype=like.dtype).eval()
