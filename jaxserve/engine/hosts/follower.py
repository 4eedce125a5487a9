"""The other hosts' side: they run what the first one plans, and answer nobody."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping

import jax

from jaxserve.engine.hosts.link import Link, LinkLostError
from jaxserve.engine.hosts.messages import (
    Admit,
    Agreed,
    Dispatch,
    End,
    Finish,
    Message,
    Settled,
    Start,
    Welcome,
)
from jaxserve.engine.pending_step import PendingStep
from jaxserve.engine.plan import Admission, StepPlan
from jaxserve.engine.runner import Runner
from jaxserve.errors import EngineDeadError

logger = logging.getLogger(__name__)

_MOST_PENDING = 2  # steps, as on the first host


class Follower:
    """Takes the first host's orders from a link, on a thread of its own: a step may wait for what never comes."""

    def __init__(self, link: Link, on_lost: Callable[[EngineDeadError], None]) -> None:
        """`on_lost` is called on another thread, once, if the first host is lost or ends with an error."""
        self._link = link
        link.be_patient()
        self._on_lost = on_lost
        self._is_ending = False
        self._orders: queue.SimpleQueue[Message | EngineDeadError] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="leader", daemon=True).start()

    def wait(self) -> None:
        """Until all hosts are there.  Raises EngineDeadError."""
        order = self._next()
        assert isinstance(order, Welcome), order

    def agree(self, facts: Mapping[str, str], num_pages: int) -> int:
        """Say what this host is about to build; the number of pages that fit everywhere.  Raises EngineDeadError."""
        try:
            self._link.send(Settled(dict(facts), num_pages))
        except LinkLostError as error:
            raise EngineDeadError(f"lost node_rank 0 (at {self._link.peer}): {error}") from error
        order = self._next()
        assert isinstance(order, Agreed), order
        return order.num_pages

    def run(self, runner: Runner) -> None:
        """Follow until the first host ends.  Raises EngineDeadError where that was no ordinary end."""
        pending: deque[PendingStep] = deque()
        started: tuple[jax.Array, ...] | None = None
        refused: set[int] = set()  # slots whose sequence could not be set up
        is_serving = False
        while True:
            order = self._orders.get()
            if isinstance(order, EngineDeadError):
                raise order
            if isinstance(order, End):
                return
            if not is_serving:
                is_serving = True
                self._link.be_prompt()
            if isinstance(order, Dispatch | Start | Finish):
                _check_refused(order.plan, refused)
            if isinstance(order, Admit):
                _admit(runner, order.admission, refused)
            elif isinstance(order, Dispatch):
                pending.append(runner.dispatch(order.plan))
            elif isinstance(order, Start):
                started = runner.start(order.plan)
            elif isinstance(order, Finish):
                assert started is not None, "a step is started before it is finished"
                pending.append(runner.finish(order.plan, started, order.allowed))
                started = None
            if len(pending) > _MOST_PENDING:
                runner.fetch(pending.popleft())

    def leave(self, why: str = "") -> None:
        """Follow no more, and tell the first host why if that is an error."""
        self._is_ending = True
        try:
            self._link.send(End(why))
        except LinkLostError:
            pass  # it has gone by itself
        self._link.close()

    def _next(self) -> Message:
        """The next order of a first host that has not ended."""
        order = self._orders.get()
        if isinstance(order, End):
            raise EngineDeadError("node_rank 0 ended")
        if isinstance(order, EngineDeadError):
            raise order
        return order

    def _listen(self) -> None:
        while True:
            try:
                message = self._link.receive()
            except LinkLostError as error:
                self._lose(f"lost node_rank 0 (at {self._link.peer}): {error}")
                return
            if isinstance(message, End) and message.error:
                self._lose(f"node_rank 0 ended: {message.error}")
                return
            self._orders.put(message)
            if isinstance(message, End):
                return

    def _lose(self, why: str) -> None:
        if self._is_ending:
            return
        error = EngineDeadError(why)
        self._orders.put(error)
        self._on_lost(error)


def _admit(runner: Runner, admission: Admission, refused: set[int]) -> None:
    refused.discard(admission.slot)
    try:
        runner.admit(admission)
    except jax.errors.JaxRuntimeError:
        raise
    except Exception:  # the first host should meet the same, and fail that request: see EngineCore
        logger.exception("request %s could not be set up", admission.request.request_id)
        refused.add(admission.slot)


def _check_refused(plan: StepPlan, refused: set[int]) -> None:
    """Raise EngineDeadError where the first host goes on with what this one could not set up."""
    if refused and any(entry.samples and entry.slot in refused for entry in plan.entries):
        raise EngineDeadError("this host could not set up a request that node_rank 0 goes on with")
