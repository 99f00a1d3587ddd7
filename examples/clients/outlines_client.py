# /// script
# dependencies = ["outlines[openai]==1.3.3"]
# ///
"""Outlines, as a client of vLLM and of SGLang."""

from typing import Literal

import openai
import outlines
from cases import BASE, MODEL, QUESTION, check, main
from outlines.types import CFG, Regex
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


client = openai.OpenAI(base_url=BASE, api_key="none", max_retries=0)
models = [outlines.from_vllm(client, MODEL), outlines.from_sglang(client, MODEL)]
LIMIT = {"max_tokens": 200}


def chat():
    for model in models:
        check(model(QUESTION, **LIMIT), "no text")


def stream():
    for model in models:
        check("".join(model.stream(QUESTION, **LIMIT)), "no text")


def json_schema():
    for model in models:
        Person.model_validate_json(model("Ann is 30.", Person, **LIMIT))


def grammar():
    for model in models:
        check(model(QUESTION, Literal["yes", "no"], **LIMIT) in ("yes", "no"), "no choice")
        check(model(QUESTION, Regex("[0-9]{3}"), **LIMIT).isdigit(), "no digits")
    check(
        models[0](QUESTION, CFG('start: "yes" | "no"'), **LIMIT) in ("yes", "no"),
        "vLLM: no word of the grammar",
    )
    check(
        models[1](QUESTION, CFG('root ::= "yes" | "no"'), **LIMIT) in ("yes", "no"),
        "SGLang: no word of the grammar",
    )


main("outlines", "outlines", {"chat": chat, "stream": stream, "json schema": json_schema, "grammar": grammar})
