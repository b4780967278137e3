"""What training minimises under each option, one optimizer step of several packs, against the float64 oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eagle_offline.cache.reader import Sample, TargetSupervision
from eagle_offline.objectives.ttt_loss import TTTLoss
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.corpus import open_corpus
from eagle_offline.training.logbook import read_metrics
from eagle_offline.training.objective import UnrollObjective
from eagle_offline.training.packs import make_pack
from eagle_offline.training.tally import Tally
from eagle_offline.training.trainer import Trainer
from tests.oracles.acceptance import decoded_length, expected_accept_length, simulated_accept_length
from tests.oracles.children import command, run_children
from tests.oracles.distribution import overlaps
from tests.oracles.slots import counts_by_gate, rows_of_samples
from tests.oracles.ttt import Unroll, gradients, read_draft, unroll
from tests.training.caches import checkpoint_tensors, settings, shared_cache, train, trainer_of

K = 3
# Products of bf16 states in float32 against float64, over a few hundred rows.
RELATIVE = 2e-5

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"step_decay": 0.35},
    "predicted": {"supervision_gate": "predicted"},
    "both": {"supervision_gate": "both", "step_decay": 1.0},
    "alpha": {"lk_loss_type": "alpha"},
    "lambda": {"lk_loss_type": "lambda", "lk_kl_scale": 0.7, "lk_kl_decay": 2.0, "step_decay": 0.6},
    "lambda both": {"lk_loss_type": "lambda", "supervision_gate": "both"},
}


def chosen_for(run: Path, **changes: Any) -> TrainSettings:
    """Steps of four packs of one sample or two; gradients are not clipped, so that they can be looked at."""
    values = {"tokens_per_batch": 60, "global_batch": 4, "ttt_steps": K, "max_grad_norm": 1e9, "log_every": 1}
    return settings(run, **{**values, **changes})


def moved_off(trainer: Trainer) -> None:
    """A draft that overlaps with its target here and there: the untrained one hardly does."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.trainable:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def oracle_of(trainer: Trainer, indices: Any, gate: str, **options: Any) -> tuple[Unroll, dict, dict]:
    samples = [trainer.corpus.samples[int(index)] for index in indices]
    source = trainer.corpus.samples.caches[0]
    batch = rows_of_samples(samples, source.head.weight, source.selected_token_ids, gate, K)
    draft = read_draft(dict(trainer.model.named_parameters()), trainer.model.config)
    found = unroll(draft, **batch, ttt_steps=K, **options)
    return found, gradients(draft, found.loss), batch


_BY_DEFAULT = ("plain", "both", "alpha", "lambda")


