"""Calls as families write them: read from pieces of any size, and valid where a grammar forces them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from curkv.bench.schemas import random_schema
from curkv.models.tools.base import (
    MOST_CALLS,
    Arguments,
    Call,
    Event,
    Parser,
    Reasoning,
    Text,
    Tool,
    ToolFormat,
)
from curkv.models.tools.formats import format_of
from curkv.models.tools.harmony import Harmony
from curkv.models.tools.hermes import Hermes
from curkv.models.tools.llama import LlamaJSON
from curkv.models.tools.mistral import MistralList, MistralNamed
from curkv.models.tools.preamble import with_preamble
from curkv.models.tools.pythonic import Gemma, Pythonic
from curkv.models.tools.thinking import ThinkingParser

FORMATS = [Hermes, LlamaJSON, MistralList, MistralNamed, Pythonic, Gemma, Harmony]
NAMES = ("weather", "add")
PARIS = ("weather", {"city": "Paris {[\"'", "days": 2})
SUM = ("add", {"a": 1, "b": [2.5, None, True]})


def outcome(events: Sequence[Event]) -> dict[str, Any]:
    """What a client makes of events."""
    calls: dict[int, tuple[str, str]] = {}
    text = reasoning = ""
    for event in events:
        match event:
            case Call(index, name):
                assert index == len(calls)
                calls[index] = name, ""
            case Arguments(index, piece):
                assert index == len(calls) - 1
                calls[index] = calls[index][0], calls[index][1] + piece
            case Text(piece):
                text += piece
            case Reasoning(piece):
                reasoning += piece
    return {
        "calls": [(name, json.loads(arguments)) for name, arguments in calls.values()],
        "text": text,
        "reasoning": reasoning,
    }


def read(parser: Parser, text: str, size: int) -> dict[str, Any]:
    events: list[Event] = []
    for start in range(0, len(text), size):
        events += parser.feed(text[start : start + size])
    return outcome(events + parser.finish())


def as_python(call: tuple[str, dict[str, Any]]) -> str:
    return f"{call[0]}({', '.join(f'{key}={value!r}' for key, value in call[1].items())})"


def as_json(call: tuple[str, dict[str, Any]], key: str = "arguments") -> str:
    return json.dumps({"name": call[0], key: call[1]})


HARMONY_CALL = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"

ANSWERS: list[tuple[str, type[ToolFormat], str, list[Any], str, str]] = [
    ("a call", Hermes, f"<tool_call>\n{as_json(PARIS)}\n</tool_call>", [PARIS], "", ""),
    (
        "text and two calls",
        Hermes,
        f"Let me see.\n<tool_call>\n{as_json(PARIS)}\n</tool_call>\n<tool_call>{as_json(SUM)}</tool_call>",
        [PARIS, SUM],
        "Let me see.\n",
        "",
    ),
    ("a list", Hermes, f"<tool_call>[{as_json(PARIS)}, {as_json(SUM)}]</tool_call>", [PARIS, SUM], "", ""),
    (
        "arguments first",
        Hermes,
        f'<tool_call>{{"arguments": {json.dumps(SUM[1])}, "name": "add"}}</tool_call>',
        [SUM],
        "",
        "",
    ),
    (
        "arguments in a string",
        Hermes,
        f"<tool_call>{json.dumps({'name': 'add', 'arguments': json.dumps(SUM[1])})}</tool_call>",
        [SUM],
        "",
        "",
    ),
    ("only text", Hermes, "No <tool is needed: 1 < 2.", [], "No <tool is needed: 1 < 2.", ""),
    (
        "no JSON",
        Hermes,
        "<tool_call>weather!</tool_call> so",
        [],
        "<tool_call>weather!</tool_call> so",
        "",
    ),
    (
        "unknown tool",
        Hermes,
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        [],
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        "",
    ),
    ("a call", LlamaJSON, as_json(PARIS, "parameters"), [PARIS], "", ""),
    (
        "two, tagged",
        LlamaJSON,
        f"<|python_tag|>{as_json(PARIS, 'parameters')}; {as_json(SUM, 'parameters')}",
        [PARIS, SUM],
        "",
        "",
    ),
    ("only text", LlamaJSON, "It is {sunny}.", [], "It is {sunny}.", ""),
    ("other JSON", LlamaJSON, '{"answer": 3}', [], '{"answer": 3}', ""),
    ("a list", MistralList, f"Hm.[TOOL_CALLS] [{as_json(PARIS)}, {as_json(SUM)}]", [PARIS, SUM], "Hm.", ""),
    (
        "two",
        MistralNamed,
        f"[TOOL_CALLS]weather[ARGS]{json.dumps(PARIS[1])}[TOOL_CALLS]add[ARGS]{json.dumps(SUM[1])}",
        [PARIS, SUM],
        "",
        "",
    ),
    ("only text", MistralNamed, "[1] is a [TOOL", [], "[1] is a [TOOL", ""),
    ("two", Pythonic, f"[{as_python(PARIS)}, {as_python(SUM)}]", [PARIS, SUM], "", ""),
    ("JSON's words", Pythonic, "[add(a=1, b=[2.5, null, true])]", [SUM], "", ""),
    ("a list of numbers", Pythonic, "[1, 2]", [], "[1, 2]", ""),
    ("code", Pythonic, "[__import__('os').system('x')]", [], "[__import__('os').system('x')]", ""),
    (
        "two lines",
        Gemma,
        f"Sure.\n```tool_code\n{as_python(PARIS)}\nprint({as_python(SUM)})\n```",
        [PARIS, SUM],
        "Sure.\n",
        "",
    ),
    ("other code", Gemma, "```python\nx = 1\n```", [], "```python\nx = 1\n```", ""),
    (
        "thought, then a call",
        Harmony,
        "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant"
        + HARMONY_CALL.format("weather", json.dumps(PARIS[1])),
        [PARIS],
        "",
        "Need the weather.",
    ),
    (
        "thought, then text",
        Harmony,
        "<|channel|>analysis<|message|>Easy: 1 < 2 <| 3.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yes <b>.",
        [],
        "Yes <b>.",
        "Easy: 1 < 2 <| 3.",
    ),
    ("no channels", Harmony, "Plain text.", [], "Plain text.", ""),
]


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
@pytest.mark.parametrize(
    "case", ANSWERS, ids=[f"{tool_format.name}: {name}" for name, tool_format, *_ in ANSWERS]
)
def test_answers_are_read_alike_in_pieces_of_any_size(
    case: tuple[str, type[ToolFormat], str, list[Any], str, str], size: int
) -> None:
    _, tool_format, answer, calls, text, reasoning = case
    expected = {"calls": calls, "text": text, "reasoning": reasoning}
    assert read(tool_format().parser(NAMES), answer, size) == expected


@pytest.mark.parametrize("tool_format", FORMATS)
def test_nothing_is_lost_of_an_answer_without_calls(tool_format: type[ToolFormat]) -> None:
    draw = random.Random(tool_format.name)
    pieces = ["[", "]", "{", "}", '"', "<", "a", " ", "\n", "```", "(", "name", ":", "tool_call>", "1, "]
    for _ in range(200):
        answer = "a" + "".join(draw.choices(pieces, k=draw.randint(1, 12)))
        assert read(tool_format().parser(NAMES), answer, draw.randint(1, 5))["text"] == answer


def test_arguments_are_streamed_as_they_come() -> None:
    parser = Hermes().parser(NAMES)
    assert parser.feed('<tool_call>{"name": "add", "arguments": {"a": 1') == [
        Call(0, "add"),
        Arguments(0, '{"a": 1'),
    ]
    assert parser.feed("2") == [Arguments(0, "2")]


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_reasoning_is_parted_from_what_follows(size: int) -> None:
    call = f"<tool_call>{as_json(SUM)}</tool_call>"
    answer = f"<think>\nIs 1 < 2?</think>\n\nYes.{call}"
    expected = {"calls": [SUM], "text": "Yes.", "reasoning": "Is 1 < 2?"}
    assert read(ThinkingParser(Hermes().parser(NAMES)), answer, size) == expected
    begun = ThinkingParser(Hermes().parser(NAMES), begun=True)
    assert read(begun, "Is 1 < 2?</think>Yes." + call, size) == expected
    assert read(ThinkingParser(), "No <b>.", size)["text"] == "No <b>."
    assert read(ThinkingParser(), "<think>On and on", size)["reasoning"] == "On and on"


@pytest.fixture(scope="module")
def vocabulary(default_model_dir: Path) -> LLTokenizer:
    return LLTokenizer((default_model_dir / "tokenizer.json").read_text(), eos_token=2)


def walk(matcher: LLMatcher, vocabulary: LLTokenizer, draw: random.Random) -> str:
    """A random text that a grammar allows."""
    ids: list[int] = []
    for _ in range(600):
        if matcher.is_stopped():
            break
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = bits.nonzero()[0].tolist()
        token = 2 if 2 in allowed else draw.choice(allowed)
        assert matcher.consume_token(token)
        if token != 2:
            ids.append(token)
    assert matcher.is_stopped(), "the text does not end"
    return vocabulary.decode_bytes(ids).decode()


@pytest.mark.parametrize("tool_format", FORMATS)
def test_forced_calls_of_random_schemas_are_valid(
    tool_format: type[ToolFormat], vocabulary: LLTokenizer
) -> None:
    draw = random.Random(f"schemas for {tool_format.name}")
    written = tool_format()
    for _ in range(20):
        tools = [Tool(name, parameters=random_schema(draw)) for name in ("get_weather", "add2")]
        grammar = LLMatcher.grammar_from_lark(written.forced(tools, parallel=False, special={}))
        matcher = LLMatcher(vocabulary, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        answer = walk(matcher, vocabulary, draw)
        said = read(written.parser([tool.name for tool in tools]), answer, 5)
        assert said["text"] == "" and len(said["calls"]) == 1, answer
        name, arguments = said["calls"][0]
        tool = next(tool for tool in tools if tool.name == name)
        jsonschema.validate(arguments, dict(tool.parameters or {}))


@pytest.mark.parametrize("tool_format", [Hermes, LlamaJSON, Pythonic])
def test_forced_calls_come_to_an_end(tool_format: type[ToolFormat], vocabulary: LLTokenizer) -> None:
    """A model that would call for ever is stopped by the grammar, and one that has called may stop itself."""
    written, none = tool_format(), {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [Tool("now", parameters=none)]
    grammar = LLMatcher.grammar_from_lark(written.forced(tools, parallel=True, special={}))
    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    ids, ends = [], 0
    while True:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = bits.nonzero()[0].tolist()
        others = [token for token in allowed if token != 2]
        ends += 2 in allowed
        if not others:
            break
        on = vocabulary.tokenize_str(written.between)[0]
        ids.append(on if on in others else others[0])
        assert matcher.consume_token(ids[-1])
    said = read(written.parser(["now"]), vocabulary.decode_bytes(ids).decode(), 50)
    assert len(said["calls"]) == MOST_CALLS, said
    assert ends == (1 if tool_format is Pythonic else MOST_CALLS)


@pytest.mark.parametrize("tool_format", FORMATS)
def test_free_text_is_allowed_but_a_call_once_begun_must_fit(
    tool_format: type[ToolFormat], vocabulary: LLTokenizer
) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    written, tools = tool_format(), [Tool("weather", parameters=city)]
    grammar = LLMatcher.grammar_from_lark(written.allowed(tools, parallel=True, special={}))

    def takes(text: str) -> bool:
        matcher = LLMatcher(vocabulary, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        tokens = vocabulary.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens)

    plain = "<|channel|>final<|message|>" if tool_format is Harmony else ""
    assert takes(f"{plain}It rains (a lot) in Paris.\n")
    assert not takes(f"{written.trigger}rm -rf")


@pytest.mark.parametrize("cut", ["", "\n", "\n</", "\n</tool_call"])
def test_an_answer_cut_off_behind_a_call_says_nothing_more(cut: str) -> None:
    said = read(Hermes().parser(["f"]), '<tool_call>\n{"name": "f", "arguments": {"a": 1}}' + cut, 3)
    assert said == {"calls": [("f", {"a": 1})], "text": "", "reasoning": ""}


def test_templates_say_their_format() -> None:
    assert format_of("... <tool_call>\n{{ call | tojson }}</tool_call>").name == "hermes"
    assert format_of("{{ '[TOOL_CALLS] [' }}").name == "mistral"
    assert format_of("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}").name == "mistral-named"
    assert format_of("<|start_header_id|>ipython").name == "llama-json"
    assert format_of("<|start|>assistant<|channel|>").name == "harmony"
    assert format_of("{% for message in messages %}").name == "hermes"


def test_a_template_without_tools_is_told_in_the_system_message() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
    ]
    told = with_preamble(messages, [{"type": "function", "function": {"name": "add"}}])
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be brief.\n\n") and '"name": "add"' in told[0]["content"]
    assert outcome(Hermes().parser(["add"]).feed(told[2]["content"]))["calls"] == [("add", {"a": 1})]
    assert told[3]["content"] == "<tool_response>\n2\n</tool_response>"
    assert with_preamble(messages[1:2], []) == messages[1:2]
