"""Mixtures of experts on GPUs against the reference: interpreted anywhere, compiled where there is a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas import experts, gpu_experts
from jaxserve.kernels_pallas.gpu_experts import ExpertsTuning
from tests.kernels_pallas.lowering import lower_for, triton_kernels
from tests.kernels_pallas.mixtures import CASES, NUM_EXPERTS, choices, make_mixture

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from 0.11 on
COMPILED = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
MODES = [pytest.param(True, id="interpreted"), pytest.param(False, id="compiled", marks=COMPILED)]
WIDE = jnp.dtype(jnp.float32)


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(("num_experts", "renormalize"), [(11, False), (128, True)])
def test_routes_like_plain_operations(num_experts: int, renormalize: bool, interpret: bool) -> None:
    values = np.random.default_rng(0).standard_normal((5, num_experts), np.float32)
    values[2, 3:6] = 9.0  # of equal ones the first
    logits, is_live = jnp.asarray(values), jnp.asarray(np.arange(5) != 3)
    want = experts.route(logits, is_live, 2, "xla", renormalize=renormalize)
    ids, weights = gpu_experts.route(
        logits, is_live.astype(jnp.int32), 2, renormalize=renormalize, interpret=interpret
    )
    np.testing.assert_array_equal(ids, want.ids)
    np.testing.assert_allclose(weights, want.weights, rtol=1e-5)


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize("case", CASES)
def test_plans_tiles_that_hold_every_row_once(case: str, interpret: bool) -> None:
    ids = CASES[case].reshape(-1)
    tiles = gpu_experts.plan(jnp.asarray(ids, jnp.int32), NUM_EXPERTS, 16, interpret=interpret)
    ids = np.where((ids >= 0) & (ids < NUM_EXPERTS), ids, NUM_EXPERTS)
    owners, rows = np.asarray(tiles.experts)[:-1], np.asarray(tiles.rows)[:-1]
    for expert in range(NUM_EXPERTS + 1):
        own = np.flatnonzero(ids == expert)
        padding = [own[-1]] * (-len(own) % 16) if len(own) else []
        np.testing.assert_array_equal(rows[owners == expert].reshape(-1), [*own, *padding])
    assert set(owners) <= {*ids, NUM_EXPERTS + 1}


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize("num_rows", [1500, 5000])  # counted by each program, and before
def test_plans_more_rows_than_a_program_looks_at_at_once(num_rows: int, interpret: bool) -> None:
    ids = np.random.default_rng(0).integers(-1, 41, num_rows)
    tiles = gpu_experts.plan(jnp.asarray(ids, jnp.int32), 40, 32, interpret=interpret)
    owners, rows = np.asarray(tiles.experts)[:-1], np.asarray(tiles.rows)[:-1]
    for expert in range(40):
        own = np.flatnonzero(ids == expert)
        np.testing.assert_array_equal(rows[owners == expert].reshape(-1)[: len(own)], own)


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case: str, interpret: bool) -> None:
    one = make_mixture(CASES[case], NUM_EXPERTS)
    parts = gpu_experts.mixture(*one[:5], out_dtype=WIDE, interpret=interpret)
    np.testing.assert_allclose(parts.sum(axis=0), one.expected, atol=1e-5)


@pytest.mark.parametrize("interpret", MODES)
def test_a_token_is_the_same_to_the_bit_in_any_company(interpret: bool) -> None:
    one = make_mixture(CASES["ragged"], NUM_EXPERTS)
    run = partial(gpu_experts.mixture, out_dtype=WIDE, interpret=interpret)
    alone = run(one.x[7:8], one.ids[7:8], one.weights[7:8], one.gate_up, one.down)
    np.testing.assert_array_equal(alone[:, 0], run(*one[:5])[:, 7])


@pytest.mark.parametrize("interpret", MODES)
def test_half_precision_and_large_tiles(interpret: bool) -> None:
    one = make_mixture(choices(50, 2, 3), 3, embed=64, ffn=32, dtype="bfloat16")
    tuning = ExpertsTuning(64, 16, 64, 32, num_warps=4, num_stages=3)
    parts = gpu_experts.mixture(*one[:5], out_dtype=one.x.dtype, tuning=tuning, interpret=interpret)
    assert parts.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(parts).sum(axis=0), one.expected, atol=0.05)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "per_token", "embed", "ffn"),
    [(1, 8, 2, 4096, 14336), (64, 128, 8, 2048, 768), (8192, 128, 8, 2048, 768)],
)
def test_lowers_for_cuda(num_tokens: int, num_experts: int, per_token: int, embed: int, ffn: int) -> None:
    def layer(x: jax.Array, router: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        logits = jnp.dot(x, router, preferred_element_type=jnp.float32)
        is_live = jnp.ones(num_tokens, bool)
        routing = experts.route(logits, is_live, per_token, "gpu", renormalize=True)
        return experts.mixture(x, routing, gate_up, down, "gpu")

    shapes: list[Any] = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in (
            (num_tokens, embed),
            (embed, num_experts),
            (num_experts, embed, 2 * ffn),
            (num_experts, ffn, embed),
        )
    ]
    lowered = lower_for("cuda", layer, *shapes)
    assert set(triton_kernels(lowered)) == {"route", "plan_experts", "experts_hidden", "experts_out"}
    (parts,) = jax.tree.leaves(lowered.out_info)
    assert parts.shape == (per_token, num_tokens, embed)
    assert parts.dtype == (jnp.bfloat16 if num_tokens >= 512 else jnp.float32)


@pytest.mark.parametrize(("embed", "ffn", "fit"), [(32, 48, True), (24, 48, False), (32, 40, False)])
def test_sizes_that_tiles_do_not_fit_are_left_to_plain_operations(embed: int, ffn: int, fit: bool) -> None:
    def run(*arrays: jax.Array) -> jax.Array:
        x, ids, weights, gate_up, down = arrays
        return experts.mixture(x, experts.Routing(ids, weights), gate_up, down, "gpu")

    shapes = (5, embed), (5, 2), (5, 2), (4, embed, 2 * ffn), (4, ffn, embed)
    specs = [jax.ShapeDtypeStruct(shape, "int32" if i == 1 else "float32") for i, shape in enumerate(shapes)]
    assert ("pallas_call" in str(jax.make_jaxpr(run)(*specs))) == fit


def test_tiles_grow_with_the_rows_of_an_expert() -> None:
    rows = [gpu_experts.tuning_rule(count, 128, jnp.bfloat16).tile_rows for count in (8, 1024, 2048, 65536)]
    assert rows == [16, 16, 32, 128]
