"""The engine's statistics as Prometheus metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from curkv.cache.store import StoreStats
from curkv.engine.stats import EvictionStats, RequestStats, SequenceStats, StepStats
from curkv.engine.types import FinishReason

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient

# Without it every counter and histogram comes with a `_created` series; there is no switch per registry.
disable_created_metrics()  # type: ignore[no-untyped-call]

PREFIX = "curkv:"

TOKEN_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
)
TTFT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0)
EVICTION_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
LAG_INTERVAL = 0.1
LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
HEAD_TOKENS = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """A registry of its own with every metric of one served model.

    `observe` runs in the engine's thread after each step; prometheus_client's values are locked.

    Args:
        model_name: value of the label `model_name` on every metric.
        vllm_names: also emit the gauges that routers read under vLLM's names.
    """

    def __init__(self, model_name: str, vllm_names: bool = False):
        self.registry = CollectorRegistry()
        self._model = model_name
        self._policies: set[str] = set()
        ProcessCollector(registry=self.registry)

        self._up = self._gauge("engine_up", "1 while requests are taken, else 0.")
        self._running = self._gauge("num_requests_running", "Sequences being prefilled or decoded.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences in the queue.")
        self._usage = self._gauge("kv_cache_usage_ratio", "Share of the KV cache's pages in use, 0 to 1.")
        self._used = self._gauge("kv_cache_used_bytes", "Bytes of KV cache pages in use.")
        self._capacity = self._gauge("kv_cache_capacity_bytes", "Bytes of the KV cache's page pool.")
        self._held = self._gauge(
            "kv_cache_held_bytes", "Bytes of pages that running sequences hold.", "policy"
        )
        self._stranded = self._gauge(
            "kv_page_slots_stranded_ratio",
            "Share of the token slots of used pages that hold no token, 0 to 1.",
        )
        self._prefix_bytes = self._gauge(
            "prefix_cache_held_bytes", "Bytes of KV cache pages held for repeated prompts."
        )
        self._prefix_saved = self._gauge(
            "prefix_cache_saved_bytes", "Bytes of KV cache that more would be in use if no page was shared."
        )
        self._sessions = self._gauge("sessions", "Conversations that can go on from what is held of them.")
        self._session_bytes = self._gauge("session_held_bytes", "Bytes of KV cache pages held of sessions.")
        self._store_bytes = self._gauge("prefix_store_bytes", "Bytes of the prefix store on disk.")
        self._store = {
            "hits": self._counter("prefix_store_hits", "Entries that were read and taken."),
            "saved_tokens": self._counter("prefix_store_saved_tokens", "Prompt tokens that they stood for."),
            "read_seconds": self._counter("prefix_store_read_seconds", "Time spent on reading entries."),
            "written": self._counter("prefix_store_written", "Entries written."),
            "skipped": self._counter(
                "prefix_store_skipped", "Entries that were damaged or could not be written."
            ),
        }
        self._stored = StoreStats()
        self._exchanged = self._counter(
            "exchanged_bytes", "Bytes of tensors handed to other processes of the model.", "content"
        )
        self._exchanged_before: Mapping[str, int] = {}
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens that were looked up.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens that were held already.")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens computed.")
        self._generation = self._counter("generation_tokens", "Tokens generated.")
        self._preemptions = self._counter("num_preemptions", "Sequences preempted for want of pages.")
        self._written = self._counter(
            "kv_tokens_written", "Tokens written to the KV cache, summed over heads."
        )
        self._success = self._counter("request_success", "Choices that ended.", "finished_reason")
        for reason in get_args(FinishReason):
            self._success.labels(model_name, reason)
        self._evicted = self._counter(
            "kv_tokens_evicted", "Tokens evicted from the KV cache, summed over heads.", "policy", "phase"
        )
        self._freed = self._counter("kv_pages_freed", "Pages that eviction gave back.", "policy", "phase")

        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_SECONDS)
        self._itl = self._histogram("inter_token_latency_seconds", "Gap between tokens.", TOKEN_SECONDS)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to end.", REQUEST_SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "Time in the queue.", REQUEST_SECONDS)
        self._prefill = self._histogram("request_prefill_time_seconds", "Time in prefill.", REQUEST_SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "Time in decode.", REQUEST_SECONDS)
        self._eviction = self._histogram(
            "kv_eviction_duration_seconds",
            "Scoring, selection and compaction of one eviction.",
            EVICTION_SECONDS,
            "policy",
            "phase",
        )
        self._kept = self._histogram(
            "request_kv_kept_ratio",
            "Share of the prompt's cache kept at the end of prefill.",
            RATIOS,
            "policy",
        )
        self._answers = self._counter("api_key_requests", "Answers, by API key.", "api_key", "status")
        self._lag = self._histogram(
            "event_loop_lag_seconds", "How much later than asked the event loop went on.", LAG_SECONDS
        )
        self._head_budgets = HeadBudgets(model_name)
        self.registry.register(self._head_budgets)
        self._vllm_names = vllm_names
        if vllm_names:
            self.registry.register(
                VLLMNames(
                    num_requests_running=self._running,
                    num_requests_waiting=self._waiting,
                    kv_cache_usage_perc=self._usage,
                )
            )

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def count_answer(self, api_key: str, status: int) -> None:
        """Counts an answer to a request that came with a key."""
        self._answers.labels(self._model, api_key, str(status)).inc()

    async def watch_event_loop(self) -> None:
        """Asks the event loop every tenth of a second to go on, and notes how late it is; never returns."""
        loop, lag = asyncio.get_running_loop(), self._lag.labels(self._model)
        while True:
            due = loop.time() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            lag.observe(max(0.0, loop.time() - due))

    def watch(self, is_up: Callable[[], bool]) -> None:
        """Asks `is_up`, at every scrape, whether requests are taken."""
        self._up.labels(self._model).set_function(is_up)

    def describe(self, client: EngineClient) -> None:
        """Sets what is fixed once the engine runs: the cache's shape, and the gauges of an idle engine."""
        layout, stats = client.cache_layout, client.stats
        shape = {
            "page_size": layout.page_size,
            "num_pages": stats.num_pages,
            "kv_dtype": layout.format.name,
            "num_layers": layout.num_layers,
            "num_kv_heads": layout.num_kv_heads,
            "head_dim": layout.head_dim,
        }
        info = self._gauge("cache_config_info", "Shape of the KV cache, in labels; always 1.", *shape)
        info.labels(self._model, *shape.values()).set(1)
        if self._vllm_names:
            self._describe_as_vllm(client)
        weights = self._gauge("weights_bytes", "Memory of the model's weights.", "kind")
        for kind, size in client.weights_bytes.items():
            weights.labels(self._model, kind).set(size)
        self._observe_state(stats)

    def _describe_as_vllm(self, client: EngineClient) -> None:
        """Sets `vllm:cache_config_info`; a block of vLLM's holds tokens of all heads."""
        layout = client.cache_layout
        shape = {
            "engine": VLLMNames.ENGINE,
            "block_size": layout.page_size,
            "num_gpu_blocks": client.stats.num_pages // layout.num_tables,
            "cache_dtype": layout.format.name,
        }
        info = Gauge(
            "vllm:cache_config_info",
            "Shape of the KV cache, in labels; always 1.",
            ("model_name", *shape),
            registry=self.registry,
        )
        info.labels(self._model, *shape.values()).set(1)

    def observe(self, step: StepStats) -> None:
        """Takes in one step."""
        self._observe_state(step)
        self._prompt.labels(self._model).inc(step.prompt_tokens)
        self._prefix_queries.labels(self._model).inc(step.prefix_queries)
        self._prefix_hits.labels(self._model).inc(step.prefix_hits)
        self._generation.labels(self._model).inc(step.generation_tokens)
        self._preemptions.labels(self._model).inc(step.preemptions)
        self._written.labels(self._model).inc(step.kv_tokens_written)
        for eviction in step.evictions:
            self._observe_eviction(eviction)
        for request in step.finished:
            self._observe_request(request)

    def _observe_state(self, step: StepStats) -> None:
        self._running.labels(self._model).set(step.running)
        self._waiting.labels(self._model).set(step.waiting)
        self._usage.labels(self._model).set(step.used_pages / max(step.num_pages, 1))
        self._used.labels(self._model).set(step.used_bytes)
        self._capacity.labels(self._model).set(step.capacity_bytes)
        self._stranded.labels(self._model).set(step.stranded_slots_ratio)
        self._prefix_bytes.labels(self._model).set(step.prefix_bytes)
        self._prefix_saved.labels(self._model).set(step.prefix_saved_bytes)
        self._sessions.labels(self._model).set(step.sessions)
        self._session_bytes.labels(self._model).set(step.session_bytes)
        self._observe_store(step.store)
        for content, size in step.exchanged.items():
            before = self._exchanged_before.get(content, 0)
            self._exchanged.labels(self._model, content).inc(max(0, size - before))
        self._exchanged_before = step.exchanged
        self._observe_held(step.sequences)

    def _observe_store(self, store: StoreStats) -> None:
        """Takes in what the prefix store has done since the start."""
        self._store_bytes.labels(self._model).set(store.bytes)
        for name, counter in self._store.items():
            counter.labels(self._model).inc(max(0, getattr(store, name) - getattr(self._stored, name)))
        self._stored = store

    def _observe_held(self, sequences: Sequence[SequenceStats]) -> None:
        """Sums up what each policy's sequences hold; a policy seen before falls back to 0."""
        for policy in self._policies.union(sequence.policy for sequence in sequences):
            held = sum(sequence.held_bytes for sequence in sequences if sequence.policy == policy)
            self._held.labels(self._model, policy).set(held)
            self._policies.add(policy)

    def _observe_eviction(self, eviction: EvictionStats) -> None:
        labels = (self._model, eviction.policy, eviction.phase)
        self._evicted.labels(*labels).inc(eviction.tokens_evicted)
        self._freed.labels(*labels).inc(eviction.pages_freed)
        self._eviction.labels(*labels).observe(eviction.seconds)
        self._head_budgets.observe(eviction.policy, eviction.head_budgets)

    def _observe_request(self, request: RequestStats) -> None:
        self._success.labels(self._model, request.finish_reason).inc()
        self._e2e.labels(self._model).observe(request.e2e_seconds)
        self._queue.labels(self._model).observe(request.queue_seconds)
        if request.ttft_seconds is not None:
            self._ttft.labels(self._model).observe(request.ttft_seconds)
            self._prefill.labels(self._model).observe(request.prefill_seconds)
            self._decode.labels(self._model).observe(request.decode_seconds)
        itl = self._itl.labels(self._model)
        for gap in request.itl_seconds:
            itl.observe(gap)
        if request.kv is not None and request.ttft_seconds is not None:
            self._kept.labels(self._model, request.kv.policy).observe(request.kv.kept_ratio)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, text, ("model_name", *labels), registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(
            PREFIX + name, text, ("model_name", *labels), buckets=buckets, registry=self.registry
        )


