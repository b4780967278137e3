"""The interface is one: drafters of other kinds, written here against the protocols alone, decode to the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from eagle_offline import HFEagle3TargetModel
from eagle_offline.errors import MismatchError
from eagle_offline.serving.cached_target import CachedTarget
from eagle_offline.serving.decoding import Answer, Limits, decode
from eagle_offline.serving.drafting import Acceptance, ChainProposal, Drafter, NoDrafter, Settled
from eagle_offline.serving.sampling import Sampling
from tests.oracles import decoding as oracle

LENGTHS = [6, 1, 29, 11]
LENGTH = 24
FULL_ATTENTION = ["Llama", "Qwen2", "Granite", "Cohere"]


def answers_of(
    kind: str, drafter: Drafter, prompts: list[list[int]], stop_token_ids: Sequence[int] = (), capture: bool = True
) -> list[Answer]:
    target = CachedTarget(HFEagle3TargetModel(oracle.target(kind), oracle.AUX_LAYER_IDS), capture=capture)
    answers, _ = decode(
        target, drafter, prompts, Limits(LENGTH, stop_token_ids), Sampling(), torch.Generator().manual_seed(0)
    )
    return answers


def true_answers(kind: str, prompts: list[list[int]], stop_token_ids: Sequence[int] = ()) -> list[list[int]]:
    found = [oracle.long_greedy_answer(kind, tuple(prompt), LENGTH) for prompt in prompts]
    return [oracle.ended(answer, LENGTH, stop_token_ids) for answer in found]


# --- Trees ---


@dataclass(frozen=True)
class Shape:
    """A tree of drafts: the column each node hangs from (0 is the last known token), and who is told the truth."""

    parents: tuple[int, ...]

    def depth(self, node: int) -> int:
        """How many tokens after the last known one a node stands; node 0 is that token."""
        return 0 if node == 0 else 1 + self.depth(self.parents[node - 1])

    def path(self, node: int) -> list[int]:
        return [0] if node == 0 else [*self.path(self.parents[node - 1]), node]

    @property
    def depths(self) -> Tensor:
        return torch.tensor([self.depth(node) for node in range(1, len(self.parents) + 1)])

    @property
    def visible(self) -> Tensor:
        size = len(self.parents) + 1
        return torch.tensor([[other in self.path(node) for other in range(size)] for node in range(size)])


SHAPES = {
    "two branches of two, one after the other": Shape((0, 1, 0, 3)),
    "two branches of two, level by level": Shape((0, 0, 1, 2)),
    "a long branch first": Shape((0, 1, 2, 0, 4)),
    "a long branch second": Shape((0, 0, 1, 2, 4)),
    "leaves that part late": Shape((0, 1, 1, 2, 2, 3)),
}


@dataclass(frozen=True)
class TreeProposal:
    """Follows, from the root, whichever child the target says."""

    token_ids: Tensor
    shape: Shape

    @property
    def depths(self) -> Tensor:
        return self.shape.depths

    @property
    def visible(self) -> Tensor:
        return self.shape.visible

    def accept(self, target_logits: Tensor, _sampling: Sampling, _generator: torch.Generator) -> Acceptance:
        said, tokens = target_logits.argmax(-1).tolist(), self.token_ids.tolist()
        paths, after = [], []
        for row, says in enumerate(said):
            node = 0
            while True:
                children = [child + 1 for child, parent in enumerate(self.shape.parents) if parent == node]
                chosen = [child for child in children if tokens[row][child - 1] == says[node]]
                if not chosen:
                    break
                node = chosen[0]
            paths.append(self.shape.path(node))
            after.append(says[node])
        longest = max(map(len, paths))
        return Acceptance(
            num_accepted=torch.tensor([len(path) - 1 for path in paths]),
            next_ids=torch.tensor(after),
            columns=torch.tensor([path + [0] * (longest - len(path)) for path in paths]),
        )


class Tree(oracle.Replay):
    """Knows the answers; at every place one branch, not always the same, holds more of the truth than the others."""

    def __init__(self, texts: Sequence[Sequence[int]], shape: Shape, error_rate: float):
        super().__init__(texts, int(shape.depths.max()), error_rate)
        self.shape = shape
        self.accepted_nodes: list[int] = []

    def propose(self, settled: Settled, _sampling: Sampling, _generator: torch.Generator) -> TreeProposal:
        rows = []
        for text_id, place in zip(self.rows, self.read(settled), strict=True):
            tokens: list[int] = []
            for node, parent in enumerate(self.shape.parents, start=1):
                siblings = [t for t, p in zip(tokens, self.shape.parents, strict=False) if p == parent]
                token = self.guess(text_id, place + self.shape.depth(node) - 1, salt=node)
                while token in siblings:
                    token = (token + 1) % self.vocab_size
                tokens.append(token)
            rows.append(tokens)
        return TreeProposal(torch.tensor(rows), self.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", FULL_ATTENTION)
def test_a_tree_decodes_to_the_plain_answer(kind: str, shape: str) -> None:
    """Over 24 tokens a branch's keys that were kept wrongly are read again and again."""
    prompts = oracle.prompts(LENGTHS)
    true = true_answers(kind, prompts)
    drafter = Tree([prompt + answer for prompt, answer in zip(prompts, true, strict=True)], SHAPES[shape], 0.45)
    answers = answers_of(kind, drafter, prompts)
    assert [answer.token_ids for answer in answers] == true
    assert {run for answer in answers for run in answer.accepted} >= {0, 1, 2}


