"""Which rows are conversations, and what is said of those that are not."""

from __future__ import annotations

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
