"""Paged decode attention on CPUs, reading keys and values where they lie.

XLA on CPU can only gather pages into a new array, element by element, before it may multiply: on 2 cores that made
17 of the 47 ms of a forward pass (SmolLM2-135M, 8 rows, context 200).

A unit of work is a row, or a row's heads over one kv head.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numba as nb
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxserve.kernels_pallas import cpu_ffi
from jaxserve.kernels_pallas.cpu_ffi import FIRST_WORD, data_of, dims_of, pointer, prefetch
from jaxserve.kernels_pallas.metadata import AttentionMetadata

_NAME = "jaxserve_cpu_decode_attention"
_TOKENS_PER_THREAD = 64  # context tokens below which another thread is not worth waking
_LEAST = np.float32(-1e30)
# Order of operations is free, infinities and NaN are not: a NaN in the cache must not become a plausible answer.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}

_Q, _KV, _TABLE, _LENS, _NUMBERS, _WINDOW, _OUT = range(FIRST_WORD, FIRST_WORD + 7)
_ROWS, _HEADS, _KV_HEADS, _HEAD_DIM, _PAGE_SIZE, _TABLE_WIDTH, _UNIT_HEADS = range(
    FIRST_WORD + 7, FIRST_WORD + 14
)


def _vector_loop(builder, rows, stride, count, width, carry, step):
    """Emit `for i in range(count): carry = step(i, row, carry)`; row: `width` floats at address rows + i * stride."""
    word, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), width)
    before = builder.block
    head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(word)
    index.add_incoming(ir.Constant(word, 0), before)
    kept = [builder.phi(value.type) for value in carry]
    for phi, value in zip(kept, carry, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, count), body, done)
    builder.position_at_end(body)
    address = builder.add(rows, builder.mul(index, stride))
    row = builder.load(builder.inttoptr(address, vector.as_pointer()), align=4)
    for phi, value in zip(kept, step(index, row, kept), strict=True):
        phi.add_incoming(value, builder.block)
    index.add_incoming(builder.add(index, ir.Constant(word, 1)), builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return kept


def _float_at(builder, base, index):
    """Pointer to float `index` behind address `base`."""
    offset = builder.mul(index, ir.Constant(ir.IntType(64), 4))
    return builder.inttoptr(builder.add(base, offset), ir.FloatType().as_pointer())


@intrinsic(prefer_literal=True)
def _dot_rows(_context, q, rows, stride, count, scores, is_more, width):
    """scores[i] = q . rows[i] over `width` floats, for i < count; added to what is there if `is_more`.

    q, rows and scores are addresses, rows lie `stride` bytes apart, and `width` is a literal: vectors of that length
    stay in registers, so that q is read once.
    """
    size = width.literal_value

    def codegen(_backend, builder, _signature, arguments):
        q_at, rows_at, stride_of, num_rows, out_at, more, _ = arguments
        vector = ir.VectorType(ir.FloatType(), size)
        query = builder.load(builder.inttoptr(q_at, vector.as_pointer()), align=4)
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), vector])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{size}f32")

        def step(index, row, _carry):
            place = _float_at(builder, out_at, index)
            before = builder.select(more, builder.load(place, align=4), ir.Constant(ir.FloatType(), 0.0))
            total = builder.call(reduce, [before, builder.fmul(query, row)], fastmath=("reassoc",))
            builder.store(total, place, align=4)
            return []

        _vector_loop(builder, rows_at, stride_of, num_rows, size, [], step)
        return ir.Constant(ir.IntType(64), 0)

    integer = types.int64
    return integer(integer, integer, integer, integer, integer, types.boolean, width), codegen


@intrinsic(prefer_literal=True)
def _add_rows(_context, acc, rows, stride, count, weights, rescale, width):
    """acc = acc * rescale + the sum of weights[i] * rows[i] over i < count; arguments as for _dot_rows."""
    size = width.literal_value

    def codegen(_backend, builder, _signature, arguments):
        acc_at, rows_at, stride_of, num_rows, weights_at, factor, _ = arguments
        vector = ir.VectorType(ir.FloatType(), size)
        pointer = builder.inttoptr(acc_at, vector.as_pointer())
        kind = ir.FunctionType(vector, [vector, vector, vector])
        fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{size}f32")

        def spread(value):
            undefined = ir.Constant(vector, ir.Undefined)
            lane = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
            mask = ir.Constant(ir.VectorType(ir.IntType(32), size), [0] * size)
            return builder.shuffle_vector(lane, undefined, mask)

        def step(index, row, carry):
            weight = builder.load(_float_at(builder, weights_at, index), align=4)
            return [builder.call(fma, [spread(weight), row, carry[0]])]

        start = builder.fmul(builder.load(pointer, align=4), spread(factor))
        (total,) = _vector_loop(builder, rows_at, stride_of, num_rows, size, [start], step)
        builder.store(total, pointer, align=4)
        return ir.Constant(ir.IntType(64), 0)

    integer = types.int64
    signature = integer(integer, integer, integer, integer, integer, types.float32, width)
    return signature, codegen


@njit(inline="always")
def _attend_heads(control, row, first_head, num_heads, first, num_keys, width):
    """Online softmax of one row's query heads over keys first .. num_keys; `width` is a literal that divides H.

    All heads go through a page before the next one: it is read from memory once, and from end to end.
    """
    page_size, head_dim = control[_PAGE_SIZE], control[_HEAD_DIM]
    group = control[_HEADS] // control[_KV_HEADS]
    pages = carray(pointer(control[_TABLE], nb.int32), (control[_ROWS], control[_TABLE_WIDTH]))[row]
    numbers = carray(pointer(control[_NUMBERS], nb.float32), 2)
    scale, soft_cap = numbers[0], numbers[1]
    head_bytes = 4 * head_dim
    token_bytes = control[_KV_HEADS] * 2 * head_bytes
    offset = (row * control[_HEADS] + first_head) * head_bytes
    queries, outs = control[_Q] + offset, control[_OUT] + offset
    acc = carray(pointer(outs, nb.float32), (num_heads, head_dim))
    acc[:] = np.float32(0)
    largest = np.full(num_heads, _LEAST, np.float32)
    totals = np.zeros(num_heads, np.float32)
    weights = np.empty(page_size, np.float32)
    end_page = (num_keys + page_size - 1) // page_size
    for index in range(first // page_size, end_page):
        begin = max(0, first - index * page_size)
        count = min(page_size, num_keys - index * page_size) - begin
        page = control[_KV] + (pages[index] * page_size + begin) * token_bytes
        if index + 1 < end_page:  # pages lie anywhere: the processor cannot guess which comes next
            following = control[_KV] + pages[index + 1] * page_size * token_bytes
            for line in range(0, page_size * token_bytes, 64):
                prefetch(following + line)
        for head in range(num_heads):
            keys = page + (first_head + head) // group * 2 * head_bytes
            query, out = queries + head * head_bytes, outs + head * head_bytes
            for part in range(0, head_bytes, 4 * width):
                _dot_rows(query + part, keys + part, token_bytes, count, weights.ctypes.data, part > 0, width)
            peak = largest[head]
            for i in range(count):
                score = weights[i] * scale
                if soft_cap > 0:
                    score = soft_cap * math.tanh(score / soft_cap)
                weights[i] = score
                peak = max(peak, score)
            rescale = math.exp(largest[head] - peak)
            largest[head] = peak
            total = totals[head] * rescale
            for i in range(count):
                weight = math.exp(weights[i] - peak)
                weights[i] = weight
                total += weight
            totals[head] = total
            values = keys + head_bytes
            for part in range(0, head_bytes, 4 * width):
                _add_rows(out + part, values + part, token_bytes, count, weights.ctypes.data, rescale, width)
    for head in range(num_heads):
        for h in range(head_dim):
            acc[head, h] /= totals[head]


@njit(fastmath=_FAST_MATH, error_model="numpy")
def _run_unit(control, unit):
    num_heads = control[_UNIT_HEADS]
    units_of_row = control[_HEADS] // num_heads
    row, first_head = unit // units_of_row, unit % units_of_row * num_heads
    head_dim = control[_HEAD_DIM]
    num_keys = np.int64(carray(pointer(control[_LENS], nb.int32), control[_ROWS])[row])
    window = np.int64(carray(pointer(control[_WINDOW], nb.int32), 1)[0])
    first = max(0, num_keys - window) if window > 0 else 0
    if num_keys <= 0:
        offset = (row * control[_HEADS] + first_head) * head_dim * 4
        carray(pointer(control[_OUT] + offset, nb.float32), num_heads * head_dim)[:] = np.float32(0)
    elif head_dim % 64 == 0:
        _attend_heads(control, row, first_head, num_heads, first, num_keys, 64)
    elif head_dim % 16 == 0:
        _attend_heads(control, row, first_head, num_heads, first, num_keys, 16)
    else:
        _attend_heads(control, row, first_head, num_heads, first, num_keys, 1)


@njit
def _set_up(control, arguments, results, num_threads):
    for i, word in enumerate((_Q, _KV, _TABLE, _LENS, _NUMBERS, _WINDOW)):
        control[word] = data_of(arguments, i)
    control[_OUT] = data_of(results, 0)
    q_dims, kv_dims = dims_of(arguments, 0), dims_of(arguments, 1)
    num_rows, num_heads, num_kv_heads = q_dims[0], q_dims[1], kv_dims[2]
    control[_ROWS], control[_HEADS], control[_HEAD_DIM] = num_rows, num_heads, q_dims[2]
    control[_PAGE_SIZE], control[_KV_HEADS] = kv_dims[1], num_kv_heads
    control[_TABLE_WIDTH] = dims_of(arguments, 2)[1]
    lens = carray(pointer(control[_LENS], nb.int32), num_rows)
    num_tokens = np.int64(0)
    for row in range(num_rows):
        num_tokens += lens[row]
    parties = max(1, min(num_threads, num_rows * num_kv_heads, num_tokens // _TOKENS_PER_THREAD))
    # Whole rows if there are enough of them to keep the threads evenly busy.
    control[_UNIT_HEADS] = num_heads if num_rows >= 3 * parties else num_heads // num_kv_heads
    return num_rows * (num_heads // control[_UNIT_HEADS]), parties


_take_units = cpu_ffi.unit_taker(_run_unit)
_handle = cpu_ffi.call_handler(_set_up, _NAME)


def _task(address):
    return _take_units(address)


def _handler(frame_address):
    return _handle(frame_address)


def register() -> None:
    """Make the kernel known to XLA; compiles it in the first process."""
    cpu_ffi.register(_NAME, _task, _handler)


def attend_decode(
    q: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """One query a row.  q [R, N, H] and kv_pages [P, S, K, 2, H] float32; see attention.paged_attention."""
    register()
    numbers = jnp.asarray([scale, soft_cap or 0.0], jnp.float32)
    window_of = jnp.asarray([window or 0], jnp.int32)
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return cpu_ffi.call(_NAME, shape, q, kv_pages, meta.page_table, meta.kv_lens, numbers, window_of)