class VLLMNames(Collector):
    """Gauges of this server under vLLM's names and labels, for routers and dashboards made for vLLM.

    Args:
        **gauges: the gauge behind each name, which is given without its prefix.
    """

    ENGINE = "0"

    def __init__(self, **gauges: Gauge):
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        """Yields each gauge as it is now."""
        for name, gauge in self._gauges.items():
            [source] = gauge.collect()
            family = GaugeMetricFamily(f"vllm:{name}", source.documentation, labels=("model_name", "engine"))
            for sample in source.samples:
                family.add_metric((sample.labels["model_name"], self.ENGINE), sample.value)
            yield family


class HeadBudgets(Collector):
    """Histogram of the tokens that each head kept in each eviction, counted for all heads at once."""

    def __init__(self, model_name: str):
        self._model = model_name
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, policy: str, kept: NDArray[Any]) -> None:
        """Adds one eviction's kept tokens per head, an integer array of any shape."""
        buckets = np.searchsorted(HEAD_TOKENS, kept.ravel())
        counts = np.bincount(buckets, minlength=len(HEAD_TOKENS) + 1)
        self._counts[policy] = self._counts.get(policy, np.zeros_like(counts)) + counts
        self._sums[policy] = self._sums.get(policy, 0.0) + float(kept.sum())

    def collect(self) -> Iterator[Metric]:
        """Yields the histogram of every policy seen."""
        family = HistogramMetricFamily(
            PREFIX + "kv_head_budget_tokens",
            "Tokens that a KV head kept in an eviction.",
            labels=("model_name", "policy"),
        )
        for policy, counts in list(self._counts.items()):
            family.add_metric((self._model, policy), self._cumulative(counts), self._sums[policy])
        yield family

    @staticmethod
    def _cumulative(counts: NDArray[np.int64]) -> list[tuple[str, float]]:
        bounds: Iterable[str] = (*(str(float(b)) for b in HEAD_TOKENS), "+Inf")
        return list(zip(bounds, np.cumsum(counts).astype(float), strict=True))
