"""Models with experts in the engine: the tokens of a dense pass, alone and in company, and the memory they plan for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxserve.config import EngineConfig, ExpertsConfig
from jaxserve.engine.building import weights_bytes
from jaxserve.engine.client import InProcessClient, build_client
from jaxserve.engine.settle import settle
from tests.engine.pretend_device import pretend_book
from tests.engine.tiny_engine import TINY, Collector, DenseModel, request, tiny_config
from tests.kernels_pallas.lowering import DEVICES

EXPERTS = ExpertsConfig(
    num_experts=6, num_per_token=2, intermediate_size=32, renormalize=True, layers=(True,)
)
MODEL = replace(TINY, family="qwen3_moe", qk_norm=True, num_layers=1, layer_windows=(None,), experts=EXPERTS)


@pytest.fixture(scope="module")
def engine(cache_dir: str) -> Iterator[tuple[InProcessClient, Collector]]:
    client, collector = (
        build_client(tiny_config(cache_dir, max_num_batched_tokens=16), None, MODEL),
        Collector(),
    )
    client.start(collector.on_outputs, collector.on_dead)
    yield client, collector
    client.shutdown()


def test_the_tokens_of_a_dense_pass_alone_and_in_company(engine: tuple[InProcessClient, Collector]) -> None:
    client, collector = engine
    rng, dense = random.Random(0), DenseModel(3, MODEL)
    prompts = [[rng.randrange(100) for _ in range(length)] for length in (1, 3, 17, 40, 8, 70)]
    requests = [request(f"r{i}", prompt, max_tokens=10) for i, prompt in enumerate(prompts)]
    client.submit(requests)
    collector.wait(*(one.request_id for one in requests))
    assert collector.error is None
    together = [collector.tokens(one.request_id) for one in requests]
    assert together == [dense.greedy(prompt, 10) for prompt in prompts]
    for one, tokens in zip(requests[:4], together, strict=False):
        collector.outputs.clear()
        assert client.reset_prefix_cache()
        client.submit([one])
        collector.wait(one.request_id)
        assert collector.tokens(one.request_id) == tokens
    assert client.stats().compiles_after_ready == 0


def test_plans_for_all_experts_weights_and_a_tokens_own_activations() -> None:
    sparse = replace(MODEL, intermediate_size=32)
    dense = replace(sparse, family="qwen3", experts=None)
    config = EngineConfig(model="tiny", max_num_seqs=4, kv_cache_memory=2**20)
    plans = [settle(config, model, weights_bytes(model)).memory for model in (dense, sparse)]
    assert plans[1].weights - plans[0].weights == 4 * (5 * 3 * 32 * 32 + 6 * 32)  # five more, and the router
    # Two experts' rows in place of one feed-forward's, each with its input and its output.
    assert plans[1].activations - plans[0].activations == 256 * (3 * 32 * 4 + 2 * 2 * 32 * 4)


def test_on_tpus_they_are_ragged_products() -> None:
    """Two a layer, of the weights as they are."""

    def lower(jitted: Any, *specs: Any) -> jax.stages.Lowered:
        mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=DEVICES["tpu"])
        with jax.sharding.use_abstract_mesh(mesh):
            return jitted.trace(*specs).lower(lowering_platforms=("tpu",))

    config = EngineConfig(model="tiny", max_num_seqs=4, max_num_batched_tokens=64)
    with pretend_book(config, MODEL, lower, memory=2**30, platform="tpu") as (_, book):
        program = next(program for program in book if program.name.startswith("forward_decode"))
        lines = program.lower().as_text().splitlines()
    products = [line for line in lines if "ragged_dot" in line]
    assert len(products) == 2
    assert all("tensor<6x32x" in line for line in products)
    assert not [line for line in lines if "stablehlo.transpose" in line and "tensor<6x" in line]
