"""Compiles schemas, expressions and choices, here or, to see whether it ends well, in a process of its own.

A schema of a few kilobytes can keep the compiler busy for minutes, in spite of its own limits, or crash it.
What a stranger sends is compiled first by a process that only it can harm: a fork of
`python -m curkv.engine.grammars`, which has read the tokenizer and does without torch and the model.
`curkv.server.vetting` speaks to it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from llguidance import LLMatcher, LLTokenizer, grammar_from

from curkv.models.tools.base import compact

Kind = Literal["json", "regex", "choice", "grammar", "lark"]

MEMORY_BYTES = 4 << 30
"""Address space of the process that tries structures."""
MAX_PROBLEM = 500
"""Characters that are told of what is wrong: a line of answer has to be written in one piece."""
EXACT_INTEGER = 2**53
"""Constants beyond it lose digits: the compiler reads numbers as float64."""

_FORMATS: dict[Kind, Literal["json_schema", "regex", "choice", "grammar", "lark"]] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "lark": "lark",
}


def source_text(source: Any) -> str:
    """The schema, the expression or the texts as one text."""
    return source if isinstance(source, str) else json.dumps(source)


def grammar_tokenizer(tokenizer_json: str, vocab_size: int, eos_ids: Sequence[int]) -> LLTokenizer:
    """The tokenizer as the compiler wants it; takes about half a second.

    Special tokens get names that no text has: what looks like one in a structure is text.

    Args:
        tokenizer_json: content of tokenizer.json.
        vocab_size: rows of the model's head, which may exceed the tokenizer's vocabulary.
        eos_ids: tokens that may end an output once its structure is complete.
    """
    content = json.loads(tokenizer_json)
    vocabulary = content["model"].get("vocab")
    for token in content.get("added_tokens", []):
        if token["special"] and isinstance(vocabulary, dict):
            hidden = f"\x00special {token['id']}\x00"
            if token["content"] in vocabulary:
                vocabulary[hidden] = vocabulary.pop(token["content"])
            token["content"] = hidden
    content["post_processor"] = None  # it names special tokens
    return LLTokenizer(json.dumps(content), n_vocab=vocab_size, eos_token=list(eos_ids) or None)


def compile_grammar(tokenizer: LLTokenizer, kind: Kind, source: str) -> LLMatcher:
    """Returns a matcher at the start of an output. The interpreter's lock is released meanwhile.

    Raises:
        ValueError: the schema or expression is wrong, or uses what cannot be followed.
    """
    if kind == "json":
        schema = json.loads(source)
        _check_constants(schema)
        source = json.dumps(compact(schema))
    matcher = LLMatcher(tokenizer, grammar_from(_FORMATS[kind], source), log_level=0)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    first = matcher.deep_copy()
    first.compute_bitmask()
    if first.is_error() and first.get_error().startswith("NoExtension"):  # as of {"$ref": "#"}
        raise ValueError("there is no output that it allows")
    return matcher


def _check_constants(schema: Any) -> None:
    pending = [(schema, False)]
    while pending:
        value, constant = pending.pop()
        if isinstance(value, dict):
            pending += [(v, constant or key in ("const", "enum")) for key, v in value.items()]
        elif isinstance(value, list):
            pending += [(v, constant) for v in value]
        elif constant and isinstance(value, int) and abs(value) > EXACT_INTEGER:
            raise ValueError(f"the constant {value} has more digits than can be followed (at most 2**53)")


def main() -> None:
    """Answers JSON lines: first the tokenizer's arguments, then [number, seconds, kind, source] each.

    Each is tried in a fork of its own, and answered, in any order, by [number, outcome]: null if all is well,
    what is wrong, "" for what crashes the compiler, or false if it takes longer than its seconds.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    tokenizer = grammar_tokenizer(*json.loads(sys.stdin.readline()))
    print(json.dumps(None), flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            _try(tokenizer, *json.loads(line))


def _try(tokenizer: LLTokenizer, number: int, seconds: float, kind: Kind, source: str) -> NoReturn:
    """Answers for one structure, which a child of this process compiles."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # whose signal ends the process
        try:
            os.write(writer, json.dumps(_problem(tokenizer, kind, source)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    said = b"".join(iter(lambda: os.read(reader, 65536), b""))
    status = os.waitpid(child, 0)[1]
    late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    outcome = False if late else json.loads(said or b'""')
    os.write(sys.stdout.fileno(), json.dumps([number, outcome]).encode() + b"\n")
    os._exit(0)


def _problem(tokenizer: LLTokenizer, kind: Kind, source: str) -> str | None:
    try:
        compile_grammar(tokenizer, kind, source)
    except ValueError as error:
        return str(error)[:MAX_PROBLEM]
    return None


if __name__ == "__main__":
    main()
