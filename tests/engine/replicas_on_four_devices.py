"""`python -m tests.engine.replicas_on_four_devices DST`: two engines of two devices each, from a converted model.

One of the programs that the first engine compiles cannot be loaded for the second.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.config import EngineConfig
from jaxserve.engine import building, compile_cache
from jaxserve.engine.balanced_client import BalancedClient
from jaxserve.engine.compile_cache import CompileCache
from jaxserve.engine.protocol import EngineClient
from jaxserve.engine.replicas import build_replicas
from jaxserve.engine.stored_program import from_bytes
from jaxserve.loading.resolve import open_checkpoint
from jaxserve.loading.weights import load_model
from tests.engine.tiny_engine import Collector, request
from tests.loading.restore_on_eight_devices import Watched
from tests.models.golden import run_sequence

PROMPTS = [[5, 17, 3, 9, 42], [7, 7, 7, 7, 7], [1, 2, 3, 4, 5], [60, 2, 33, 4, 0]]
NUM_TOKENS = 8


class CountingCache(CompileCache):
    """Counts how often each program is compiled."""

    def __init__(self, counts: Counter[str], *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]  # as they come
        self._counts = counts

    def compile(
        self, name: str, lower: Callable[[], jax.stages.Lowered], rows: int = 0
    ) -> jax.stages.Compiled:
        self._counts[name] += 1
        return super().compile(name, lower, rows)


def build(config: EngineConfig, checkpoint: Watched) -> tuple[EngineClient, Counter[str]]:
    """The engines, and how often each program was compiled for them."""
    counts: Counter[str] = Counter()
    is_refused = iter([True])

    def load(stored: bytes, devices: Sequence[Any]) -> jax.stages.Compiled:
        if next(is_refused, False):
            raise jax.errors.JaxRuntimeError("not on these devices")
        return from_bytes(stored, devices)

    with (
        mock.patch.object(building, "CompileCache", partial(CountingCache, counts)),
        mock.patch.object(compile_cache, "from_bytes", load),
    ):
        return build_replicas(config, checkpoint, checkpoint.config), counts


def main() -> None:
    (converted,) = sys.argv[1:]
    config = EngineConfig(
        converted,
        dtype="float32",
        page_size=8,
        max_model_len=32,
        max_num_seqs=1,
        max_num_batched_tokens=8,
        kv_cache_memory=1 << 20,
        compile_cache_dir="",
        data_parallel_size=2,
        tensor_parallel_size=2,
    )
    checkpoint = Watched(open_checkpoint(converted).path)
    client, counts = build(config, checkpoint)
    num_reads = max(checkpoint.num_reads.values())
    assert isinstance(client, BalancedClient)
    collector = Collector()
    client.start(collector.on_outputs, collector.on_dead)
    try:
        asked = [request(f"r{i}", PROMPTS[i % 4], max_tokens=NUM_TOKENS) for i in range(8)]
        client.submit(asked)
        collector.wait(*(one.request_id for one in asked))
        assert collector.error is None
        answers = [collector.tokens(one.request_id) for one in asked]
    finally:
        client.shutdown()
    model = nnx.merge(*load_model(checkpoint, jnp.dtype("float32"), progress=False))
    for prompt, tokens in zip(PROMPTS * 2, answers, strict=True):
        everything = np.array(prompt + tokens, np.int32)
        logits = run_sequence(model, everything, [len(everything)], jnp.dtype("float32"))
        wanted = np.asarray(logits).argmax(-1)[len(prompt) - 1 : -1].tolist()
        assert tokens == wanted, (prompt, tokens, wanted)
    num_free = client.stats().num_free_pages, client.stats().num_pages
    found = {"num_reads": num_reads, "num_compiles": sorted(counts.values()), "free": num_free}
    print(json.dumps(found | {"device": client.info.device}))


if __name__ == "__main__":
    main()
