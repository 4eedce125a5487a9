"""Residual addition and RMS norm as one kernel on NVIDIA GPUs, written in Pallas for Triton.

XLA needs two or three launches for the pair: it ends a kernel where the sum over a row must be known.  One program
takes one row, keeps it in registers and writes both results.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

_THREADS = 32  # of a warp
_FEW_ROWS = 128  # about an H100's multiprocessors: up to here a row's latency is what counts


@partial(jax.jit, static_argnames=("eps", "interpret"))
def add_norm(
    x: jax.Array,
    parts: jax.Array,
    scales: jax.Array,
    row: jax.Array,
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """x [T, D] plus the sum of parts [C, T, D], and that normalised and times scales[row], both in x's dtype.

    scales is [L, D], row [1] int32.  Parts are summed in float32, in order, and each step rounds to x's dtype where
    plain operations would: their sum, the sum with x, the normalised row.  residual.add_norm has the plain ones.
    """
    num_rows, size = x.shape
    width = pl.next_power_of_2(size)
    per_thread = 8 if num_rows <= _FEW_ROWS else 16  # 8 values of 16 bits are one access
    num_warps = min(max(width // (per_thread * _THREADS), 1), 16)
    return pl.pallas_call(
        partial(_kernel, size=size, width=width, eps=eps),
        grid=(num_rows,),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="add_norm",
    )(x, parts, scales, row)


def _kernel(
    x_ref: Any,
    parts_ref: Any,
    scales_ref: Any,
    scale_row_ref: Any,
    sum_ref: Any,
    normed_ref: Any,
    *,
    size: int,
    width: int,
    eps: float,
) -> None:
    row = pl.program_id(0)
    columns = jnp.arange(width, dtype=jnp.int32)
    mask = None if width == size else columns < size
    other = None if mask is None else 0.0

    def load(ref: Any) -> jax.Array:
        return pltriton.load(ref, mask=mask, other=other).astype(jnp.float32)

    dtype = sum_ref.dtype
    delta = load(parts_ref.at[0, row, columns])
    for part in range(1, parts_ref.shape[0]):
        delta += load(parts_ref.at[part, row, columns])
    total = (load(x_ref.at[row, columns]) + delta.astype(dtype).astype(jnp.float32)).astype(dtype)
    pltriton.store(sum_ref.at[row, columns], total, mask=mask)
    wide = total.astype(jnp.float32)
    mean_square = jnp.sum(wide * wide, axis=0) / size
    normed = wide * jax.lax.rsqrt(mean_square + eps) * load(scales_ref.at[scale_row_ref[0], columns])
    pltriton.store(normed_ref.at[row, columns], normed.astype(dtype), mask=mask)
