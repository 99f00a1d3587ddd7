"""Tools over HTTP: what a request may call becomes a grammar, and what the model wrote becomes calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from curkv.engine.types import InvalidRequest, Structure
from curkv.models.chat_template import ChatTemplate
from curkv.server.chat.conversation import _plain_message
from curkv.server.chat.protocol import ChatRequest, Message
from curkv.server.chat.tools import Spoken, ToolUse

TEMPLATE = ChatTemplate("{{ messages }}", {})


def tool(name: str) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {}}},
    }


def use(**fields: Any) -> ToolUse:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool("f"), tool("g")], **fields}
    return ChatRequest.model_validate(body).tool_use


@pytest.mark.parametrize(
    ("fields", "callable_", "forced", "parallel"),
    [
        ({}, ["f", "g"], False, True),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ["f", "g"], False, False),
        ({"tool_choice": "none"}, [], False, True),
        ({"tool_choice": "required"}, ["f", "g"], True, True),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, ["g"], True, False),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "f"}}],
                    },
                }
            },
            ["f"],
            True,
            True,
        ),
        ({"tools": None, "functions": [tool("h")["function"]]}, ["h"], False, False),
        (
            {"tools": None, "functions": [tool("h")["function"]], "function_call": {"name": "h"}},
            ["h"],
            True,
            False,
        ),
    ],
)
def test_choices(fields: dict[str, Any], callable_: list[str], forced: bool, parallel: bool) -> None:
    tools = use(**fields)
    assert [tool.name for tool in tools.callable] == callable_
    assert (tools.forced, tools.parallel) == (forced, parallel)


def test_the_prompt_tells_of_tools_that_may_be_called() -> None:
    assert [spec["function"]["name"] for spec in use().told] == ["f", "g"]
    assert use(tool_choice="none").told == []


def test_calls_or_a_schema() -> None:
    answer = Structure("json", {"type": "object"}, "response_format")
    structure = use().structure(TEMPLATE, {}, answer)
    assert structure is not None and structure.source.startswith("start: answer | ")
    with pytest.raises(InvalidRequest) as refused:
        use().structure(TEMPLATE, {}, Structure("regex", "a", "guided_regex"))
    assert refused.value.param == "guided_regex"
    assert use(tool_choice="none").structure(TEMPLATE, {}, answer) is answer


def test_a_message_is_put_together_from_its_pieces() -> None:
    spoken = Spoken(use().parser(TEMPLATE, ""), iter(["id1", "id2"]).__next__)
    calls = ('{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "arguments": {}}')
    written = "Well." + "".join(f"<tool_call>{call}</tool_call>" for call in calls)
    news = [spoken.take(written[:30], False), spoken.take(written[30:], True)]
    assert news[0] == {"content": "Well."}
    assert spoken.content == "Well." and spoken.reasoning is None
    made = [(call.id, call.function.name, json.loads(call.function.arguments)) for call in spoken.calls]
    assert made == [("id1", "f", {"a": 1}), ("id2", "g", {})]
    deltas = [delta for piece in news for delta in piece.get("tool_calls", [])]
    assert {frozenset(delta.model_dump()) for delta in deltas if not delta.id} <= {
        frozenset(["index", "function"])
    }
    assert [delta.id for delta in deltas if delta.id] == ["id1", "id2"]
    for piece in news:
        indices = [delta.index for delta in piece.get("tool_calls", [])]
        assert len(indices) == len(set(indices)), "a client may read one piece of a call from a delta"
    assert "".join(d.function.arguments or "" for d in deltas if d.index == 0) == '{"a": 1}'


def test_history_reaches_the_template_with_arguments_as_objects() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "no JSON"}},
        {"role": "function", "name": "f", "content": "7"},
    ]
    read = [Message.model_validate(message) for message in messages]
    plain = [_plain_message(message, "".join(text for text, _ in message.parts)) for message in read]
    assert plain[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert plain[1] == {"role": "tool", "content": "42", "tool_call_id": "c1"}
    assert plain[2]["tool_calls"][0]["function"]["arguments"] == "no JSON"
    assert plain[3]["role"] == "tool"
