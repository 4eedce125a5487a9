"""Pages narrower than the model, and models of every dtype: what the engine answers stays near a dense float32 pass."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.tiny_engine import Collector, DenseModel, build_tiny, request

PROMPT = [*range(3, 43)]


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype", "least", "most"),
    [("float32", "fp8", 1e-5, 1e-3), ("float16", "auto", 1e-6, 5e-4)],
)
def test_answers_are_near_those_of_a_dense_pass(
    cache_dir: str, dtype: str, kv_cache_dtype: str, least: float, most: float
) -> None:
    dense = DenseModel(3, dtype=dtype)
    options = {"dtype": dtype, "kv_cache_dtype": kv_cache_dtype}
    client = build_tiny(cache_dir, **options, max_num_seqs=1, max_num_batched_tokens=16)
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
        assert least < errors.max() < most  # rounded, but no more than that
    assert collector.outputs["again"][-1].num_cached_tokens == 32 or client.stats().prefix_cache_hits
    client.shutdown()