@pytest.mark.parametrize("second", [False, True], ids=["first branch right", "second branch right"])
def test_the_right_branch_is_kept_wherever_it_stands(second: bool) -> None:
    """One branch always right, the other always wrong: two tokens and the target's own in every round."""
    prompts = oracle.prompts(LENGTHS)
    true = true_answers("Llama", prompts)
    texts = [prompt + answer for prompt, answer in zip(prompts, true, strict=True)]
    shape = SHAPES["two branches of two, one after the other"]

    class OneRight(Tree):
        def guess(self, text_id: int, place: int, salt: int = 0) -> int:
            text = self.texts[text_id]
            token = text[place] if place < len(text) else 0
            return token if (salt > 2) == second else (token + 5) % self.vocab_size

    answers = answers_of("Llama", OneRight(texts, shape, 0.0), prompts)
    assert [answer.token_ids for answer in answers] == true
    assert all(answer.accepted == [2] * 7 + [2] for answer in answers)


def test_states_told_after_a_tree_are_those_of_the_branch_that_was_accepted() -> None:
    """What an EAGLE tree would draft from next: the outputs of the target's layers along the text."""
    prompts = oracle.prompts(LENGTHS)
    texts = [prompt + answer for prompt, answer in zip(prompts, true_answers("Llama", prompts), strict=True)]
    told: list[list[Tensor]] = [[] for _ in texts]

    class Watching(Tree):
        def propose(self, settled: Settled, sampling: Sampling, generator: torch.Generator) -> TreeProposal:
            for index, text_id in enumerate(self.rows):
                told[text_id].append(settled.aux_hidden_states[index, : int(settled.num_slots[index])].clone())
            return super().propose(settled, sampling, generator)

    answers_of("Llama", Watching(texts, SHAPES["two branches of two, one after the other"], 0.45), prompts)
    for text, states in zip(texts, told, strict=True):
        found = torch.cat(states)
        assert len(found) >= len(text) - 3
        expected = oracle.states_of(oracle.target("Llama"), text)[: len(found)]
        assert torch.allclose(found, expected, rtol=0, atol=1e-9)


def test_a_tree_stops_where_plain_decoding_stops() -> None:
    prompts = oracle.prompts(LENGTHS)
    whole = true_answers("Llama", prompts)
    stop = whole[2][7]
    true = true_answers("Llama", prompts, [stop])
    texts = [prompt + answer for prompt, answer in zip(prompts, whole, strict=True)]
    answers = answers_of("Llama", Tree(texts, SHAPES["a long branch second"], 0.3), prompts, [stop])
    assert [answer.token_ids for answer in answers] == true
    assert [answer.stopped for answer in answers] == [stop in answer for answer in true]


def test_a_trees_batch_gives_each_prompt_what_it_gets_alone() -> None:
    prompts = oracle.prompts(LENGTHS)
    true = true_answers("Qwen2", prompts)
    texts = [prompt + answer for prompt, answer in zip(prompts, true, strict=True)]
    shape = SHAPES["leaves that part late"]
    together = answers_of("Qwen2", Tree(texts, shape, 0.4), prompts)
    alone = [answers_of("Qwen2", Tree([text], shape, 0.4), [p])[0] for text, p in zip(texts, prompts, strict=True)]
    assert together == alone


def test_a_tree_that_is_a_chain_is_a_chain() -> None:
    prompts = oracle.prompts(LENGTHS)
    true = true_answers("Llama", prompts)
    texts = [prompt + answer for prompt, answer in zip(prompts, true, strict=True)]

    class SameGuesses(Tree):
        def guess(self, text_id: int, place: int, salt: int = 0) -> int:
            return super().guess(text_id, place)

    as_tree = answers_of("Llama", SameGuesses(texts, Shape((0, 1, 2)), 0.3), prompts)
    assert as_tree == answers_of("Llama", oracle.Replay(texts, 3, 0.3), prompts)


