"""How Numba's code becomes a foreign function of XLA's on CPUs, run by all threads that XLA has.

A kernel cuts its work into units.  The calling thread and XLA's own thread pool take units from a shared counter.  The
caller returns when all units are done; it waits for units that others have begun, never for a thread to come, so that
a busy pool cannot hold it up.  What the threads of a call share is a control block, freed by whoever leaves it last,
which may be a thread that came when everything was done.

The structs are those of xla/ffi/api/c_api.h, read as arrays of 8-byte words.
"""

# Numba itself passes an intrinsic its first argument, the typing context.
# pyright: reportCallIssue=false

from __future__ import annotations

import ctypes
import hashlib
import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import numba as nb
import numpy as np
from llvmlite import binding, ir
from numba import carray, cfunc, njit, types  # pyright: ignore[reportPrivateImportUsage]  # documented, not in __all__
from numba.core import cgutils, config, event
from numba.extending import intrinsic

logger = logging.getLogger(__name__)

CONTROL_WORDS = 32
_NEXT_UNIT, _NUM_DONE, _NUM_HOLDERS, _NUM_UNITS = range(4)
FIRST_WORD = 4  # of the control block that a kernel may use for itself
_SPINS = 2000  # turns of waiting, some 20 us, after which the core is offered to others


def _api_word(function: str) -> int:
    """Index of a function's pointer in XLA_FFI_Api, read from the header that comes with jaxlib."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    fields = re.findall(r"^\s+_XLA_FFI_API_STRUCT_FIELD\((\w+)\);", header, re.MULTILINE)
    return 6 + fields.index(
        function
    )  # behind struct_size, extension_start, api_version (3 words), internal_api


_SCHEDULE = _api_word("XLA_FFI_ThreadPool_Schedule")
_NUM_THREADS = _api_word("XLA_FFI_ThreadPool_NumThreads")


@intrinsic
def pointer(_context, address, element):
    """The integer `address` as a pointer to `element`, a Numba type."""
    kind = types.CPointer(element.dtype)

    def codegen(context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(types.int64, element), codegen


@intrinsic
def _call(_context, function, argument):
    """Call the C function at address `function`: int64 f(int64)."""

    def codegen(_backend, builder, _signature, arguments):
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _fetch_add(_context, address, amount):
    """Atomically add to the word at `address`; the value from before."""

    def codegen(_backend, builder, _signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


_malloc = types.ExternalFunction("malloc", types.int64(types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))
_yield = types.ExternalFunction("sched_yield", types.int32())


@intrinsic(prefer_literal=True)
def _task_address(_context, name):
    """Where the task of kernel `name`, a literal, was loaded.

    Looked up by name, so that code from Numba's disk cache finds it in a new process.
    """
    symbol = _task_symbol(name.literal_value)

    def codegen(_backend, builder, _signature, _arguments):
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
        known = builder.module.globals.get(symbol)
        return builder.ptrtoint(known or ir.Function(builder.module, kind, symbol), ir.IntType(64))

    return types.int64(name), codegen


@intrinsic
def prefetch(_context, address):
    """Ask for the cache line at `address`, which will be read soon."""

    def codegen(_backend, builder, _signature, arguments):
        place, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        hints = [ir.Constant(word, hint) for hint in (0, 2, 1)]  # to read, to the second level, data
        builder.call(function, [builder.inttoptr(arguments[0], place), *hints])
        return ir.Constant(ir.IntType(64), 0)

    return types.int64(types.int64), codegen


@njit(inline="always")
def words(address, count):
    """`count` words at `address`."""
    return carray(pointer(address, nb.int64), count)


@njit(inline="always")
def data_of(buffers, index):
    """Address of what buffer `index` of a call's arguments or results holds."""
    return words(buffers[index], 6)[3]


@njit(inline="always")
def dims_of(buffers, index):
    """Its dimensions."""
    buffer = words(buffers[index], 6)
    return words(buffer[5], buffer[4])


def unit_taker(run_unit: Any) -> Any:
    """What each thread of a call does, from run_unit(control, unit): take_units(address of the control block)."""

    @njit
    def take_units(address):
        control = words(address, CONTROL_WORDS)
        num_units = control[_NUM_UNITS]
        while True:
            unit = _fetch_add(address + 8 * _NEXT_UNIT, 1)
            if unit >= num_units:
                break
            run_unit(control, unit)
            _fetch_add(address + 8 * _NUM_DONE, 1)
        if _fetch_add(address + 8 * _NUM_HOLDERS, -1) == 1:
            _free(address)
        return 0

    return take_units


