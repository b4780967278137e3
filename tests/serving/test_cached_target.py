"""Whatever was extended, kept, forgotten and dropped, the next forward says what a fresh one of each row says."""

from __future__ import annotations

import random

import pytest
import torch

from eagle_offline import HFEagle3TargetModel
from eagle_offline.errors import MismatchError
from eagle_offline.serving.cached_target import CachedTarget
from tests import builders
from tests.oracles import decoding as oracle


class Mirror:
    """The rows that a cached target holds, as plain lists, and the check of every forward against fresh ones."""

    def __init__(self, kind: str, prompts: list[list[int]], capture: bool = True):
        self.model = oracle.target(kind)
        # float64 but for soft-capped attention, whose models are float32.
        exact = next(self.model.parameters()).dtype == torch.float64 and "Llama4" not in kind  # its rotary is float32
        self.tolerance = 1e-9 if exact else 1e-4
        self.target = CachedTarget(HFEagle3TargetModel(self.model, oracle.AUX_LAYER_IDS), capture=capture)
        self.rows = [list(prompt) for prompt in prompts]
        step = self.target.start(prompts)
        for row, tokens in enumerate(self.rows):
            self.close(step.logits[row, -1], oracle.logits_of(self.model, [tokens])[0, -1])
            if capture:
                assert step.aux_hidden_states is not None
                found = step.aux_hidden_states[row, step.aux_hidden_states.shape[1] - len(tokens) :]
                self.close(found, oracle.states_of(self.model, tokens))
            else:
                assert step.aux_hidden_states is None

    def close(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=self.tolerance, atol=self.tolerance)

    def extend(self, tokens: list[list[int]], paths: list[list[int]] | None = None) -> None:
        """Run new tokens; `paths[c]` are the columns that column c reads, in order, itself last."""
        num_new = len(tokens[0])
        depths = visible = None
        if paths is not None:
            depths = torch.tensor([len(path) - 1 for path in paths])
            visible = torch.tensor([[c in path for c in range(num_new)] for path in paths])
        step = self.target.extend(torch.tensor(tokens), depths, visible)
        for row, (kept, new) in enumerate(zip(self.rows, tokens, strict=True)):
            for column, path in enumerate(paths or [list(range(c + 1)) for c in range(num_new)]):
                text = kept + [new[c] for c in path]
                self.close(step.logits[row, column], oracle.logits_of(self.model, [text])[0, -1])
                if step.aux_hidden_states is not None:
                    self.close(step.aux_hidden_states[row, column], oracle.states_of(self.model, text)[-1])

    def keep(self, tokens: list[list[int]], columns: list[list[int]]) -> None:
        """Keep columns of the tokens just run, which may be the first ones."""
        counts = [len(chosen) for chosen in columns]
        given = None
        if any(chosen != list(range(len(chosen))) for chosen in columns):
            longest = max(counts)
            given = torch.tensor([chosen + [0] * (longest - len(chosen)) for chosen in columns])
        self.target.keep(counts, given)
        self.rows = [
            row + [new[c] for c in chosen] for row, new, chosen in zip(self.rows, tokens, columns, strict=True)
        ]

    def select(self, rows: list[int]) -> None:
        self.target.select_rows(torch.tensor(rows))
        self.rows = [list(self.rows[row]) for row in rows]


TREE = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4]]


def wander(kind: str, seed: int, steps: int, *, least_kept: int = 1, trees: bool = False) -> None:
    """A random sequence of everything a cached target can be asked."""
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 5, 9, 14]) for _ in range(rng.choice([1, 3, 4]))]
    mirror = Mirror(kind, oracle.prompts(lengths, seed=seed))
    for _ in range(steps):
        as_tree = trees and rng.random() < 0.6
        num_new = len(TREE) if as_tree else rng.choice([1, 2, 4, 6])
        tokens = [[rng.randrange(oracle.VOCAB_SIZE) for _ in range(num_new)] for _ in mirror.rows]
        mirror.extend(tokens, TREE if as_tree else None)
        if as_tree:
            columns = [rng.choice(TREE) for _ in mirror.rows]
        else:
            columns = [list(range(rng.randint(least_kept, num_new))) for _ in mirror.rows]
        mirror.keep(tokens, columns)
        if len(mirror.rows) > 1 and rng.random() < 0.4:
            mirror.select(rng.sample(range(len(mirror.rows)), rng.randint(1, len(mirror.rows))))


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_forwards_after_any_history_equal_fresh_ones(kind: str) -> None:
    wander(kind, seed=1, steps=5)


