"""Paged decode attention on CPUs: loops over pages that Numba compiles and XLA calls as a foreign function.

XLA on CPU can only gather pages into a new array, element by element, before it may multiply: on 2 cores that made
29 of the 80 ms of a decode step (SmolLM2-135M, 8 rows, context 200).  Here keys and values are read where they lie.

Work is cut into units: rows, or a row's heads over one kv head.  XLA's own thread pool and the calling thread take units from a shared
counter; whoever is the last to finish completes the future that XLA waits for, so that no thread ever blocks.

The structs are those of xla/ffi/api/c_api.h, read as arrays of 8-byte words.
"""

from __future__ import annotations

import ctypes
import math
import re
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numba as nb
import numpy as np
from llvmlite import binding, ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxserve.kernels_pallas.metadata import AttentionMetadata

_TARGET = "jaxserve_cpu_decode_attention"
_TASK_SYMBOL = "jaxserve_cpu_decode_attention_task"
_TOKENS_PER_THREAD = 64  # context tokens below which another thread is not worth waking
_LEAST = np.float32(-1e30)
# Order of operations is free, infinities and NaN are not: a NaN in the cache must not become a plausible answer.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}

# Words of the control block that the threads of one call share (an XLA result buffer, alive until the future is set).
_NEXT_UNIT, _NUM_DONE, _NUM_PARTIES, _FUTURE, _API = range(5)
_Q, _KV, _TABLE, _LENS, _OUT, _NUMBERS, _WINDOW = range(5, 12)
_ROWS, _HEADS, _KV_HEADS, _HEAD_DIM, _PAGE_SIZE, _TABLE_WIDTH, _UNIT_HEADS = range(12, 19)
_CONTROL_WORDS = 24


def _api_word(function: str) -> int:
    """Index of a function's pointer in XLA_FFI_Api, read from the header that comes with jaxlib."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    fields = re.findall(r"^\s+_XLA_FFI_API_STRUCT_FIELD\((\w+)\);", header, re.MULTILINE)
    return 6 + fields.index(
        function
    )  # behind struct_size, extension_start, api_version (3 words), internal_api


_SCHEDULE = _api_word("XLA_FFI_ThreadPool_Schedule")
_NUM_THREADS = _api_word("XLA_FFI_ThreadPool_NumThreads")
_FUTURE_CREATE = _api_word("XLA_FFI_Future_Create")
_FUTURE_SET = _api_word("XLA_FFI_Future_SetAvailable")


@intrinsic
def _pointer(_context, address, element):
    """The integer `address` as a pointer to `element`, a Numba type."""
    pointer = types.CPointer(element.dtype)

    def codegen(context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, element), codegen


@intrinsic
def _call(_context, function, argument):
    """Call the C function at address `function`: int64 f(int64)."""

    def codegen(_backend, builder, _signature, arguments):
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _fetch_add(_context, address):
    """Atomically add 1 to the word at `address`; the value from before."""

    def codegen(_backend, builder, _signature, arguments):
        word = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(word, 1), "seq_cst")

    return types.int64(types.int64), codegen


@intrinsic
def _task_address(_context):
    """Where _task was loaded: by name, so that code from Numba's disk cache finds it in a new process."""

    def codegen(_backend, builder, _signature, _arguments):
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
        known = builder.module.globals.get(_TASK_SYMBOL)
        function = known or ir.Function(builder.module, kind, _TASK_SYMBOL)
        return builder.ptrtoint(function, ir.IntType(64))

    return types.int64(), codegen


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


@intrinsic
def _prefetch(_context, address):
    """Ask for the cache line at `address`, which will be read soon."""

    def codegen(_backend, builder, _signature, arguments):
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        hints = [ir.Constant(word, hint) for hint in (0, 2, 1)]  # to read, to the second level, data
        builder.call(prefetch, [builder.inttoptr(arguments[0], pointer), *hints])
        return ir.Constant(ir.IntType(64), 0)

    return types.int64(types.int64), codegen


@njit(inline="always")
def _words(address, count):
    return carray(_pointer(address, nb.int64), count)


@njit(inline="always")
def _dims(buffer):
    return _words(buffer[5], buffer[4])


@njit(inline="always")
def _attend_heads(control, row, first_head, num_heads, first, num_keys, width):
    """Online softmax of one row's query heads over keys first .. num_keys; `width` is a literal that divides H.

    All heads go through a page before the next one: it is read from memory once, and from end to end.
    """
    page_size, head_dim = control[_PAGE_SIZE], control[_HEAD_DIM]
    group = control[_HEADS] // control[_KV_HEADS]
    pages = carray(_pointer(control[_TABLE], nb.int32), (control[_ROWS], control[_TABLE_WIDTH]))[row]
    numbers = carray(_pointer(control[_NUMBERS], nb.float32), 2)
    scale, soft_cap = numbers[0], numbers[1]
    head_bytes = 4 * head_dim
    token_bytes = control[_KV_HEADS] * 2 * head_bytes
    offset = (row * control[_HEADS] + first_head) * head_bytes
    queries, outs = control[_Q] + offset, control[_OUT] + offset
    acc = carray(_pointer(outs, nb.float32), (num_heads, head_dim))
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
                _prefetch(following + line)
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
def _attend_unit(control, unit):
    num_heads = control[_UNIT_HEADS]
    units_of_row = control[_HEADS] // num_heads
    row, first_head = unit // units_of_row, unit % units_of_row * num_heads
    head_dim = control[_HEAD_DIM]
    num_keys = np.int64(carray(_pointer(control[_LENS], nb.int32), control[_ROWS])[row])
    window = np.int64(carray(_pointer(control[_WINDOW], nb.int32), 1)[0])
    first = max(0, num_keys - window) if window > 0 else 0
    if num_keys <= 0:
        offset = (row * control[_HEADS] + first_head) * head_dim * 4
        carray(_pointer(control[_OUT] + offset, nb.float32), num_heads * head_dim)[:] = np.float32(0)
    elif head_dim % 64 == 0:
        _attend_heads(control, row, first_head, num_heads, first, num_keys, 64)
    elif head_dim % 16 == 0:
        _attend_heads(control, row, first_head, num_heads, first, num_keys, 16)
    else:
        _attend_heads(control, row, first_head, num_heads, first, num_keys, 1)


