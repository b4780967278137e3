"""Qwen3's layers and other widths: the same unroll, whether plain, packed or with a cache, as it is defined."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from eagle_offline.draft.cache import DraftCache
from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.objectives.ttt import unroll
from tests.draft.styles import FORMS, make_config, make_draft, scattered, twin
from tests.objectives import test_packed_ttt as packed
from tests.oracles import ttt
from tests.oracles.samples import NUM_AUX, TARGET_HIDDEN_SIZE, VOCAB_SIZE

TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}  # float64 on both sides


def draw(seed: int, num_rows: int, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] and aux states [B, T, A * Ht]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB_SIZE, (num_rows, num_slots), generator=generator)
    size = NUM_AUX * TARGET_HIDDEN_SIZE
    return ids, torch.randn(num_rows, num_slots, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_attention_is_that_of_qwen3(num_key_value_heads):
    config = make_config("qwen3", num_hidden_layers=2, num_key_value_heads=num_key_value_heads, head_dim=6)
    attention = scattered(Eagle3DraftModel(config).double(), 1).layers[1].self_attn
    names = (
        "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters",
        "max_position_embeddings", "vocab_size",
    )  # fmt: skip
    given = {name: getattr(config, name) for name in names}
    theirs = Qwen3Attention(Qwen3Config(**given, attn_implementation="sdpa"), layer_idx=0).double()
    theirs.load_state_dict(attention.state_dict())  # the same names, the same shapes
    states = torch.randn(2, 9, 16, dtype=torch.float64)
    positions = torch.arange(9).expand(2, -1)
    rotary = Qwen3RotaryEmbedding(Qwen3Config(**given))
    expected, _ = theirs(states, rotary(states.float(), positions), attention_mask=None)
    cos, sin = Eagle3DraftModel(config).rotary(positions, torch.float64)
    queries, keys, values = attention.project(states, cos, sin)
    causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    found = attention.attend(queries, [keys], [values], causal)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # their norms and angles are float32


@pytest.mark.parametrize("form", FORMS)
def test_norms_of_queries_and_keys_are_there_with_qwen3_alone(form):
    model = make_draft(form)
    config, parameters = model.config, dict(model.named_parameters())
    norms = {name for name in parameters if name.endswith(("q_norm.weight", "k_norm.weight"))}
    qwen3 = config.layer_style == "qwen3"
    layers = range(config.num_hidden_layers if qwen3 else 0)
    assert norms == {f"layers.{layer}.self_attn.{part}_norm.weight" for layer in layers for part in "qk"}
    assert all(parameters[name].shape == (config.head_dim,) for name in norms)
    assert parameters["fc.weight"].shape == (config.hidden_size, NUM_AUX * TARGET_HIDDEN_SIZE)


@pytest.mark.parametrize("form", FORMS)
def test_an_unroll_follows_the_definition_at_every_step(form):
    model = make_draft(form, 2)
    draft = twin(model)
    ids, aux = draw(2, 2, 7)
    rows = [ttt.Row([0] * 7, [False] * 7, list(range(7))) for _ in ids]
    states = [draft.project(row) for row in aux]
    fed_back, cache = model.project_hidden_states(aux), [[], []]
    for k in range(4):
        fed_back = model(ttt.shifted(ids, k), fed_back, torch.ones_like(ids), cache_hidden=cache)
        states = [ttt.draft_step(draft, rows[b], k, ttt.shifted(ids, k)[b], states[b]) for b in range(2)]
        expected = torch.stack(states)
        torch.testing.assert_close(fed_back, expected, **TOLERANCE)
        torch.testing.assert_close(model.compute_logits(fed_back), draft.logits(expected), **TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_chain_with_a_cache_follows_the_definition(form):
    model = make_draft(form, 3)
    oracle = twin(model)
    ids, aux = draw(3, 1, 12)
    cache, start = DraftCache(model, 1), 0
    for end in (3, 4, 7, 12):
        positions = torch.arange(start, end)[None]
        hidden = cache.extend(ids[:, start:end], model.project_hidden_states(aux[:, start:end]), positions, end)
        row = ttt.Row([0] * end, [False] * end, list(range(end)))
        state = ttt.draft_step(oracle, row, 0, ids[0, :end], oracle.project(aux[0, :end]))
        torch.testing.assert_close(hidden[0], state[start:], **TOLERANCE)
        hidden = hidden[:, -1:]
        for step in range(1, 4):
            token = torch.tensor([[(7 * end + step) % VOCAB_SIZE]])
            state = ttt.draft_step(oracle, row, step, token[0].expand(end), state)
            hidden = cache.extend(token, hidden, torch.tensor([[end - 1 + step]]), end + step)
            torch.testing.assert_close(hidden[0, 0], state[-1], **TOLERANCE)
        start = end


@pytest.mark.parametrize("form", FORMS)
def test_the_packed_unroll_equals_the_plain_one_in_losses_hits_and_gradients(form):
    lengths = [1, 2, 40, 3, 17]
    batch = packed.make_batch(lengths, *packed.random_masks(lengths, 5, 0.5))
    _, aux = draw(5, 1, sum(lengths))
    batch.aux_hidden_states = aux
    model = make_draft(form, 4, vocab_size=packed.VOCAB_SIZE, draft_vocab_size=packed.VOCAB_SIZE)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.25], dtype=torch.float64)
    plain = unroll(model, batch, 4)
    expected = packed.gradients(model, (plain.losses * weights).sum())
    loss, sums = packed.run_packed(model, batch, packed.plan_of(batch, lengths, 4), weights)
    torch.testing.assert_close(sums.losses, plain.losses.detach(), **TOLERANCE)
    assert torch.equal(sums.step_hits, plain.step_hits)
    for name, gradient in packed.gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9, msg=name)
        assert gradient.any(), name


class WideNorm(torch.nn.Module):
    """What a norm gives under autocast on CUDA."""

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        return heads.float()


@pytest.mark.parametrize("norm", [None, WideNorm()])
def test_normed_queries_are_no_wider_than_values_under_autocast(norm):
    attention = make_draft("qwen3").float().layers[0].self_attn
    if norm is not None:
        attention.q_norm = attention.k_norm = norm
    with torch.autocast("cpu", torch.bfloat16):
        states = torch.randn(5, 32)
        dtypes = {part(states).dtype for part in (attention.queries, attention.keys, attention.values)}
    assert dtypes == {torch.bfloat16}


def test_an_unknown_style_is_refused_and_none_is_llama():
    assert Eagle3DraftConfig().layer_style == "llama"
    with pytest.raises(ValueError, match="layer_style: expected one of llama, qwen3, found 'gemma'"):
        Eagle3DraftConfig(layer_style="gemma")


class Products(packed.LiveBytes):
    """Counts matrix products too."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.default
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_feed_forward_keeps_two_tensors_of_its_width_and_multiplies_nothing_twice(autocast):
    feed_forward, width = make_draft("qwen3", intermediate_size=400).float().layers[0].mlp, 400
    states = torch.randn(50, 16, requires_grad=True)
    kept_of_one = 50 * width * (2 if autocast else 4)
    with Products() as work:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = feed_forward(states)
        assert work.count == 3
        assert 2 * kept_of_one <= work.live < 2.5 * kept_of_one + 3 * 16 * width * 2 * autocast
        output.sum().backward()
    assert work.count == 3 * 3
    found = [states.grad, *(parameter.grad for parameter in feed_forward.parameters())]
    gate, up, down = (feed_forward.get_parameter(f"{part}_proj.weight") for part in ("gate", "up", "down"))
    twins = [tensor.detach().double().requires_grad_() for tensor in (states, gate, up, down)]
    x, gate, up, down = twins
    product = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    (product @ down.T).sum().backward()
    for gradient, exact in zip(found, twins, strict=True):
        assert gradient is not None
        assert (gradient - exact.grad).abs().max() <= (2e-2 if autocast else 1e-5) * exact.grad.abs().max()
