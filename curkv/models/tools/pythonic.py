"""`[f(a=1), g(b="x")]`: Llama 3.2 and 4; and Gemma's block of code that calls functions."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from curkv.models.tools.base import (
    Arguments,
    Call,
    Event,
    Grammar,
    Lark,
    Marked,
    Parser,
    Text,
    Tool,
    ToolFormat,
    quoted,
)


class Pythonic(ToolFormat):
    """An answer that begins with a bracket is a list of calls; any other is text."""

    name = "pythonic"
    trigger = "["
    between = ", "

    def body(self, tools: Sequence[Tool]) -> Grammar:
        """See `ToolFormat`."""
        return Grammar([(f"{tool.name}(", *_keywords(tool), ")") for tool in tools])

    def forced(self, tools: Sequence[Tool], parallel: bool, special: Mapping[str, int]) -> str:
        """See `ToolFormat`; the brackets are around all calls."""
        more = self.more(f"{quoted(self.between)} body") * parallel
        return "\n".join([f'start: "[" body{more} "]"', *self.body(tools).rules("body", special)])

    def allowed(self, tools: Sequence[Tool], parallel: bool, special: Mapping[str, int]) -> str:
        """See `ToolFormat`; calls stand only at the beginning, and text does not begin with a bracket."""
        more = f" ({quoted(self.between)} body)*" * parallel
        start = f'start: TEXT | "[" body{more} "]"'
        return "\n".join([start, r"TEXT: /([^\[](.|\n)*)?/", *self.body(tools).rules("body", special)])

    def parser(self, tools: Iterable[str]) -> Parser:
        """See `ToolFormat`."""
        return _ListParser(tools)


class Gemma(ToolFormat):
    """A fenced block of Python whose lines are calls."""

    name = "gemma"
    trigger = "```tool_code\n"
    between = "\n"

    def body(self, tools: Sequence[Tool]) -> Grammar:
        """See `ToolFormat`."""
        return Grammar([(f"{tool.name}(", *_keywords(tool), ")\n```") for tool in tools])

    def parser(self, tools: Iterable[str]) -> Parser:
        """See `ToolFormat`."""
        return _FencedParser(tools)


def _keywords(tool: Tool) -> list[Lark | Mapping[str, Any] | str]:
    """Arguments as keywords: those required, then any of the others, in the order of the schema."""
    schema = tool.schema
    properties = schema.get("properties", {})
    shared = ("$defs", "definitions", "x-guidance")
    definitions: dict[str, Any] = {key: schema[key] for key in shared if key in schema}
    required = [name for name in properties if name in schema.get("required", ())]
    optional = [name for name in properties if name not in required]

    def keyword(name: str, before: str) -> str:
        return f"{quoted(f'{before}{name}=')} {_value(properties[name], definitions)}"

    parts = [keyword(name, ", " if i else "") for i, name in enumerate(required)]
    if required:
        parts += [f"({keyword(name, ', ')})?" for name in optional]
    elif optional:  # whichever is first has no comma before it
        choices = [
            " ".join([keyword(name, ""), *(f"({keyword(later, ', ')})?" for later in optional[i + 1 :])])
            for i, name in enumerate(optional)
        ]
        parts.append(f"({' | '.join(choices)})?")
    return [Lark(" ".join(parts))] if parts else []


def _value(schema: Any, definitions: Mapping[str, Any]) -> str:
    """A value: JSON, but for the three words that Python writes otherwise."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "boolean" and "enum" not in schema and "const" not in schema:
        return '("True" | "False")'
    if kind == "null":
        return '"None"'
    return f"%json {json.dumps({**definitions, **schema} if isinstance(schema, Mapping) else schema)}"


def read_calls(source: str, tools: frozenset[str]) -> list[tuple[str, str]] | None:
    """Names and arguments of calls in Python's syntax, in a list or one a line.

    Values are literals of Python or of JSON.

    Returns:
        None if the source is anything else, or calls what is no tool.
    """
    try:
        module = ast.parse(source.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    nodes: list[ast.expr] = []
    for statement in module.body:
        if not isinstance(statement, ast.Expr):
            return None
        value = statement.value
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "print":
            nodes += value.args  # Gemma likes to print what it calls
        else:
            nodes += value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
    calls = [_read_call(node, tools) for node in nodes]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def _read_call(node: ast.expr, tools: frozenset[str]) -> tuple[str, str] | None:
    if not isinstance(node, ast.Call) or node.args:
        return None
    name = ast.unparse(node.func)
    if name not in tools:
        return None
    try:
        arguments = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords if keyword.arg}
        return name, json.dumps(arguments, ensure_ascii=False)
    except (ValueError, TypeError):
        return None


def _literal(node: ast.expr) -> Any:
    """A literal's value; JSON's words are known too."""

    class _Words(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.expr:
            words = {"true": True, "false": False, "null": None}
            return ast.copy_location(ast.Constant(words[name.id]), name) if name.id in words else name

    return ast.literal_eval(_Words().visit(node))


def _events(calls: Sequence[tuple[str, str]], first: int) -> list[Event]:
    events: list[Event] = []
    for index, (name, arguments) in enumerate(calls, first):
        events += [Call(index, name), Arguments(index, arguments)]
    return events


class _ListParser(Parser):
    """Holds an answer that begins with a bracket back until its calls are complete."""

    def __init__(self, tools: Iterable[str]):
        self._tools = frozenset(tools)
        self._held = ""
        self._text = False

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        if self._text:
            return [Text(text)] if text else []
        self._held += text
        if self._held.strip() and not self._held.lstrip().startswith("["):
            self._text, held = True, self._held
            return [Text(held)]
        return []

    def finish(self) -> list[Event]:
        """See `Parser`."""
        if self._text or not self._held:
            return []
        calls = read_calls(self._held, self._tools)
        return _events(calls, 0) if calls is not None else [Text(self._held)]


class _FencedParser(Parser):
    def __init__(self, tools: Iterable[str]):
        self._tools = frozenset(tools)
        self._text = Marked()
        self._code: str | None = None
        self._index = 0

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        self._text.buffer += text
        events: list[Event] = []
        while self._text.buffer:
            before, found = self._text.before("```" if self._code is not None else Gemma.trigger)
            if self._code is not None:
                self._code += before
            elif before and not (self._index and before.isspace()):
                events.append(Text(before))
            if not found:
                break
            if self._code is None:
                self._code = ""
            else:
                events += self._read(self._code + "```")
                self._code = None
        return events

    def _read(self, block: str) -> list[Event]:
        calls = read_calls(block.removesuffix("```"), self._tools)
        if calls is None:
            return [Text(Gemma.trigger + block)]
        events = _events(calls, self._index)
        self._index += len(calls)
        return events

    def finish(self) -> list[Event]:
        """See `Parser`."""
        left = self._text.take()
        if self._code is not None:
            return self._read(self._code + left)
        return [Text(left)] if left else []
