"""Tools in the words of OpenAI's API: what may be called, what must be, and what was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

from curkv.engine.types import InvalidRequest, Structure
from curkv.models.chat_template import ChatTemplate
from curkv.models.tools.base import Arguments, Call, Event, Parser, Reasoning, Text, Tool, compact
from curkv.models.tools.thinking import ThinkingParser
from curkv.server.limits import MAX_STRUCTURE_CHARACTERS, MAX_TOOLS
from curkv.server.protocol import Sparse

_STRICT = ConfigDict(strict=True)

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionSpec(BaseModel):
    """A function that the model may call."""

    model_config = _STRICT

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments, an object.")
    strict: bool | None = Field(None, description="Refuse a schema if a keyword cannot be followed.")


class ToolSpec(BaseModel):
    """A tool: only functions are understood."""

    model_config = _STRICT

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(BaseModel):
    """The name of a function."""

    model_config = _STRICT

    name: FunctionName


class NamedTool(BaseModel):
    """The one tool that has to be called."""

    model_config = _STRICT

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(BaseModel):
    """Those of the tools that may be called."""

    model_config = _STRICT

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(BaseModel):
    """Restricts the tools without changing the prompt."""

    model_config = _STRICT

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Choice = Literal["none", "auto", "required"] | NamedTool | AllowedChoice


class CalledFunction(BaseModel):
    """Name and arguments of a call.

    Attributes:
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class FunctionDelta(Sparse):
    """A piece of a call: its name first, then its arguments."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Sparse):
    """A piece of a call in a stream; id, type and name come with its first."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


