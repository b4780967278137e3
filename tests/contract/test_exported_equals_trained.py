"""What is exported is what was trained: the same logits, bit for bit, through either layout."""

from __future__ import annotations

import pytest
import torch

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.files import write_draft
from eagle_offline.serving.drafts import ServedDraft, read_draft
from eagle_offline.serving.export import export_draft
from tests.serving import directories
from tests.training.caches import latest, settings, train

KINDS = {
    "eagle3": {},
    "eagle31": {"fc_norm": True, "norm_output": True},
    "trained_embeddings": {"train_embeddings": True},
    "qwen3": {"layer_style": "qwen3"},
    "narrow": {"draft_hidden_size": 16},
}


def unroll(model: Eagle3DraftModel) -> list[torch.Tensor]:
    """Logits of three unroll steps over random tokens and states."""
    generator = torch.Generator().manual_seed(3)
    config = model.config
    tokens = torch.randint(config.vocab_size, (2, 9), generator=generator)
    aux = torch.randn(2, 9, config.num_aux_hidden_states * config.target_hidden_size, generator=generator)
    cache: list = [[], []]
    with torch.no_grad():
        hidden, logits = model.project_hidden_states(aux), []
        for step in range(3):
            rolled = torch.roll(tokens, -step, dims=1)
            hidden = model(rolled, hidden, torch.ones(2, 9, dtype=torch.int64), cache_hidden=cache)
            logits.append(model.compute_logits(hidden))
    return logits


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory) -> ServedDraft:
    run = tmp_path_factory.mktemp("run")
    train(settings(run, num_epochs=1, **KINDS[request.param]))
    return read_draft(latest(run))


@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_exported_logits_are_the_trained_ones(tmp_path, trained, layout):
    if layout == "speculators" and trained.model.config.hidden_size != trained.model.config.target_hidden_size:
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


def test_what_was_trained_is_what_was_asked_for(request, trained):
    asked = KINDS[request.node.callspec.params["trained"]]
    config = trained.model.config
    assert config.layer_style == asked.get("layer_style", "llama")
    assert config.hidden_size == asked.get("draft_hidden_size", config.target_hidden_size)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (kind, layout)
        for kind, made in directories.FLAT_KINDS.items()
        for layout in ("flat", "speculators")
        if layout == "flat" or made.target_hidden_size == directories.HIDDEN_SIZE
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
