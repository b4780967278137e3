"""What is exported is what was trained: the same logits, bit for bit, through either layout."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.files import write_draft
from eagle_offline.serving.drafters import drafter_of
from eagle_offline.serving.drafting import Settled
from eagle_offline.serving.drafts import ServedDraft, read_draft
from eagle_offline.serving.export import export_draft, reason_against_speculators
from eagle_offline.serving.sampling import Sampling
from tests.serving import directories
from tests.training.caches import latest, settings, train

KINDS = {
    "eagle3": {},
    "eagle31": {"fc_norm": True, "norm_output": True},
    "trained_embeddings": {"train_embeddings": True},
    "qwen3": {"layer_style": "qwen3"},
    "narrow": {"draft_hidden_size": 16},
    "peagle": {"objective": "peagle", "num_draft_layers": 3},
    "peagle, qwen3, trained embeddings": {
        "objective": "peagle", "num_draft_layers": 2, "layer_style": "qwen3", "train_embeddings": True,
    },
}  # fmt: skip


def unroll(model: Eagle3DraftModel) -> list[torch.Tensor]:
    """Logits of three unroll steps over random tokens and states; of P-EAGLE those of one forward, as it serves."""
    generator = torch.Generator().manual_seed(3)
    config = model.config
    tokens = torch.randint(config.vocab_size, (2, 9), generator=generator)
    aux = torch.randn(2, 9, config.num_aux_hidden_states * config.target_hidden_size, generator=generator)
    if model.config.parallel_drafting:
        return drafted(model, tokens, aux)
    cache: list = [[], []]
    with torch.no_grad():
        hidden, logits = model.project_hidden_states(aux), []
        for step in range(3):
            rolled = torch.roll(tokens, -step, dims=1)
            hidden = model(rolled, hidden, torch.ones(2, 9, dtype=torch.int64), cache_hidden=cache)
            logits.append(model.compute_logits(hidden))
    return logits


@torch.no_grad()
def drafted(model: Eagle3DraftModel, tokens: torch.Tensor, aux: torch.Tensor) -> list[torch.Tensor]:
    """What three drafts are drawn from, of rows that settled 9 and 6 slots, sampled."""
    settled = Settled(tokens, aux, torch.arange(9).expand(2, -1), torch.tensor([9, 6]), num_columns=9)
    # Weights in a file stand at any address, and products of unaligned ones are rounded otherwise.
    drafter = drafter_of(deepcopy(model), torch.arange(model.config.draft_vocab_size), 3)
    drafter.start(2)
    proposal = drafter.propose(settled, Sampling(temperature=1.0), torch.Generator().manual_seed(0))
    assert proposal.draft_probs is not None
    return [*proposal.draft_probs.unbind(1), proposal.token_ids]


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory) -> ServedDraft:
    run = tmp_path_factory.mktemp("run")
    train(settings(run, num_epochs=1, **KINDS[request.param]))
    return read_draft(latest(run))


@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_exported_logits_are_the_trained_ones(tmp_path, trained, layout):
    if layout == "speculators" and reason_against_speculators(trained.model.config) is not None:
        pytest.skip("holds no draft of another width")
    export_draft(
        trained,
        layout,
        tmp_path / "out",
        target_name="org/target",
        target_architectures=["LlamaForCausalLM"],
        num_draft_tokens=3,
        dtype="fp32",
    )
    exported = read_draft(tmp_path / "out")
    if not exported.has_embeddings:  # frozen: the target's own, which a checkpoint keeps too
        assert trained.origin is not None
        assert not trained.origin.embeddings_trained
        exported.model.embed_tokens.weight.data.copy_(trained.model.embed_tokens.weight)
    expected = unroll(trained.model)
    for ours, theirs in zip(unroll(exported.model), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert exported.aux_layer_ids == trained.aux_layer_ids
    assert torch.equal(exported.selected_token_ids, trained.selected_token_ids)
    assert expected[0].std() > 0
    assert exported.model.config.mask_token_id == trained.model.config.mask_token_id


def test_what_was_trained_is_what_was_asked_for(request, trained):
    asked = KINDS[request.node.callspec.params["trained"]]
    config = trained.model.config
    assert config.layer_style == asked.get("layer_style", "llama")
    assert config.hidden_size == asked.get("draft_hidden_size", config.target_hidden_size)
    assert config.num_hidden_layers == asked.get("num_draft_layers", 1)
    assert config.parallel_drafting == ("objective" in asked)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (kind, layout)
        for kind, made in directories.FLAT_KINDS.items()
        for layout in ("flat", "speculators")
        if layout == "flat" or kind in directories.KINDS
    ],
)
def test_every_kind_of_draft_keeps_its_logits(tmp_path, kind, layout):
    made = directories.FLAT_KINDS[kind]
    model, origin = directories.make_model(made), directories.make_origin(made)
    write_draft(tmp_path, model, torch.tensor(made.selected), origin)
    export_draft(
        read_draft(tmp_path),
        layout,
        tmp_path / "out",
        target_name="org/target",
        target_architectures=["LlamaForCausalLM"],
        num_draft_tokens=3,
        dtype="fp32",
    )
    back = read_draft(tmp_path / "out")
    exported = back.model
    if not back.has_embeddings:  # the target's, which the draft starts from
        exported.embed_tokens.weight.data.copy_(model.embed_tokens.weight)
    for ours, theirs in zip(unroll(exported), unroll(model), strict=True):
        assert torch.equal(ours, theirs)
