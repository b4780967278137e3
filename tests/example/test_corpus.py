"""The example corpus: determined by its seed, varied, and split without overlap."""

from __future__ import annotations

import json

import pytest

from eagle_offline.example.corpus import TASKS, generate_conversations, read_conversations, write_corpus


def test_same_arguments_write_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        write_corpus(tmp_path / name / "train.jsonl", tmp_path / name / "heldout.jsonl", 60, 20, seed=3)
    for file in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_another_seed_writes_other_conversations():
    first = [conversation["messages"] for conversation in generate_conversations(50, seed=0)]
    second = [conversation["messages"] for conversation in generate_conversations(50, seed=1)]
    assert first != second


def test_a_shorter_run_is_a_prefix_of_a_longer_one():
    assert list(generate_conversations(30, seed=5)) == list(generate_conversations(90, seed=5))[:30]


def test_train_and_heldout_share_no_conversation(tmp_path):
    write_corpus(tmp_path / "train.jsonl", tmp_path / "heldout.jsonl", 800, 200, seed=0)
    train = {json.dumps(line["messages"]) for line in read_conversations(tmp_path / "train.jsonl")}
    heldout = {json.dumps(line["messages"]) for line in read_conversations(tmp_path / "heldout.jsonl")}
    assert (len(train), len(heldout)) == (800, 200)
    assert not train & heldout


def test_every_task_and_form_of_conversation_occurs():
    conversations = list(generate_conversations(600, seed=0))
    assert {conversation["task"] for conversation in conversations} == set(TASKS)
    roles = [[message["role"] for message in conversation["messages"]] for conversation in conversations]
    assert {turn[0] for turn in roles} == {"system", "user"}
    assert {turn.count("assistant") for turn in roles} >= {1, 2, 3, 4}
    assert len({conversation["id"] for conversation in conversations}) == 600


def test_user_and_assistant_alternate_and_nobody_is_silent():
    for conversation in generate_conversations(300, seed=2):
        messages = [message for message in conversation["messages"] if message["role"] != "system"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() == message["content"] != "" for message in conversation["messages"])


@pytest.mark.parametrize("seed", [0, 7])
def test_worked_arithmetic_adds_up(seed):
    checked = 0
    for conversation in generate_conversations(400, seed):
        if conversation["task"] != "arithmetic":
            continue
        for message in conversation["messages"]:
            if message["role"] == "assistant":
                working = message["content"].partition("Ones: ")[2]
                for equation in working.replace(", carry 1", "").replace(", borrow 1", "").split(". ")[:2]:
                    left, _, right = equation.removeprefix("Tens: ").partition(" = ")
                    numbers = left.replace(" - ", " + -").split(" + ")
                    assert sum(map(int, numbers)) == int(right), message["content"]
                    checked += 1
    assert checked > 40
