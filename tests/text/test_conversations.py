"""Which rows are conversations, and what is said of those that are not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eagle_offline.text.conversations import Message, RowProblem, parse_conversation, parse_tools

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]


@pytest.mark.parametrize("name", ["gpt", "chatgpt", "bing", "bard", "model", "Assistant"])
def test_sharegpt_equals_messages(name: str) -> None:
    sharegpt = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": name, "value": "Yes?"},
        {"from": "observation", "value": "3"},
    ]
    messages = [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "tool", "content": "3"}]
    assert parse_conversation({"conversations": sharegpt}) == parse_conversation({"messages": messages})


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Yes"}, {"type": "text", "text": "?", "image": None}]
    assert parse_conversation({"messages": [HELLO[0], {"role": "assistant", "content": parts}]})[1].content == "Yes?"


def test_row_level_system_text_becomes_the_first_turn_once() -> None:
    assert parse_conversation({"messages": HELLO, "system": "Be brief."})[0] == Message("system", "Be brief.")
    own = [{"role": "system", "content": "Own."}, *HELLO]
    assert [turn.role for turn in parse_conversation({"messages": own, "system": "x"})] == [
        "system",
        "user",
        "assistant",
    ]


def test_further_fields_reach_the_template_and_nulls_do_not() -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}], "thinking": "hm", "name": None}
    message = parse_conversation({"messages": [HELLO[0], turn]})[1]
    expected = {"role": "assistant", "content": "", "tool_calls": [{"id": 1}], "thinking": "hm"}
    assert message.as_template_input() == expected


@pytest.mark.parametrize(
    ("value", "reason", "named"),
    [
        ({"prompt": "Hi"}, "no-conversation", "prompt"),
        ({}, "no-conversation", "none"),
        ({"messages": "Hi"}, "conversation-not-a-list", "text"),
        ({"messages": []}, "empty-conversation", "messages"),
        ({"conversations": []}, "empty-conversation", "conversations"),
        ({"messages": ["Hi"]}, "turn-not-an-object", "turn 1"),
        ({"messages": [*HELLO, {"role": "wizard", "content": "x"}]}, "unknown-role", "turn 3: the role is 'wizard'"),
        ({"messages": [{"content": "x"}]}, "unknown-role", "missing"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown-role", "turn 1"),
        ({"messages": [{"role": "user", "content": None}]}, "content-not-text", "null"),
        ({"messages": [{"role": "user", "content": 7}]}, "content-not-text", "a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content-not-text", "image"),
        ({"messages": [HELLO[0]]}, "no-assistant-turn", "user"),
        ({"messages": [HELLO[0], {"role": "assistant", "content": " \n"}]}, "empty-assistant-turn", "turn 2"),
    ],
)
def test_row_that_is_no_conversation_says_why(value: dict[str, Any], reason: str, named: str) -> None:
    with pytest.raises(RowProblem) as problem:
        parse_conversation(value)
    assert problem.value.reason_code == reason
    assert named in problem.value.detail
    assert "\n" not in problem.value.detail


def test_tools_are_taken_as_list_or_as_json_text() -> None:
    tools = [{"name": "add"}]
    assert parse_tools({"tools": tools}) == parse_tools({"tools": '[{"name": "add"}]'}) == tools
    assert parse_tools({"tools": ""}) is None
    assert parse_tools({}) is None
    for bad in ("{", '"add"', ["add"], 3):
        with pytest.raises(RowProblem) as problem:
            parse_tools({"tools": bad})
        assert problem.value.reason_code == "tools-not-a-list"


def asked_and_said(*texts: str) -> tuple[Message, ...]:
    return tuple(Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))


@pytest.mark.parametrize("prompt", ["prompt", "instruction", "question", "query", "input"])
@pytest.mark.parametrize("response", ["response", "output", "answer", "completion"])
def test_prompt_and_response_are_two_turns(prompt: str, response: str) -> None:
    assert parse_conversation({prompt: "Hi", response: "Yes?", "id": 3}) == asked_and_said("Hi", "Yes?")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"instruction": "Add", "input": "2, 3", "output": "5"}, asked_and_said("Add\n\n2, 3", "5")),
        ({"instruction": "Add 2, 3", "input": "", "output": "5"}, asked_and_said("Add 2, 3", "5")),
        ({"instruction": "Who?", "context": "Ann did.", "response": "Ann"}, asked_and_said("Who?\n\nAnn did.", "Ann")),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": "Yes?"}, asked_and_said("Hi", "Yes?")),
        (
            {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yes?"}]},
            asked_and_said("Hi", "Yes?"),
        ),
        ({"prompt": "Hi", "response": {"role": "assistant", "content": "Yes?"}}, asked_and_said("Hi", "Yes?")),
        (
            {"instruction": "More", "output": "d", "history": [["a", "b"]]},
            asked_and_said("a", "b", "More", "d"),
        ),
        (
            {"system_prompt": "Be brief.", "question": "Hi", "response": "Yes?"},
            (Message("system", "Be brief."), *asked_and_said("Hi", "Yes?")),
        ),
        ({"prompt": "x", "messages": HELLO}, asked_and_said("Hi", "Yes?")),
        ({"messages": None, "prompt": "Hi", "output": "Yes?", "response": "Yes?"}, asked_and_said("Hi", "Yes?")),
    ],
)
def test_pairs_of_other_shapes(value: dict[str, Any], expected: tuple[Message, ...]) -> None:
    assert parse_conversation(value) == expected


@pytest.mark.parametrize(
    ("value", "reason", "named"),
    [
        ({"prompt": "Hi", "chosen": "x"}, "no-conversation", "chosen"),
        ({"response": "Yes?"}, "no-conversation", "response"),
        ({"prompt": "Hi", "response": ""}, "empty-assistant-turn", "turn 2"),
        ({"prompt": "Hi", "response": None}, "empty-assistant-turn", "turn 2"),
        ({"prompt": "Hi", "response": 5}, "content-not-text", "a number"),
        ({"prompt": "a", "instruction": "b", "response": "c"}, "ambiguous-row", "`prompt` and `instruction`"),
        ({"prompt": "a", "response": "b", "output": "c"}, "ambiguous-row", "`response` and `output`"),
        ({"prompt": [{"role": "user", "content": "a"}], "input": "b", "output": "c"}, "ambiguous-row", "input"),
        ({"prompt": ["a"], "response": "b"}, "turn-not-an-object", "turn 1"),
        ({"prompt": "a", "response": "b", "history": "c"}, "conversation-not-a-list", "history"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "b"}]},
         "no-assistant-turn", "user"),
    ],
)  # fmt: skip
def test_pair_that_is_no_conversation_says_why(value: dict[str, Any], reason: str, named: str) -> None:
    with pytest.raises(RowProblem) as problem:
        parse_conversation(value)
    assert problem.value.reason_code == reason
    assert named in problem.value.detail


@pytest.mark.parametrize("key", ["messages", "conversations", "conversation", "dialog", "dialogue"])
def test_list_of_turns_has_many_names_and_may_be_json_text(key: str) -> None:
    turns = [{"role": "user", "content": "[Hi"}, {"role": "assistant", "content": "Yes?"}]
    expected = (Message("user", "[Hi"), Message("assistant", "Yes?"))
    assert parse_conversation({key: turns}) == parse_conversation({key: json.dumps(turns)}) == expected
    for text in ("[Hi", "Hi", "[" * 100_000):
        with pytest.raises(RowProblem) as problem:
            parse_conversation({key: text})
        assert problem.value.reason_code == "conversation-not-a-list"
