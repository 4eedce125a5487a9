"""Every family gives the logits that transformers' code gives: config reader, weight table, pages and all."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.loading.weights import load_model
from tests.models.golden import NAMES, read_golden, run_sequence


@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str) -> None:
    """In chunks and single tokens: positions, windows and pages have to carry on from step to step."""
    golden = read_golden(name)
    model = nnx.merge(*load_model(golden.checkpoint, jnp.dtype("float32"), progress=False))
    logits = run_sequence(model, golden.token_ids, [19, 1, 1, 19], jnp.dtype("float32"))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_stays_near(name: str) -> None:
    golden = read_golden(name)
    model = nnx.merge(*load_model(golden.checkpoint, jnp.dtype("bfloat16"), progress=False))
    logits = run_sequence(model, golden.token_ids, [len(golden.token_ids)], jnp.dtype("bfloat16"))
    assert logits.dtype == jnp.float32
    assert np.mean(np.abs(logits - golden.logits)) < 0.03 * np.std(golden.logits)


def test_there_are_goldens_of_every_family() -> None:
    assert {read_golden(name).checkpoint.config.family for name in NAMES} == {
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
    }
