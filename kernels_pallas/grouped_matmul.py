"""Products of rows that are sorted into groups, each group with a weight of its own."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kernels_pallas.matmul import precision_of, to_rows
from jaxserve.kernels_pallas.metadata import Backend

_MOST_BLOCK_ROWS = 128  # rows that share one reading of a weight
_LEAST_BLOCK_ROWS = 8

_RAGGED = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def grouped_matmul(x: jax.Array, weight: jax.Array, sizes: jax.Array, backend: Backend) -> jax.Array:
    """x [M, K] times weight [E, K, N]: [M, N].

    The first sizes[0] rows of x are multiplied with weight[0], the next sizes[1] with weight[1], and so on; rows that
    are left over give zeros.  Only weights of groups that have rows are read.  sizes is [E] int32.  Where the backend
    is "cpu", the weight had better come from `from_rows`, or it is transposed at every call.
    """
    if backend == "cpu":
        from jaxserve.kernels_pallas import cpu_grouped_matmul

        rows = to_rows(weight, 1, 1)
        if cpu_grouped_matmul.suits(x):
            return cpu_grouped_matmul.multiply(x, rows, sizes)
        return _by_blocks(x, rows, sizes, contracted=1)
    return lax.platform_dependent(
        x, weight, sizes, tpu=_ragged_dot, default=partial(_by_blocks, contracted=0)
    )


def _ragged_dot(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """For TPUs.  On others XLA multiplies every row with every weight."""
    out = lax.ragged_dot_general(x, weight, sizes, _RAGGED, precision=precision_of(x.dtype))
    return _zeros_behind(out, sizes)


def _by_blocks(x: jax.Array, weight: jax.Array, sizes: jax.Array, *, contracted: int) -> jax.Array:
    """One block of rows of one group after the other; `contracted` is the axis of weight[e].

    A block is always whole.  Its rows past the end of the group are wrong, and are overwritten by the next block, which
    begins there.
    """
    num_rows = x.shape[0]
    block = _block_rows(num_rows, weight.shape[0])
    num_outputs = weight.shape[2 - contracted]
    starts = jnp.cumsum(sizes) - sizes
    num_blocks = -(-sizes // block)
    ends = jnp.cumsum(num_blocks)
    x = jnp.pad(x, ((0, block), (0, 0)))

    def body(index: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.sum(ends <= index)
        start = starts[group] + (index - ends[group] + num_blocks[group]) * block
        product = lax.dot_general(
            lax.dynamic_slice_in_dim(x, start, block),
            lax.dynamic_index_in_dim(weight, group, keepdims=False),
            (((1,), (contracted,)), ((), ())),
            precision=precision_of(x.dtype),
        )
        return lax.dynamic_update_slice_in_dim(out, product, start, axis=0)

    out = jnp.zeros((num_rows + block, num_outputs), x.dtype)
    return _zeros_behind(lax.fori_loop(0, ends[-1], body, out)[:num_rows], sizes)


def _block_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a block: about twice as many as a group has on average, a power of two."""
    wanted = 1 << max(2 * num_rows // num_groups - 1, 0).bit_length()
    return min(max(wanted, _LEAST_BLOCK_ROWS), _MOST_BLOCK_ROWS, 1 << (num_rows - 1).bit_length())


def _zeros_behind(out: jax.Array, sizes: jax.Array) -> jax.Array:
    """`out` with zeros in rows that belong to no group."""
    return jnp.where(jnp.arange(out.shape[0])[:, None] < jnp.sum(sizes), out, jnp.zeros((), out.dtype))
