"""Routing as the models' reference code does it, and mixtures of experts against the reference."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.experts import Routing, mixture, route
from jaxserve.kernels_pallas.metadata import Backend
from tests.kernels_pallas.mixtures import CASES, NUM_EXPERTS, Mixture, make_mixture

BACKENDS: list[Backend] = ["xla", "cpu"]


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_likeliest_experts_are_taken(renormalize: bool) -> None:
    logits = np.random.default_rng(0).standard_normal((9, 11)).astype(np.float32)
    is_live = np.arange(9) != 4
    routing = route(jnp.asarray(logits), jnp.asarray(is_live), 3, "xla", renormalize=renormalize)
    exps = np.exp(logits.astype(np.float64))
    for token in np.flatnonzero(is_live):
        best = np.argsort(-logits[token])[:3]
        np.testing.assert_array_equal(routing.ids[token], best)
        weights = exps[token, best] / (exps[token, best].sum() if renormalize else exps[token].sum())
        np.testing.assert_allclose(routing.weights[token], weights, rtol=1e-5)
    assert (routing.ids[4] == 11).all()


@partial(jax.jit, static_argnames="backend")
def run(one: Mixture, backend: Backend) -> jax.Array:
    parts = mixture(one.x, Routing(one.ids, one.weights), one.gate_up, one.down, backend)
    return jnp.sum(parts, axis=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case: str, backend: Backend) -> None:
    one = make_mixture(CASES[case], NUM_EXPERTS)
    np.testing.assert_allclose(run(one, backend), one.expected, atol=1e-5)


def test_half_precision() -> None:
    one = make_mixture(CASES["padding"], NUM_EXPERTS, dtype="bfloat16")
    out = run(one, "xla")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), one.expected, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_is_the_same_in_any_company(backend: Backend) -> None:
    one = make_mixture(CASES["ragged"], NUM_EXPERTS)
    together = run(one, backend)
    alone = one._replace(x=one.x[7:8], ids=one.ids[7:8], weights=one.weights[7:8])
    np.testing.assert_allclose(run(alone, backend)[0], together[7], atol=2e-6)
