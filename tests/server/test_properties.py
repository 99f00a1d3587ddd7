"""Whatever headers and options a request has, its answer is a documented one, and says what was wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curkv.cache.policies import policy_descriptions
from curkv.config import Settings
from curkv.server.errors import ErrorResponse
from tests.server.scripted import ScriptedClient, running

FAST = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/kv/explain", "/tokenize")
PROMPT = {"prompt": "w1 w2 w3 w4 w5 w6 w7 w8"}
CONVERSATION = {"messages": [{"role": "user", "content": "w1 w2 w3 w4"}]}

policies = st.sampled_from([*policy_descriptions(), "full", "no-such", ""])
numbers = st.one_of(
    st.sampled_from(["0", "1", "-1", "25%", "0.25", "100%", "101%", "8MiB", "512tok", "1e3", "nan", "inf"]),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(repr),
)
spans = st.lists(st.tuples(st.integers(-2, 9), st.integers(-2, 9)), max_size=4)
printable = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=30
)
fuzzy = st.one_of(numbers, printable, spans.map(lambda them: ",".join(f"{a}-{b}" for a, b in them)))


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with (
        running(ScriptedClient(), Settings(served_model_name="words")) as url,
        httpx.Client(base_url=url, timeout=10) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def named(http: httpx.Client) -> list[dict[str, Any]]:
    """Headers that the OpenAPI document has."""
    post = http.get("/openapi.json").json()["paths"]["/v1/completions"]["post"]
    return [parameter for parameter in post["parameters"] if parameter["in"] == "header"]


def check(response: httpx.Response) -> None:
    """The answer is one that the OpenAPI document has, and an error has the shape of errors."""
    assert response.status_code in (200, 400, 408, 413), response.text
    if response.status_code != 200:
        error = ErrorResponse.model_validate(response.json()).error
        assert error.message and len(error.message) < 4000


@FAST
@given(data=st.data())
def test_any_headers(http: httpx.Client, named: list[dict[str, Any]], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from([p["name"] for p in named]), unique=True, max_size=5))
    headers = {name: data.draw(policies if name == "X-KV-Policy" else fuzzy, label=name) for name in chosen}
    headers |= data.draw(
        st.dictionaries(st.sampled_from(["X-Request-Id", "X-Session-Id", "Accept"]), printable)
    )
    path = data.draw(st.sampled_from(PATHS))
    body = CONVERSATION if "chat" in path else PROMPT
    encoded = {name: value.strip().encode("latin-1") for name, value in headers.items()}
    check(http.post(path, json={**body, "max_tokens": 2} if "completions" in path else body, headers=encoded))


@pytest.fixture(scope="module")
def fields(http: httpx.Client) -> dict[str, list[str]]:
    """Names of the body's fields, and of those of `kv`."""
    body = http.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]["properties"]
    return {"body": list(body), "kv": list(body["kv"]["anyOf"][0]["properties"])}


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**65), 2**65),
        st.integers(-2, 40),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace").decode()),
        numbers,
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "0", "type", "policy"]), inner, max_size=2),
    ),
    max_leaves=6,
)


@FAST
@given(data=st.data())
def test_any_options(http: httpx.Client, fields: dict[str, list[str]], data: st.DataObject) -> None:
    names = [name for name in fields["body"] if name not in ("prompt", "kv", "model")]
    body = data.draw(st.dictionaries(st.sampled_from(names), values, max_size=4))
    kv = data.draw(st.dictionaries(st.sampled_from(fields["kv"]), values, max_size=4))
    if data.draw(st.booleans()):
        kv["policy"] = data.draw(policies)
    check(http.post("/v1/completions", json={**PROMPT, "max_tokens": 2, **body, "kv": kv}))
