"""The residual stream: what a layer's parts add to it, and the normalised rows that the next part reads.

The one door for models.  On GPUs, with few rows, the addition, the norm and the sum of a split product are one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.heads import rms_norm
from jaxserve.kernels_pallas.matmul import contract
from jaxserve.kernels_pallas.metadata import Backend

# From here on a product's time is its own, and cuBLAS adds the residual on its way out: nothing is left to fuse, and
# two sums less are read and written.  Compiled for H100 with the options for such programs, jax 0.11.2, 2026-11-23: 268
# MB for product and norm of 8192 x 4096, the kernel included 335 MB.
_MANY_ROWS = 512
_TILE = (64, 128)  # rows and columns of a product's tile that a multiprocessor computes
_TILES_WANTED = 264  # two for each of an H100's multiprocessors
_MIN_INPUTS = 256  # that a part sums over


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedRow:
    """A vector that is a row of a stack: a kernel finds it there, where a slice would be copied before every launch."""

    stack: jax.Array  # [L, D]
    row: jax.Array  # [1] int32

    def __getitem__(self, key: Any) -> jax.Array:
        return self.stack[self.row[0]][key]


def add_norm(
    x: jax.Array, parts: jax.Array, scale: jax.Array | StackedRow, eps: float, backend: Backend
) -> tuple[jax.Array, jax.Array]:
    """x [T, D] plus the sum of parts [C, T, D] (from `contract_parts`), and that with RMS norm; both in x's dtype."""
    if backend == "gpu" and x.shape[0] < _MANY_ROWS:
        from jaxserve.kernels_pallas import gpu_norm

        if not isinstance(scale, StackedRow):
            scale = StackedRow(scale[None], jnp.zeros(1, jnp.int32))
        return gpu_norm.add_norm(x, parts, scale.stack, scale.row, eps=eps)
    scale = scale[...]
    total = x + (parts[0] if len(parts) == 1 else jnp.sum(parts, axis=0, dtype=jnp.float32).astype(x.dtype))
    return total, rms_norm(total, scale, eps)


def contract_parts(x: jax.Array, weight: jax.Array, num_axes: int, backend: Backend) -> jax.Array:
    """matmul.contract of x [T, ...] with weight [..., D] as [C, T, D], the product being the sum of the C parts.

    C is 1, and the part in x's dtype, unless a GPU needs the parts to be busy: then they are float32, unrounded.
    """
    num_inputs, num_outputs = prod(weight.shape[:num_axes]), weight.shape[-1]
    num_parts = split_of(x.shape[0], num_inputs, num_outputs) if backend == "gpu" else 1
    if num_parts == 1 or x.dtype == jnp.float32:
        return contract(x, weight, num_axes, backend=backend)[None]
    return jax.lax.dot_general(
        x.reshape(x.shape[0], num_parts, -1),
        weight.reshape(num_parts, -1, num_outputs),
        (((2,), (1,)), ((1,), (0,))),
        preferred_element_type=jnp.float32,
    )


def contract_share(x: jax.Array, weight: jax.Array, num_axes: int, backend: Backend) -> jax.Array:
    """matmul.contract of x [T, ...] with weight [..., D]: [T, D], rounded, for devices to add up."""
    if backend != "gpu" or x.shape[0] != 1 or x.dtype == jnp.float32:
        return contract(x, weight, num_axes, backend=backend)
    # As two equal rows and in parts: what XLA takes for one row of 2048 times [2048, 4096] lasts 16.3 us, the three
    # kernels of this 10.0 (2 x H100, jax 0.11.2, 2026-11-26).
    parts = contract_parts(jnp.concatenate([x, x]), weight, num_axes, backend)
    return jnp.sum(parts, axis=0, dtype=jnp.float32)[:1].astype(x.dtype)


def split_of(num_tokens: int, num_inputs: int, num_outputs: int) -> int:
    """Parts into which a product is cut on a GPU, so that few tokens keep all multiprocessors busy.

    What XLA's own rewrite of such products does (jax 0.11.2, compiled for H100), whose sum is a kernel of its own.
    """
    tiles = -(-num_tokens // _TILE[0]) * -(-num_outputs // _TILE[1])
    split = 1
    # For a batch of vectors XLA would make a transposed copy of the weight.
    if num_tokens == 1 or num_tokens >= _MANY_ROWS:
        return split
    while 2 * split * tiles <= _TILES_WANTED and num_inputs % (2 * split * _MIN_INPUTS) == 0:
        split *= 2
    return split
