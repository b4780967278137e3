"""States are the outputs of the decoder layers asked for, whatever the layout, packed or alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from eagle_offline import Eagle3TargetBatch, HFEagle3TargetModel, default_aux_layer_ids
from eagle_offline.errors import MismatchError, UsageError
from eagle_offline.target.layout import find_decoder
from tests import builders

KINDS = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Cohere", "Granite"]
H, V = 6, 11


class AddingLayer(nn.Module):
    """Adds its own number; returns a tuple when odd, as layers of some models do."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def forward(self, hidden: torch.Tensor) -> Any:
        out = hidden + (self.number + 1) * torch.arange(H)
        return (out, None) if self.number % 2 else out


class TinyDecoder(nn.Module):
    def __init__(self, attribute: str, num_layers: int, as_dict: bool):
        super().__init__()
        layers = [AddingLayer(number) for number in range(num_layers)]
        # Keyed in an order other than that of the numbers: 0, 1, 10, 2, …
        keyed = {str(n): layers[n] for n in sorted(range(num_layers), key=str)}
        setattr(self, attribute, nn.ModuleDict(keyed) if as_dict else nn.ModuleList(layers))
        self.layer_list = layers
        self.embed = nn.Embedding(V, H)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        hidden = self.embed(input_ids)
        for layer in self.layer_list:
            out = layer(hidden)
            hidden = out[0] if isinstance(out, tuple) else out
        return SimpleNamespace(last_hidden_state=2 * hidden)


class TinyModel(nn.Module):
    """A causal LM whose decoder stands at `path`."""

    def __init__(self, path: str, attribute: str, num_layers: int = 12, as_dict: bool = False):
        super().__init__()
        decoder = TinyDecoder(attribute, num_layers, as_dict)
        self.decoder_path = path
        if not path:
            setattr(self, attribute, getattr(decoder, attribute))
        owner: nn.Module = self
        names = path.split(".") if path else ["inner"]
        for name in names[:-1]:
            setattr(owner, name, nn.Module())
            owner = getattr(owner, name)
        setattr(owner, names[-1], decoder)
        object.__setattr__(self, "decoder_", decoder)
        self.lm_head = nn.Linear(H, V, bias=False)
        self.config = SimpleNamespace()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder_.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        last = self.decoder_(input_ids).last_hidden_state
        return SimpleNamespace(last_hidden_state=last, logits=self.lm_head(last))


LAYOUTS = [
    ("model", "layers"), ("model.language_model", "layers"), ("", "layers"), ("transformer", "h"),
    ("language_model.model", "layers"),
]  # fmt: skip


@pytest.mark.parametrize("as_dict", [False, True], ids=["ModuleList", "ModuleDict"])
@pytest.mark.parametrize(("path", "attribute"), LAYOUTS)
def test_layers_are_found_in_their_order_in_every_layout(path: str, attribute: str, as_dict: bool) -> None:
    torch.manual_seed(0)
    model = TinyModel(path, attribute, as_dict=as_dict)
    _, layers = find_decoder(model)
    assert [layer.number for layer in layers] == list(range(12))  # type: ignore[union-attr]
    target = HFEagle3TargetModel(model, [0, 3, 10])
    assert target._get_transformer_layers() == layers
    ids = torch.tensor([[1, 2, 3, 4]])
    ones = torch.ones_like(ids)
    batch = target.generate_batch(ids, ones, ones)
    embedded = model.decoder_.embed(ids).detach()
    steps = torch.arange(H)
    expected = [embedded + sum(range(1, layer + 2)) * steps for layer in (0, 3, 10)]
    torch.testing.assert_close(batch.aux_hidden_states, torch.cat(expected, dim=-1))


def test_a_wrapper_with_layers_of_its_own_gives_those_of_its_language_model() -> None:
    model = TinyModel("model.language_model", "layers")
    model.model.layers = nn.ModuleList([nn.Identity()])  # a vision tower's, say
    assert len(find_decoder(model)[1]) == 12


def test_a_model_without_decoder_layers_names_itself_and_the_places_looked_at() -> None:
    with pytest.raises(MismatchError, match=r"Linear.*layers or h or blocks.*model.*transformer"):
        HFEagle3TargetModel(nn.Linear(2, 2))


