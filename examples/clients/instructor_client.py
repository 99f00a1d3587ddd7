# /// script
# dependencies = ["instructor==1.17.0"]
# ///
"""instructor, modes TOOLS, TOOLS_STRICT and JSON_SCHEMA."""

from collections.abc import Iterable

import instructor
from cases import BASE, MODEL, NotOurs, check, main
from instructor.core import IncompleteOutputException
from openai import OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


ASK = [{"role": "user", "content": "Ann is 30 years old."}]


def create(mode, **options):
    client = instructor.from_openai(OpenAI(base_url=BASE, api_key="none", max_retries=0), mode=mode)
    fixed = {
        "model": MODEL,
        "messages": ASK,
        "response_model": Person,
        "max_retries": 0,
        "max_tokens": 200,
        "temperature": 0,
    }
    return client, fixed | options


def ask(mode, **options):
    client, arguments = create(mode, **options)
    check(isinstance(client.chat.completions.create(**arguments), Person), mode)


def tools_streamed():
    client, arguments = create(instructor.Mode.TOOLS)
    *_, last = client.chat.completions.create_partial(**arguments)
    check(last.name is not None and last.age is not None, repr(last))


def tools_parallel():
    client, arguments = create(instructor.Mode.PARALLEL_TOOLS, response_model=Iterable[Person])
    try:
        people = list(client.chat.completions.create(**arguments))
    except IncompleteOutputException as error:
        raise NotOurs("the model calls again and again, until max_tokens") from error
    check(all(isinstance(person, Person) for person in people), "others")


main(
    "instructor",
    "instructor",
    {
        "json schema": lambda: ask(instructor.Mode.JSON_SCHEMA),
        "tools required": lambda: (ask(instructor.Mode.TOOLS), ask(instructor.Mode.TOOLS_STRICT)),
        "tools streamed": tools_streamed,
        "tools parallel": tools_parallel,
    },
)