@dataclass(frozen=True)
class ToolUse:
    """What a conversation may call.

    Attributes:
        specs: all tools, which the prompt tells of.
        callable: those that may be called now.
        forced: at least one has to be.
        parallel: several may be.
        legacy: they came as `functions`, and a call is answered as `function_call`.
    """

    specs: tuple[ToolSpec, ...] = ()
    callable: tuple[Tool, ...] = ()
    forced: bool = False
    parallel: bool = True
    legacy: bool = False

    @property
    def told(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        return [spec.model_dump(exclude_unset=True) for spec in self.specs]

    @classmethod
    def of(
        cls, specs: Sequence[ToolSpec], choice: Choice | None, parallel: bool, legacy: bool = False
    ) -> ToolUse:
        """Reads the fields of a request.

        Raises:
            InvalidRequest: a tool is asked for that there is not, two share a name, or they are too large.
        """
        names = [spec.function.name for spec in specs]
        if repeated := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise InvalidRequest(f"two tools are called {repeated!r}", "tools")
        if sum(len(json.dumps(spec.function.parameters)) for spec in specs) > MAX_STRUCTURE_CHARACTERS:
            raise InvalidRequest(
                f"their parameters are longer than {MAX_STRUCTURE_CHARACTERS} characters", "tools"
            )
        if choice == "none" or not specs:
            if choice not in (None, "none", "auto"):
                raise InvalidRequest("asks for a tool, but there are no tools", "tool_choice")
            return cls(tuple(specs) if choice != "none" else ())
        wanted, forced = names, choice == "required"
        if isinstance(choice, NamedTool):
            wanted, forced, parallel = [choice.function.name], True, False
        elif isinstance(choice, AllowedChoice):
            wanted = [tool.function.name for tool in choice.allowed_tools.tools]
            forced = choice.allowed_tools.mode == "required"
        if unknown := next((name for name in wanted if name not in names), None):
            raise InvalidRequest(f"there is no tool {unknown!r}", "tool_choice")
        callable_ = tuple(_tool(spec.function) for spec in specs if spec.function.name in wanted)
        return cls(tuple(specs), callable_, forced, parallel, legacy)

    def structure(
        self, template: ChatTemplate, special: dict[str, int], answer: Structure | None
    ) -> Structure | None:
        """The form of an answer that may or must call.

        Args:
            template: of the model.
            special: ids of the markers that are special tokens.
            answer: the form of an answer that calls nothing.

        Raises:
            InvalidRequest: calls are to be had together with a form that cannot be parted from them.
        """
        if not self.callable:
            return answer
        written = template.tool_format
        if self.forced:
            source = written.forced(self.callable, self.parallel, special)
        elif answer is None:
            source = written.allowed(self.callable, self.parallel, special)
        elif answer.kind == "json":
            calls = written.forced(self.callable, self.parallel, special)
            source = calls.replace("start: ", "start: answer | ", 1)
            source += f"\nanswer: %json {_schema(answer)}"
        else:
            raise InvalidRequest("cannot be had together with tools", answer.param)
        return Structure("lark", source, "tools", answer.ignored if answer is not None else ())

    def parser(self, template: ChatTemplate, prompt: str) -> Parser | None:
        """Reads an answer to a rendered prompt; None: it is text."""
        rest = template.tool_format.parser([tool.name for tool in self.callable]) if self.callable else None
        if not template.thinks:
            return rest
        return ThinkingParser(rest, begun=not self.forced and prompt.rstrip().endswith("<think>"))


def _tool(function: FunctionSpec) -> Tool:
    return Tool(function.name, function.description, function.parameters, bool(function.strict))


def _schema(answer: Structure) -> str:
    try:
        source = json.loads(answer.source) if isinstance(answer.source, str) else answer.source
    except ValueError as error:
        raise InvalidRequest(f"is no JSON: {error}", answer.param) from error
    return json.dumps(compact(source))


class Spoken:
    """One choice's message, from the events of its parser.

    Args:
        parser: reads the answer; None: all of it is content.
        new_id: makes ids of calls.
    """

    def __init__(self, parser: Parser | None, new_id: Callable[[], str]):
        self._parser = parser
        self._new_id = new_id
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []

    def take(self, text: str, last: bool) -> dict[str, Any]:
        """Takes a piece of the answer; returns what is new, as the fields of a delta."""
        if self._parser is None:
            events: list[Event] = [Text(text)] if text else []
        else:
            events = self._parser.feed(text) + (self._parser.finish() if last else [])
        said = "".join(event.text for event in events if isinstance(event, Text))
        thought = "".join(event.text for event in events if isinstance(event, Reasoning))
        pieces = self._pieces([event for event in events if isinstance(event, Call | Arguments)])
        self._content.append(said)
        self._reasoning.append(thought)
        news = {"content": said, "reasoning_content": thought, "tool_calls": pieces}
        return {name: value for name, value in news.items() if value}

    def _pieces(self, events: Sequence[Call | Arguments]) -> list[ToolCallDelta]:
        """One for each call, as clients expect: some read the first of a delta alone."""
        pieces: list[ToolCallDelta] = []
        for piece in map(self._piece, events):
            if pieces and pieces[-1].index == piece.index:
                before, more = pieces[-1].function, piece.function
                before.arguments = (before.arguments or "") + (more.arguments or "")
            else:
                pieces.append(piece)
        return pieces

    def _piece(self, event: Call | Arguments) -> ToolCallDelta:
        if isinstance(event, Call):
            call = ToolCall(id=self._new_id(), function=CalledFunction(name=event.name, arguments=""))
            self._calls.append(call)
            function = FunctionDelta(name=event.name, arguments="")
            return ToolCallDelta(index=event.index, id=call.id, type="function", function=function)
        self._calls[event.index].function.arguments += event.text
        return ToolCallDelta(index=event.index, function=FunctionDelta(arguments=event.text))

    @property
    def calls(self) -> list[ToolCall]:
        """The calls so far."""
        return self._calls

    @property
    def content(self) -> str | None:
        """The text so far; None beside calls if there is none."""
        return "".join(self._content) or (None if self._calls else "")

    @property
    def reasoning(self) -> str | None:
        """The reasoning so far."""
        return "".join(self._reasoning) or None


def readable_arguments(arguments: str | None) -> JsonValue:
    """Arguments of an earlier call as templates want them: an object; what is no JSON stays as it is."""
    try:
        value: JsonValue = json.loads(arguments or "{}")
    except ValueError:
        return arguments
    return value