def call_handler(set_up: Any, name: str) -> Any:
    """An XLA_FFI_Handler for kernel `name`: handle(address of the call frame).

    set_up(control, arguments, results, num_threads) fills the kernel's words of the control block and returns the
    numbers of units and of threads that it wants.
    """

    @njit
    def handle(frame_address):
        frame = words(frame_address, 22)
        api = words(frame[2], max(_SCHEDULE, _NUM_THREADS) + 1)
        if frame[1] != 0:  # XLA asks for the handler's metadata: answer with the API version of the asker
            metadata = words(words(frame[1], 4)[3], 6)
            metadata[3] = api[4]
            metadata[4] = metadata[4] >> 32 << 32  # no traits
            return 0
        if frame[4] & 0xFFFFFFFF != 3:  # only the stage "execute" has anything to do
            return 0
        arguments, results = words(frame[9], frame[7]), words(frame[14], frame[12])
        address = _malloc(8 * CONTROL_WORDS)
        control = words(address, CONTROL_WORDS)
        query = np.zeros(5, np.int64)
        threads = np.ones(1, np.int64)
        query[0], query[2], query[3] = 32, frame[3], threads.ctypes.data
        if _call(api[_NUM_THREADS], query.ctypes.data) != 0:
            threads[0] = 1  # no pool to share the work with
        num_units, parties = set_up(control, arguments, results, threads[0])
        parties = max(1, min(parties, num_units, threads[0]))
        control[_NEXT_UNIT] = control[_NUM_DONE] = 0
        # The caller holds it twice: once as a taker of units, once until it has seen them all done.
        control[_NUM_UNITS], control[_NUM_HOLDERS] = num_units, parties + 1
        query[0], query[3], query[4] = 40, _task_address(name), address
        for _ in range(parties - 1):
            if _call(api[_SCHEDULE], query.ctypes.data) != 0:
                _fetch_add(address + 8 * _NUM_HOLDERS, -1)
        _call(_task_address(name), address)
        spins = 0
        while _fetch_add(address + 8 * _NUM_DONE, 0) < num_units:
            spins += 1
            if spins % _SPINS == 0:
                _yield()
        if _fetch_add(address + 8 * _NUM_HOLDERS, -1) == 1:
            _free(address)
        return 0

    return handle


def call(name: str, result: jax.ShapeDtypeStruct, *arguments: jax.Array) -> jax.Array:
    """Inside a program: call kernel `name`."""
    return jax.ffi.ffi_call(name, result)(*arguments)


_register_lock = Lock()
_registered: dict[str, tuple[Any, Any]] = {}  # code that XLA may call must stay loaded


def register(name: str, task: Callable[[int], int], handler: Callable[[int], int]) -> None:
    """Compile a kernel's two C functions, or load them from Numba's cache, and make them known to XLA; once.

    `task` calls the kernel's take_units, `handler` its handle.
    """
    with _register_lock:
        if name in _registered:
            return
        with event.install_listener("numba:run_pass", _Announcement(name)):
            compiled_task = _compile(task)
            binding.add_symbol(_task_symbol(name), compiled_task.address)
            compiled = _compile(handler)
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        jax.ffi.register_ffi_target(name, new_capsule(compiled.address, None, None), platform="cpu")
        _registered[name] = (compiled_task, compiled)


class _Announcement(event.Listener):
    """Says once that Numba compiles a kernel, which takes many seconds; where it finds it in its cache there is no
    event, and nothing is said."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def on_start(self, event: object) -> None:
        if self._name is not None:
            logger.info(
                "compiling CPU kernel %s, once on a machine: later starts find it on disk", self._name
            )
            self._name = None

    def on_end(self, event: object) -> None:
        pass


def _task_symbol(name: str) -> str:
    return f"{name}_task"


def _compile(function: Callable[[int], int]) -> Any:
    """As a C function int64 f(int64).  Numba's own cache looks at one source file only, so each state of the sources
    gets a folder of its own; without a folder to write to, every process compiles anew."""
    settings: Any = config  # Numba puts its names there while it is imported
    before = settings.CACHE_DIR
    try:
        settings.CACHE_DIR = str(_cache_folder())
        return cfunc(types.int64(types.int64), cache=True)(function)
    except (OSError, RuntimeError):
        return cfunc(types.int64(types.int64))(function)
    finally:
        settings.CACHE_DIR = before


@cache
def _cache_folder() -> Path:
    digest = hashlib.sha256(f"{nb.__version__} {jax.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("cpu_*.py")):
        digest.update(path.read_bytes())
    folder = Path("~/.cache/jaxserve/numba").expanduser() / digest.hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    return folder
