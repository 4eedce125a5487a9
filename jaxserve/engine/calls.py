"""Calls of a runner's steps on a thread of their own: a call may last for as long as the device is busy."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

from jaxserve.engine.pending_step import PendingStep
from jaxserve.engine.plan import StepPlan


class Dispatches(Protocol):
    """As much of a runner as is needed here."""

    def dispatch(self, plan: StepPlan) -> PendingStep: ...


@dataclass(slots=True)
class Call:
    """A step that the device has been given, or is about to be."""

    plan: StepPlan
    made: Future[PendingStep] = field(default_factory=Future)
    made_at: float = math.inf  # time.monotonic() when all of it was queued on the device

    @classmethod
    def of(cls, pending: PendingStep) -> Call:
        """One that was made already."""
        call = cls(pending.plan)
        call.end(pending)
        return call

    def end(self, pending: PendingStep) -> None:
        """It was made."""
        self.made_at = time.monotonic()
        self.made.set_result(pending)


class CallThread:
    """Dispatches plans in order, while its owner goes on.  Daemonic: a call may never come back.

    Where eight steps are one program the device takes its launches only as it gets to them, and a program over several
    GPUs costs milliseconds, as XLA records its all-reduces anew (4.5 ms for Llama 8B's dimensions over two, where the
    device needs 2.5: 2 x H200, jax 0.11.2, 2026-11-26).  Meanwhile the owner reads what came of the step before.
    """

    def __init__(self, runner: Dispatches, prepare: Callable[[], None]) -> None:
        """The thread calls `prepare` first."""
        self._runner = runner
        self._prepare = prepare
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._last: Call | None = None
        self._thread = threading.Thread(target=self._run, name="engine-calls", daemon=True)
        self._thread.start()

    def dispatch(self, plan: StepPlan) -> Call:
        """Have a plan dispatched after those before it."""
        call = self._last = Call(plan)
        self._calls.put(call)
        return call

    def settle(self) -> None:
        """Wait until every call was made, so that the runner may be used from the calling thread.

        Raises what the last of them raised.
        """
        if self._last is not None:
            self._last.made.result()

    def stop(self) -> None:
        """End the thread, after the calls that it was given."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        self._prepare()
        while (call := self._calls.get()) is not None:
            try:
                call.end(self._runner.dispatch(call.plan))
            except BaseException as error:  # noqa: BLE001 - raised again, where the step is waited for
                call.made.set_exception(error)
