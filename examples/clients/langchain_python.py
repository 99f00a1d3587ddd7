# /// script
# dependencies = ["langchain==1.5.2", "langchain-openai==1.7.4"]
# ///
"""langchain-openai, and create_agent of langchain."""

from cases import BASE, MODEL, QUESTION, check, check_call, main
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return "sunny"


def model(**options):
    return ChatOpenAI(
        base_url=BASE, api_key="none", model=MODEL, max_retries=0, temperature=0, max_tokens=200, **options
    )


def chat():
    check(model().invoke(QUESTION).content, "no text")


def stream():
    check("".join(chunk.content for chunk in model().stream(QUESTION)), "no text")


def json_schema():
    for method in ("json_schema", "function_calling"):
        person = model().with_structured_output(Person, method=method).invoke("Ann is 30.")
        check(isinstance(person, Person), f"{method}: {person}")


def tools_auto():
    for call in model().bind_tools([get_weather]).invoke(QUESTION).tool_calls:
        check_call(call["name"], call["args"])
    check(
        create_agent(model(), [get_weather]).invoke(
            {"messages": [("user", QUESTION)]}, {"recursion_limit": 8}
        )["messages"],
        "",
    )


def tools_required():
    call = model().bind_tools([get_weather], tool_choice="any").invoke(QUESTION).tool_calls[0]
    check_call(call["name"], call["args"])


def tools_streamed():
    whole = None
    for chunk in model().bind_tools([get_weather], tool_choice="get_weather").stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    check_call(whole.tool_calls[0]["name"], whole.tool_calls[0]["args"])


def tools_parallel():
    bound = model().bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    check(len(bound.invoke(QUESTION).tool_calls) == 1, "several calls")


def tool_history():
    call = {"name": "get_weather", "args": {"city": "Paris"}, "id": "call_1"}
    past = [
        HumanMessage(QUESTION),
        AIMessage("", tool_calls=[call]),
        ToolMessage("sunny", tool_call_id="call_1"),
    ]
    check(model().bind_tools([get_weather]).invoke(past) is not None, "no answer")


def responses():
    check(model(use_responses_api=True).invoke(QUESTION).content, "no content")


def embeddings():
    embed = OpenAIEmbeddings(base_url=BASE, api_key="none", model=MODEL, check_embedding_ctx_length=False)
    check(len(embed.embed_documents(["a", "b"])) == 2, "not two vectors")


main(
    "langchain-openai",
    "langchain-openai",
    {
        "chat": chat,
        "stream": stream,
        "json schema": json_schema,
        "tools auto": tools_auto,
        "tools required": tools_required,
        "tools streamed": tools_streamed,
        "tools parallel": tools_parallel,
        "tool history": tool_history,
        "responses": responses,
        "embeddings": embeddings,
    },
)