@pytest.mark.parametrize("kind", [*oracle.WINDOWED, "Gemma2"])
def test_a_tree_on_a_sliding_window_is_refused(kind: str) -> None:
    prompts = oracle.prompts([4, 9])
    drafter = Tree([prompt + [0] * 40 for prompt in prompts], Shape((0, 0)), 0.3)
    with pytest.raises(MismatchError):
        answers_of(kind, drafter, prompts)


# --- Prompt lookup ---


class Lookup:
    """Proposes what followed the last earlier occurrence of the newest token in the text so far."""

    name = "lookup"

    def __init__(self, num_draft_tokens: int):
        self.num_draft_tokens = num_draft_tokens

    def start(self, num_rows: int) -> None:
        self.texts: list[list[int]] = [[] for _ in range(num_rows)]

    def select_rows(self, rows: Tensor) -> None:
        self.texts = [self.texts[int(row)] for row in rows]

    def propose(self, settled: Settled, _sampling: Sampling, _generator: torch.Generator) -> ChainProposal:
        drafts = []
        for index, text in enumerate(self.texts):
            text.extend(settled.input_ids[index, : int(settled.num_slots[index])].tolist())
            earlier = [place for place, token in enumerate(text[:-1]) if token == text[-1]]
            found = text[earlier[-1] + 1 :][: self.num_draft_tokens] if earlier else []
            drafts.append(found + [0] * (self.num_draft_tokens - len(found)))
        return ChainProposal(torch.tensor(drafts))


@pytest.mark.parametrize("kind", ["Llama", "Cohere", "Gemma3, window of 8", "Olmo2"])
def test_prompt_lookup_decodes_to_the_plain_answer(kind: str) -> None:
    prompts = oracle.prompts(LENGTHS)
    answers = answers_of(kind, Lookup(3), prompts, capture=kind == "Llama")
    assert [answer.token_ids for answer in answers] == true_answers(kind, prompts)
    assert sum(sum(answer.accepted) for answer in answers) > 0


def test_prompt_lookup_stays_lossless_when_sampled() -> None:
    """A drafter that draws nothing must be refused when tokens are sampled, or give them all their probability."""
    model = oracle.target("Llama", vocab_size=10, num_layers=3)
    prompt = [3, 1, 4, 1, 5, 3, 1]
    target = CachedTarget(HFEagle3TargetModel(model, oracle.AUX_LAYER_IDS), capture=False)

    class Certain(Lookup):
        def propose(self, settled: Settled, sampling: Sampling, generator: torch.Generator) -> ChainProposal:
            drafts = super().propose(settled, sampling, generator).token_ids
            return ChainProposal(drafts, torch.nn.functional.one_hot(drafts, 10).float())

    answers, _ = decode(
        target, Certain(2), [prompt] * 2000, Limits(4, ()), Sampling(1.0, 1.0), torch.Generator().manual_seed(0)
    )
    counts: dict[tuple[int, ...], int] = {}
    for answer in answers:
        counts[tuple(answer.token_ids[:3])] = counts.get(tuple(answer.token_ids[:3]), 0) + 1
    assert oracle.chi_square_p_value(counts, oracle.joint_distribution(model, prompt, 3, 1.0, 1.0)) > 1e-3


# --- What is told ---


def test_slots_settled_are_the_tokens_that_became_known_and_each_is_told_once() -> None:
    """`Replay` checks positions and padding; here what it was told, put together, is the text."""
    prompts = oracle.prompts(LENGTHS)
    true = true_answers("Llama", prompts)
    texts = [prompt + answer for prompt, answer in zip(prompts, true, strict=True)]
    drafter = oracle.Replay(texts, 3, 0.4)
    answers_of("Llama", drafter, prompts)
    for known, text in zip(drafter.known, texts, strict=True):
        assert known[1:] == text[1 : len(known)]
        assert len(known) >= len(text) - 4


def test_nothing_is_told_to_a_drafter_of_rows_that_are_finished() -> None:
    prompts = oracle.prompts(LENGTHS)
    true = true_answers("Llama", prompts)
    stop = true[1][3]
    recorder = oracle.Recorder(NoDrafter(oracle.VOCAB_SIZE))
    answers = answers_of("Llama", recorder, prompts, [stop])
    for row, answer in enumerate(answers):
        assert len(recorder.drafted[row]) == len(answer.accepted) == len(answer.token_ids) - 1


def test_a_drafter_without_states_needs_no_capture() -> None:
    prompts = oracle.prompts(LENGTHS)
    texts = [prompt + answer for prompt, answer in zip(prompts, true_answers("Llama", prompts), strict=True)]
    captured = answers_of("Llama", oracle.Replay(texts, 3, 0.3), prompts, capture=True)
    assert answers_of("Llama", oracle.Replay(texts, 3, 0.3), prompts, capture=False) == captured
