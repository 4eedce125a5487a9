"""Paged attention on CPUs, reading keys and values where they lie.

XLA on CPU can only gather pages into a new array, element by element, before it may multiply: on 2 cores that made
17 of the 47 ms of a decode step's forward pass, and 140 of the 470 ms of a prefill step of 256 tokens
(SmolLM2-135M, float32; 8 rows at context 200, one prompt of 256; jax 0.10.2, 2026-11-23).

A unit of work is a few tokens, which share a page while it is in the first-level cache, or their heads of one kv head.
"""

# Numba itself passes an intrinsic its first argument, the typing context.
# pyright: reportCallIssue=false

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numba as nb
import numpy as np
from llvmlite import ir
from numba import carray, njit, types  # pyright: ignore[reportPrivateImportUsage]  # documented, not in __all__
from numba.core import cgutils
from numba.extending import intrinsic

from jaxserve.kernels_pallas import cpu_ffi
from jaxserve.kernels_pallas.cpu_ffi import FIRST_WORD, data_of, dims_of, pointer, prefetch
from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.kernels_pallas.scoring import Scoring

_NAME = "jaxserve_cpu_decode_attention"
_TOKENS_PER_THREAD = 64  # context tokens below which another thread is not worth waking
_LEAST = np.float32(-1e30)
# Order of operations is free, infinities and NaN are not: a NaN in the cache must not become a plausible answer.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}

_TILE_TOKENS = 8  # new tokens of a unit in a mixed step

_Q, _KV, _TABLE, _LENS, _TOKEN_ROWS, _POSITIONS, _NUMBERS, _WINDOW, _OUT = range(FIRST_WORD, FIRST_WORD + 9)
_TOKENS, _HEADS, _KV_HEADS, _HEAD_DIM, _PAGE_SIZE, _TABLE_WIDTH = range(FIRST_WORD + 9, FIRST_WORD + 15)
_UNIT_TOKENS, _UNIT_HEADS = range(FIRST_WORD + 15, FIRST_WORD + 17)


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
def _ints(address):
    return pointer(address, nb.int32)


