# /// script
# dependencies = ["llama-index-llms-openai-like==0.8.1"]
# ///
"""llama-index, OpenAILike."""

from cases import BASE, MODEL, QUESTION, check, check_call, main
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


def get_weather(city: str) -> str:
    """The weather in a city."""
    return "sunny"


TOOL = FunctionTool.from_defaults(get_weather)
llm = OpenAILike(
    model=MODEL,
    api_base=BASE,
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    should_use_structured_outputs=True,
    max_tokens=200,
    temperature=0,
    max_retries=0,
    timeout=100,
    context_window=8192,
)


def chat():
    check(llm.chat([ChatMessage(QUESTION)]).message.content, "no text")


def stream():
    check([part.delta for part in llm.stream_chat([ChatMessage(QUESTION)])], "no text")


def json_schema():
    check(
        isinstance(llm.as_structured_llm(Person).chat([ChatMessage("Ann is 30.")]).raw, Person), "no person"
    )


def tools_auto():
    answer = llm.chat_with_tools([TOOL], QUESTION)
    for call in llm.get_tool_calls_from_response(answer, error_on_no_tool_call=False):
        check_call(call.tool_name, call.tool_kwargs)


def tools_required():
    (call, *_) = llm.get_tool_calls_from_response(llm.chat_with_tools([TOOL], QUESTION, tool_required=True))
    check_call(call.tool_name, call.tool_kwargs)


def tools_streamed():
    *_, last = llm.stream_chat_with_tools(
        [TOOL], QUESTION, tool_required=True, allow_parallel_tool_calls=False
    )
    (call, *_) = llm.get_tool_calls_from_response(last)
    check_call(call.tool_name, call.tool_kwargs)


main(
    "llama-index",
    "llama-index-llms-openai-like",
    {
        "chat": chat,
        "stream": stream,
        "json schema": json_schema,
        "tools auto": tools_auto,
        "tools required": tools_required,
        "tools streamed": tools_streamed,
    },
)
