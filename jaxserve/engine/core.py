"""The engine core: schedule, run, commit, with step n+1 dispatched while step n runs."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import jax
import numpy as np

from jaxserve.engine.calls import Call, Calls, CallThread
from jaxserve.engine.constraints import MaskMaker
from jaxserve.engine.pace import Pace
from jaxserve.engine.pending_step import PendingStep
from jaxserve.engine.plan import ON_DEVICE, Admission, StepPlan, StepResult
from jaxserve.engine.protocol import CoreRequest, EngineStats, TokenOutput
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.sequence import Sequence
from jaxserve.outputs import FINISH_ERROR
from jaxserve.structured.compiler import CompiledGrammar, GrammarCompiler
from jaxserve.structured.constraint import ConstraintError, TokenConstraint

logger = logging.getLogger(__name__)

_STEPS_IN_FLIGHT = 2  # one that runs and one that waits behind it
# Forced tokens that are run at once.  One saves nothing: the step in which it would have been sampled has begun.
_MIN_FORCED = 2
_MIN_FORCED_MIXED = 3  # where the step that runs them is a mixed one, slower for all than a decode step
_STUCK = (
    "what the answer must look like (structured_outputs, response_format or required tool calls) leaves no token to go "
    "on with: it is at odds with allowed_token_ids, bad_words, min_tokens or ignore_eos."
)
_NOTHING_ALLOWED = (
    "allowed_token_ids leaves no token to go on with: it is at odds with bad_words or min_tokens."
)


class AnyRunner(Protocol):
    """As much of a Runner as is needed here; that of several hosts has no more."""

    def admit(self, admission: Admission) -> None: ...

    def dispatch(self, plan: StepPlan) -> PendingStep: ...

    def start(self, plan: StepPlan) -> tuple[jax.Array, ...]: ...

    def finish(
        self, plan: StepPlan, outputs: tuple[jax.Array, ...], allowed: Mapping[int, np.ndarray]
    ) -> PendingStep: ...

    def fetch(self, pending: PendingStep) -> StepResult: ...


class EngineCore:
    """Scheduler and runner in one loop, which never waits for anything but the device.

    Between `start` and `stop` one thread steps it; over several devices a second one makes the calls.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: AnyRunner,
        grammars: GrammarCompiler | None = None,
        *,
        has_slow_calls: bool = False,
    ) -> None:
        """`has_slow_calls`: a call may last about as long as the program that it calls, as over several GPUs."""
        self._scheduler = scheduler
        self._runner = runner
        self._grammars = grammars
        self._mask_maker = None if grammars is None else MaskMaker(grammars.vocab_size)
        self._has_slow_calls = has_slow_calls
        self._calls = Calls(runner)
        self._in_flight: deque[Call] = deque()
        self._pace = Pace()
        self._resumed_at = 0.0  # when the last step had come back; 0 after a pause

    def start(self, prepare: Callable[[], None]) -> None:
        """Be ready for steps from the calling thread.  A second thread, if there is one, does `prepare` first."""
        if self._has_slow_calls:
            self._calls = CallThread(self._runner, prepare)

    def stop(self) -> None:
        """Make no more calls."""
        self._calls.stop()

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._in_flight) or self._scheduler.num_running + self._scheduler.num_waiting > 0

    def add(self, request: CoreRequest, compiled: CompiledGrammar | None = None) -> list[TokenOutput]:
        """Queue a request, which the front end has checked; its failure if it is impossible all the same.

        `compiled` is its grammar, if it has one.
        """
        try:
            self._scheduler.add(request, self._constraint(request, compiled))
        except ConstraintError as error:
            return [_own_fault(request.request_id, str(error), "structured_outputs")]
        except (AssertionError, OverflowError, TypeError, ValueError) as error:
            logger.exception("request %s was refused", request.request_id)
            return [failure(request.request_id, error)]
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
            if constrained := self._scheduler.constrained(plan):
                self._dispatch_constrained(plan, constrained, outputs)
            else:
                self._in_flight.append(self._calls.dispatch(plan))
        if self._in_flight and (plan is None or len(self._in_flight) >= _STEPS_IN_FLIGHT):
            oldest = self._in_flight.popleft()
            result = self._fetch(oldest, outputs)
            forced = self._advance(oldest.plan, result, outputs)
            outputs += self._scheduler.commit(oldest.plan, result, forced)
        return outputs

    def _constraint(self, request: CoreRequest, compiled: CompiledGrammar | None) -> TokenConstraint | None:
        if request.grammar is None:
            return None
        assert self._grammars is not None, "this engine was given no compiler of grammars"
        assert compiled is not None
        own_end_ids = (*request.eos_token_ids, *request.stop_token_ids)
        return TokenConstraint(self._grammars, request.grammar, compiled, own_end_ids)

    def _dispatch_constrained(
        self, plan: StepPlan, constrained: dict[int, Sequence], outputs: list[TokenOutput]
    ) -> None:
        """Dispatch a step with masks that its sampler has to wait for, while the forward pass does not.

        Where a mask depends on a token in flight, the step ahead is fetched while the device runs this one's forward
        pass, and committed once this one's sampler is queued.
        """
        self._calls.settle()
        hidden = self._runner.start(plan)
        ahead: tuple[StepPlan, StepResult, dict[int, list[int]]] | None = None
        gone_on: set[int] = set()  # sequences that have the token that they would sample here
        if any(plan.entries[row].token_ids[-1] == ON_DEVICE for row in constrained):
            oldest = self._in_flight.popleft()
            assert not self._in_flight, "a step with constraints waits for the one ahead"
            result = self._fetch(oldest, outputs)
            ahead = oldest.plan, result, self._advance(oldest.plan, result, outputs)
            gone_on = {oldest.plan.entries[index].seq_id for index in ahead[2]}
        rows = {row: seq for row, seq in constrained.items() if seq.seq_id not in gone_on}
        masks, complete = self._make_masks(rows, outputs)
        entries = tuple(
            replace(entry, samples=False) if row in constrained and row not in masks else entry
            for row, entry in enumerate(plan.entries)
        )
        pending = self._runner.finish(replace(plan, entries=entries), hidden, masks)
        self._in_flight.append(Call.of(pending))
        if ahead is not None:
            outputs += self._scheduler.commit(*ahead)  # which ends those that are complete
        for row in complete.union(pending.stuck) & rows.keys():
            self._fail(rows[row].request.request_id, ConstraintError(_STUCK), outputs)

    def _make_masks(
        self, rows: dict[int, Sequence], outputs: list[TokenOutput]
    ) -> tuple[dict[int, np.ndarray], set[int]]:
        """Masks of rows, and the rows to which nothing is left to say; those that fail have neither."""
        assert self._mask_maker is not None
        constraints = {row: seq.constraint for row, seq in rows.items() if seq.constraint is not None}
        made = self._mask_maker.masks(constraints)
        for row, error in made.errors.items():
            self._fail(rows[row].request.request_id, error, outputs)
        return made.masks, made.complete

    def _advance(
        self, plan: StepPlan, result: StepResult, outputs: list[TokenOutput]
    ) -> dict[int, list[int]]:
        """Let constraints take a step's tokens; the tokens that they force next, by the entry's index."""
        forced: dict[int, list[int]] = {}
        least = _MIN_FORCED if self._scheduler.has_room_for_chunks else _MIN_FORCED_MIXED
        for index, seq in self._scheduler.constrained(plan).items():
            assert seq.constraint is not None
            (token_id,) = result.token_ids[index]
            try:
                seq.constraint.accept(token_id)
            except ConstraintError as error:
                self._fail(seq.request.request_id, error, outputs)
                continue
            if tokens := seq.take_forced(1, least=least):
                forced[index] = tokens
        return forced

    def _fail(self, request_id: str, error: ConstraintError, outputs: list[TokenOutput]) -> None:
        """End a request that cannot go on, unless it has ended."""
        if self._scheduler.abort(request_id):
            outputs.append(_own_fault(request_id, str(error), "structured_outputs"))

    def _fetch(self, call: Call, outputs: list[TokenOutput]) -> StepResult:
        """Wait for a step, note who had to wait for whom, and end those to whom their parameters left no token."""
        asked_at = time.monotonic()
        pending = call.made.result()
        result = self._runner.fetch(pending)
        now = time.monotonic()
        if self._resumed_at and self._in_flight:
            # The host is at work until the device has the next step to go on with.
            following = self._in_flight[-1]
            ready_at = min(max(asked_at, following.made_at), now)
            worked, waited = ready_at - self._resumed_at, now - ready_at
            self._pace.observe(call.plan.num_steps, worked, waited, is_single=following.plan.is_single)
            self._scheduler.burst_steps = self._pace.steps
        self._resumed_at = now if self._in_flight else 0.0
        for row in pending.stuck:
            request = self._scheduler.request_of(call.plan.entries[row])
            if request is not None and self._scheduler.abort(request.request_id):
                outputs.append(_own_fault(request.request_id, _NOTHING_ALLOWED, "allowed_token_ids"))
        return result

    def _admit(self, plan: StepPlan, outputs: list[TokenOutput]) -> StepPlan:
        """Set up the plan's new sequences.

        Those that fail are finished, but their tokens still run: the scheduler has offered their pages to the
        prefix cache, where the plan's other sequences may have found them.
        """
        failed_slots = set()
        if plan.admissions:
            self._calls.settle()
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
                outputs.append(failure(request_id, error))
        if not failed_slots:
            return plan
        entries = tuple(
            replace(entry, samples=False, prompt_targets=()) if entry.slot in failed_slots else entry
            for entry in plan.entries
        )
        return replace(plan, entries=entries)

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False while any page is in use."""
        return self._scheduler.allocator.reset_prefix_cache()

    def stats(self, compiles_after_ready: int) -> EngineStats:
        """A snapshot."""
        scheduler = self._scheduler
        counters = scheduler.counters
        mm_cache_queries, mm_cache_hits = scheduler.image_cache_counts
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_pages=scheduler.allocator.num_pages,
            num_free_pages=scheduler.allocator.num_free,
            prefix_cache_queries=counters.prefix_cache_queries,
            prefix_cache_hits=counters.prefix_cache_hits,
            mm_cache_queries=mm_cache_queries,
            mm_cache_hits=mm_cache_hits,
            num_preemptions=counters.num_preemptions,
            num_steps=counters.num_steps,
            compiles_after_ready=compiles_after_ready,
        )


def _own_fault(request_id: str, error: str, param: str) -> TokenOutput:
    return TokenOutput(
        request_id=request_id, token_ids=[], finish_reason=FINISH_ERROR, error=error, error_param=param
    )


def failure(request_id: str, error: BaseException) -> TokenOutput:
    """The end of a request that an error of the server's own ended."""
    return TokenOutput(
        request_id=request_id,
        token_ids=[],
        finish_reason=FINISH_ERROR,
        error=f"{type(error).__name__}: {error}",
    )
