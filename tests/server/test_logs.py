"""Logs as JSON, and spans for a collector."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import httpx
import pytest

from curkv.config import Settings
from curkv.engine.stats import RequestStats, StepStats
from curkv.engine.types import KVReport
from curkv.exits import StartupError
from curkv.server.logs import JsonFormatter
from curkv.server.run import Server
from tests.server.scripted import ScriptedClient

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"
HEADERS = {"X-Request-Id": "mine-1", "traceparent": TRACEPARENT}


@pytest.fixture
def lines() -> Any:
    written: list[dict[str, Any]] = []
    handler = logging.Handler()
    formatter = JsonFormatter()
    handler.emit = lambda record: written.append(json.loads(formatter.format(record)))  # type: ignore[method-assign]
    logging.getLogger("curkv").addHandler(handler)
    yield written
    logging.getLogger("curkv").removeHandler(handler)


async def test_a_line_names_the_request_and_the_trace_that_it_belongs_to(
    http: httpx.AsyncClient, lines: list[dict[str, Any]]
) -> None:
    await http.post("/v1/completions", json={"prompt": "w1", "wings": 2}, headers=HEADERS)
    (line,) = [line for line in lines if "wings" in line["message"]]
    assert line["level"] == "WARNING" and line["logger"].startswith("curkv.") and "T" in line["time"]
    assert (line["request_id"], line["trace_id"], line["span_id"]) == ("mine-1", TRACE, SPAN)
    await http.post("/v1/completions", json={"prompt": "w1", "wings": 2}, headers={"traceparent": "no"})
    assert "trace_id" not in lines[-1] and lines[-1]["request_id"] != "mine-1"


async def test_a_failure_is_one_line_with_its_traceback(
    http: httpx.AsyncClient, engine: ScriptedClient, lines: list[dict[str, Any]]
) -> None:
    engine.fail_after, engine.failure = 1, RuntimeError("broken")
    await http.post("/v1/completions", json={"prompt": "w1", "stream": True}, headers=HEADERS)
    (line,) = [line for line in lines if "exception" in line]
    assert "RuntimeError: broken" in line["exception"] and line["request_id"] == "mine-1"


async def test_the_engine_is_told_of_the_trace(http: httpx.AsyncClient, engine: ScriptedClient) -> None:
    await http.post("/v1/completions", json={"prompt": "w1"}, headers=HEADERS)
    assert [request.traceparent for request in engine.taken] == [TRACEPARENT]


def test_a_choice_becomes_a_span_below_the_clients_with_one_for_each_phase() -> None:
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip(
        "opentelemetry.sdk.trace.export.in_memory_span_exporter"
    ).InMemorySpanExporter()
    from curkv.server.tracing import Tracing

    tracing = Tracing("words", export.SimpleSpanProcessor(memory))
    kv = KVReport("snapcur", 25, 25, 75, 0.25, 1000, 4000, 0)
    request = RequestStats("stop", 100, 3, 0.1, 0.2, 0.3, 0.6, 0.3, [], kv, "cmpl-1-0", TRACEPARENT)
    tracing.observe(StepStats(0, 0, 0, 1, 0, 1, finished=[request]))
    tracing.close()
    spans = {span.name: span for span in memory.get_finished_spans()}
    whole = spans["llm_request"]
    assert f"{whole.context.trace_id:032x}" == TRACE and f"{whole.parent.span_id:016x}" == SPAN
    assert whole.attributes["gen_ai.request.id"] == "cmpl-1-0"
    assert whole.attributes["gen_ai.usage.input_tokens"] == 100
    assert whole.attributes["curkv.kv.kept_ratio"] == 0.25
    assert whole.end_time - whole.start_time == pytest.approx(0.6e9)
    assert spans["queue"].start_time == whole.start_time and spans["decode"].end_time == whole.end_time
    assert spans["prefill"].end_time == spans["decode"].start_time
    assert {spans[name].parent.span_id for name in ("queue", "prefill", "decode")} == {whole.context.span_id}


def test_tracing_without_its_packages_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "curkv.server.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError, match=r"pip install 'curkv\[otel\]'"):
        Server(Settings(otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces"))
