"""Paged decode attention on CPUs: a loop over pages compiled by Numba, called by XLA through its foreign function interface.

XLA on CPU can only gather pages into a new array, element by element, before it may multiply: on 2 cores that made
29 of the 80 ms of a decode step (SmolLM2-135M, 8 rows, context 200).  Here keys and values are read where they lie.

Work is cut into units of (row, kv head).  XLA's own thread pool and the calling thread take units from a shared
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
from numba.extending import intrinsic

from jaxserve.kernels_pallas.metadata import AttentionMetadata

_TARGET = "jaxserve_cpu_decode_attention"
_TASK_SYMBOL = "jaxserve_cpu_decode_attention_task"
_TOKENS_PER_THREAD = 64  # context tokens of a kv head below which another thread is not worth waking
_LEAST = np.float32(-1e30)
# Order of operations is free, infinities and NaN are not: a NaN in the cache must not become a plausible answer.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}

# Words of the control block that the threads of one call share (an XLA result buffer, alive until the future is set).
_NEXT_UNIT, _NUM_DONE, _NUM_PARTIES, _FUTURE, _API = range(5)
_Q, _KV, _TABLE, _LENS, _OUT, _NUMBERS, _WINDOW = range(5, 12)
_ROWS, _HEADS, _KV_HEADS, _HEAD_DIM, _PAGES, _PAGE_SIZE, _TABLE_WIDTH = range(12, 19)
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


@njit(inline="always")
def _words(address, count):
    return carray(_pointer(address, nb.int64), count)


@njit(inline="always")
def _dims(buffer):
    return _words(buffer[5], buffer[4])


@njit(inline="always")
def _unit(q, kv, pages, first, num_keys, out, page_size, stride, head_dim, scale, soft_cap):
    """Online softmax of q [G, H] over keys first .. num_keys of one kv head; kv [P * S * K * 2, H] of all heads.

    The pages' first slots are rows pages[i] * page_size * stride of kv; a token's value follows its key.
    """
    group = q.shape[0]
    largest = np.full(group, _LEAST, np.float32)
    total = np.zeros(group, np.float32)
    scores = np.empty((page_size, group), np.float32)
    acc = np.zeros((group, head_dim), np.float32)
    for page in range(first // page_size, (num_keys + page_size - 1) // page_size):
        base = np.int64(pages[page]) * page_size * stride
        begin = max(0, first - page * page_size)
        end = min(page_size, num_keys - page * page_size)
        for slot in range(begin, end):
            key = kv[base + slot * stride]
            for g in range(group):
                dot = np.float32(0)
                for h in range(head_dim):
                    dot += q[g, h] * key[h]
                dot *= scale
                if soft_cap > 0:
                    dot = soft_cap * math.tanh(dot / soft_cap)
                scores[slot, g] = dot
        for g in range(group):
            peak = largest[g]
            for slot in range(begin, end):
                peak = max(peak, scores[slot, g])
            if peak > largest[g]:
                rescale = math.exp(largest[g] - peak)
                largest[g] = peak
                total[g] *= rescale
                for h in range(head_dim):
                    acc[g, h] *= rescale
            for slot in range(begin, end):
                weight = math.exp(scores[slot, g] - peak)
                scores[slot, g] = weight
                total[g] += weight
        for slot in range(begin, end):
            value = kv[base + slot * stride + 1]
            for g in range(group):
                weight = scores[slot, g]
                for h in range(head_dim):
                    acc[g, h] += weight * value[h]
    for g in range(group):
        for h in range(head_dim):
            out[g, h] = acc[g, h] / total[g]


@njit(fastmath=_FAST_MATH, error_model="numpy")
def _attend_unit(control, unit):
    num_heads, num_kv_heads, head_dim = control[_HEADS], control[_KV_HEADS], control[_HEAD_DIM]
    page_size, width = control[_PAGE_SIZE], control[_TABLE_WIDTH]
    group = num_heads // num_kv_heads
    row, head = unit // num_kv_heads, unit % num_kv_heads
    begin = row * num_heads + head * group
    q = carray(_pointer(control[_Q], nb.float32), (control[_ROWS] * num_heads, head_dim))[
        begin : begin + group
    ]
    out = carray(_pointer(control[_OUT], nb.float32), (control[_ROWS] * num_heads, head_dim))[
        begin : begin + group
    ]
    stride = num_kv_heads * 2
    kv = carray(_pointer(control[_KV], nb.float32), (control[_PAGES] * page_size * stride, head_dim))[
        head * 2 :
    ]
    pages = carray(_pointer(control[_TABLE], nb.int32), (control[_ROWS], width))[row]
    num_keys = np.int64(carray(_pointer(control[_LENS], nb.int32), control[_ROWS])[row])
    numbers = carray(_pointer(control[_NUMBERS], nb.float32), 2)
    window = np.int64(carray(_pointer(control[_WINDOW], nb.int32), 1)[0])
    scale, soft_cap = numbers[0], numbers[1]
    if num_keys <= 0:
        out[:] = np.float32(0)
        return
    first = max(0, num_keys - window) if window > 0 else 0
    # The same code with the head size known, which unrolls the inner loops.
    if head_dim == 64:
        _unit(q, kv, pages, first, num_keys, out, page_size, stride, 64, scale, soft_cap)
    elif head_dim == 128:
        _unit(q, kv, pages, first, num_keys, out, page_size, stride, 128, scale, soft_cap)
    else:
        _unit(q, kv, pages, first, num_keys, out, page_size, stride, head_dim, scale, soft_cap)


@njit
def _take_units(address):
    """Work until no unit is left; the last of the parties completes the future.  `address` is dead afterwards."""
    control = _words(address, _CONTROL_WORDS)
    num_units = control[_ROWS] * control[_KV_HEADS]
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
    control[_PAGES], control[_PAGE_SIZE], control[_KV_HEADS] = kv_dims[0], kv_dims[1], kv_dims[2]
    control[_TABLE_WIDTH] = _dims(_words(arguments[2], 6))[1]

    lens = carray(_pointer(control[_LENS], nb.int32), q_dims[0])
    num_tokens = np.int64(0)
    for row in range(q_dims[0]):
        num_tokens += lens[row]
    query = np.zeros(5, np.int64)
    threads = np.zeros(1, np.int64)
    query[0], query[2], query[3] = 32, frame[3], threads.ctypes.data
    parties = np.int64(1)
    if num_tokens * kv_dims[2] >= 2 * _TOKENS_PER_THREAD and _call(api[_NUM_THREADS], query.ctypes.data) == 0:
        parties = min(threads[0], q_dims[0] * kv_dims[2], num_tokens * kv_dims[2] // _TOKENS_PER_THREAD)
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
