"""A few threads with room for deep recursion."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from jaxserve.structured.limits import STACK_BYTES

T = TypeVar("T")
_NUM_THREADS = 2


class Workers:
    """Runs calls in the order in which they come.  The threads start with the first call.

    They are daemons, and end when the object goes: nobody waits for a grammar that takes forever.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._has_started = False
        self._lock = threading.Lock()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Call it on one of the threads.  Whoever waits for another call's future there must have submitted it."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # nobody can cancel it

        def call() -> None:
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001  # it is the future's, and raised there
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            if not self._has_started:
                self._has_started = True
                self._start()
        self._calls.put(call)
        return future

    def _start(self) -> None:
        # The size applies to whatever thread starts meanwhile; to others it is address space that they do not use.
        before = threading.stack_size(STACK_BYTES)
        try:
            for index in range(_NUM_THREADS):
                threading.Thread(
                    target=_work, args=(self._calls,), name=f"{self._name}-{index}", daemon=True
                ).start()
        finally:
            threading.stack_size(before)
        weakref.finalize(self, _stop, self._calls)


def _work(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # a future's result must not live until the next call


def _stop(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    for _ in range(_NUM_THREADS):
        calls.put(None)