def layer_by_layer(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of every decoder layer from calling them one after another, and the final norm's."""
    caught: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []
    layers = model.model.layers
    handles = [
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    handles.append(model.model.norm.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])))
    handles.append(model.model.norm.register_forward_hook(lambda _m, _i, output: caught.append(output)))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    # What goes into layer l + 1, or into the norm, is what layer l put out.
    return [*inputs[1:], caught[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_captured_states_are_what_the_next_layer_reads(kind: str) -> None:
    model = builders.make_model(kind)
    ids = torch.randint(0, builders.VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(1))
    expected = layer_by_layer(model, ids)
    target = HFEagle3TargetModel(model, list(range(builders.NUM_LAYERS)))
    layers, last = target.capture(ids)
    assert len(layers) == builders.NUM_LAYERS
    for captured, plain in zip([*layers, last], expected, strict=True):
        assert torch.equal(captured, plain)
    ones = torch.ones_like(ids)
    batch = target.generate_batch(ids, ones, ones)
    torch.testing.assert_close(batch.aux_hidden_states, torch.cat(expected[:-1], dim=-1), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(batch.logits[:, :-1], logits[:, 1:], rtol=1e-4, atol=1e-5)
    assert not batch.logits[:, -1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_right_of_a_row_does_not_reach_it(kind: str) -> None:
    target = HFEagle3TargetModel(builders.make_model(kind), [1, 4, 7])
    ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[:, 12:] = 0
    for one, two in zip(target.capture(ids)[0], target.capture(other)[0], strict=True):
        torch.testing.assert_close(one[:, :12], two[:, :12], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[[5, 7, 4], [9, 3, 0]], [[16], [1]]])
def test_packed_documents_give_what_they_give_alone(kind: str, lengths: list[list[int]]) -> None:
    target = HFEagle3TargetModel(builders.make_model(kind), [0, 3, 6])
    generator = torch.Generator().manual_seed(3)
    num_slots = 16
    ids = torch.randint(0, 256, (2, num_slots), generator=generator)
    attention_mask = torch.tensor([[1] * sum(row) + [0] * (num_slots - sum(row)) for row in lengths])
    places = [[t for size in row for t in range(size)] for row in lengths]
    position_ids = torch.tensor([row + [0] * (num_slots - len(row)) for row in places])
    seq_lens = torch.tensor(lengths)
    batch = target.generate_batch(ids, attention_mask, attention_mask, position_ids=position_ids, seq_lens=seq_lens)
    assert batch.position_ids is position_ids
    assert batch.seq_lens is seq_lens
    for row, sizes in enumerate(lengths):
        start = 0
        for size in filter(None, sizes):
            alone = ids[row : row + 1, start : start + size]
            ones = torch.ones_like(alone)
            single = target.generate_batch(alone, ones, ones)
            ours = batch.aux_hidden_states[row, start : start + size]
            torch.testing.assert_close(ours, single.aux_hidden_states[0], rtol=1e-4, atol=1e-4)
            if size > 1:
                torch.testing.assert_close(
                    batch.logits[row, start : start + size - 1], single.logits[0, :-1], rtol=1e-4, atol=1e-4
                )
            start += size
    assert batch.aux_hidden_states.isfinite().all()


def test_a_batch_is_in_the_slot_frame() -> None:
    target = HFEagle3TargetModel(builders.make_model(), [1, 3, 4])
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.tensor([[0, 1, 1, 0]])
    batch = target.generate_batch(ids, torch.ones_like(ids), mask)
    assert batch.input_ids.tolist() == [[6, 7, 8, 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1]]
    assert set(batch.to_trainer_inputs()) == {
        "input_ids", "attention_mask", "loss_mask", "aux_hidden_states", "target_logits",
    }  # fmt: skip
    assert not batch.logits.requires_grad
    assert not batch.aux_hidden_states.requires_grad


def test_hooks_are_gone_after_a_capture_and_after_a_failed_one() -> None:
    model = builders.make_model()
    target = HFEagle3TargetModel(model, [1, 3, 4])
    target.capture(torch.tensor([[1, 2, 3]]))
    with pytest.raises((IndexError, RuntimeError)):
        target.capture(torch.tensor([[10**6]]))
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_a_layer_that_does_not_run_is_reported() -> None:
    model = TinyModel("model", "layers")
    model.decoder_.layer_list = model.decoder_.layer_list[:5]
    ids = torch.tensor([[1, 2]])
    with pytest.raises(MismatchError, match=r"\[7\]"):
        HFEagle3TargetModel(model, [1, 7]).generate_batch(ids, torch.ones_like(ids), torch.ones_like(ids))


@pytest.mark.parametrize(("num_layers", "ids"), [(7, [1, 2, 3]), (8, [1, 3, 4]), (32, [1, 15, 28]), (80, [1, 39, 76])])
def test_default_layers_are_one_half_less_one_and_the_fourth_last(num_layers: int, ids: list[int]) -> None:
    assert default_aux_layer_ids(num_layers) == ids
    assert HFEagle3TargetModel(TinyModel("model", "layers", num_layers)).aux_layer_ids == ids


@pytest.mark.parametrize("num_layers", [1, 2, 4, 5, 6])
def test_targets_too_shallow_for_the_default_name_the_flag(num_layers: int) -> None:
    with pytest.raises(UsageError, match=rf"{num_layers} layers.*--aux-layer-ids"):
        HFEagle3TargetModel(TinyModel("model", "layers", num_layers))


@pytest.mark.parametrize("ids", [[], [3, 1], [2, 2], [-1, 2], [0, 12], [1, 5, 100]])
def test_layer_ids_that_cannot_be_meant_are_refused(ids: list[int]) -> None:
    with pytest.raises(UsageError, match="--aux-layer-ids"):
        HFEagle3TargetModel(TinyModel("model", "layers"), ids)


def test_a_context_parallel_mesh_is_refused() -> None:
    with pytest.raises(UsageError, match="cp_mesh"):
        HFEagle3TargetModel(TinyModel("model", "layers"), [1, 3, 4], cp_mesh=object())


@pytest.mark.parametrize("given", ["none", "both", "no mask", "mask alone"])
def test_a_batch_with_none_or_two_supervisions_is_refused(given: str) -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    plain = {"aux_hidden_states": torch.zeros(1, 3, 6), "input_ids": ids, "attention_mask": ids, "loss_mask": ids}
    logits, probs, mask = torch.zeros(1, 3, 5), torch.zeros(1, 3, 4), torch.ones(1, 3, 1, dtype=torch.bool)
    wrong: dict[str, dict[str, torch.Tensor]] = {
        "none": {},
        "both": {"logits": logits, "target_probs": probs, "position_mask": mask},
        "no mask": {"target_probs": probs},
        "mask alone": {"logits": logits, "position_mask": mask},
    }
    with pytest.raises(UsageError):
        Eagle3TargetBatch(**plain, **wrong[given])
    Eagle3TargetBatch(**plain, logits=logits)
    Eagle3TargetBatch(**plain, target_probs=probs, position_mask=mask)
