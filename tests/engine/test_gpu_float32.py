"""Whoever asks a GPU for float32 gets it: log-probabilities of a dense pass, alone and in company."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import jax
import pytest

from jaxserve.engine.client import InProcessClient, build_client
from jaxserve.engine.protocol import CoreRequest
from tests.engine.tiny_engine import TINY, Collector, DenseModel, request, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]

# Attention by our kernels, which take no head_dim of 8.
MODEL = replace(TINY, num_heads=8, num_kv_heads=2, head_dim=64, hidden_size=128)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[InProcessClient, Collector]]:
    config = tiny_config(str(tmp_path_factory.mktemp("xla")))
    client, collector = build_client(config, None, MODEL), Collector()
    client.start(collector.on_outputs, collector.on_dead)
    yield client, collector
    client.shutdown()


def test_logprobs_are_those_of_a_dense_pass_in_any_company(
    running: tuple[InProcessClient, Collector],
) -> None:
    client, collector = running
    dense = DenseModel(seed=3, config=MODEL)
    draw = random.Random(1)
    requests = [
        request(f"f{i}", [draw.randrange(100) for _ in range(length)], logprobs=1, max_tokens=20)
        for i, length in enumerate((1, 3, 8, 17, 40, 70, 100))
    ]
    together = run(client, collector, requests)
    for one in requests:
        tokens, logprobs = together[one.request_id]
        assert client.reset_prefix_cache()
        again, alone = run(client, collector, [one])[one.request_id]
        assert again == tokens
        assert alone == pytest.approx(logprobs, abs=1e-5)
        start = len(one.prompt_token_ids) - 1
        rows = dense.log_probs([*one.prompt_token_ids, *tokens])[start:-1]
        wanted = [row[token] for row, token in zip(rows, tokens, strict=True)]
        assert logprobs == pytest.approx(wanted, abs=1e-4)


def run(
    client: InProcessClient, collector: Collector, requests: list[CoreRequest]
) -> dict[str, tuple[list[int], list[float]]]:
    """Each request's tokens and their log-probabilities."""
    collector.outputs.clear()
    client.submit(requests)
    collector.wait(*(one.request_id for one in requests))
    assert collector.error is None
    answers = {}
    for one in requests:
        outputs = collector.outputs[one.request_id]
        scores = [score.logprob for output in outputs for score in output.logprobs or []]
        answers[one.request_id] = collector.tokens(one.request_id), scores
    return answers
