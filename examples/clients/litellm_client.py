# /// script
# dependencies = ["litellm==1.110.2"]
# ///
"""litellm."""

import json

import litellm
from cases import BASE, HISTORY, MODEL, PERSON, QUESTION, TOOL, check, check_call, main

ASK = [{"role": "user", "content": QUESTION}]


def create(**options):
    fixed = {"model": f"hosted_vllm/{MODEL}", "api_base": BASE, "api_key": "none", "num_retries": 0}
    return litellm.completion(**fixed | {"messages": ASK, "max_tokens": 200, "temperature": 0} | options)


def chat():
    check(create().choices[0].message.content, "no text")


def stream():
    check("".join(c.choices[0].delta.content or "" for c in create(stream=True)), "no text")


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
    call = create(tools=[TOOL], tool_choice="required").choices[0].message.tool_calls[0]
    check_call(call.function.name, call.function.arguments)


def tools_streamed():
    chunks = list(create(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, stream=True))
    call = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0]
    check_call(call.function.name, call.function.arguments)


def tool_history():
    check(create(messages=HISTORY, tools=[TOOL]).choices[0].message is not None, "no answer")


def responses():
    answer = litellm.responses(
        model=f"openai/{MODEL}", input=QUESTION, max_output_tokens=20, api_base=BASE, api_key="none"
    )
    check(answer.output, "no output")


def embeddings():
    check(litellm.embedding(f"openai/{MODEL}", ["a"], api_base=BASE, api_key="none").data, "no vector")


main(
    "litellm",
    "litellm",
    {
        "chat": chat,
        "stream": stream,
        "json schema": json_schema,
        "tools auto": tools_auto,
        "tools required": tools_required,
        "tools streamed": tools_streamed,
        "tool history": tool_history,
        "responses": responses,
        "embeddings": embeddings,
    },
)
