# /// script
# dependencies = ["pydantic-ai-slim[openai]==2.38.0"]
# ///
"""pydantic-ai: default (tool) output, native output, function tools."""

from cases import BASE, MODEL, QUESTION, NotOurs, check, main
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, UnexpectedModelBehavior
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


provider = OpenAIProvider(base_url=BASE, api_key="none")
model = OpenAIChatModel(MODEL, provider=provider)
SETTINGS = {"temperature": 0, "max_tokens": 200}


async def chat():
    check((await Agent(model, model_settings=SETTINGS).run(QUESTION)).output, "no text")


async def stream():
    async with Agent(model, model_settings=SETTINGS).run_stream(QUESTION) as run:
        check([text async for text in run.stream_text(delta=True)], "no text")


async def json_schema():
    run = await Agent(model, output_type=NativeOutput(Person), model_settings=SETTINGS).run("Ann is 30.")
    check(isinstance(run.output, Person), run.output)


async def tools_required():
    run = await Agent(model, output_type=Person, model_settings=SETTINGS).run("Ann is 30.")
    check(isinstance(run.output, Person), run.output)


async def tools_streamed():
    async with Agent(model, output_type=Person, model_settings=SETTINGS).run_stream("Ann is 30.") as run:
        check(isinstance(await run.get_output(), Person), "no person")


async def tools_auto():
    agent = Agent(model, model_settings=SETTINGS)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return "sunny"

    try:
        check((await agent.run(QUESTION)).output is not None, "no output")
    except UnexpectedModelBehavior as error:
        raise NotOurs(f"the model: {error}") from error


async def responses():
    agent = Agent(OpenAIResponsesModel(MODEL, provider=provider), model_settings=SETTINGS)
    check((await agent.run(QUESTION)).output, "no text")


main(
    "pydantic-ai",
    "pydantic-ai-slim",
    {
        "chat": chat,
        "stream": stream,
        "json schema": json_schema,
        "tools auto": tools_auto,
        "tools required": tools_required,
        "tools streamed": tools_streamed,
        "responses": responses,
    },
)
