"""A conversation in the terminal with any server that speaks OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from curkv.sse import event_of

HELP = """/policy NAME [BUDGET]  choose what the cache keeps: /policy curdkv 25%, /policy full
/clear                 forget the conversation
/quit                  leave (or Ctrl-D)"""


@dataclass
class Conversation:
    """What was said so far, and how the next answer is to be had.

    Attributes:
        url: base URL of the server, without /v1.
        api_key: sent as a bearer token; None sends none.
        document: put before the first question, and marked as the context of all of them.
        kv: eviction controls of the server this is made for; empty for any other.
        max_tokens: most tokens of an answer; None leaves it to the server.
        temperature: of sampling.
        session: name under which the server holds what it can go on from; "": none.
        file: where the conversation is written after each answer, and goes on from; None: nowhere.
        messages: the conversation in the form of the API.
        usage: of the last answer, if the server told it.
    """

    url: str
    api_key: str | None = None
    document: str | None = None
    kv: dict[str, str] = field(default_factory=dict)
    max_tokens: int | None = None
    temperature: float = 0.0
    session: str = ""
    file: Path | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.file is not None and self.file.exists():
            self.messages = json.loads(self.file.read_text())

    def ask(self, question: str) -> Iterator[str]:
        """Yields the pieces of the answer as they come.

        Raises:
            ChatError: the server refuses the question, fails, or cannot be reached; it is forgotten.
        """
        self.messages.append({"role": "user", "content": self._content(question)})
        answer = ""
        try:
            for piece in self._stream():
                answer += piece
                yield piece
        except (httpx.HTTPError, ChatError) as error:
            self.messages.pop()
            raise ChatError(str(error)) from error
        self.messages.append({"role": "assistant", "content": answer})
        self._write()

    def clear(self) -> None:
        """Forgets what was said; the document stays."""
        self.messages = []
        self._write()

    def _write(self) -> None:
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch(mode=0o600)
            self.file.write_text(json.dumps(self.messages))

    def _content(self, question: str) -> Any:
        if self.document is None or self.messages:
            return question
        document = {"type": "text", "text": self.document, "cache_control": {"type": "ephemeral"}}
        return [document, {"type": "text", "text": question}]

    def _stream(self) -> Iterator[str]:
        kv = {**self.kv, **({"session": self.session} if self.session else {})}
        body: dict[str, Any] = {
            "messages": self.messages,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"max_tokens": self.max_tokens} if self.max_tokens else {}),
            **({"kv": kv} if kv else {}),
        }
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        with httpx.Client(base_url=self.url, headers=headers, timeout=None) as http:
            models = http.get("/v1/models")
            body["model"] = _checked(models).json()["data"][0]["id"]
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                for line in _checked(response).iter_lines():
                    yield from self._piece(line)

    def _piece(self, line: str) -> Iterator[str]:
        if (event := event_of(line)) is None:
            return
        if "error" in event:
            raise ChatError(event["error"]["message"])
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""


class ChatError(Exception):
    """The server did not answer; the message says why."""


def _checked(response: httpx.Response) -> httpx.Response:
    if response.status_code == 200:
        return response
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    raise ChatError(f"{response.status_code}: {message}")


def describe(usage: dict[str, Any] | None) -> str:
    """One line of what an answer took; empty if the server did not say."""
    if not usage:
        return ""
    line = f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens"
    if cached := (usage.get("prompt_tokens_details") or {}).get("cached_tokens"):
        line += f" | {cached} known"
    if kv := usage.get("kv"):
        kept = f"kept {kv['kept_ratio']:.0%} of the prompt"
        memory = f"{kv['bytes'] / 2**20:.1f} MiB of {kv['peak_bytes'] / 2**20:.1f} MiB at the peak"
        line += f" | {kv['policy']}: {kept}, {memory}"
    return f"[{line}]"


def loop(conversation: Conversation, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Reads questions and commands, and writes answers, until there is nothing more to read.

    Args:
        conversation: to be continued.
        read: gives a line; raises EOFError at the end.
        write: takes text as it is, without adding a line's end.
    """
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        match line.split():
            case []:
                continue
            case ["/quit"]:
                return
            case ["/clear"]:
                conversation.clear()
            case ["/policy", policy, *budget] if len(budget) <= 1:
                conversation.kv = {"policy": policy, **({"budget": budget[0]} if budget else {})}
            case [word, *_] if word.startswith("/"):
                write(HELP + "\n")
            case _:
                _answer(conversation, line, write)


def _answer(conversation: Conversation, question: str, write: Callable[[str], None]) -> None:
    try:
        for piece in conversation.ask(question):
            write(piece)
        write(f"\n{describe(conversation.usage)}\n")
    except ChatError as error:
        write(f"\n{error}\n")
    except KeyboardInterrupt:
        conversation.messages.pop()
        write("\n[stopped]\n")
