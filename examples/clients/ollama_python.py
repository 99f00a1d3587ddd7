# /// script
# dependencies = ["ollama==0.6.3"]
# ///
"""The ollama package, on /api."""

import json

from cases import MODEL, PERSON, QUESTION, TOOL, URL, check, check_call, main
from ollama import Client

client = Client(URL)
ASK = [{"role": "user", "content": QUESTION}]
OPTIONS = {"num_predict": 200, "temperature": 0}


def create(**options):
    return client.chat(**{"model": MODEL, "messages": ASK, "options": OPTIONS} | options)


def chat():
    check(create().message.content, "no text")
    check(client.generate(MODEL, QUESTION, options=OPTIONS).response, "no text of generate")
    check([model.model for model in client.list().models] and client.show(MODEL), "no models")


def stream():
    check("".join(part.message.content or "" for part in create(stream=True)), "no text")


def json_schema():
    check("name" in json.loads(create(format=PERSON).message.content), "no name")


def tools_auto():
    for call in create(tools=[TOOL]).message.tool_calls or []:
        check_call(call.function.name, dict(call.function.arguments))


def tool_history():
    call = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    past = [
        *ASK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_name": "get_weather"},
    ]
    check(create(messages=past, tools=[TOOL]) is not None, "no answer")


def embeddings():
    check(len(client.embed(MODEL, ["a", "b"]).embeddings) == 2, "not two vectors")


main(
    "ollama (Python)",
    "ollama",
    {
        "chat": chat,
        "stream": stream,
        "json schema": json_schema,
        "tools auto": tools_auto,
        "tool history": tool_history,
        "embeddings": embeddings,
    },
)
