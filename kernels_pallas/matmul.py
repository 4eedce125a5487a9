"""Products with weights: the one door for models, since CPUs want another way for few rows."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from math import prod

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.metadata import Backend


def contract(
    x: jax.Array,
    weight: jax.Array,
    num_axes: int = 1,
    *,
    backend: Backend,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """Contract the last `num_axes` axes of x with the first of weight: one GEMM, however many axes.

    Where the backend is "cpu", the weight had better come from `from_rows`, or it is transposed at every call.
    """
    if backend == "cpu":
        num_inputs, outputs = prod(weight.shape[:num_axes]), weight.shape[num_axes:]
        rows = to_rows(weight, num_axes).reshape(-1, num_inputs)
        y = contract_rows(x.reshape(-1, num_inputs), rows, backend=backend, out_dtype=out_dtype)
        return y.reshape(*x.shape[: x.ndim - num_axes], *outputs)
    axes = (tuple(range(x.ndim - num_axes, x.ndim)), tuple(range(num_axes)))
    return _dot(x, weight, axes, out_dtype)


def contract_rows(
    x: jax.Array, rows: jax.Array, *, backend: Backend, out_dtype: jnp.dtype | None = None
) -> jax.Array:
    """x [M, K] times rows [N, K] transposed: [M, N]."""
    if backend == "cpu" and x.dtype == jnp.float32 and out_dtype in (None, jnp.float32):
        from jaxserve.kernels_pallas import cpu_matmul

        if cpu_matmul.suits(x, rows.shape[1]):
            return cpu_matmul.multiply(x, rows)
    return _dot(x, rows, ((1,), (1,)), out_dtype)


@cache
def has_numba() -> bool:
    """Whether CPUs have kernels of their own here."""
    return find_spec("numba") is not None


def to_rows(weight: jax.Array, num_axes: int, num_kept: int = 0) -> jax.Array:
    """A weight whose first `num_axes` axes are contracted, with these moved behind the others.

    Where a weight is several, the `num_kept` axes that tell them apart stand before all, and stay there.
    """
    return jnp.transpose(weight, rows_order(weight.ndim, num_axes, num_kept))


def rows_order(ndim: int, num_axes: int, num_kept: int = 0) -> tuple[int, ...]:
    """The axes of `to_rows`' result, by their numbers in a weight of `ndim`."""
    behind = num_kept + num_axes
    return (*range(num_kept), *range(behind, ndim), *range(num_kept, behind))


def from_rows(rows: jax.Array, num_axes: int, num_kept: int = 0) -> jax.Array:
    """The reverse of `to_rows`.  XLA drops the pair of them, so that a program reads what is stored."""
    outputs = rows.ndim - num_axes
    return jnp.transpose(rows, (*range(num_kept), *range(outputs, rows.ndim), *range(num_kept, outputs)))


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Whoever asks for float32 means it: by default a GPU would multiply in tf32 and a TPU in bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _dot(
    x: jax.Array,
    weight: jax.Array,
    axes: tuple[tuple[int, ...], tuple[int, ...]],
    out_dtype: jnp.dtype | None,
) -> jax.Array:
    return jax.lax.dot_general(
        x, weight, (axes, ((), ())), precision=precision_of(x.dtype), preferred_element_type=out_dtype
    )
