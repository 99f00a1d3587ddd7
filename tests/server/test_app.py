"""Models, request ids, metrics and the OpenAPI document."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from curkv.engine.stats import EvictionStats, RequestStats, StepStats
from curkv.engine.types import KVReport
from tests.server.scripted import MAX_MODEL_LEN, ScriptedClient


async def test_models(http: httpx.AsyncClient) -> None:
    [model] = (await http.get("/v1/models")).json()["data"]
    assert (model["id"], model["owned_by"], model["max_model_len"]) == ("words", "curkv", MAX_MODEL_LEN)
    assert model["weights_bytes"] == 400
    assert model["pruning"] == {"method": "self-calibrated", "removed": 0.25, "base": "more-words"}


@pytest.mark.parametrize("path", ["/v1/models", "/nothing", "/health"])
async def test_request_id_is_echoed(http: httpx.AsyncClient, path: str) -> None:
    response = await http.get(path, headers={"X-Request-Id": "mine-1"})
    assert response.headers.get_list("x-request-id") == ["mine-1"]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "\u00e9"])
async def test_unusable_request_id_is_replaced(http: httpx.AsyncClient, given: str) -> None:
    headers = [(b"X-Request-Id", given.encode("latin-1"))]
    assert len((await http.get("/health", headers=headers)).headers["x-request-id"]) == 32


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """`name{label=value,...}` to value, without the label every metric has."""
    response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            if sample.name.startswith("curkv:"):
                assert sample.labels.pop("model_name") == "words"
                labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
                values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return values


async def test_idle_metrics(http: httpx.AsyncClient) -> None:
    values = await metrics(http)
    assert values["curkv:num_requests_running"] == values["curkv:num_requests_waiting"] == 0
    assert values["curkv:kv_cache_usage_ratio"] == values["curkv:kv_cache_used_bytes"] == 0
    assert values["curkv:kv_cache_capacity_bytes"] == 1 << 20
    assert values["curkv:weights_bytes{kind=mlp}"] == 300
    [info] = [name for name in values if name.startswith("curkv:cache_config_info")]
    assert "kv_dtype=float16" in info and "page_size=16" in info and "num_pages=100" in info


async def test_a_step_shows_in_the_metrics(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    report = KVReport("adacurdkv", 50, 50.0, 50.0, 0.5, 1000, 2000, 0)
    finished = RequestStats("length", 100, 3, 0.1, 0.2, 0.3, 0.6, 0.3, [0.1, 0.2], report)
    aborted = RequestStats("abort", 100, 0, 0.1, 0.0, 0.0, 0.1)
    eviction = EvictionStats("adacurdkv", "prefill", 300, 12, 0.002, 0.5, np.array([[16, 84], [17, 5000]]))
    step = StepStats(3, 2, 25, 100, 2500, 10_000, 0.25, 100, 3, 600, 1, [eviction], [finished, aborted])
    for sink in engine.sinks:
        sink(step)
        sink(step)
    values = await metrics(http)
    expected = {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_ratio": 0.25,
        "kv_cache_used_bytes": 2500,
        "kv_cache_capacity_bytes": 10_000,
        "kv_page_slots_stranded_ratio": 0.25,
        "prompt_tokens_total": 200,
        "generation_tokens_total": 6,
        "num_preemptions_total": 2,
        "kv_tokens_written_total": 1200,
        "kv_tokens_evicted_total{phase=prefill,policy=adacurdkv}": 600,
        "kv_pages_freed_total{phase=prefill,policy=adacurdkv}": 24,
        "request_success_total{finished_reason=length}": 2,
        "request_success_total{finished_reason=abort}": 2,
        "kv_eviction_duration_seconds_count{phase=prefill,policy=adacurdkv}": 2,
        "request_kv_kept_ratio_sum{policy=adacurdkv}": 1.0,
        "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 4,
        "e2e_request_latency_seconds_count": 4,
        "request_queue_time_seconds_count": 4,
        "request_prefill_time_seconds_sum": 0.4,
        "request_decode_time_seconds_sum": 0.6,
        "kv_head_budget_tokens_bucket{le=16.0,policy=adacurdkv}": 2,
        "kv_head_budget_tokens_bucket{le=32.0,policy=adacurdkv}": 4,
        "kv_head_budget_tokens_bucket{le=+Inf,policy=adacurdkv}": 8,
        "kv_head_budget_tokens_sum{policy=adacurdkv}": 2 * (16 + 84 + 17 + 5000),
    }
    assert {name: values[f"curkv:{name}"] for name in expected} == pytest.approx(expected)


async def test_openapi_declares_streams_headers_and_errors(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    route = document["paths"]["/v1/completions"]["post"]
    assert set(route["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"X-KV-Policy", "X-KV-Budget", "X-KV-Protect"} <= {p["name"] for p in route["parameters"]}
    assert {"400", "404", "413", "500", "503", "default"} <= set(route["responses"])
    assert "422" not in route["responses"]
    prompt = document["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert len(prompt["anyOf"]) == 4
