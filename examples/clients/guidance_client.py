# /// script
# dependencies = ["guidance==0.3.1", "openai"]
# ///
"""guidance with its experimental client of vLLM."""

from cases import BASE, MODEL, QUESTION, check, main
from guidance import assistant, gen, json, select, user
from guidance.models.experimental import VLLMModel


def ask(grammar):
    lm = VLLMModel(MODEL, base_url=BASE, api_key="none")
    with user():
        lm += QUESTION
    with assistant():
        lm += grammar
    return lm["x"]


PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["age"],
}

main(
    "guidance",
    "guidance",
    {
        "chat": lambda: check(ask(gen("x", max_tokens=20)), "no text"),
        "json schema": lambda: check("age" in ask(json("x", schema=PERSON)), "no age"),
        "grammar": lambda: check(ask(select(["yes", "no"], name="x")) in ("yes", "no"), "no choice"),
    },
)
