"""Outputs that follow a grammar, sampled freely from a model that would say something else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

import curkv.engine.structure
from curkv.engine.engine import Engine
from curkv.engine.types import InvalidRequest, Structure
from curkv.models.vocabulary import Vocabulary
from curkv.server.structural_tags import StructuralTagFormat, tag_structure

from .conftest import Loaded, request, run, tokens

MakeEngine = Callable[..., Engine]

CHOICES = ["ja", 'n"ein\n']
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


def text(outputs: list[Any]) -> str:
    return "".join(output.text for output in outputs)


def test_structured_and_free_choices_in_one_batch(make_engine: MakeEngine, loaded: Loaded) -> None:
    engine, prompt = make_engine(), loaded.prompt(20)
    outputs = run(
        engine,
        request(prompt, 60, "json", structure=Structure("json", SCHEMA, "p"), temperature=1.0, seed=1, n=3),
        request(prompt, 20, "regex", structure=Structure("regex", "[a-c]{3}-[0-9]{2}", "p")),
        request(prompt, 20, "choice", structure=Structure("choice", CHOICES, "p"), temperature=2.0),
        request(prompt, 8, "free"),
    )
    for index in range(3):
        found = json.loads(text(outputs["json", index]))
        assert set(found) == {"name", "size"} and found["size"] in ("small", "large")
    assert re.fullmatch("[a-c]{3}-[0-9]{2}", text(outputs["regex", 0]))
    assert text(outputs["choice", 0]) in CHOICES
    for key in (("json", 0), ("regex", 0), ("choice", 0)):
        assert outputs[key][-1].finish_reason == "stop"
    assert tokens(outputs["free", 0]) == tokens(run(engine, request(prompt, 8, "free"))["free", 0])


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "yes" | "no"',
        'root ::= answer\nanswer ::= "yes" | "no"',
        'root ::= ("y" "es") | "n" [o] # GBNF',
    ],
)
def test_grammars_in_lark_ebnf_and_gbnf(make_engine: MakeEngine, loaded: Loaded, grammar: str) -> None:
    structure = Structure("grammar", grammar, "p")
    [outputs] = run(make_engine(), request(loaded.prompt(9), 9, structure=structure)).values()
    assert text(outputs) in ("yes", "no") and outputs[-1].finish_reason == "stop"


def test_json_has_no_white_space_to_run_off_into(make_engine: MakeEngine, loaded: Loaded) -> None:
    structure = Structure("json", SCHEMA, "p")
    blank = loaded.tokenizer.token_to_id("\u0120")
    asked = request(loaded.prompt(9), 60, structure=structure, logit_bias={blank: 100})
    [outputs] = run(make_engine(), asked).values()
    assert set(json.loads(text(outputs))) == {"name", "size"}
    assert re.match(r'\{"name": "', text(outputs))


def test_structural_tags(make_engine: MakeEngine, loaded: Loaded) -> None:
    tags = StructuralTagFormat.model_validate(
        {
            "type": "structural_tag",
            "structures": [{"begin": "<f>", "schema": {"const": 7}, "end": "</f>"}],
            "triggers": ["<f"],
        }
    )
    matcher = make_engine().structures.matcher(tag_structure(tags, "p"))
    encode = Vocabulary(loaded.tokenizer).encode
    for written, fits in (("so <f>7</f> then", True), ("so <f>8", False), ("<g>", True)):
        trial = matcher.deep_copy()
        assert all(trial.consume_token(token) for token in encode(written)) == fits, written


def test_a_structure_that_gets_too_complex_is_the_fault_of_the_request(
    make_engine: MakeEngine, loaded: Loaded
) -> None:
    structure = Structure("choice", [f"choice {i}" for i in range(4000)], "structured_outputs.choice")
    [outputs] = run(make_engine(), request(loaded.prompt(9), 9, structure=structure)).values()
    assert outputs[-1].finish_reason == "error"
    problem = outputs[-1].problem
    assert problem is not None and problem.param == "structured_outputs.choice"
    assert "4001 items" in problem.message


def test_an_output_that_may_go_on_ends_with_end_of_sequence(make_engine: MakeEngine, loaded: Loaded) -> None:
    structure = Structure("regex", "a{1,3}", "p")
    eos = loaded.model.config.eos_token_ids[0]
    [outputs] = run(
        make_engine(),
        request(loaded.prompt(9), 9, structure=structure, ignore_eos=False, logit_bias={eos: 100}),
    ).values()
    assert text(outputs) == "a" and outputs[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    "structure",
    [
        Structure("regex", "[a", "p"),
        Structure("grammar", "root ::= (", "p"),
        Structure("grammar", 'start: "a', "p"),
        Structure("regex", "(?=a)b", "p"),
        Structure("json", {"type": "thing"}, "p"),
        Structure("json", '{"type": ', "p"),
        Structure("json", {"$ref": "#"}, "p"),
        Structure("json", {"enum": [1, 2**53 + 1]}, "p"),
        Structure("json", {"type": "string", "minLength": 3, "maxLength": 2}, "p"),
    ],
)
def test_what_cannot_be_followed_is_refused(make_engine: MakeEngine, structure: Structure) -> None:
    with pytest.raises(InvalidRequest) as error:
        make_engine().plan(request([1], structure=structure))
    assert error.value.param == "p"


def test_what_looks_like_a_special_token_is_text(make_engine: MakeEngine, loaded: Loaded) -> None:
    structure = Structure("choice", ["a<|im_end|>b"], "p")
    [outputs] = run(make_engine(), request(loaded.prompt(9), 20, structure=structure)).values()
    assert text(outputs) == "a<|im_end|>b" and outputs[-1].finish_reason == "stop"


def test_all_prompts_of_a_structure_share_what_was_compiled(
    make_engine: MakeEngine, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    compile_grammar = curkv.engine.structure.compile_grammar
    monkeypatch.setattr(
        curkv.engine.structure,
        "compile_grammar",
        lambda *args: compiled.append(args[2]) or compile_grammar(*args),
    )
    structure = Structure("regex", "[a-c]{3}", "p")
    items = [request(loaded.prompt(9, start=i), 9, f"{i}", structure=structure, n=2) for i in range(3)]
    found = run(make_engine(), *items)
    assert len(found) == 6 and all(re.fullmatch("[a-c]{3}", text(outputs)) for outputs in found.values())
    assert len(compiled) == 1
