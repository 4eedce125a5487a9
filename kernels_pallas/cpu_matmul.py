"""Products of few rows with a weight on CPUs, at the speed at which the weight can be read.

XLA on CPU copies the whole weight into another order whenever it multiplies more than one row: a step of 8 rows took
1.5 times as long as one of 1.  Here a weight lies output by output, [N, K], and streams through once; rows
wait in the first-level cache.

Every output is summed over K in one order, whatever the number of rows: a row's result does not depend on its company.
"""

# Numba itself passes an intrinsic its first argument, the typing context.
# pyright: reportCallIssue=false

from __future__ import annotations

from math import prod

import jax
import jax.numpy as jnp
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxserve.kernels_pallas import cpu_ffi
from jaxserve.kernels_pallas.cpu_ffi import FIRST_WORD, data_of, dims_of

LANES = 16  # floats that are multiplied at once; K is a multiple
MAX_ROWS = 32  # beyond, XLA's blocked product is faster
_NAME = "jaxserve_cpu_matmul"
_X, _W, _OUT, _M, _N, _K, _UNIT = range(FIRST_WORD, FIRST_WORD + 7)
# Rows and outputs of a tile: as many sums as there are registers for.
_MANY_ROWS, _MANY_OUTPUTS = (8, 2) if binding.get_host_cpu_features().get("avx512f") else (4, 1)
_ONE_ROW_OUTPUTS = 8
# How far ahead of the products to ask for the weight, into the second-level cache: three times as fast as leaving it
# to the processor, which forgets where it was at every new row.
_BYTES_AHEAD = 32 * 1024


@intrinsic(prefer_literal=True)
def _dot_tile(_context, x, w, out, stride, count, out_stride, rows, outputs):
    """out[m, n] = x[m] . w[n] for m < rows, n < outputs (literals), over `count` vectors of LANES floats.

    x, w and out are addresses; rows of x and w lie `stride` bytes apart, those of out `out_stride`.
    """
    num_rows, num_outputs = rows.literal_value, outputs.literal_value

    def codegen(_backend, builder, _signature, arguments):
        x_at, w_at, out_at, step, num_vectors, out_step, _, _ = arguments
        word, scalar = ir.IntType(64), ir.FloatType()
        vector = ir.VectorType(scalar, LANES)

        def address(base, index, distance, offset):
            far = builder.mul(distance, ir.Constant(word, index))
            return builder.add(base, builder.add(far, offset))

        def load(at):
            return builder.load(builder.inttoptr(at, vector.as_pointer()), align=4)

        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32"
        )
        reduce = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(scalar, [scalar, vector]), f"llvm.vector.reduce.fadd.v{LANES}f32"
        )
        byte, hint = ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, hint, hint, hint]), "llvm.prefetch.p0"
        )
        before = builder.block
        body, done = builder.append_basic_block("body"), builder.append_basic_block("done")
        builder.branch(body)
        builder.position_at_end(body)
        index = builder.phi(word)
        index.add_incoming(ir.Constant(word, 0), before)
        zero = ir.Constant(vector, [0.0] * LANES)
        sums = [[builder.phi(vector) for _ in range(num_outputs)] for _ in range(num_rows)]
        offset = builder.mul(index, ir.Constant(word, 4 * LANES))
        weights = [load(address(w_at, n, step, offset)) for n in range(num_outputs)]
        for n in range(num_outputs):
            ahead = address(builder.add(w_at, ir.Constant(word, _BYTES_AHEAD)), n, step, offset)
            ahead = builder.inttoptr(ahead, byte)
            builder.call(prefetch, [ahead, *(ir.Constant(ir.IntType(32), hint) for hint in (0, 2, 1))])
        totals = []
        for m in range(num_rows):
            row = load(address(x_at, m, step, offset))
            totals.append([builder.call(fma, [row, weights[n], sums[m][n]]) for n in range(num_outputs)])
        following = builder.add(index, ir.Constant(word, 1))
        index.add_incoming(following, body)
        for m in range(num_rows):
            for n in range(num_outputs):
                sums[m][n].add_incoming(zero, before)
                sums[m][n].add_incoming(totals[m][n], body)
        builder.cbranch(builder.icmp_signed("<", following, num_vectors), body, done)
        builder.position_at_end(done)
        for m in range(num_rows):
            for n in range(num_outputs):
                total = builder.call(reduce, [ir.Constant(scalar, 0.0), totals[m][n]], fastmath=("reassoc",))
                place = address(out_at, m, out_step, ir.Constant(word, 4 * n))
                builder.store(total, builder.inttoptr(place, scalar.as_pointer()), align=4)
        return ir.Constant(word, 0)

    integer = types.int64
    return integer(integer, integer, integer, integer, integer, integer, rows, outputs), codegen


