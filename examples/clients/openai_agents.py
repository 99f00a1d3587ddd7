# /// script
# dependencies = ["openai-agents==0.24.0"]
# ///
"""openai-agents: function_tool, output types, handoffs; over chat completions and over responses."""

from agents import (
    Agent,
    MaxTurnsExceeded,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from cases import BASE, MODEL, QUESTION, NotOurs, check, main
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

set_tracing_disabled(True)
SETTINGS = {"temperature": 0, "max_tokens": 200}


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


@function_tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return "sunny"


def agent(kind=OpenAIChatCompletionsModel, choice=None, **options):
    model = kind(MODEL, openai_client=AsyncOpenAI(base_url=BASE, api_key="none", max_retries=0))
    return Agent(
        name="helper",
        instructions="Help.",
        model=model,
        model_settings=ModelSettings(**SETTINGS, tool_choice=choice),
        **options,
    )


async def finish(which, text=QUESTION):
    try:
        return await Runner.run(which, text, max_turns=4)
    except MaxTurnsExceeded as error:
        raise NotOurs("the model calls the tool again and again") from error


async def chat():
    check((await finish(agent())).final_output, "no text")


async def stream():
    run = Runner.run_streamed(agent(), QUESTION)
    check([event async for event in run.stream_events()], "no events")


async def json_schema():
    check(
        isinstance((await finish(agent(output_type=Person), "Ann is 30.")).final_output, Person), "no person"
    )


async def tools_auto():
    await finish(agent(tools=[get_weather]))


async def tools_required():
    run = await finish(agent(tools=[get_weather], choice="required"))
    check([item for item in run.new_items if item.type == "tool_call_item"], "no call")


async def tool_history():
    run = await finish(agent(handoffs=[agent()], choice="required"))
    check([item for item in run.new_items if "handoff" in item.type], "no handoff")


async def responses():
    # the client takes an answer that max_tokens cuts off for an error: one that ends by itself
    run = await finish(agent(OpenAIResponsesModel, output_type=Person), "Ann is 30.")
    check(isinstance(run.final_output, Person), "no person")
    run = await finish(agent(OpenAIResponsesModel, tools=[get_weather], choice="required"))
    check([item for item in run.new_items if item.type == "tool_call_item"], "no call")


main(
    "openai-agents",
    "openai-agents",
    {
        "chat": chat,
        "stream": stream,
        "json schema": json_schema,
        "tools auto": tools_auto,
        "tools required": tools_required,
        "tool history": tool_history,
        "responses": responses,
    },
)
