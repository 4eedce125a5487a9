"""A float16 engine with float8 pages, whose answers stay near a dense float32 pass of the same weights."""

from __future__ import annotations

import numpy as np

from tests.engine.tiny_engine import Collector, DenseModel, build_tiny, request

PROMPT = [*range(3, 43)]


def test_answers_are_near_those_of_a_dense_pass(cache_dir: str) -> None:
    dense = DenseModel(3, dtype="float16")
    client = build_tiny(
        cache_dir,
        dtype="float16",
        kv_cache_dtype="fp8_e5m2",
        max_num_seqs=1,
        max_num_batched_tokens=16,
    )
    collector = Collector()
    client.start(collector.on_outputs, collector.on_dead)
    # Chunks of a prompt, decodes, and both behind a prefix from the cache.
    for name, prompt in (("first", PROMPT), ("again", [*PROMPT[:32], 1, 2])):
        client.submit([request(name, prompt, logprobs=1, max_tokens=12)])
        collector.wait(name)
        assert collector.error is None
        tokens = collector.tokens(name)
        rows = dense.log_probs([*prompt, *tokens])[len(prompt) - 1 : -1]
        scores = [item.logprob for output in collector.outputs[name] for item in output.logprobs or []]
        errors = np.abs(scores - rows[np.arange(len(tokens)), tokens])
        assert 1e-4 < errors.max() < 2e-3  # more than float16 alone would cost, which is 5e-5
    assert client.stats().prefix_cache_hits == 32
    client.shutdown()
