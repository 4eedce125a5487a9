"""Products with weights: the CPU kernel for few rows, and the door for models."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas import cpu_matmul
from jaxserve.kernels_pallas.matmul import contract, contract_rows, from_rows, to_rows
from jaxserve.kernels_pallas.metadata import Backend

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA calls this kernel on CPUs only")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@on_cpu
@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 32])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 16), (37, 48), (64, 576), (1000, 32), (8, 1536)])
def test_matches_float64(num_rows: int, num_outputs: int, num_inputs: int) -> None:
    x, w = normal(num_rows, num_inputs), normal(num_outputs, num_inputs, seed=1)
    want = x.astype(np.float64) @ w.astype(np.float64).T
    out = jax.jit(cpu_matmul.multiply)(x, w)
    np.testing.assert_allclose(out, want, atol=1e-6 * num_inputs)


@on_cpu
def test_a_row_is_the_same_to_the_bit_in_any_company() -> None:
    x, w = normal(32, 576), normal(300, 576, seed=1)
    together = np.asarray(cpu_matmul.multiply(jnp.asarray(x), jnp.asarray(w)))
    for count in (1, 3, 8, 17):
        some = cpu_matmul.multiply(jnp.asarray(x[:count]), jnp.asarray(w))
        np.testing.assert_array_equal(some, together[:count])


@on_cpu
def test_what_is_not_a_number_shows() -> None:
    x, w = normal(8, 64), normal(10, 64, seed=1)
    x[3, 5], w[7, 1] = np.nan, np.inf
    out = np.asarray(cpu_matmul.multiply(jnp.asarray(x), jnp.asarray(w)))
    assert np.isnan(out[3]).all()
    assert not np.isfinite(out[:, 7]).any()
    assert np.isfinite(np.delete(np.delete(out, 3, 0), 7, 1)).all()


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=on_cpu), "xla"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 8, 33])
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [((64,), (3, 5, 8)), ((6, 16), (40,)), ((48,), (2, 10)), ((7,), (9,)), ((5, 3), (2,))],
)
def test_the_door_contracts_any_axes(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    num_rows: int,
    dtype: jnp.dtype,
    backend: Backend,
) -> None:
    x = jnp.asarray(normal(num_rows, *inputs), dtype)
    weight = jnp.asarray(normal(*inputs, *outputs, seed=1), dtype)
    size = int(np.prod(inputs))
    want = np.asarray(x, np.float64).reshape(num_rows, size) @ np.asarray(weight, np.float64).reshape(
        size, -1
    )
    out = jax.jit(partial(contract, num_axes=len(inputs), backend=backend))(x, weight)
    assert out.dtype == dtype
    assert out.shape == (num_rows, *outputs)
    tolerance = 1e-4 if dtype == jnp.float32 else 0.3
    np.testing.assert_allclose(
        np.asarray(out, np.float64).reshape(num_rows, -1), want, atol=tolerance, rtol=tolerance
    )
    rows = to_rows(weight, len(inputs))
    assert rows.shape == (*outputs, *inputs)
    np.testing.assert_array_equal(from_rows(rows, len(inputs)), weight)


def test_rows_give_wide_logits() -> None:
    x, rows = jnp.asarray(normal(4, 32), jnp.bfloat16), jnp.asarray(normal(50, 32, seed=1), jnp.bfloat16)
    out = contract_rows(x, rows, backend="cpu", out_dtype=jnp.dtype(jnp.float32))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, np.asarray(x, np.float32) @ np.asarray(rows, np.float32).T, atol=1e-4)
