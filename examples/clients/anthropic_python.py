# /// script
# dependencies = ["anthropic==2.14.0"]
# ///
"""The anthropic package, on /v1/messages."""

from anthropic import Anthropic
from cases import MODEL, PLACE, QUESTION, URL, check, check_call, main

client = Anthropic(base_url=URL, api_key="none", max_retries=0)
TOOL = {"name": "get_weather", "description": "The weather in a city", "input_schema": PLACE}
ASK = [{"role": "user", "content": QUESTION}]


def create(**options):
    return client.messages.create(**{"model": MODEL, "max_tokens": 200, "messages": ASK} | options)


def called(answer):
    return [block for block in answer.content if block.type == "tool_use"]


def chat():
    check(create().content[0].text, "no text")
    check(client.messages.count_tokens(model=MODEL, messages=ASK).input_tokens > 5, "not counted")


def stream():
    with client.messages.stream(model=MODEL, max_tokens=40, messages=ASK) as events:
        check("".join(events.text_stream), "no text")


def tools_auto():
    for call in called(create(tools=[TOOL])):
        check_call(call.name, call.input)


def tools_required():
    (call, *_) = called(create(tools=[TOOL], tool_choice={"type": "any"}))
    check_call(call.name, call.input)


def tools_streamed():
    with client.messages.stream(
        model=MODEL, max_tokens=200, messages=ASK, tools=[TOOL], tool_choice={"type": "any"}
    ) as events:
        (call, *_) = called(events.get_final_message())
    check_call(call.name, call.input)


def tool_history():
    use = {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"}
    past = [*ASK, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    check(create(messages=past, tools=[TOOL]) is not None, "no answer")


main(
    "anthropic (Python)",
    "anthropic",
    {
        "chat": chat,
        "stream": stream,
        "tools auto": tools_auto,
        "tools required": tools_required,
        "tools streamed": tools_streamed,
        "tool history": tool_history,
    },
)
