"""What /metrics shows: vLLM's names under a prefix, so that existing dashboards need one change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from jaxserve.async_llm import AsyncLLM
from jaxserve.outputs import RequestOutput

# The counter that must stay at zero; its name is fixed, whatever the prefix.
COMPILES_AFTER_READY = "jaxserve_compiles_after_ready"

# Upper bounds in seconds, from one decode step of a small model to a very long answer.
_FIRST_TOKEN_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_BETWEEN_TOKENS_BUCKETS = (
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
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
)
_LATENCY_BUCKETS = (
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
)
_TOKENS_BUCKETS = (
    1,
    2,
    5,
    10,
    20,
    50,
    100,
    200,
    500,
    1000,
    2000,
    5000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
)


class ServerMetrics:
    """The counters and histograms of one server, in a registry of their own."""

    def __init__(self, prefix: str, model_name: str, llm: AsyncLLM) -> None:
        """`prefix` goes in front of every name, e.g. "jaxserve:"."""
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.registry.register(_EngineCollector(prefix, self._labels, llm))

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            metric = Histogram(prefix + name, what, ["model_name"], registry=self.registry, buckets=buckets)
            return metric.labels(**self._labels)

        def counter(name: str, what: str) -> Counter:
            return Counter(prefix + name, what, ["model_name"], registry=self.registry).labels(**self._labels)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts answered.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._success = Counter(
            prefix + "request_success",
            "Answers that ended, by finish_reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._http_requests = Counter(
            "http_requests",
            "HTTP requests answered.",
            ["method", "handler", "status"],
            registry=self.registry,
        )
        self.first_token = histogram(
            "time_to_first_token_seconds",
            "Arrival to first token, of streamed answers.",
            _FIRST_TOKEN_BUCKETS,
        )
        self.between_tokens = histogram(
            "inter_token_latency_seconds",
            "Time between tokens, of streamed answers.",
            _BETWEEN_TOKENS_BUCKETS,
        )
        self.latency = histogram(
            "e2e_request_latency_seconds", "Arrival to the end of the answer.", _LATENCY_BUCKETS
        )
        self.prompt_length = histogram(
            "request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS_BUCKETS
        )
        self.answer_length = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS_BUCKETS)

    def count_http(self, method: str, handler: str, status: int) -> None:
        """Count an HTTP answer; `handler` is the route, not the path, so that the series stay few."""
        self._http_requests.labels(method, handler, str(status)).inc()

    def count_answer(self, num_tokens: int, finish_reason: str) -> None:
        """Count one of the n answers to a prompt at its end."""
        self._success.labels(**self._labels, finished_reason=finish_reason).inc()
        self.answer_length.observe(num_tokens)

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class RequestMeter:
    """Watches the outputs of one prompt go by, and books them."""

    def __init__(self, metrics: ServerMetrics, num_prompt_tokens: int, *, is_streamed: bool) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._is_streamed = is_streamed
        self._arrived_at = time.monotonic()
        self._num_tokens: dict[int, int] = {}  # by index of the answer
        self._last_at: dict[int, float] = {}

    def see(self, output: RequestOutput) -> None:
        """Book one output: new tokens (of a stream), or the whole answer."""
        now = time.monotonic()
        metrics = self._metrics
        if not self._num_tokens:
            metrics.prompt_tokens.inc(self._num_prompt_tokens)
            metrics.prompt_length.observe(self._num_prompt_tokens)
            if self._is_streamed:
                metrics.first_token.observe(now - self._arrived_at)
        for answer in output.outputs:
            num_new = len(answer.token_ids)
            num_before = self._num_tokens.get(answer.index, 0)
            self._num_tokens[answer.index] = num_before + num_new
            metrics.generation_tokens.inc(num_new)
            if self._is_streamed and num_before and num_new:
                pause = (now - self._last_at[answer.index]) / num_new
                for _ in range(num_new):
                    metrics.between_tokens.observe(pause)
            self._last_at[answer.index] = now
            if answer.finish_reason is not None:
                metrics.count_answer(num_before + num_new, answer.finish_reason)
        if output.finished:
            metrics.latency.observe(now - self._arrived_at)


class _EngineCollector(Collector):
    """Asks the engine for its own counters whenever somebody looks."""

    def __init__(self, prefix: str, labels: dict[str, str], llm: AsyncLLM) -> None:
        self._prefix = prefix
        self._names = list(labels)
        self._values = list(labels.values())
        self._llm = llm

    def collect(self) -> Iterator[Metric]:
        stats = self._llm.stats()
        used = 1 - stats.num_free_pages / stats.num_pages if stats.num_pages else 0.0
        yield self._gauge("num_requests_running", "Sequences that the engine works on.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences that wait for the engine.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of KV pages in use; 1 is all.", used)
        yield self._gauge("asyncio_tasks", "Tasks on the server's event loop.", len(asyncio.all_tasks()))
        for name, what, value in (
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_cache_queries,
            ),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hits),
            ("num_preemptions", "Sequences put back to wait for pages.", stats.num_preemptions),
            ("engine_steps", "Steps that the engine has made.", stats.num_steps),
            (
                "compiles_after_ready",
                "Shapes compiled after start; each one is a stall.",
                stats.compiles_after_ready,
            ),
        ):
            yield self._counter(self._prefix + name, what, value)
        yield self._counter(COMPILES_AFTER_READY, "Shapes compiled after start.", stats.compiles_after_ready)

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, what, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(name, what, labels=self._names)
        family.add_metric(self._values, value)
        return family
