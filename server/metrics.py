"""What /metrics shows: vLLM's names under a prefix, so that existing dashboards need one change."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from jaxserve.async_llm import AsyncLLM
from jaxserve.observer import AnswerTimes
from jaxserve.outputs import FINISH_ABORT, FINISH_ERROR, FINISH_LENGTH, FINISH_STOP
from jaxserve.request_state import RequestState
from jaxserve.server.engine_metrics import EngineCollector
from jaxserve.server.histogram import BulkHistogram


def _bounds(text: str) -> tuple[float, ...]:
    return tuple(float(bound) for bound in text.split())


# Upper bounds in seconds, from one decode step of a small model to a very long answer.
_FIRST_TOKEN_BUCKETS = _bounds(
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
)
_BETWEEN_TOKENS_BUCKETS = _bounds(
    "0.001 0.0025 0.005 0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
)
_LATENCY_BUCKETS = _bounds(
    "0.01 0.03 0.1 0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
)
_TOKENS_BUCKETS = _bounds("1 2 5 10 20 50 100 200 500 1e3 2e3 5e3 1e4 2e4 5e4 1e5 2e5")
_ANSWERS_BUCKETS = _bounds("1 2 5 10 20 50 100")


class ServerMetrics:
    """The counters and histograms of one server, in a registry of their own.

    It observes the front end (jaxserve.observer.Observer), so that what it counts does not depend on how
    an answer is read.  Times are the engine's; each of the n answers to a prompt is one observation.
    """

    def __init__(self, prefix: str, model_name: str, llm: AsyncLLM) -> None:
        """`prefix` goes in front of every name, e.g. "jaxserve:"."""
        self.registry = CollectorRegistry()
        labels = {"model_name": model_name}
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.registry.register(EngineCollector(prefix, labels, llm))

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            metric = Histogram(prefix + name, what, ["model_name"], registry=self.registry, buckets=buckets)
            return metric.labels(**labels)

        def counter(name: str, what: str) -> Counter:
            return Counter(prefix + name, what, ["model_name"], registry=self.registry).labels(**labels)

        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts answered.")
        self._cached_tokens = counter("prompt_tokens_cached", "Those of them that the prefix cache had.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        ended = Counter(
            prefix + "request_success",
            "Answers that ended, by finish_reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._ended = {
            reason: ended.labels(**labels, finished_reason=reason)  # there from the start, so that rates work
            for reason in (FINISH_STOP, FINISH_LENGTH, FINISH_ABORT, FINISH_ERROR)
        }
        self._http_requests = Counter(
            "http_requests",
            "HTTP requests answered.",
            ["method", "handler", "status"],
            registry=self.registry,
        )
        self._first_token = histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN_BUCKETS
        )
        self._between_tokens = BulkHistogram(
            prefix + "inter_token_latency_seconds",
            "Time between tokens of an answer.",
            labels,
            _BETWEEN_TOKENS_BUCKETS,
        )
        self.registry.register(self._between_tokens)
        self._per_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean time between the tokens of an answer.",
            _BETWEEN_TOKENS_BUCKETS,
        )
        self._latency = histogram("e2e_request_latency_seconds", "Arrival to last token.", _LATENCY_BUCKETS)
        self._queue = histogram(
            "request_queue_time_seconds", "Arrival to the first step with it.", _LATENCY_BUCKETS
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "First step to first token.", _LATENCY_BUCKETS
        )
        self._decode = histogram(
            "request_decode_time_seconds", "First token to last token.", _LATENCY_BUCKETS
        )
        self._inference = histogram(
            "request_inference_time_seconds", "First step to last token.", _LATENCY_BUCKETS
        )
        self._prompt_length = histogram(
            "request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS_BUCKETS
        )
        self._answer_length = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS_BUCKETS)
        self._longest = histogram(
            "request_max_num_generation_tokens", "Tokens of a request's longest answer.", _TOKENS_BUCKETS
        )
        self._n = histogram("request_params_n", "Answers asked for.", _ANSWERS_BUCKETS)
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens asked for.", _TOKENS_BUCKETS)

    def count_http(self, method: str, handler: str, status: int) -> None:
        """Count an HTTP answer; `handler` is the route, not the path, so that the series stay few."""
        self._http_requests.labels(method, handler, str(status)).inc()

    def on_first_token(self, request: RequestState, index: int, times: AnswerTimes) -> None:
        """Book the wait for the first token and, once a request, its prompt."""
        self._first_token.observe(times.first_token - times.arrival)
        if index == 0:
            self._prompt_tokens.inc(request.num_prompt_tokens)
            self._cached_tokens.inc(request.num_cached_tokens)
            self._prompt_length.observe(request.num_prompt_tokens)
            self._n.observe(request.params.n)
            if request.params.max_tokens is not None:
                self._max_tokens.observe(request.params.max_tokens)

    def on_tokens(self, num_tokens: int, pauses: Sequence[float]) -> None:
        """Book the tokens of a step, and the times that they took."""
        self._generation_tokens.inc(num_tokens)
        self._between_tokens.observe(pauses)

    def on_end(self, request: RequestState, num_tokens: int, finish_reason: str, times: AnswerTimes) -> None:
        """Book the end of an answer; its times only if it ended by itself, as in vLLM."""
        self._ended[finish_reason].inc()
        if finish_reason not in (FINISH_STOP, FINISH_LENGTH):
            return
        self._answer_length.observe(num_tokens)
        if request.is_finished:
            answers = (request.answer(i) for i in range(request.params.n))
            self._longest.observe(max(len(answer.token_ids) for answer in answers))
        self._latency.observe(times.last_token - times.arrival)
        self._queue.observe(times.scheduled - times.arrival)
        self._prefill.observe(times.first_token - times.scheduled)
        self._decode.observe(times.last_token - times.first_token)
        self._inference.observe(times.last_token - times.scheduled)
        if num_tokens > 1:
            self._per_token.observe((times.last_token - times.first_token) / (num_tokens - 1))

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
