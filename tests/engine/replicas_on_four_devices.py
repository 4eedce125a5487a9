"""`python -m tests.engine.replicas_on_four_devices DST`: two engines of two devices each, from a converted model."""

from __future__ import annotations

import json
import sys

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.config import EngineConfig
from jaxserve.engine.balanced_client import BalancedClient
from jaxserve.engine.replicas import build_replicas
from jaxserve.loading.resolve import open_checkpoint
from jaxserve.loading.weights import load_model
from tests.engine.tiny_engine import Collector, request
from tests.loading.restore_on_eight_devices import Watched
from tests.models.golden import run_sequence

PROMPTS = [[5, 17, 3, 9, 42], [7, 7, 7, 7, 7], [1, 2, 3, 4, 5], [60, 2, 33, 4, 0]]
NUM_TOKENS = 8


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
    client = build_replicas(config, checkpoint, checkpoint.config)
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
    print(json.dumps({"num_reads": num_reads, "free": num_free, "device": client.info.device}))


if __name__ == "__main__":
    main()