@pytest.mark.parametrize("kind", ["Llama", "Granite", "Cohere"])
def test_forwards_after_trees_equal_fresh_ones(kind: str) -> None:
    wander(kind, seed=2, steps=5, trees=True)


@pytest.mark.parametrize("kind", ["Llama", "Mistral, window of 8"])
def test_rows_may_keep_nothing(kind: str) -> None:
    wander(kind, seed=3, steps=5, least_kept=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_forwards_after_many_histories_equal_fresh_ones(kind: str) -> None:
    for seed in range(12):
        wander(kind, seed=100 + seed, steps=8)
        if kind not in oracle.WINDOWED:
            wander(kind, seed=200 + seed, steps=8, trees=True)


def test_a_row_far_ahead_of_another_leaves_it_alone() -> None:
    """One row keeps everything, one keeps one token a round: 1 + 5 against 30 + 30."""
    mirror = Mirror("Mistral, window of 8", oracle.prompts([1, 30]))
    for _ in range(5):
        tokens = oracle.prompts([6, 6], seed=len(mirror.rows[1]))
        mirror.extend(tokens)
        mirror.keep(tokens, [[0], [0, 1, 2, 3, 4, 5]])
    assert [len(row) for row in mirror.rows] == [6, 60]


def test_rows_can_be_given_another_order() -> None:
    mirror = Mirror("Llama", oracle.prompts([3, 12, 7]))
    for rows in ([2, 0, 1], [1, 0], [1]):
        mirror.select(rows)
        tokens = oracle.prompts([3] * len(rows), seed=len(rows))
        mirror.extend(tokens)
        mirror.keep(tokens, [[0, 1]] + [[0, 1, 2]] * (len(rows) - 1))


def test_columns_of_a_chain_equal_counts_of_a_chain() -> None:
    mirror = Mirror("Llama", oracle.prompts([3, 12]))
    tokens = oracle.prompts([4, 4])
    mirror.extend(tokens)
    mirror.target.keep([2, 3], torch.tensor([[0, 1, 0], [0, 1, 2]]))
    mirror.rows = [mirror.rows[0] + tokens[0][:2], mirror.rows[1] + tokens[1][:3]]
    mirror.extend(oracle.prompts([2, 2], seed=1))


def test_states_are_left_out_when_they_are_not_wanted() -> None:
    mirror = Mirror("Llama", oracle.prompts([3, 12]), capture=False)
    step = mirror.target.extend(torch.tensor([[1], [2]]))
    assert step.aux_hidden_states is None


def test_a_start_forgets_what_was_before() -> None:
    mirror = Mirror("Llama", oracle.prompts([3, 12]))
    mirror.extend(oracle.prompts([4, 4]))
    prompts = oracle.prompts([5, 2, 8], seed=5)
    step = mirror.target.start(prompts)
    for row, prompt in enumerate(prompts):
        mirror.close(step.logits[row, -1], oracle.logits_of(mirror.model, [prompt])[0, -1])


@pytest.mark.parametrize("kind", oracle.WINDOWED)
def test_a_tree_on_a_sliding_window_is_refused(kind: str) -> None:
    target = CachedTarget(HFEagle3TargetModel(oracle.target(kind), oracle.AUX_LAYER_IDS), capture=True)
    target.start([[1, 2, 3]])
    with pytest.raises(MismatchError):
        target.extend(torch.tensor([[4, 5]]), torch.tensor([0, 0]), torch.eye(2, dtype=torch.bool))


def test_a_target_whose_past_cannot_be_taken_back_is_refused() -> None:
    """A short convolution remembers its last inputs: what it was told cannot be forgotten."""
    layers = ["conv", "conv", "full_attention", "conv"]
    model = builders.make_model("Lfm2", vocab_size=24, num_hidden_layers=4, layer_types=layers, block_multiple_of=8)
    target = HFEagle3TargetModel(model, oracle.AUX_LAYER_IDS)
    with pytest.raises(MismatchError):
        CachedTarget(target, capture=True).start([[1, 2, 3]])
