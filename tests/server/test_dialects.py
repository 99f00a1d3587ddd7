"""The APIs of others: what they ask reaches the engine, and its answers come back in their words."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest

from curkv.config import Settings
from curkv.server.blocks import Blocks
from curkv.server.chat.protocol import Message
from curkv.server.chat.tools import FunctionDelta, ToolCallDelta
from curkv.server.errors import APIError
from curkv.server.messages.protocol import MessagesRequest
from curkv.server.ollama.protocol import OllamaChatRequest
from curkv.server.responses.protocol import ResponsesRequest
from curkv.server.responses.store import ResponseStore
from tests.server.scripted import ScriptedClient, running

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
EPHEMERAL = {"type": "ephemeral"}


def sse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Events of a stream, and what they say."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        assert events[-1][1]["type"] == events[-1][0]
    return events


def plain(messages: list[Message]) -> list[dict[str, Any]]:
    return [message.model_dump(exclude_none=True, exclude_defaults=True) for message in messages]


# Anthropic


async def messages(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"model": "words", "max_tokens": 3, "messages": [{"role": "user", "content": "w10"}], **fields}
    return await http.post("/v1/messages", json=body)


async def test_messages(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    response = await messages(http, system="w9", stop_sequences=["x"], temperature=0.5, kv={"policy": "full"})
    answer = response.json()
    assert engine.taken[0].prompt_token_ids == [2, 9, 1, 10, 3]
    sampling = engine.taken[0].sampling
    assert (sampling.max_tokens, sampling.stop, sampling.temperature) == (3, ("x",), 0.5)
    assert answer["type"] == "message" and answer["id"].startswith("msg-")
    assert answer["content"] == [{"type": "text", "text": " w1 w2 w3"}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == 5 and usage["output_tokens"] == 3
    assert usage["kv"]["policy"] == response.headers["x-kv-policy"] == "full"


async def test_messages_as_a_stream(http: httpx.AsyncClient) -> None:
    events = sse((await messages(http, stream=True)).text)
    assert [name for name, _ in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    pieces = [data["delta"]["text"] for name, data in events if name == "content_block_delta"]
    assert "".join(pieces) == " w1 w2 w3"
    assert events[-2][1]["delta"]["stop_reason"] == "max_tokens"
    assert events[-2][1]["usage"]["output_tokens"] == 3


def test_turns_with_calls_and_marks() -> None:
    body = MessagesRequest.model_validate(
        {
            "max_tokens": 5,
            "system": [{"type": "text", "text": "be brief", "cache_control": EPHEMERAL}],
            "tools": [{"name": "f", "input_schema": SCHEMA}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "thinking": {"type": "disabled"},
            "messages": [
                {"role": "user", "content": "go"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": "s"},
                        {"type": "text", "text": "well"},
                        {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True},
                        {"type": "text", "text": "and?"},
                    ],
                },
            ],
        }
    ).whole_chat
    assert body.messages[0].parts == [("be brief", True)]
    call = body.messages[2].called[0]
    assert (call.id, call.function.name, json.loads(call.function.arguments or "")) == ("t1", "f", {"a": 1})
    assert (body.messages[2].reasoning_content, body.messages[2].parts[0][0]) == ("hm", "well")
    assert [m.role for m in body.messages] == ["system", "user", "assistant", "tool", "user"]
    assert [text for text, _ in body.messages[3].parts] == ["Error: ", "no"]
    assert body.messages[3].tool_call_id == "t1"
    assert body.tool_use.forced and not body.tool_use.parallel
    assert body.chat_template_kwargs == {"enable_thinking": False}


async def test_tokens_are_counted(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    body = {"messages": [{"role": "user", "content": "w10 w11"}]}
    response = await http.post("/v1/messages/count_tokens", json=body)
    assert response.json() == {"input_tokens": 4}
    assert not engine.taken


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"max_tokens": 0}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": {}}]}]}, 400, "invalid_request_error"),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error"),
        ({"model": "other"}, 404, "not_found_error"),
        ({"kv": {"policy": "curdkv", "budget": 0}}, 400, "invalid_request_error"),
        ({"wings": 2}, 400, "invalid_request_error"),
    ],
)
async def test_errors_of_messages(
    http: httpx.AsyncClient, engine: ScriptedClient, fields: dict[str, Any], status: int, kind: str
) -> None:
    response = await messages(http, **fields)
    assert response.status_code == status, response.text
    assert response.json()["type"] == "error" and response.json()["error"]["type"] == kind
    assert not engine.taken


async def test_a_stream_of_messages_that_fails(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    engine.fail_after = 1
    name, data = sse((await messages(http, stream=True)).text)[-1]
    assert (name, data["error"]["type"]) == ("error", "api_error")


async def test_keys_as_anthropic_sends_them(engine: ScriptedClient) -> None:
    settings = Settings(served_model_name="words", api_key=("given",))
    with running(engine, settings) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            refused = await messages(http)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
            http.headers["x-api-key"] = "given"
            assert (await messages(http)).status_code == 200


# Responses


async def respond(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/responses", json={"input": "w10", "max_output_tokens": 3, **fields})


async def test_responses(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    answer = (await respond(http, instructions="w9", metadata={"a": "b"})).json()
    assert engine.taken[0].prompt_token_ids == [2, 9, 1, 10, 3]
    assert (answer["object"], answer["status"]) == ("response", "incomplete")
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    [item] = answer["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", " w1 w2 w3")
    assert answer["usage"]["output_tokens"] == 3 and answer["usage"]["kv"]["policy"] == "full"
    assert answer["metadata"] == {"a": "b"}
    kept = await http.get(f"/v1/responses/{answer['id']}")
    assert kept.json() == answer


async def test_responses_with_probabilities(http: httpx.AsyncClient) -> None:
    answer = (await respond(http, include=["message.output_text.logprobs"])).json()
    assert [entry["logprob"] for entry in answer["output"][0]["content"][0]["logprobs"]] == [-0.5] * 3


def test_strict_schemas_of_responses_are_followed_whole() -> None:
    """As in chat: what cannot be followed is refused later, not left out."""
    schema = {"type": "array", "uniqueItems": True}
    form = {"type": "json_schema", "name": "x", "schema": schema}
    for strict, ignored in ((True, ()), (False, ("uniqueItems",))):
        body = ResponsesRequest.model_validate(
            {"input": "go", "text": {"format": {**form, "strict": strict}}}
        )
        structure = body.chat(body.messages([])).structure
        assert structure is not None and structure.ignored == ignored


async def test_a_response_goes_on_with_another(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    first = (await respond(http, instructions="w9")).json()["id"]
    second = (await respond(http, input="w11", previous_response_id=first, stream=True)).text
    assert engine.taken[1].prompt_token_ids == [1, 10, 2, 1, 2, 3, 1, 11, 3]
    last = sse(second)[-1][1]["response"]
    await respond(http, input="w12", previous_response_id=last["id"], store=False)
    assert engine.taken[2].prompt_token_ids[:-2] == [1, 10, 2, 1, 2, 3, 1, 11, 2, 1, 2, 3, 1]
    assert (await http.delete(f"/v1/responses/{first}")).json()["deleted"]
    assert (await respond(http, previous_response_id=first)).status_code == 404


async def test_responses_that_are_not_stored(http: httpx.AsyncClient) -> None:
    answer = (await respond(http, store=False)).json()
    assert (await http.get(f"/v1/responses/{answer['id']}")).status_code == 404


async def test_responses_as_a_stream(http: httpx.AsyncClient) -> None:
    events = sse((await respond(http, stream=True)).text)
    assert [name for name, _ in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert events[-1][1]["response"]["output"][0]["content"][0]["text"] == " w1 w2 w3"


def test_items_become_messages() -> None:
    body = ResponsesRequest.model_validate(
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "go"}]},
                {
                    "type": "reasoning",
                    "id": "r",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "hm"}],
                },
                {
                    "role": "assistant",
                    "type": "message",
                    "content": [{"type": "output_text", "text": "well"}],
                },
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "1"},
                {"type": "function_call_output", "call_id": "c2", "output": "2"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
            "tool_choice": {"type": "function", "name": "f"},
            "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        }
    )
    chat = body.chat(body.messages([]))
    assert [m.role for m in chat.messages] == ["user", "assistant", "tool", "tool"]
    said = chat.messages[1]
    assert (said.reasoning_content, said.parts[0][0], [c.id for c in said.called]) == (
        "hm",
        "well",
        ["c1", "c2"],
    )
    assert chat.tool_use.forced
    assert chat.structure is not None and chat.structure.kind == "json"


def test_the_store_is_bounded_and_each_key_sees_its_own() -> None:
    store = ResponseStore(200)
    turn = [Message(role="user", content="x" * 50)]
    for name in ("a", "b", "c"):
        store.put("one", name, turn, "{}")
    assert store.get("one", "c").messages == turn
    for key, name in (("one", "a"), ("two", "c")):
        with pytest.raises(APIError) as refused:
            store.get(key, name)
        assert refused.value.status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input"),
        ({"input": [{"type": {}}]}, "input"),
        ({"input": [{"type": []}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"wings": 2}, "wings"),
    ],
)
async def test_errors_of_responses(http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await respond(http, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


# Ollama


async def test_ollama_chat(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    body = {
        "model": "words:latest",
        "messages": [{"role": "user", "content": "w10"}],
        "options": {"num_predict": 3, "temperature": 0.5, "num_ctx": 100},
    }
    lines = [json.loads(line) for line in (await http.post("/api/chat", json=body)).text.splitlines()]
    assert [line["message"]["content"] for line in lines] == [" w1", " w2", " w3", ""]
    assert [line["done"] for line in lines] == [False, False, False, True]
    assert (lines[-1]["done_reason"], lines[-1]["eval_count"], lines[-1]["model"]) == ("length", 3, "words")
    assert engine.taken[0].sampling.temperature == 0.5
    whole = (await http.post("/api/chat", json={**body, "stream": False})).json()
    assert whole["message"]["content"] == " w1 w2 w3" and whole["kv"]["policy"] == "full"


async def test_ollama_generate(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    body = {"model": "words", "prompt": "w10", "stream": False, "options": {"num_predict": 2}}
    assert (await http.post("/api/generate", json={**body, "system": "w9"})).json()["response"] == " w1 w2"
    assert engine.taken[0].prompt_token_ids == [2, 9, 1, 10, 3]
    await http.post("/api/generate", json={**body, "raw": True})
    assert engine.taken[1].prompt_token_ids == [10]
    assert (await http.post("/api/generate", json={"model": "words"})).json()["done_reason"] == "load"


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/api/show"])
async def test_bodies_without_a_type_are_json_to_ollama(http: httpx.AsyncClient, path: str) -> None:
    """As curl sends them; a page of another origin has to name the type, so that browsers ask first."""
    asked = {"/api/chat": {"messages": [{"role": "user", "content": "w1"}]}, "/api/embed": {"input": "w1"}}
    body = json.dumps({"model": "words", **asked.get(path, {"prompt": "w1"} if path != "/api/show" else {})})
    form = {"content-type": "application/x-www-form-urlencoded"}
    for headers in ({}, form):
        answer = await http.post(path, content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        refused = await http.post(path, content=body, headers={**headers, "origin": "http://elsewhere"})
        assert refused.status_code == 400 and "Content-Type" in refused.json()["error"]


def test_ollama_history_and_forms() -> None:
    chat = OllamaChatRequest.model_validate(
        {
            "messages": [
                {"role": "user", "content": "go"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
                },
                {"role": "tool", "tool_name": "f", "content": "1"},
            ],
            "format": SCHEMA,
            "think": True,
        }
    ).whole_chat
    assert chat.messages[1].called[0].function.arguments == '{"a": 1}'
    assert (chat.messages[2].role, chat.messages[2].name) == ("tool", "f")
    assert chat.structure is not None and chat.structure.source == SCHEMA
    assert chat.chat_template_kwargs == {"enable_thinking": True} and chat.stream


async def test_what_ollama_tells_of_models(http: httpx.AsyncClient) -> None:
    for path in ("/api/tags", "/api/ps"):
        assert [m["name"] for m in (await http.get(path)).json()["models"]] == ["words"]
    shown = (await http.post("/api/show", json={"model": "words"})).json()
    assert "tools" in shown["capabilities"]
    assert shown["model_info"][shown["model_info"]["general.architecture"] + ".context_length"] == 256
    assert (await http.get("/api/version")).json()["version"]


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": "w1", "images": ["x"]}]}, 400),
        ("/api/chat", {"model": "other"}, 404),
        ("/api/generate", {"prompt": "w1", "suffix": "w2"}, 400),
        ("/api/generate", {"prompt": "w1", "options": {"mirostat": 2}}, 400),
        ("/api/pull", {"model": "words"}, 404),
        ("/api/show", {"model": "other"}, 404),
    ],
)
async def test_errors_of_ollama(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any], status: int
) -> None:
    response = await http.post(path, json=fields)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"] and isinstance(response.json()["error"], str)


# What they share


def test_blocks() -> None:
    blocks = Blocks()
    call = ToolCallDelta(index=0, id="c", type="function", function=FunctionDelta(name="f", arguments=""))
    more = ToolCallDelta(index=0, function=FunctionDelta(arguments="{}"))
    changes = [
        *blocks.take({"reasoning_content": "hm", "content": "\n\n"}, False),
        *blocks.take({"content": " so"}, False),
        *blocks.take({"content": "."}, False),
        *blocks.take({"tool_calls": [call, more], "content": None}, False),
        *blocks.take({"content": "\n"}, True),
    ]
    assert [(b.kind, b.text) for b in blocks.blocks] == [
        ("reasoning", "hm"),
        ("text", "\n\n so."),
        ("call", "{}"),
    ]
    assert [(c.what, c.block.index) for c in changes if c.what != "piece"] == [
        (what, index) for index in range(3) for what in ("begin", "end")
    ]


def test_an_answer_of_white_space_is_one() -> None:
    blocks = Blocks()
    blocks.take({"content": "\n"}, True)
    assert [(b.kind, b.text) for b in blocks.blocks] == [("text", "\n")]


async def test_several_names(engine: ScriptedClient) -> None:
    with running(engine, Settings(served_model_name=("a", "b"))) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            assert [m["id"] for m in (await http.get("/v1/models")).json()["data"]] == ["a", "b"]
            for name in ("a", "b"):
                answer = await http.post("/v1/completions", json={"prompt": "w1", "model": name})
                assert answer.json()["model"] == name
            assert (
                await http.post("/v1/completions", json={"prompt": "w1", "model": "c"})
            ).status_code == 404


async def test_any_model(engine: ScriptedClient) -> None:
    with running(engine, Settings(served_model_name="a", any_model=True)) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            answer = await http.post("/v1/completions", json={"prompt": "w1", "model": "gpt-4o"})
            assert answer.json()["model"] == "gpt-4o"


async def test_probes(http: httpx.AsyncClient) -> None:
    for path in ("/", "/health", "/v1/models", "/api/tags", "/api/version", "/version"):
        answer = await http.head(path)
        assert (answer.status_code, answer.content) == (200, b""), path


# Embeddings


async def test_embeddings(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    for given, prompts in (
        ("w1 w2", [[1, 2]]),
        (["w1", "w2 w3"], [[1], [2, 3]]),
        ([1, 2], [[1, 2]]),
        ([[1], [2]], [[1], [2]]),
    ):
        engine.taken.clear()
        answer = (await http.post("/v1/embeddings", json={"input": given})).json()
        assert sorted(request.prompt_token_ids for request in engine.taken) == sorted(prompts)
        assert all(request.sampling.embed for request in engine.taken)
        assert [entry["index"] for entry in answer["data"]] == list(range(len(prompts)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
        for entry in answer["data"]:
            assert entry["embedding"] == pytest.approx([1 / 5**0.5, 2 / 5**0.5])
    encoded = (await http.post("/v1/embeddings", json={"input": "w1", "encoding_format": "base64"})).json()
    vector = np.frombuffer(base64.b64decode(encoded["data"][0]["embedding"]), "<f4")
    assert np.linalg.norm(vector) == pytest.approx(1)


async def test_ollama_s_embeddings(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/api/embed", json={"model": "words:latest", "input": ["w1", "w2"]})).json()
    assert len(answer["embeddings"]) == 2 and answer["prompt_eval_count"] == 2
    older = (await http.post("/api/embeddings", json={"model": "words", "prompt": "w1"})).json()
    assert older["embedding"] == answer["embeddings"][0]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": "w1", "dimensions": 64}, "dimensions"),
        ({"input": "w1", "kv": {"budget": "25%"}}, "kv"),
        ({"input": "w1 " * 300}, "input"),
    ],
)
async def test_errors_of_embeddings(
    http: httpx.AsyncClient, engine: ScriptedClient, fields: dict[str, Any], param: str
) -> None:
    answer = await http.post("/v1/embeddings", json=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert not engine.taken


async def test_props(http: httpx.AsyncClient) -> None:
    props = (await http.get("/props")).json()
    assert props["default_generation_settings"]["n_ctx"] == 256 and props["chat_template"] == "words"