@njit
def multiply_outputs(x, w, out, num_rows, num_inputs, first, last, out_bytes):
    """out[m, n] = x[m] . w[n] for m < num_rows, first <= n < last; addresses, rows of out lie `out_bytes` apart."""
    row_bytes, count = 4 * num_inputs, num_inputs // LANES
    whole_rows = num_rows // _MANY_ROWS * _MANY_ROWS
    n = first
    while whole_rows and n + _MANY_OUTPUTS <= last:
        for m in range(0, whole_rows, _MANY_ROWS):
            place = out + m * out_bytes + 4 * n
            _dot_tile(
                x + m * row_bytes,
                w + n * row_bytes,
                place,
                row_bytes,
                count,
                out_bytes,
                _MANY_ROWS,
                _MANY_OUTPUTS,
            )
        n += _MANY_OUTPUTS
    for rest in range(n, last if whole_rows else first):
        for m in range(whole_rows):
            place = out + m * out_bytes + 4 * rest
            _dot_tile(x + m * row_bytes, w + rest * row_bytes, place, row_bytes, count, out_bytes, 1, 1)
    for m in range(whole_rows, num_rows):
        n = first
        while n + _ONE_ROW_OUTPUTS <= last:
            place = out + m * out_bytes + 4 * n
            _dot_tile(
                x + m * row_bytes, w + n * row_bytes, place, row_bytes, count, out_bytes, 1, _ONE_ROW_OUTPUTS
            )
            n += _ONE_ROW_OUTPUTS
        for rest in range(n, last):
            place = out + m * out_bytes + 4 * rest
            _dot_tile(x + m * row_bytes, w + rest * row_bytes, place, row_bytes, count, out_bytes, 1, 1)


@njit
def _run_unit(control, unit):
    first = unit * control[_UNIT]
    last = min(control[_N], first + control[_UNIT])
    multiply_outputs(
        control[_X], control[_W], control[_OUT], control[_M], control[_K], first, last, 4 * control[_N]
    )


@njit
def _set_up(control, arguments, results, num_threads):
    x_dims, w_dims = dims_of(arguments, 0), dims_of(arguments, 1)
    control[_X], control[_W], control[_OUT] = (
        data_of(arguments, 0),
        data_of(arguments, 1),
        data_of(results, 0),
    )
    control[_M], control[_N], control[_K] = x_dims[0], w_dims[0], w_dims[1]
    # Some units a thread, so that a slow one does not keep the others waiting; whole tiles each.
    unit = max(8, min(64, w_dims[0] // (8 * num_threads) // 8 * 8))
    control[_UNIT] = unit
    return (w_dims[0] + unit - 1) // unit, num_threads


_take_units = cpu_ffi.unit_taker(_run_unit)
_handle = cpu_ffi.call_handler(_set_up, _NAME)


def _task(address):
    return _take_units(address)


def _handler(frame_address):
    return _handle(frame_address)


def register() -> None:
    """Make the kernel known to XLA; compiles it in the first process."""
    cpu_ffi.register(_NAME, _task, _handler)


def suits(x: jax.Array, num_inputs: int) -> bool:
    """Whether `multiply` takes x [..., K] of this many rows and inputs."""
    return x.dtype == jnp.float32 and prod(x.shape) <= MAX_ROWS * num_inputs and num_inputs % LANES == 0


def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [M, K] times weight [N, K] transposed, float32: [M, N]."""
    register()
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return cpu_ffi.call(_NAME, shape, x, weight)
