"""OpenTelemetry spans of requests, sent to a collector; needs the extra `curkv[otel]`."""

from __future__ import annotations

import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

import curkv
from curkv.engine.stats import RequestStats, StepStats

PHASES = ("queue", "prefill", "decode")


def send_to(endpoint: str) -> SpanProcessor:
    """Sends spans in batches, from a thread of its own.

    Args:
        endpoint: where the collector takes traces over HTTP, such as http://localhost:4318/v1/traces.
    """
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))


class Tracing:
    """Makes a span of every choice that ends, below the one that its `traceparent` named, and one per phase.

    Names of attributes are those of the semantic conventions for generative AI and, for latencies, vLLM's.

    Args:
        model_name: name of the model served.
        processor: takes the spans.
    """

    def __init__(self, model_name: str, processor: SpanProcessor):
        self._model = model_name
        resource = Resource.create({SERVICE_NAME: "curkv", "service.version": curkv.__version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("curkv", curkv.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def observe(self, step: StepStats) -> None:
        """Takes the choices that ended in a step; runs in the engine's thread."""
        now = time.time_ns()
        for request in step.finished:
            self._trace(request, now)

    def close(self) -> None:
        """Sends what has not been sent."""
        self._provider.shutdown()

    def _trace(self, request: RequestStats, end: int) -> None:
        start = end - _nanoseconds(request.e2e_seconds)
        parent = self._propagator.extract({"traceparent": request.traceparent})
        span = self._tracer.start_span(
            "llm_request", parent, SpanKind.SERVER, self._attributes(request), start_time=start
        )
        if request.finish_reason == "error":
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        for phase in PHASES:
            duration = _nanoseconds(getattr(request, f"{phase}_seconds"))
            self._tracer.start_span(phase, inside, start_time=start).end(start + duration)
            start += duration
        span.end(end)

    def _attributes(self, request: RequestStats) -> dict[str, AttributeValue]:
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.response.model": self._model,
            "gen_ai.request.id": request.request_id,
            "gen_ai.usage.input_tokens": request.prompt_tokens,
            "gen_ai.usage.output_tokens": request.generation_tokens,
            "gen_ai.response.finish_reasons": (request.finish_reason,),
            "gen_ai.latency.e2e": request.e2e_seconds,
            "gen_ai.latency.time_in_queue": request.queue_seconds,
            "gen_ai.latency.time_in_model_prefill": request.prefill_seconds,
            "gen_ai.latency.time_in_model_decode": request.decode_seconds,
        }
        if request.ttft_seconds is not None:
            attributes["gen_ai.latency.time_to_first_token"] = request.ttft_seconds
        if request.kv is not None:
            attributes["curkv.kv.policy"] = request.kv.policy
            attributes["curkv.kv.kept_ratio"] = request.kv.kept_ratio
            attributes["curkv.kv.peak_bytes"] = request.kv.peak_bytes
        return attributes


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
