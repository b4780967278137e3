"""Rewritten answers: the target's own greedy text, turn by turn, whatever the batch and the interruptions."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle_offline.errors import DataError, StoppedEarly
from eagle_offline.example.corpus import read_conversations, write_conversations
from eagle_offline.example.rewrite import rewrite_answers
from eagle_offline.example.target import ExampleTargetConfig, train_target

MAX_NEW_TOKENS = 30


def _short_conversation(number):
    """Return a conversation with one to three short answers, after prompts of unlike length."""
    words = ["red", "green", "blue", "white"]
    messages = [{"role": "system", "content": "Be brief."}] if number % 3 == 0 else []
    for turn in range(1 + number % 3):
        word = words[(number + turn) % 4]
        messages.append({"role": "user", "content": " ".join([f"Number {number}: say", *[word] * (1 + number % 5)])})
        messages.append({"role": "assistant", "content": f"I say {word}" + f" and {words[number % 4]}" * (number % 4)})
    return {"id": f"short-{number}", "task": "echo", "messages": messages}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A target that has learned to end its turns, the conversations to rewrite, and their rewritten form."""
    directory = tmp_path_factory.mktemp("rewrite")
    write_conversations(directory / "train.jsonl", map(_short_conversation, range(100)))
    write_conversations(directory / "heldout.jsonl", map(_short_conversation, range(100, 112)))
    config = ExampleTargetConfig(
        hidden_size=32, num_hidden_layers=4, intermediate_size=48, vocab_size=300, steps=80, tokens_per_batch=512
    )
    train_target(directory / "train.jsonl", directory / "model", config)
    summary = rewrite_answers(
        directory / "model", directory / "heldout.jsonl", directory / "rewritten.jsonl", MAX_NEW_TOKENS, 4
    )
    return directory, summary


@torch.inference_mode()
def _rewrite_one_by_one(directory, messages):
    """Return the messages with greedy answers, made token by token without cache, batch or padding."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    result, answered = [], 0
    for message in messages:
        if message["role"] != "assistant":
            result.append(message)
            continue
        text = tokenizer.apply_chat_template(result, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = []
        while len(answer) < MAX_NEW_TOKENS and tokenizer.eos_token_id not in answer:
            answer.append(model(torch.tensor([ids + answer])).logits[0, -1].argmax().item())
        if answer[-1] != tokenizer.eos_token_id:
            break
        result.append({"role": "assistant", "content": tokenizer.decode(answer[:-1], skip_special_tokens=True)})
        answered = len(result)
    return result[:answered]


def test_rewritten_answers_equal_greedy_generation_one_by_one(example):
    directory, summary = example
    expected = []
    for conversation in read_conversations(directory / "heldout.jsonl"):
        messages = _rewrite_one_by_one(directory, conversation["messages"])
        if messages:
            expected.append({**conversation, "messages": messages})
    assert read_conversations(directory / "rewritten.jsonl") == expected
    assert summary["num_conversations"] == len(expected) > 4
    assert summary["num_left_out"] == 12 - len(expected)
    kept = sum(message["role"] == "assistant" for line in expected for message in line["messages"])
    originals = read_conversations(directory / "heldout.jsonl")
    asked = sum(message["role"] == "assistant" for line in originals for message in line["messages"])
    assert summary["num_turns"] == kept
    assert summary["num_dropped_turns"] == asked - kept


def test_answers_without_an_end_are_dropped_and_counted(example, tmp_path):
    directory, _ = example
    summary = rewrite_answers(directory / "model", directory / "heldout.jsonl", tmp_path / "cut.jsonl", 1, 8)
    assert summary["num_conversations"] == 0
    assert summary["num_left_out"] == 12
    assert (tmp_path / "cut.jsonl").read_bytes() == b""


def test_interrupted_rewriting_goes_on_and_gives_the_same_bytes(example, tmp_path):
    directory, summary = example
    arguments = (directory / "model", directory / "heldout.jsonl", tmp_path / "rewritten.jsonl", MAX_NEW_TOKENS, 4)
    asked = []

    def stop_at_third_batch():
        asked.append(None)
        return len(asked) == 3

    with pytest.raises(StoppedEarly):
        rewrite_answers(*arguments, should_stop=stop_at_third_batch)
    assert not (tmp_path / "rewritten.jsonl").exists()
    partial = tmp_path / "rewritten.jsonl.partial"
    assert len(partial.read_text().splitlines()) == 3
    with partial.open("ab") as stream:
        stream.write(b'["torn')
    asked = [None] * 10
    assert rewrite_answers(*arguments, should_stop=stop_at_third_batch) == summary
    uninterrupted = []
    other = (*arguments[:2], tmp_path / "other.jsonl", *arguments[3:])
    rewrite_answers(*other, should_stop=lambda: bool(uninterrupted.append(None)))
    assert len(asked) - 10 == len(uninterrupted) - 2
    assert (tmp_path / "rewritten.jsonl").read_bytes() == (directory / "rewritten.jsonl").read_bytes()
    assert not partial.exists()


def test_finished_rewriting_is_not_repeated_for_the_same_inputs_only(example):
    directory, summary = example
    arguments = (directory / "model", directory / "heldout.jsonl", directory / "rewritten.jsonl")
    assert rewrite_answers(*arguments, MAX_NEW_TOKENS, 4, should_stop=lambda: True) == summary
    with pytest.raises(StoppedEarly):
        rewrite_answers(*arguments, MAX_NEW_TOKENS + 1, 4, should_stop=lambda: True)


def test_a_file_without_answers_is_refused(example, tmp_path):
    line = {"id": "a", "task": "none", "messages": [{"role": "user", "content": "Hello?"}]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match="no assistant turn"):
        rewrite_answers(example[0] / "model", tmp_path / "questions.jsonl", tmp_path / "out.jsonl", 5, 2)
