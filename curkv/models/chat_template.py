"""Conversations as the text that a model was trained to continue."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from curkv.models.loading.json_file import read_json
from curkv.models.tools.formats import format_of
from curkv.models.tools.preamble import with_preamble

Message = Mapping[str, Any]

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ARGUMENTS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""What a template is given otherwise, and what transformers' `apply_chat_template` would not pass on."""


_UNSAID = "\ue000"
"""A private-use character that stands for all that is said in a conversation."""


class ChatTemplate:
    """A model's Jinja template, rendered in a sandbox as transformers renders it.

    Args:
        source: the template.
        special_tokens: name to text of those that it may name.

    Attributes:
        source: the template.
        special_tokens: name to text of those that it may name.
        tool_format: how the model writes calls of tools.
        thinks: it marks its reasoning by `<think>` and `</think>`.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        self.source = source
        self.special_tokens = special_tokens
        self.tool_format = format_of(source)
        self.thinks = "<think>" in source and "</think>" in source

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> str:
        """Returns the conversation's text up to where the assistant's next message begins.

        Args:
            messages: with `role`, `content` as a string, and whatever else the template reads: `tool_calls`,
                whose arguments are objects, and `tool_call_id`.
            variables: further variables of the template, such as `enable_thinking`.
            tools: in OpenAI's form. A template that knows none gets them in the system message, and calls and
                their results as plain text.
            documents: what the answer may rest upon, for templates that know them.
            add_generation_prompt: begin the assistant's message.

        Raises:
            ValueError: the template does not take such messages or variables.
        """
        taken = sorted(_ARGUMENTS & set(variables))
        if taken:
            raise ValueError(f"{taken[0]!r} is no variable of a chat template")
        used = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
        if documents and "documents" not in self._knows:
            raise ValueError("the model's chat template knows no documents")
        if (tools or used) and "tools" not in self._knows:
            messages, tools = with_preamble(messages, tools), ()
        given = {
            **self.special_tokens,
            **variables,
            "messages": [self._worded(message) for message in messages],
            "tools": [dict(tool) for tool in tools] or None,
            "documents": [dict(document) for document in documents] or None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(given)
        except Exception as error:  # a template may do anything with what it is given
            raise ValueError(f"the model's chat template refuses the conversation: {error}") from error

    def frame(self, text: str, roles: Sequence[str], variables: Mapping[str, Any]) -> int:
        """Counts the characters that a conversation begins with whatever is said in it: those of its frame.

        Args:
            text: what `render` makes of the conversation.
            roles: of its messages.
            variables: as `render` was given them.
        """
        until = roles.index("user") + 1 if "user" in roles else len(roles)
        try:
            unsaid = self.render([{"role": role, "content": _UNSAID} for role in roles[:until]], variables)
        except ValueError:  # a template may want to know more of such messages
            return 0
        pairs = enumerate(zip(text, unsaid, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(text), len(unsaid)))

    @cached_property
    def _template(self) -> Template:
        return _ENVIRONMENT.from_string(self.source)

    @cached_property
    def _knows(self) -> Set[str]:
        """Names of its variables."""
        try:
            return meta.find_undeclared_variables(_ENVIRONMENT.parse(self.source))
        except TemplateError:  # which rendering will say
            return {"tools", "documents"}

    def _worded(self, message: Message) -> dict[str, Any]:
        """A message as the template reads it, which may want its content in parts."""
        content = message.get("content")
        if not self._reads_parts or not isinstance(content, str):
            return dict(message)
        return {**message, "content": [{"type": "text", "text": content}]}

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the content of messages is read only if it comes in parts; it is tried out."""
        probe = "curkv"
        as_text, as_parts = (self._try(content) for content in (probe, [{"type": "text", "text": probe}]))
        return probe not in as_text and probe in as_parts

    def _try(self, content: Any) -> str:
        given = {**self.special_tokens, "messages": [{"role": "user", "content": content}]}
        try:
            return self._template.render({**given, "add_generation_prompt": True})
        except Exception:  # a template may do anything with what it is given
            return ""


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; its body is rendered like all else."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is: Jinja's own filter escapes what HTML would take for markup."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
)
_ENVIRONMENT.filters["tojson"] = _tojson
_ENVIRONMENT.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


def load_chat_template(directory: Path) -> ChatTemplate | None:
    """Returns the template of a model directory, None if it has none (a base model)."""
    config = _tokenizer_config(directory)
    source, file = config.get("chat_template"), directory / "chat_template.jinja"
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    return ChatTemplate(source, _special_tokens(config)) if source else None


def load_eos_token(directory: Path) -> str | None:
    """Returns the text of the token that a model directory's tokenizer ends a text with, if it has one."""
    return _special_tokens(_tokenizer_config(directory)).get("eos_token")


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    config = read_json(directory / "tokenizer_config.json") or {}
    if "added_tokens_decoder" not in config:  # an older form
        config |= read_json(directory / "special_tokens_map.json") or {}
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(config[name]) for name in _SPECIAL_TOKENS if config.get(name) is not None}


def _text(token: str | dict[str, Any]) -> str:
    """A special token's text; it may be written with its properties."""
    return str(token["content"]) if isinstance(token, dict) else token
