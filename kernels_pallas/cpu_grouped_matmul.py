"""Grouped products on CPUs, at the speed at which the weights of groups that have rows can be read.

XLA on CPU has no product of one weight out of several: it copies that weight before it multiplies.  The tiles are those
of cpu_matmul, and so is the order in which an output is summed: a row's result does not depend on its company.
"""

# Numba itself passes an intrinsic its first argument, the typing context.
# pyright: reportCallIssue=false

from __future__ import annotations

import jax
import jax.numpy as jnp
import numba as nb
import numpy as np
from numba import carray, njit  # pyright: ignore[reportPrivateImportUsage]  # documented, not in __all__

from jaxserve.kernels_pallas import cpu_ffi
from jaxserve.kernels_pallas.cpu_ffi import FIRST_WORD, data_of, dims_of, pointer
from jaxserve.kernels_pallas.cpu_matmul import LANES, multiply_outputs

_NAME = "jaxserve_cpu_grouped_matmul"
_BLOCK_ROWS = 32  # that wait in the cache while a unit's outputs stream through
_X, _W, _SIZES, _OUT, _M, _E, _N, _K, _UNIT, _ACTIVE = range(FIRST_WORD, FIRST_WORD + 10)


@njit
def _run_unit(control, unit):
    num_groups, num_outputs, num_inputs = control[_E], control[_N], control[_K]
    row_bytes, out_bytes = 4 * num_inputs, 4 * num_outputs
    sizes = carray(pointer(control[_SIZES], nb.int32), num_groups)
    per_group = (num_outputs + control[_UNIT] - 1) // control[_UNIT]
    wanted = unit // per_group  # among the groups that have rows, or behind them
    start, group = np.int64(0), 0
    while group < num_groups:
        if sizes[group] > 0:
            if wanted == 0:
                break
            wanted -= 1
        start += sizes[group]
        group += 1
    if group == num_groups:
        # Rows of no group, a block a unit.
        start += (unit - control[_ACTIVE] * per_group) * _BLOCK_ROWS
        count = min(control[_M] - start, _BLOCK_ROWS) * num_outputs
        carray(pointer(control[_OUT] + start * out_bytes, nb.float32), count)[:] = np.float32(0)
        return
    first = unit % per_group * control[_UNIT]
    last = min(num_outputs, first + control[_UNIT])
    end = start + sizes[group]
    while start < end:
        rows = min(end - start, _BLOCK_ROWS)
        multiply_outputs(
            control[_X] + start * row_bytes,
            control[_W] + group * num_outputs * row_bytes,
            control[_OUT] + start * out_bytes,
            rows,
            num_inputs,
            first,
            last,
            out_bytes,
        )
        start += rows


@njit
def _set_up(control, arguments, results, num_threads):
    for i in range(3):
        control[_X + i] = data_of(arguments, i)
    control[_OUT] = data_of(results, 0)
    x_dims, w_dims = dims_of(arguments, 0), dims_of(arguments, 1)
    control[_M] = x_dims[0]
    control[_E], control[_N], control[_K] = w_dims[0], w_dims[1], w_dims[2]
    sizes = carray(pointer(control[_SIZES], nb.int32), w_dims[0])
    active, total = 0, np.int64(0)
    for size in sizes:
        active += size > 0
        total += size
    control[_ACTIVE] = active
    # Some units a thread, so that a slow one does not keep the others waiting; whole tiles each.
    unit = max(8, min(64, active * w_dims[1] // (8 * num_threads) // 8 * 8))
    control[_UNIT] = unit
    num_units = active * ((w_dims[1] + unit - 1) // unit)
    return num_units + (x_dims[0] - total + _BLOCK_ROWS - 1) // _BLOCK_ROWS, num_threads


_take_units = cpu_ffi.unit_taker(_run_unit)
_handle = cpu_ffi.call_handler(_set_up, _NAME)


def _task(address):
    return _take_units(address)


def _handler(frame_address):
    return _handle(frame_address)


def register() -> None:
    """Make the kernel known to XLA; compiles it in the first process."""
    cpu_ffi.register(_NAME, _task, _handler)


def suits(x: jax.Array) -> bool:
    """Whether `multiply` takes x [M, K]."""
    return x.dtype == jnp.float32 and x.shape[1] % LANES == 0


def multiply(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """grouped_matmul of x [M, K] with weight [E, N, K], float32: [M, N]."""
    register()
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), jnp.float32)
    return cpu_ffi.call(_NAME, shape, x, weight, sizes)
