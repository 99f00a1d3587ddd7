# /// script
# dependencies = ["haystack-ai==3.4.1"]
# ///
"""Haystack: OpenAIChatGenerator and OpenAITextEmbedder."""

import json

from cases import BASE, MODEL, PERSON, PLACE, QUESTION, check, check_call, main
from haystack.components.embedders import OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, ToolCall
from haystack.tools import Tool
from haystack.utils import Secret

KEY = Secret.from_token("none")
TOOL = Tool("get_weather", "The weather in a city", PLACE, lambda city: "sunny")
parts = []


def run(messages=None, callback=None, tools=None, **options):
    options = {"max_tokens": 200, "temperature": 0} | options
    generator = OpenAIChatGenerator(
        api_key=KEY,
        model=MODEL,
        api_base_url=BASE,
        generation_kwargs=options,
        tools=tools,
        streaming_callback=callback,
        max_retries=0,
    )
    return generator.run(messages or [ChatMessage.from_user(QUESTION)])["replies"][0]


def chat():
    check(run().text, "no text")


def stream():
    run(callback=parts.append)
    check(parts, "no chunks")


def json_schema():
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    check("name" in json.loads(run(response_format=form).text), "no name")


def tools_auto():
    for call in run(tools=[TOOL]).tool_calls:
        check_call(call.tool_name, call.arguments)


def tools_required():
    call = run(tools=[TOOL], tool_choice="required").tool_calls[0]
    check_call(call.tool_name, call.arguments)


def tools_streamed():
    call = run(tools=[TOOL], tool_choice="required", callback=parts.append).tool_calls[0]
    check_call(call.tool_name, call.arguments)


def tool_history():
    call = ToolCall("get_weather", {"city": "Paris"}, id="call_1")
    past = [
        ChatMessage.from_user(QUESTION),
        ChatMessage.from_assistant(tool_calls=[call]),
        ChatMessage.from_tool("sunny", call),
    ]
    check(run(past, tools=[TOOL]) is not None, "no answer")


def embeddings():
    check(OpenAITextEmbedder(api_key=KEY, model=MODEL, api_base_url=BASE).run("a")["embedding"], "no vector")


main(
    "haystack",
    "haystack-ai",
    {
        "chat": chat,
        "stream": stream,
        "json schema": json_schema,
        "tools auto": tools_auto,
        "tools required": tools_required,
        "tools streamed": tools_streamed,
        "tool history": tool_history,
        "embeddings": embeddings,
    },
)