@pytest.mark.parametrize(
    "name", [name if name in _BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
def test_a_step_of_several_packs_is_the_oracle_s_over_all_of_them(name, tmp_path):
    options = dict(OPTIONS[name])
    trainer = trainer_of(chosen_for(tmp_path, **options))
    moved_off(trainer)
    loaded = trainer.stream.load(next(trainer.remaining_steps()))
    assert len(loaded.packs) == 4
    gate = options.pop("supervision_gate", "input")
    expected, grads, batch = oracle_of(trainer, loaded.samples, gate, **options)
    assert min(expected.step_counts) > 10
    tally = Tally(K)
    outcome = trainer.step(loaded, tally)
    assert bool(outcome.is_finite)
    row = tally.row("train", trainer.loss, 1, 0.1)
    assert loaded.step_counts.tolist() == expected.step_counts
    assert row.loss == pytest.approx(float(expected.loss.detach()), rel=RELATIVE)
    assert row.accuracy == pytest.approx(expected.accuracy, abs=1e-9)
    assert row.simulated_accept_length == pytest.approx(simulated_accept_length(expected.prefix_hits, expected.valid))
    names = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    for name, parameter in trainer.model.named_parameters():
        if name not in names:
            continue
        size = float(grads[name].abs().max())
        assert size > 0, name
        worst = float((parameter.grad.double() - grads[name]).abs().max())
        assert worst <= RELATIVE * size, f"{name}: off by {worst / size:.2g}"
    norm = torch.stack([grads[name].norm() for name in names]).norm()
    assert float(outcome.grad_norm) == pytest.approx(float(norm), rel=RELATIVE)
    assert row.expected_accept_length == pytest.approx(expected_length(expected, batch), rel=RELATIVE)


def expected_length(found: Unroll, batch: dict[str, torch.Tensor]) -> float:
    """From the oracle's logits, slot by slot, a chain at a time."""
    chains, valid = [], []
    num_rows, num_slots = batch["input_ids"].shape
    for b in range(num_rows):
        for t in range(num_slots):
            chain, reach = [], []
            for k in range(K):
                inside = k < int(batch["doc_remaining"][b, t])
                reach.append(inside and bool(batch["loss_mask"][b, t + k]))
                counts = inside and bool(batch["position_mask"][b, t + k])
                alpha = 0.0
                if counts:
                    logits, probs = found.step_logits[k][b, t], batch["target_probs"][b, t + k]
                    alpha = float(overlaps(logits[None], probs[None], torch.ones(1))[0].detach())
                chain.append(alpha)
            chains.append(chain)
            valid.append(reach)
    by_step = [list(step) for step in zip(*chains, strict=True)]
    return expected_accept_length(by_step, [list(step) for step in zip(*valid, strict=True)])


def test_the_oracles_of_expected_length_agree():
    assert decoded_length([0.5, 0.25]) == pytest.approx(expected_accept_length([[0.5], [0.25]], [[True], [True]]))


def test_gates_differ_by_whose_tokens_they_ask_for():
    """One answer of three tokens, and one at the document's end: by hand."""
    mask = [False, True, True, True, False, False, True, True]
    assert counts_by_gate(mask, "input") == mask
    assert counts_by_gate(mask, "predicted") == [True, True, True, False, False, True, True, False]
    assert counts_by_gate(mask, "both") == [False, True, True, False, False, False, True, False]


@pytest.mark.parametrize("gate", ["input", "predicted", "both"])
def test_counts_of_a_gate_are_those_of_the_masks_document_by_document(gate, tmp_path):
    """The first answer token's distribution is stored beside the answer: `predicted` asks for it."""
    trainer = trainer_of(chosen_for(tmp_path, supervision_gate=gate, tokens_per_batch=400, global_batch=1))
    for step in trainer.remaining_steps():
        loaded = trainer.stream.load(step)
        expected = [0] * K
        for index in loaded.samples:
            sample = trainer.corpus.samples[int(index)]
            counts = counts_by_gate(sample.loss_mask.tolist(), gate)
            chosen = set(trainer.corpus.samples.caches[0].selected_token_ids.tolist())
            best = dict(
                zip(sample.supervision.positions.tolist(), sample.supervision.target_argmax.tolist(), strict=True)
            )
            for k in range(K):
                for slot in range(len(counts)):
                    t = slot + 1 + k
                    expected[k] += t < len(counts) and counts[t] and best[t] in chosen
        assert loaded.step_counts.tolist() == expected
        if step[0].step == 4:
            break


@pytest.mark.parametrize("gate", ["input", "predicted", "both"])
def test_a_gate_ends_with_its_document_even_where_the_next_begins_with_an_answer(gate):
    """Nobody's templates do that, but a document's last distribution predicts no token of another one."""
    generator = torch.Generator().manual_seed(7)
    selected = torch.tensor([True, True, False, True])
    samples = []
    for sample_id, length in enumerate((5, 2, 1, 6)):
        wrote = torch.rand(length, generator=generator) < 0.7
        wrote[0] = wrote[-1] = True
        everywhere = torch.arange(length)
        best = torch.randint(4, (length,), generator=generator)
        supervision = TargetSupervision(everywhere, torch.randn(length, 8), None, best, torch.zeros(length))
        samples.append(Sample(sample_id, everywhere, wrote, torch.randn(length, 24), supervision))
    plan = make_pack(samples, selected, UnrollObjective(TTTLoss(K)), torch.device("cpu"), gate).plan
    expected = [0] * K
    for sample in samples:
        counts = counts_by_gate(sample.loss_mask.tolist(), gate)
        for k in range(K):
            for t in range(1 + k, len(counts)):
                expected[k] += counts[t] and bool(selected[sample.supervision.target_argmax[t]])
    assert plan.step_counts.tolist() == expected


@pytest.mark.parametrize("gate", ["predicted", "both"])
def test_validation_asks_the_reference_s_gate_whatever_the_run_trains_with(gate, tmp_path):
    rows = []
    for chosen in (gate, "input"):
        trainer = trainer_of(chosen_for(tmp_path, supervision_gate=chosen))
        moved_off(trainer)
        rows.append(trainer.validate().row("heldout", trainer.loss, 0, 0.0))
    assert rows[0] == rows[1]


def test_validation_is_the_oracle_s(tmp_path):
    trainer = trainer_of(chosen_for(tmp_path, supervision_gate="both", heldout_share=0.1))
    moved_off(trainer)
    row = trainer.validate().row("heldout", trainer.loss, 0, 0.0)
    expected, _, batch = oracle_of(trainer, trainer.corpus.heldout_samples, "input")
    assert row.loss == pytest.approx(float(expected.loss.detach()), rel=RELATIVE)
    assert row.expected_accept_length == pytest.approx(expected_length(expected, batch), rel=RELATIVE)
    assert row.simulated_accept_length == pytest.approx(simulated_accept_length(expected.prefix_hits, expected.valid))


@pytest.mark.parametrize("kind", [None, "alpha", "lambda"])
def test_one_pack_or_many_an_optimizer_step_is_the_same_step(kind, tmp_path):
    """The same samples in one pack, and in packs of their own: losses and gradients as sums over the step."""
    found = []
    trainer = trainer_of(chosen_for(tmp_path, lk_loss_type=kind))
    position, packs = next(trainer.remaining_steps())
    samples = [index for pack in packs for index in pack]
    for cut in ([samples], [[index] for index in samples]):
        other = Trainer(trainer.settings, open_corpus(trainer.settings))
        moved_off(other)
        tally = Tally(K)
        outcome = other.step(other.stream.load((position, [torch.tensor(part).numpy() for part in cut])), tally)
        grads = {name: p.grad.clone() for name, p in other.model.named_parameters() if p.grad is not None}
        found.append((tally.row("train", other.loss, 1, 0.0), outcome, grads))
    (row, outcome, grads), (other_row, other_outcome, other_grads) = found
    assert row.loss == pytest.approx(other_row.loss, rel=1e-5)
    assert float(outcome.grad_norm) == pytest.approx(float(other_outcome.grad_norm), rel=1e-4)
    for name, gradient in grads.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(other_grads[name], gradient, rtol=0, atol=1e-4 * size, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"lk_loss_type": "lambda", "supervision_gate": "both"}, id="lambda"),
        pytest.param({"lk_loss_type": "alpha"}, id="alpha", marks=pytest.mark.slow),
        pytest.param({"supervision_gate": "predicted", "step_decay": 0.5}, id="gate", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one(options, tmp_path):
    """The mean overlap of the lambda loss is of the whole step, so ranks have to share it before they begin."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for size, run in enumerate(runs, start=1):
        chosen = chosen_for(run, max_steps=4, max_grad_norm=0.5, heldout_share=0, **options)
        ended = run_children(command(chosen), tmp_path, size)
        assert [one.code for one in ended] == [0] * size, [one.err for one in ended]
    ours, theirs = checkpoint_tensors(runs[1]), checkpoint_tensors(runs[0])
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    for one, two in zip(read_metrics(runs[0]), read_metrics(runs[1]), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["expected_accept_length"] == pytest.approx(two["expected_accept_length"], rel=1e-5)
        assert one["top1"] == two["top1"]


@pytest.mark.parametrize("kind", [pytest.param("alpha", marks=pytest.mark.slow), "lambda"])
def test_lk_losses_train(kind, tmp_path):
    """Fifteen steps on the same eight samples: the loss that is minimised goes down, the overlap up."""
    run = tmp_path / "run"
    chosen = settings(
        run, cache=(shared_cache(count=10, seed=1),), heldout_share=0, lk_loss_type=kind, tokens_per_batch=800,
        num_epochs=15, global_batch=1, learning_rate=5e-3,
    )  # fmt: skip
    train(chosen)
    rows = read_metrics(run)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert rows[-1]["expected_accept_length"] > rows[0]["expected_accept_length"]
