"""Tools told to a model whose chat template knows none: in the system message, with Hermes' format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

PREAMBLE = """You can call functions. They are described by JSON schemas within <tools></tools>:
<tools>
{tools}
</tools>
To call a function, answer with its name and arguments as JSON within <tool_call></tool_call>:
<tool_call>
{{"name": "function_name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def with_preamble(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Messages for a template that knows only `role` and `content`.

    Args:
        messages: as templates take them, with `tool_calls` and role "tool".
        tools: as templates take them; the preamble is left out if there are none.
    """
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    told = PREAMBLE.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {**rest, "role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    written = [_written({"name": call["name"], "arguments": call["arguments"]}) for call in calls]
    return {**rest, "content": "\n".join([*([content] if content else []), *written])}


def _written(call: Mapping[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
