# /// script
# dependencies = ["openai==3.3.0"]
# ///
"""The openai package."""

import json

from cases import BASE, HISTORY, MODEL, PERSON, QUESTION, TOOL, check, check_call, main
from openai import OpenAI

client = OpenAI(base_url=BASE, api_key="none", max_retries=0)
ASK = [{"role": "user", "content": QUESTION}]


def create(**options):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": ASK, "max_tokens": 200, "temperature": 0} | options
    )


def chat():
    check(create().choices[0].message.content, "no text")


def stream():
    chunks = list(create(stream=True, stream_options={"include_usage": True}))
    check("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), "no text")
    check(chunks[-1].usage.completion_tokens, "no usage")


def json_schema():
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    check(
        set(json.loads(create(response_format=form).choices[0].message.content)) == {"name", "age"},
        "other keys",
    )


def tools_auto():
    for call in create(tools=[TOOL]).choices[0].message.tool_calls or []:
        check_call(call.function.name, call.function.arguments)


def tools_required():
    choice = create(tools=[TOOL], tool_choice="required", parallel_tool_calls=False).choices[0]
    check(choice.finish_reason == "tool_calls", choice.finish_reason)
    check_call(choice.message.tool_calls[0].function.name, choice.message.tool_calls[0].function.arguments)


def tools_streamed():
    name, arguments = "", ""
    for chunk in create(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    check_call(name, arguments)


def tools_parallel():
    both = (
        create(tools=[TOOL], tool_choice="required", parallel_tool_calls=True).choices[0].message.tool_calls
    )
    one = (
        create(tools=[TOOL], tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls
    )
    check(both and len(one) == 1, "parallel_tool_calls: false gave several")


def tool_history():
    check(create(messages=HISTORY, tools=[TOOL]).choices[0].message is not None, "no answer")


def grammar():
    said = (
        create(extra_body={"structured_outputs": {"grammar": 'start: "yes" | "no"'}})
        .choices[0]
        .message.content
    )
    check(said in ("yes", "no"), said)


def responses():
    answer = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=40)
    check(answer.output_text, "no text")
    flat = {"type": "function", **TOOL["function"]}
    answer = client.responses.create(model=MODEL, input=QUESTION, tools=[flat], tool_choice="required")
    (call, *_) = [item for item in answer.output if item.type == "function_call"]
    check_call(call.name, call.arguments)
    kinds = {
        event.type
        for event in client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=20, stream=True)
    }
    check({"response.created", "response.output_text.delta"} <= kinds, kinds)
    check({"response.completed", "response.incomplete"} & kinds, kinds)


def embeddings():
    check(len(client.embeddings.create(model=MODEL, input=["a", "b"]).data) == 2, "not two vectors")


main(
    "openai (Python)",
    "openai",
    {
        "chat": chat,
        "stream": stream,
        "json schema": json_schema,
        "tools auto": tools_auto,
        "tools required": tools_required,
        "tools streamed": tools_streamed,
        "tools parallel": tools_parallel,
        "tool history": tool_history,
        "grammar": grammar,
        "responses": responses,
        "embeddings": embeddings,
    },
)
