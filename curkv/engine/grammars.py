"""Compiles schemas, expressions and choices, here or, to see whether it ends well, in a process of its own.

A schema of a few kilobytes can keep the compiler busy for minutes, in spite of its own limits, or crash it.
What a stranger sends is compiled by a process that can be killed first, `python -m curkv.engine.grammars`;
`curkv.server.vetting` speaks to it. It does without torch and the model.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from typing import Any, Literal

from llguidance import LLMatcher, LLTokenizer, grammar_from

Kind = Literal["json", "regex", "choice", "lark"]

MEMORY_BYTES = 4 << 30
"""Address space of the process that tries structures."""
EXACT_INTEGER = 2**53
"""Constants beyond it lose digits: the compiler reads numbers as float64."""

_FORMATS: dict[Kind, Literal["json_schema", "regex", "choice", "lark"]] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
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
        _check_constants(json.loads(source))
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
    """Answers JSON lines: first the tokenizer's arguments, then [kind, source] each; null: all is well."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    tokenizer = grammar_tokenizer(*json.loads(sys.stdin.readline()))
    print(json.dumps(None), flush=True)
    for line in sys.stdin:
        problem = None
        try:
            compile_grammar(tokenizer, *json.loads(line))
        except ValueError as error:
            problem = str(error)[:2000]
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main()
