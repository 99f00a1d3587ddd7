"""Models, request ids and the OpenAPI document."""

from __future__ import annotations

import httpx
import pytest

from curkv.cache.catalogue import catalogue
from tests.server.scripted import MAX_MODEL_LEN


async def test_models(http: httpx.AsyncClient) -> None:
    [model] = (await http.get("/v1/models")).json()["data"]
    assert (model["id"], model["owned_by"], model["max_model_len"]) == ("words", "curkv", MAX_MODEL_LEN)
    assert (model["weights"], model["weights_bytes"], model["kv_dtype"]) == ("int8", 400, "float16")
    assert model["pruning"] == {"method": "self-calibrated", "removed": 0.25, "base": "more-words"}


@pytest.mark.parametrize("path", ["/v1/models", "/nothing", "/health"])
async def test_request_id_is_echoed(http: httpx.AsyncClient, path: str) -> None:
    response = await http.get(path, headers={"X-Request-Id": "mine-1"})
    assert response.headers.get_list("x-request-id") == ["mine-1"]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "\u00e9"])
async def test_unusable_request_id_is_replaced(http: httpx.AsyncClient, given: str) -> None:
    headers = [(b"X-Request-Id", given.encode("latin-1"))]
    assert len((await http.get("/health", headers=headers)).headers["x-request-id"]) == 32


async def test_openapi_declares_streams_headers_and_errors(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    route = document["paths"]["/v1/completions"]["post"]
    assert set(route["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"X-KV-Policy", "X-KV-Budget", "X-KV-Protect"} <= {p["name"] for p in route["parameters"]}
    assert {"400", "404", "413", "500", "503", "default"} <= set(route["responses"])
    assert "422" not in route["responses"]
    prompt = document["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert len(prompt["anyOf"]) == 4


async def test_openapi_describes_every_field_of_kv(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    schemas = [s for s in document["components"]["schemas"].values() if "kv" in s.get("properties", {})]
    [kv] = [part for part in schemas[0]["properties"]["kv"]["anyOf"] if part.get("title") == "KVFields"]
    assert set(kv["properties"]) == {*catalogue(), "session"}
    assert all(field["description"] for field in kv["properties"].values())