@njit
def _take_units(address):
    """Work until no unit is left; the last of the parties completes the future.  `address` is dead afterwards."""
    control = _words(address, _CONTROL_WORDS)
    num_units = control[_ROWS] * (control[_HEADS] // control[_UNIT_HEADS])
    while True:
        unit = _fetch_add(address + 8 * _NEXT_UNIT)
        if unit >= num_units:
            break
        _attend_unit(control, unit)
    api, future, parties = control[_API], control[_FUTURE], control[_NUM_PARTIES]
    if _fetch_add(address + 8 * _NUM_DONE) == parties - 1 and future != 0:
        arguments = np.array([24, 0, future])
        _call(_words(api, _FUTURE_SET + 1)[_FUTURE_SET], arguments.ctypes.data)


@njit
def _handle_call(frame_address):
    """An XLA_FFI_Handler: describe itself, or run one call."""
    frame = _words(frame_address, 22)
    api = _words(frame[2], _FUTURE_SET + 1)
    if frame[1] != 0:  # XLA asks for the handler's metadata: answer with the API version of the asker
        metadata = _words(_words(frame[1], 4)[3], 6)
        metadata[3] = api[4]
        metadata[4] = metadata[4] >> 32 << 32  # no traits
        return 0
    if frame[4] & 0xFFFFFFFF != 3:  # only the stage "execute" has anything to do
        return 0
    arguments, results = _words(frame[9], 6), _words(frame[14], 2)
    address = _words(results[1], 6)[3]
    control = _words(address, _CONTROL_WORDS)
    control[_NEXT_UNIT] = control[_NUM_DONE] = control[_FUTURE] = 0
    control[_API] = frame[2]
    for i, word in enumerate((_Q, _KV, _TABLE, _LENS, _NUMBERS, _WINDOW)):
        control[word] = _words(arguments[i], 6)[3]
    control[_OUT] = _words(results[0], 6)[3]
    q_dims, kv_dims = _dims(_words(arguments[0], 6)), _dims(_words(arguments[1], 6))
    control[_ROWS], control[_HEADS], control[_HEAD_DIM] = q_dims[0], q_dims[1], q_dims[2]
    control[_PAGE_SIZE], control[_KV_HEADS] = kv_dims[1], kv_dims[2]
    control[_TABLE_WIDTH] = _dims(_words(arguments[2], 6))[1]

    lens = carray(_pointer(control[_LENS], nb.int32), q_dims[0])
    num_tokens = np.int64(0)
    for row in range(q_dims[0]):
        num_tokens += lens[row]
    query = np.zeros(5, np.int64)
    threads = np.zeros(1, np.int64)
    query[0], query[2], query[3] = 32, frame[3], threads.ctypes.data
    parties = np.int64(1)
    if num_tokens >= 2 * _TOKENS_PER_THREAD and _call(api[_NUM_THREADS], query.ctypes.data) == 0:
        parties = min(threads[0], q_dims[0] * kv_dims[2], num_tokens // _TOKENS_PER_THREAD)
    # Whole rows if there are enough of them to keep the threads evenly busy, else a kv head's queries.
    control[_UNIT_HEADS] = q_dims[1] if q_dims[0] >= 3 * parties else q_dims[1] // kv_dims[2]
    control[_NUM_PARTIES] = max(parties, 1)
    if parties > 1:
        create = np.zeros(3, np.int64)
        create[0] = 24
        _call(api[_FUTURE_CREATE], create.ctypes.data)
        control[_FUTURE] = frame[21] = create[2]
        query[0], query[3], query[4] = 40, _task_address(), address
        for _ in range(parties - 1):
            _call(api[_SCHEDULE], query.ctypes.data)
    _call(_task_address(), address)
    return 0


@cache
def register() -> None:
    """Compile, or load from Numba's cache, and make the handler known to XLA; once a process."""
    task = cfunc(types.int64(types.int64), cache=True)(_run_task)
    binding.add_symbol(_TASK_SYMBOL, task.address)
    handler = cfunc(types.int64(types.int64), cache=True)(_run_handler)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    jax.ffi.register_ffi_target(_TARGET, new_capsule(handler.address, None, None), platform="cpu")
    _alive.extend((task, handler))


def _run_task(address):
    _take_units(address)
    return 0


def _run_handler(frame_address):
    return _handle_call(frame_address)


_alive: list[object] = []


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
    out, _ = jax.ffi.ffi_call(
        _TARGET,
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((2 * _CONTROL_WORDS,), jnp.int32)),
    )(
        q,
        kv_pages,
        meta.page_table,
        meta.kv_lens,
        jnp.asarray([scale, soft_cap or 0.0], jnp.float32),
        jnp.asarray([window or 0], jnp.int32),
    )
    return out
