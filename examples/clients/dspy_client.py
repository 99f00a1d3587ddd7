# /// script
# dependencies = ["dspy==3.4.1"]
# ///
"""DSPy: Predict with the chat and the JSON adapter."""

import dspy
from cases import BASE, MODEL, NotOurs, check, main
from dspy.utils.exceptions import AdapterParseError

lm = dspy.LM(
    f"openai/{MODEL}",
    api_base=BASE,
    api_key="none",
    max_tokens=100,
    temperature=0,
    num_retries=0,
    cache=False,
)


def predict():
    try:
        return dspy.Predict("question -> answer")(question="What is the capital of France?")
    except AdapterParseError as error:
        raise NotOurs(f"the model does not keep the layout that is asked for in words: {error}") from error


def chat():
    dspy.configure(lm=lm)
    check(lm("What is the capital of France?"), "no text")
    predict()


def json_schema():
    dspy.configure(lm=lm, adapter=dspy.JSONAdapter())
    check(predict().answer is not None, "none")


main("dspy", "dspy", {"chat": chat, "json schema": json_schema})
