"""The engine core: schedule, run, commit, with step n+1 dispatched while step n runs."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import replace

import jax

from jaxserve.engine.pace import Pace
from jaxserve.engine.plan import StepPlan, StepResult
from jaxserve.engine.protocol import CoreRequest, EngineStats, TokenOutput
from jaxserve.engine.runner import PendingStep, Runner
from jaxserve.engine.scheduler import Scheduler
from jaxserve.outputs import FINISH_ERROR

logger = logging.getLogger(__name__)

_STEPS_IN_FLIGHT = 2  # one that runs and one that waits behind it


class EngineCore:
    """Scheduler and runner in one loop; single-threaded, never waits for anything but the device."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._in_flight: deque[PendingStep] = deque()
        self._pace = Pace()
        self._resumed_at = 0.0  # when the last step had come back; 0 after a pause

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._in_flight) or self._scheduler.num_running + self._scheduler.num_waiting > 0

    def add(self, request: CoreRequest) -> list[TokenOutput]:
        """Queue a request, which the front end has checked; its failure if it is impossible all the same."""
        if request.grammar is not None:
            return [_unconstrained(request.request_id)]
        try:
            self._scheduler.add(request)
        except (AssertionError, OverflowError, TypeError, ValueError) as error:
            logger.exception("request %s was refused", request.request_id)
            return [_failure(request.request_id, error)]
        return []

    def abort(self, request_id: str) -> None:
        """Drop a request; a token of it that is still in flight is thrown away when it comes."""
        self._scheduler.abort(request_id)

    def step(self) -> list[TokenOutput]:
        """Dispatch the next step, then wait for the oldest one if enough are out.

        A request whose parameters cannot be set up fails alone.  Any other error leaves the device in an unknown
        state and is the caller's: the engine cannot go on.
        """
        outputs: list[TokenOutput] = []
        plan = self._scheduler.schedule()
        if plan is not None:
            plan = self._admit(plan, outputs)
            self._in_flight.append(self._runner.dispatch(plan))
        if self._in_flight and (plan is None or len(self._in_flight) >= _STEPS_IN_FLIGHT):
            pending = self._in_flight.popleft()
            outputs += self._scheduler.commit(pending.plan, self._fetch(pending))
        return outputs

    def _fetch(self, pending: PendingStep) -> StepResult:
        """Wait for a step, and note who had to wait for whom."""
        is_late, asked_at = pending.is_ready, time.monotonic()
        result = self._runner.fetch(pending)
        now = time.monotonic()
        if self._resumed_at and self._in_flight:  # the device has the next step to go on with
            self._pace.observe(is_late=is_late, worked=asked_at - self._resumed_at, waited=now - asked_at)
            self._scheduler.burst_steps = self._pace.steps
        self._resumed_at = now if self._in_flight else 0.0
        return result

    def _admit(self, plan: StepPlan, outputs: list[TokenOutput]) -> StepPlan:
        """Set up the plan's new sequences.

        Those that fail are finished, but their tokens still run: the scheduler has offered their pages to the
        prefix cache, where the plan's other sequences may have found them.
        """
        failed_slots = set()
        for admission in plan.admissions:
            request_id = admission.request.request_id
            try:
                self._runner.admit(admission)
            except jax.errors.JaxRuntimeError:
                raise
            except Exception as error:  # one of the two places that catch: see docs/architecture.md
                logger.exception("request %s could not be set up", request_id)
                failed_slots.add(admission.slot)
                self._scheduler.abort(request_id)
                outputs.append(_failure(request_id, error))
        if not failed_slots:
            return plan
        entries = tuple(
            replace(entry, samples=False, prompt_targets=()) if entry.slot in failed_slots else entry
            for entry in plan.entries
        )
        return replace(plan, entries=entries)

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False while any page is in use."""
        return not self._in_flight and self._scheduler.allocator.reset_prefix_cache()

    def stats(self, compiles_after_ready: int) -> EngineStats:
        """A snapshot."""
        scheduler = self._scheduler
        counters = scheduler.counters
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_pages=scheduler.allocator.num_pages,
            num_free_pages=scheduler.allocator.num_free,
            prefix_cache_queries=counters.prefix_cache_queries,
            prefix_cache_hits=counters.prefix_cache_hits,
            num_preemptions=counters.num_preemptions,
            num_steps=counters.num_steps,
            compiles_after_ready=compiles_after_ready,
        )


def _unconstrained(request_id: str) -> TokenOutput:
    return TokenOutput(
        request_id=request_id,
        token_ids=[],
        finish_reason=FINISH_ERROR,
        error="Structured output is not supported yet: this engine does not follow grammars.",
        error_param="structured_outputs",
    )


def _failure(request_id: str, error: Exception) -> TokenOutput:
    return TokenOutput(
        request_id=request_id,
        token_ids=[],
        finish_reason=FINISH_ERROR,
        error=f"{type(error).__name__}: {error}",
    )
