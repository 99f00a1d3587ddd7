# /// script
# dependencies = ["smolagents[openai]==1.26.0"]
# ///
"""smolagents: OpenAIServerModel and ToolCallingAgent."""

from cases import BASE, MODEL, QUESTION, check, check_call, main
from smolagents import OpenAIServerModel, ToolCallingAgent, tool


@tool
def get_weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: name of the city.
    """
    return "sunny"


model = OpenAIServerModel(MODEL, api_base=BASE, api_key="none", max_tokens=200, temperature=0)
ASK = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]


def chat():
    check(model.generate(ASK).content, "no text")


def stream():
    check("".join(delta.content or "" for delta in model.generate_stream(ASK)), "no text")


def tools_required():
    (call, *_) = model.generate(ASK, tools_to_call_from=[get_weather]).tool_calls
    check_call(call.function.name, call.function.arguments)


def tool_history():
    agent = ToolCallingAgent(tools=[get_weather], model=model, max_steps=2, verbosity_level=0)
    agent.run(QUESTION)
    check([step for step in agent.memory.steps if getattr(step, "tool_calls", None)], "no call")


main(
    "smolagents",
    "smolagents",
    {
        "chat": chat,
        "stream": stream,
        "tools required": tools_required,
        "tool history": tool_history,
    },
)
