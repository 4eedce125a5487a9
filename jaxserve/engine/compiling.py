"""Compile every program of the lattice before serving, in parallel, and count what compiles later."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import jax

from jaxserve.engine.compile_cache import CompileCache
from jaxserve.engine.host_limits import num_processors
from jaxserve.engine.memory_plan import MemoryPlan
from jaxserve.engine.programs import Program
from jaxserve.errors import RecompileError
from jaxserve.progress import progress_bar

logger = logging.getLogger(__name__)

_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


def compile_all(
    programs: Iterable[Program],
    cache: CompileCache,
    *,
    show_progress: bool,
    given_up: threading.Event | None = None,
) -> dict[str, jax.stages.Compiled]:
    """Every program by name, from disk where it was compiled before.

    Compiling leaves the interpreter's lock alone, so a thread a core keeps the cores busy.  XLA tunes the
    matrix products of a GPU program by trying kernels, and remembers the fastest, for products alike and once it has
    it: of programs with the same products one is compiled ahead of the others.  Once `given_up` is set, nothing new
    is begun, and what was compiled until then is returned.
    """
    todo: list[Program] = []
    waiting: dict[str, list[Program]] = {}  # by the products that another one tunes
    for program in programs:
        if program.products in waiting:
            waiting[program.products].append(program)
        else:
            todo.append(program)
            if program.products:
                waiting[program.products] = []
    total = len(todo) + sum(map(len, waiting.values()))
    workers = max(2, num_processors())  # two at least: reading files and compiling leave the lock
    compiled: dict[str, jax.stages.Compiled] = {}
    with (
        cache.alone(),
        ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool,
        progress_bar(total, "programs", "prog", enabled=show_progress) as bar,
    ):
        tasks = {pool.submit(_load_or_compile, program, cache): program for program in todo}
        while tasks:
            done, _ = wait(tasks, return_when=FIRST_COMPLETED)
            for task in done:
                program = tasks.pop(task)
                if given_up is not None and given_up.is_set():
                    pool.shutdown(wait=False, cancel_futures=True)
                    return compiled
                compiled[program.name] = task.result()
                for other in waiting.pop(program.products, ()):
                    tasks[pool.submit(_load_or_compile, other, cache)] = other
                bar.update()
    return compiled


def _load_or_compile(program: Program, cache: CompileCache) -> jax.stages.Compiled:
    found = cache.load(program.name)
    return found if found is not None else cache.compile(program.name, program.lower, program.rows)


def check_memory(programs: Mapping[str, jax.stages.Compiled], memory: MemoryPlan) -> None:
    """Warn if a program takes more for a step than was planned, and more than is left."""
    needs = {name: _step_bytes(program) for name, program in programs.items()}
    name = max(needs, key=lambda name: needs[name])
    total = memory.total - memory.activations + needs[name]
    if total > memory.available:
        logger.warning(
            "program %s takes %.2f GiB where %.2f GiB were planned for a step: memory may run out, so lower "
            "gpu_memory_utilization, kv_cache_memory or max_num_batched_tokens",
            name,
            needs[name] / 2**30,
            memory.activations / 2**30,
        )


def _step_bytes(program: jax.stages.Compiled) -> int:
    """What a call takes beside its arguments; 0 where the compiler does not tell."""
    analysis = program.memory_analysis()
    if analysis is None:
        return 0
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.temp_size_in_bytes + max(0, outputs)


class CompileGuard:
    """Watches an engine's threads for compilations: after "ready" each one is a bug, counted and on request refused."""

    def __init__(self, *, forbid: bool) -> None:
        self.count = 0
        self._forbid = forbid
        self._threads: set[int] = set()

    def start(self) -> None:
        """Watch the calling thread from now on."""
        self.watch()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def watch(self) -> None:
        """Watch the calling thread as well."""
        self._threads.add(threading.get_ident())

    @property
    def is_watching(self) -> bool:
        """Whether the calling thread is one of them."""
        return threading.get_ident() in self._threads

    def stop(self) -> None:
        """Watch no longer."""
        self._threads.clear()
        from jax._src import monitoring  # the public module can register but not unregister

        monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event != _BACKEND_COMPILE or threading.get_ident() not in self._threads:
            return
        self.count += 1
        logger.error(
            "a program was compiled after the engine was ready (%.2f s): please report this", duration_secs
        )
        if self._forbid:
            raise RecompileError(
                "a step needed a program outside the compiled lattice, and forbid_recompile is set"
            )
