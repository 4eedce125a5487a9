"""Grouped products against the reference: the CPU kernel, and the forms that XLA compiles."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas import cpu_grouped_matmul, reference
from jaxserve.kernels_pallas.grouped_matmul import grouped_matmul
from jaxserve.kernels_pallas.matmul import from_rows, has_numba, to_rows
from jaxserve.kernels_pallas.metadata import Backend

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not has_numba(),
    reason="XLA calls this kernel on CPUs only, and numba makes it",
)
BACKENDS = [pytest.param("cpu", marks=on_cpu), "xla"]
NUM_ROWS = 53
SIZES = {
    "ragged": [3, 0, 41, 1, 8],
    "one row": [0, 0, 1, 0, 0],
    "one group has all": [0, 53, 0, 0, 0],
    "rows of no group": [0, 5, 0, 2, 7],
    "no group has any": [0, 0, 0, 0, 0],
}


def arguments(
    sizes: list[int], num_inputs: int, num_outputs: int, dtype: str = "float32"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((NUM_ROWS, num_inputs)), dtype)
    weight = jnp.asarray(rng.standard_normal((len(sizes), num_inputs, num_outputs)), dtype)
    return x, weight, jnp.asarray(sizes, jnp.int32)


run = jax.jit(grouped_matmul, static_argnums=3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SIZES)
def test_matches_the_reference(case: str, backend: Backend) -> None:
    x, weight, sizes = arguments(SIZES[case], 48, 38)
    out = run(x, weight, sizes, backend)
    np.testing.assert_allclose(out, reference.grouped_matmul(*map(np.asarray, (x, weight, sizes))), atol=1e-4)
    assert not out[sum(SIZES[case]) :].any()


@pytest.mark.parametrize(("dtype", "num_inputs"), [("bfloat16", 48), ("float32", 20)])
def test_what_the_cpu_kernel_does_not_take_is_computed_all_the_same(dtype: str, num_inputs: int) -> None:
    x, weight, sizes = arguments(SIZES["ragged"], num_inputs, 24, dtype)
    out = run(x, weight, sizes, "cpu")
    assert out.dtype == jnp.dtype(dtype)
    want = reference.grouped_matmul(*map(np.asarray, (x, weight, sizes)))
    np.testing.assert_allclose(np.float32(out), np.float32(want), rtol=2e-2, atol=1e-4)


@on_cpu
def test_a_row_is_the_same_to_the_bit_in_any_company() -> None:
    x, weight, sizes = arguments(SIZES["ragged"], 64, 50)
    multiply = jax.jit(cpu_grouped_matmul.multiply)
    together = multiply(x, to_rows(weight, 1, 1), sizes)
    for group, row in ((0, 0), (0, 2), (2, 3), (2, 43), (3, 44), (4, 52)):
        alone = multiply(x[row : row + 1], to_rows(weight, 1, 1), (jnp.arange(5) == group).astype(jnp.int32))
        np.testing.assert_array_equal(alone[0], together[row])


@on_cpu
def test_stored_rows_are_read_as_they_are() -> None:
    """No transposed copy of all weights, which takes longer than the product."""
    x, weight, sizes = arguments(SIZES["ragged"], 64, 192)
    rows = to_rows(weight, 1, 1)
    multiply = jax.jit(lambda x, rows, sizes: grouped_matmul(x, from_rows(rows, 1, 1), sizes, "cpu"))
    analysis = multiply.lower(x, rows, sizes).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < rows.nbytes


def test_lowers_for_tpu() -> None:
    """As the ragged product that XLA has there.  On others it would multiply each row with every weight."""
    shapes = jax.eval_shape(lambda: arguments(SIZES["ragged"], 64, 192, "bfloat16"))
    traced = jax.jit(partial(grouped_matmul, backend="xla")).trace(*shapes)
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "tpu")}
    assert "ragged_dot" in texts["tpu"]
    assert "ragged_dot" not in texts["cuda"]
