"""Metrics: what an idle engine, a step and the option for vLLM's names show."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from curkv.config import Settings
from curkv.engine.stats import EvictionStats, RequestStats, SequenceStats, StepStats
from curkv.engine.types import KVReport
from curkv.server.metrics import Metrics
from tests.server.scripted import ScriptedClient, running

CONVENTION = """
num_requests_running num_requests_waiting kv_cache_usage_ratio prompt_tokens generation_tokens request_success
num_preemptions time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds
request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds cache_config_info
kv_tokens_written kv_tokens_evicted kv_pages_freed kv_cache_used_bytes kv_cache_capacity_bytes
kv_eviction_duration_seconds request_kv_kept_ratio kv_page_slots_stranded_ratio kv_head_budget_tokens
kv_cache_held_bytes weights_bytes engine_up prefix_cache_queries prefix_cache_hits prefix_cache_held_bytes
prefix_cache_saved_bytes sessions session_held_bytes prefix_store_bytes prefix_store_hits
prefix_store_saved_tokens prefix_store_read_seconds prefix_store_written prefix_store_skipped
exchanged_bytes
"""


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
    sequences = [
        SequenceStats("a-0", 0, "adacurdkv", 100, 100, 3, 50, 50.0, 1000, 2000),
        SequenceStats("b-0", 0, "adacurdkv", 100, 64, 0, 50, 64.0, 1500, 1500),
    ]
    ended = [finished, aborted]
    step = StepStats(3, 2, 25, 100, 2500, 10_000, 0.25, 100, 3, 600, 1, [eviction], ended, sequences)
    step = replace(step, prefix_bytes=700, prefix_saved_bytes=800, prefix_queries=50, prefix_hits=32)
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
        "kv_cache_held_bytes{policy=adacurdkv}": 2500,
        "kv_page_slots_stranded_ratio": 0.25,
        "prompt_tokens_total": 200,
        "generation_tokens_total": 6,
        "num_preemptions_total": 2,
        "prefix_cache_held_bytes": 700,
        "prefix_cache_saved_bytes": 800,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 64,
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


async def test_every_metric_is_announced_before_the_first_request(http: httpx.AsyncClient) -> None:
    families = text_string_to_metric_families((await http.get("/metrics")).text)
    assert {f"curkv:{name}" for name in CONVENTION.split()} <= {family.name for family in families}


async def test_a_dead_engine_shows_in_the_metrics(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    assert (await metrics(http))["curkv:engine_up"] == 1
    engine.state = "dead"
    assert (await metrics(http))["curkv:engine_up"] == 0


async def test_each_way_to_end_counts_from_zero(http: httpx.AsyncClient) -> None:
    values = await metrics(http)
    for reason in ("stop", "length", "abort", "error"):
        assert values[f"curkv:request_success_total{{finished_reason={reason}}}"] == 0


async def test_a_policy_that_no_longer_runs_holds_nothing(
    http: httpx.AsyncClient, engine: ScriptedClient
) -> None:
    held = SequenceStats("a-0", 0, "knorm", 100, 100, 3, 50, 50.0, 1000, 2000)
    for sequences in ([held, held], []):
        for sink in engine.sinks:
            sink(StepStats(len(sequences), 0, 0, 100, 0, 10_000, sequences=sequences))
    assert (await metrics(http))["curkv:kv_cache_held_bytes{policy=knorm}"] == 0


async def test_names_of_vllm_on_demand(engine: ScriptedClient) -> None:
    with running(engine, Settings(served_model_name="words", vllm_metrics=True)) as url:
        engine.sinks[0](StepStats(3, 2, 25, 100, 2500, 10_000))
        async with httpx.AsyncClient(base_url=url) as http:
            text = (await http.get("/metrics")).text
    for line in (
        'vllm:num_requests_running{engine="0",model_name="words"} 3.0',
        'vllm:num_requests_waiting{engine="0",model_name="words"} 2.0',
        'vllm:kv_cache_usage_perc{engine="0",model_name="words"} 0.25',
        'vllm:cache_config_info{block_size="16",cache_dtype="float16",engine="0",model_name="words",'
        'num_gpu_blocks="16"} 1.0',
    ):
        assert line in text.splitlines()


async def test_names_of_vllm_are_off_by_default(http: httpx.AsyncClient) -> None:
    assert "vllm:" not in (await http.get("/metrics")).text


async def test_an_event_loop_that_is_held_up_shows() -> None:
    metrics = Metrics("words")
    watching = asyncio.create_task(metrics.watch_event_loop())
    await asyncio.sleep(0.02)
    time.sleep(0.3)
    await asyncio.sleep(0.05)
    watching.cancel()
    lag = metrics.registry.get_sample_value("curkv:event_loop_lag_seconds_sum", {"model_name": "words"})
    assert lag is not None and lag > 0.1


def test_metrics_on_a_port_of_their_own(engine: ScriptedClient) -> None:
    settings = Settings(served_model_name="words", metrics_port=9999)
    with running(engine, settings) as url:
        assert httpx.get(f"{url}/metrics").status_code == 404
