"""Drafts of Qwen3's layers and of another width, exported and read back, decode as defined and change no token.

Each starts as training starts it and is trained for a moment on the target's own answers, so that rounds accept from
none to all.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle_offline.draft.files import write_draft
from eagle_offline.draft.from_target import draft_config, initial_draft, of_width
from eagle_offline.objectives.ttt import unroll
from eagle_offline.serving.cached_target import CachedTarget
from eagle_offline.serving.chain import ChainDrafter
from eagle_offline.serving.check import check_draft
from eagle_offline.serving.decoding import Limits, decode
from eagle_offline.serving.drafts import ServedDraft, read_draft
from eagle_offline.serving.export import export_draft
from eagle_offline.serving.pairing import Pair, pair
from eagle_offline.serving.sampling import Sampling
from eagle_offline.target.layout import read_head
from tests.builders import SCRATCH
from tests.contract.test_real_decoding_is_what_was_promised import slot_batch
from tests.draft.styles import twin
from tests.oracles import decoding as oracle
from tests.serving.directories import make_origin

LENGTH, LENGTHS, STEPS = 24, [5, 1, 17, 9], 5
FORMS: dict[str, dict[str, Any]] = {
    "qwen3": {"layer_style": "qwen3"},
    "qwen3, two layers, 3.1": {"layer_style": "qwen3", "num_layers": 2, "fc_norm": True, "norm_output": True},
    "narrow": {"hidden_size": 16},
    "narrow, fewer heads, qwen3": {
        "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "layer_style": "qwen3",
    },
    "wide": {"hidden_size": 48, "intermediate_size": 20},
}  # fmt: skip
ENGINES = {
    form: {"vllm"} if sizes.get("layer_style") == "qwen3" else {"vllm", "sglang"} for form, sizes in FORMS.items()
}


def prompts() -> list[list[int]]:
    return oracle.prompts(LENGTHS, seed=4)


def answers() -> list[list[int]]:
    return [list(oracle.long_greedy_answer("Llama", tuple(prompt), LENGTH)) for prompt in prompts()]


@cache
def trained(form: str) -> ServedDraft:
    """A draft after a few updates, as a checkpoint holds it."""
    target = oracle.target("Llama")
    ids = oracle.selected_ids(17)
    config = draft_config(target.config.to_dict(), draft_vocab_size=17, num_aux_hidden_states=3, **FORMS[form])
    embeddings = target.get_input_embeddings().weight.detach()
    draft = initial_draft(config, embeddings, read_head(target), ids, seed=0).double()
    batch = slot_batch(target, ids, prompts(), answers())
    optimizer = torch.optim.Adam([parameter for parameter in draft.parameters() if parameter.requires_grad], lr=0.01)
    for _ in range(40):
        sums = unroll(draft, batch, STEPS)
        optimizer.zero_grad()
        (sums.losses / sums.counts.clamp_min(1)).sum().backward()
        optimizer.step()
    directory = SCRATCH / f"other-draft-{form}".replace(" ", "-")
    directory.mkdir()
    shape = {"target_hidden_size": target.config.hidden_size, "target_vocab_size": target.config.vocab_size}
    origin = make_origin(aux_layer_ids=oracle.AUX_LAYER_IDS, target_num_layers=oracle.NUM_LAYERS, **shape)
    write_draft(directory, draft.float(), ids, origin)
    return read_draft(directory)


def served(form: str, directory: Path) -> Pair:
    """The draft, exported flat and put to its target."""
    export_draft(
        trained(form),
        "flat",
        directory / "out",
        target_name="org/target",
        target_architectures=["LlamaForCausalLM"],
        num_draft_tokens=4,
        dtype="fp32",
    )
    return pair(read_draft(directory / "out"), oracle.target("Llama"))


@pytest.mark.parametrize("form", FORMS)
def test_greedy_answers_are_the_target_s_and_rounds_are_those_of_the_definition(form, tmp_path):
    both = served(form, tmp_path)
    recorder = oracle.Recorder(ChainDrafter(both.draft, both.selected_token_ids, 4))
    found, _ = decode(
        CachedTarget(both.target, capture=True), recorder, prompts(), Limits(LENGTH, ()), Sampling(), torch.Generator()
    )
    weights = twin(trained(form).model)
    weights.parameters["embed_tokens.weight"].data.copy_(both.draft.embed_tokens.weight)
    for row, (prompt, true) in enumerate(zip(prompts(), answers(), strict=True)):
        assert found[row].token_ids == true
        aux, known = oracle.states_of(oracle.target("Llama"), [*prompt, *true]), 1
        for drafted, accepted in zip(recorder.drafted[row], found[row].accepted, strict=True):
            chain = oracle.drafted_chain(weights, both.selected_token_ids, aux, [*prompt, *true[:known]], 4)
            assert drafted == chain.token_ids
            known += accepted + 1
    runs = {run for answer in found for run in answer.accepted}
    assert max(runs) >= 2, "the draft is too bad to tell"
    assert len(runs) >= 3


@pytest.mark.parametrize("form", FORMS)
def test_an_export_is_clean_for_the_engines_that_serve_it(form, tmp_path):
    served(form, tmp_path)
    report = check_draft(tmp_path / "out")
    assert report.is_clean_as_claimed
    # The original code reads other layers of a target of four.
    assert {engine for engine in report.claimed if engine != "eagle"} == ENGINES[form]


@pytest.mark.parametrize("form", ["narrow", "wide"])
def test_the_untrained_twin_is_what_training_starts_from(form, tmp_path):
    both, target = served(form, tmp_path), oracle.target("Llama")
    untrained = both.untrained().draft
    width = FORMS[form]["hidden_size"]
    embeddings = target.get_input_embeddings().weight.detach()
    torch.testing.assert_close(untrained.embed_tokens.weight, of_width(embeddings.float(), width).double())
    rows = read_head(target).weight.float()[both.selected_token_ids]
    torch.testing.assert_close(untrained.lm_head.weight, of_width(rows, width).double())