@njit(inline="always")
def _attend_tokens(control, row, first_token, num_tokens, num_keys, first_head, num_heads, width):
    """Online softmax of some heads of consecutive tokens of one row; `width` is a literal that divides head_dim.

    `num_keys` is what the last token sees.  All tokens and heads go through a page before the next one: it is read
    from memory once, and from end to end.
    """
    page_size, head_dim = control[_PAGE_SIZE], control[_HEAD_DIM]
    group = control[_HEADS] // control[_KV_HEADS]
    table = _ints(control[_TABLE] + 4 * row * control[_TABLE_WIDTH])
    numbers = pointer(control[_NUMBERS], nb.float32)
    scale, soft_cap = numbers[0], numbers[1]
    window = np.int64(_ints(control[_WINDOW])[0])
    head_bytes = 4 * head_dim
    token_bytes = control[_KV_HEADS] * 2 * head_bytes
    first = max(0, num_keys - (num_tokens - 1) - window) if window > 0 else 0
    largest = np.full(num_tokens * num_heads, _LEAST, np.float32)
    totals = np.zeros(num_tokens * num_heads, np.float32)
    weights = np.empty(page_size, np.float32)
    end_page = (num_keys + page_size - 1) // page_size
    for index in range(first // page_size, end_page):
        page = control[_KV] + table[index] * page_size * token_bytes
        if index + 1 < end_page:  # pages lie anywhere: the processor cannot guess which comes next
            following = control[_KV] + table[index + 1] * page_size * token_bytes
            for line in range(0, page_size * token_bytes, 64):
                prefetch(following + line)
        for head in range(num_heads):
            keys_of_head = page + (first_head + head) // group * 2 * head_bytes
            for token in range(num_tokens):
                visible = num_keys - (num_tokens - 1 - token)
                begin = max(0, visible - window - index * page_size) if window > 0 else 0
                count = min(page_size, visible - index * page_size) - begin
                if count <= 0:
                    continue
                keys = keys_of_head + begin * token_bytes
                offset = ((first_token + token) * control[_HEADS] + first_head + head) * head_bytes
                query, out = control[_Q] + offset, control[_OUT] + offset
                for part in range(0, head_bytes, 4 * width):
                    _dot_rows(
                        query + part, keys + part, token_bytes, count, weights.ctypes.data, part > 0, width
                    )
                state = token * num_heads + head
                peak = largest[state]
                for i in range(count):
                    score = weights[i] * scale
                    if soft_cap > 0:
                        score = soft_cap * math.tanh(score / soft_cap)
                    weights[i] = score
                    peak = max(peak, score)
                rescale = math.exp(largest[state] - peak)
                largest[state] = peak
                total = totals[state] * rescale
                for i in range(count):
                    weight = math.exp(weights[i] - peak)
                    weights[i] = weight
                    total += weight
                totals[state] = total
                for part in range(0, head_bytes, 4 * width):
                    _add_rows(
                        out + part,
                        keys + head_bytes + part,
                        token_bytes,
                        count,
                        weights.ctypes.data,
                        rescale,
                        width,
                    )
    for token in range(num_tokens):
        for head in range(num_heads):
            offset = ((first_token + token) * control[_HEADS] + first_head + head) * head_bytes
            out = carray(pointer(control[_OUT] + offset, nb.float32), head_dim)
            for h in range(head_dim):
                out[h] /= totals[token * num_heads + head]


@njit(fastmath=_FAST_MATH, error_model="numpy")
def _run_unit(control, unit):
    num_heads = control[_UNIT_HEADS]
    splits = control[_HEADS] // num_heads
    first_head = unit % splits * num_heads
    token = unit // splits * control[_UNIT_TOKENS]
    end = min(control[_TOKENS], token + control[_UNIT_TOKENS])
    head_dim = control[_HEAD_DIM]
    rows, positions, lens = _ints(control[_TOKEN_ROWS]), _ints(control[_POSITIONS]), _ints(control[_LENS])
    for index in range(token, end):
        offset = (index * control[_HEADS] + first_head) * head_dim * 4
        carray(pointer(control[_OUT] + offset, nb.float32), num_heads * head_dim)[:] = np.float32(0)
    while token < end:
        row, count = np.int64(rows[token]), 1
        while token + count < end and rows[token + count] == row:
            count += 1
        num_keys = np.int64(positions[token]) + count
        if num_keys <= lens[row]:  # padding stands in a row without keys
            if head_dim % 64 == 0:
                _attend_tokens(control, row, token, count, num_keys, first_head, num_heads, 64)
            elif head_dim % 16 == 0:
                _attend_tokens(control, row, token, count, num_keys, first_head, num_heads, 16)
            else:
                _attend_tokens(control, row, token, count, num_keys, first_head, num_heads, 1)
        token += count


@njit
def _set_up(control, arguments, results, num_threads):
    for i in range(_OUT - _Q):
        control[_Q + i] = data_of(arguments, i)
    control[_OUT] = data_of(results, 0)
    q_dims, kv_dims, table_dims = dims_of(arguments, 0), dims_of(arguments, 1), dims_of(arguments, 2)
    num_tokens, num_heads, num_kv_heads, num_rows = q_dims[0], q_dims[1], kv_dims[2], table_dims[0]
    control[_TOKENS], control[_HEADS], control[_HEAD_DIM] = num_tokens, num_heads, q_dims[2]
    control[_PAGE_SIZE], control[_KV_HEADS], control[_TABLE_WIDTH] = kv_dims[1], num_kv_heads, table_dims[1]
    control[_UNIT_TOKENS] = 1 if num_tokens == num_rows else _TILE_TOKENS
    lens = _ints(control[_LENS])
    context = np.int64(0)
    for row in range(num_rows):
        context += lens[row]
    parties = max(1, min(num_threads, context // _TOKENS_PER_THREAD))
    # All heads in a unit if there are enough units to keep the threads evenly busy.
    units = (num_tokens + control[_UNIT_TOKENS] - 1) // control[_UNIT_TOKENS]
    control[_UNIT_HEADS] = num_heads if units >= 3 * parties else num_heads // num_kv_heads
    return units * (num_heads // control[_UNIT_HEADS]), parties


_take_units = cpu_ffi.unit_taker(_run_unit)
_handle = cpu_ffi.call_handler(_set_up, _NAME)


def _task(address):
    return _take_units(address)


def _handler(frame_address):
    return _handle(frame_address)


def register() -> None:
    """Make the kernel known to XLA; compiles it in the first process."""
    cpu_ffi.register(_NAME, _task, _handler)


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    meta: AttentionMetadata,
    scoring: Scoring,
) -> jax.Array:
    """Attention of q [T, N, H] over pages [P, S, K, 2, H] that already hold this step's keys and values, float32.

    Padding tokens get zeros.  A token's result does not depend on what else is in the step.
    """
    register()
    return cpu_ffi.call(
        _NAME,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        q,
        kv_pages,
        meta.page_table,
        meta.kv_lens,
        meta.token_rows,
        meta.positions,
        jnp.asarray([scoring.scale, scoring.soft_cap or 0.0], jnp.float32),
        jnp.asarray([scoring.window or 0], jnp.int32),
    )
