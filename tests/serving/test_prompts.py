"""What is asked: every shape of prompt file becomes the same conversations, and a bad row is named."""

from __future__ import annotations

import pytest

from eagle_offline.errors import DataError, UsageError
from eagle_offline.serving.prompts import Conversation, default_prompts, read_prompts
from eagle_offline.text.conversations import Message
from tests.builders import write_jsonl


def said(conversation: Conversation) -> list[list[tuple[str, str]]]:
    return [[(message.role, message.content) for message in turn] for turn in conversation.turns]


SYSTEM = {"role": "system", "content": "Be brief."}
HI, BYE = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Bye"}
HELLO = {"role": "assistant", "content": "Hello."}
SHAPES = {
    "prompt": ({"prompt": "Hi"}, [[("user", "Hi")]]),
    "turns": ({"turns": ["Hi", "Bye"]}, [[("user", "Hi")], [("user", "Bye")]]),
    "messages": ({"messages": [HI]}, [[("user", "Hi")]]),
    "with a system turn": ({"messages": [SYSTEM, HI]}, [[("system", "Be brief."), ("user", "Hi")]]),
    "answers are asked for again": ({"messages": [HI, HELLO, BYE, HELLO]}, [[("user", "Hi")], [("user", "Bye")]]),
    "a last question": ({"messages": [HI, HELLO, BYE]}, [[("user", "Hi")], [("user", "Bye")]]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}]}, [[("user", "Hi")]]),
    "two messages at once": ({"messages": [HI, BYE]}, [[("user", "Hi"), ("user", "Bye")]]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_every_shape_become_turns(shape, tmp_path):
    row, expected = SHAPES[shape]
    (read,) = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", [row])))
    assert said(read) == expected


@pytest.mark.parametrize(("key", "task"), [("task", "code"), ("category", "code"), ("kind", "all")])
def test_a_row_says_what_kind_of_question_it_is(key, task, tmp_path):
    (read,) = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Hi", key: "code"}])))
    assert read.task == task


BAD = {
    "no question": ({"messages": [SYSTEM]}, "nothing is asked in it"),
    "only an answer": ({"messages": [HELLO]}, "nothing is asked in it"),
    "nothing known": ({"text": "Hi"}, "keys are text"),
    "an empty prompt": ({"prompt": ""}, "expected `prompt`, `turns`, `messages` or `conversations`, not empty"),
    "no turns": ({"turns": []}, "not empty"),
    "half a surrogate pair": ('{"prompt": "\\ud800 x"}', "half a surrogate pair"),
    "an empty turn": ({"turns": ["Hi", ""]}, "keys are turns"),
    "a bad role": ({"messages": [{"role": "robot", "content": "Hi"}]}, "the role is 'robot'"),
    "bad JSON": ("{", "not"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_cannot_be_asked_is_named_with_its_file_and_number(kind, tmp_path):
    row, said_of_it = BAD[kind]
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Hi"}, row])
    with pytest.raises(DataError, match=r"p\.jsonl, row 2: ") as caught:
        read_prompts(str(path))
    assert said_of_it in str(caught.value)
    assert len(read_prompts(str(path), limit=1)) == 1, "rows beyond the limit are not read"


def test_splits_limits_and_missing_files(tmp_path):
    path = str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Question {number}"} for number in range(5)]))
    assert said(read_prompts(path, split="[2:3]")[0]) == [[("user", "Question 2")]]
    assert len(read_prompts(path, limit=3)) == 3
    with pytest.raises(UsageError, match="selects no row"):
        read_prompts(path, split="[7:]")
    with pytest.raises(DataError, match="no such file"):
        read_prompts(str(tmp_path / "nothing.jsonl"))


def test_without_a_file_there_are_two_questions_of_each_of_eight_kinds():
    prompts = default_prompts()
    assert len(prompts) == 16
    assert len({prompt.task for prompt in prompts}) == 8
    assert all(prompt.turns[0][0] == Message("user", prompt.turns[0][0].content) for prompt in prompts)
