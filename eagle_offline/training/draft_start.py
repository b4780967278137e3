"""The draft that a run begins with: what it reads, what it proposes, where its weights come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_offline.cache.reader import Cache
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.from_target import draft_config, initial_draft, read_target_config
from eagle_offline.draft.warm_start import DraftWeights, warm_start
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.draft_choice import choose_aux_layers, choose_vocabulary
from eagle_offline.training.mask_token import MaskToken, choose_mask_token
from eagle_offline.vocab import LOW_COVERAGE, DraftVocab


@dataclass(frozen=True)
class DraftChoice:
    """What a draft reads and proposes.

    Attributes:
        vocabulary: the draft vocabulary.
        aux_layers: places of the layers it reads among those captured.
        aux_layer_ids: the same layers, 0-based outputs of the target.
        mask_token: what stands for tokens not known yet, of a draft that drafts in parallel.
    """

    vocabulary: DraftVocab
    aux_layers: tuple[int, ...]
    aux_layer_ids: tuple[int, ...]
    mask_token: MaskToken | None = None

    def describe(self, *, chosen: bool) -> str | None:
        """Return a line for the log where the vocabulary was ``chosen`` by the user, or covers too little."""
        vocabulary = self.vocabulary
        if not chosen and vocabulary.coverage >= LOW_COVERAGE:
            return None
        line = f"draft vocabulary of {vocabulary.size} tokens, {vocabulary.coverage:.2%} of the supervised ones"
        if vocabulary.coverage < LOW_COVERAGE:
            line += ": WARNING: the others are lost for acceptance; a larger --draft-vocab-size covers more"
        return line

    @property
    def selected_token_ids(self) -> Tensor:
        """int64 ``[Vd]``, strictly increasing."""
        return torch.from_numpy(self.vocabulary.selected_token_ids)

    @property
    def selected_token_mask(self) -> Tensor:
        """Bool ``[V]``."""
        return torch.from_numpy(self.vocabulary.selected_token_mask)


def choose_draft(settings: TrainSettings, caches: Sequence[Cache], heldout: Sequence[Cache] = ()) -> DraftChoice:
    """Return what the draft of a run over caches of one target reads and proposes.

    Raises:
        UsageError, DataError, MismatchError: see `choose_aux_layers`, `choose_vocabulary` and `choose_mask_token`.
    """
    captured = caches[0].aux_layer_ids
    places = choose_aux_layers(settings.aux_layer_ids, captured)
    vocabulary = choose_vocabulary(caches, settings.draft_vocab_size, settings.draft_vocab)
    parallel = settings.objective == "peagle"
    mask_token = choose_mask_token(caches, settings.mask_token_id, heldout) if parallel else None
    return DraftChoice(vocabulary, tuple(places), tuple(captured[place] for place in places), mask_token)


def start_draft(
    settings: TrainSettings, cache: Cache, choice: DraftChoice, source: DraftWeights | None = None
) -> tuple[Eagle3DraftModel, str | None]:
    """Return the draft that a run starts from, float32, and a line about what it took from another.

    Args:
        settings: of the run.
        cache: brings the target's config, embeddings and head.
        choice: what it reads and proposes.
        source: a draft to go on from; None for the target's embeddings and head rows and a random rest.

    Raises:
        UsageError: sizes that make no model. MismatchError: ``source`` is of another kind.
    """
    target = cache.manifest.identity.target
    config = draft_config(
        {
            **read_target_config(cache.path / "target" / "config.json"),
            "hidden_size": target.hidden_size,
            "vocab_size": target.vocab_size,
        },
        draft_vocab_size=choice.vocabulary.size,
        num_aux_hidden_states=len(choice.aux_layers),
        num_layers=settings.num_layers,
        mask_token_id=None if choice.mask_token is None else choice.mask_token.token_id,
        fc_norm=settings.fc_norm,
        norm_output=settings.norm_output,
        layer_style=settings.layer_style,
        hidden_size=settings.draft_hidden_size,
        intermediate_size=settings.draft_intermediate_size,
        num_attention_heads=settings.draft_num_attention_heads,
        num_key_value_heads=settings.draft_num_key_value_heads,
    )
    draft = initial_draft(
        config,
        cache.embeddings,
        cache.head,
        choice.selected_token_ids,
        seed=settings.seed,
        train_embeddings=settings.train_embeddings,
        head_start=settings.head_start,
    )
    if source is None:
        return draft, None
    return draft, warm_start(draft, choice.selected_token_ids, choice.aux_layer_ids, source).describe()
