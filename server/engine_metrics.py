"""The engine's own counters, asked for whenever /metrics is read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from jaxserve.async_llm import AsyncLLM

# The counter that must stay at zero.  Its name is ours whatever the prefix: vLLM has no such counter.
COMPILES_AFTER_READY = "jaxserve_compiles_after_ready"


class EngineCollector(Collector):
    """EngineStats as Prometheus' metrics."""

    def __init__(self, prefix: str, labels: Mapping[str, str], llm: AsyncLLM) -> None:
        self._prefix = prefix
        self._labels = dict(labels)
        self._llm = llm

    def collect(self) -> Iterator[Metric]:
        """A fresh snapshot."""
        stats, info, prefix = self._llm.stats(), self._llm.info, self._prefix
        used = 1 - stats.num_free_pages / stats.num_pages if stats.num_pages else 0.0
        for name, what, value in (
            ("num_requests_running", "Sequences that the engine works on.", stats.num_running),
            ("num_requests_waiting", "Sequences that wait for the engine.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of KV pages in use; 1 is all.", used),
            ("asyncio_tasks", "Tasks on the server's event loop.", len(asyncio.all_tasks())),
        ):
            yield self._put(GaugeMetricFamily(prefix + name, what, labels=list(self._labels)), value)
        for name, what, value in (
            (
                prefix + "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_cache_queries,
            ),
            (
                prefix + "prefix_cache_hits",
                "Prompt tokens found in the prefix cache.",
                stats.prefix_cache_hits,
            ),
            (prefix + "mm_cache_queries", "Images in prompts.", stats.mm_cache_queries),
            (prefix + "mm_cache_hits", "Images that need not be encoded again.", stats.mm_cache_hits),
            (
                prefix + "num_preemptions",
                "Sequences put back to wait for pages.",
                stats.num_preemptions,
            ),
            (prefix + "engine_steps", "Steps that the engine has made.", stats.num_steps),
            (
                COMPILES_AFTER_READY,
                "Shapes compiled after start; each one is a stall.",
                stats.compiles_after_ready,
            ),
        ):
            yield self._put(CounterMetricFamily(name, what, labels=list(self._labels)), value)
        # vLLM's names for what a page is: dashboards multiply them.
        pages = {**self._labels, "block_size": str(info.page_size), "num_gpu_blocks": str(info.num_pages)}
        family = GaugeMetricFamily(
            prefix + "cache_config_info", "How the KV cache is cut.", labels=list(pages)
        )
        family.add_metric(list(pages.values()), 1)
        yield family

    def _put(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric(list(self._labels.values()), value)
        return family
