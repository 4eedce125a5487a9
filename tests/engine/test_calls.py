"""Calls that last are made in order on a thread of their own, and what they raise comes to whoever waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from jaxserve.engine.calls import CallThread
from jaxserve.engine.pending_step import PendingStep
from jaxserve.engine.plan import StepPlan
from tests.patience import PATIENCE


class SlowRunner:
    """Makes no call before `may_go` is set, and none at all of a plan of two steps."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.made: list[StepPlan] = []
        self.threads: set[int] = set()

    def dispatch(self, plan: StepPlan) -> PendingStep:
        assert self.may_go.wait(PATIENCE)
        self.threads.add(threading.get_ident())
        if plan.num_steps == 2:
            raise ValueError("no call of two steps")
        self.made.append(plan)
        return PendingStep(plan, sampled=[], num_logprobs=[], prompt_scores={}, num_prompt_logprobs=[])


def plan(num_steps: int = 1) -> StepPlan:
    return StepPlan(admissions=(), entries=(), num_steps=num_steps)


@pytest.fixture
def runner() -> SlowRunner:
    return SlowRunner()


@pytest.fixture
def prepared() -> list[int]:
    return []


@pytest.fixture
def calls(runner: SlowRunner, prepared: list[int]) -> Iterator[CallThread]:
    calls = CallThread(runner, lambda: prepared.append(threading.get_ident()))
    yield calls
    runner.may_go.set()
    calls.stop()


def test_the_owner_goes_on_and_calls_keep_their_order(
    calls: CallThread, runner: SlowRunner, prepared: list[int]
) -> None:
    plans = [plan() for _ in range(5)]
    made = [calls.dispatch(each) for each in plans]
    assert not any(call.made.done() for call in made)
    runner.may_go.set()
    calls.settle()
    assert all(given is taken for given, taken in zip(plans, runner.made, strict=True))
    assert [call.made.result(timeout=0).plan for call in made] == plans
    assert sorted(call.made_at for call in made) == [call.made_at for call in made]
    assert runner.threads == set(prepared) != {threading.get_ident()}


def test_what_a_call_raises_is_raised_to_who_waits(calls: CallThread, runner: SlowRunner) -> None:
    runner.may_go.set()
    calls.settle()  # nothing was called yet
    call = calls.dispatch(plan(num_steps=2))
    with pytest.raises(ValueError, match="no call of two steps"):
        call.made.result(PATIENCE)
    with pytest.raises(ValueError, match="no call of two steps"):
        calls.settle()


def test_after_one_that_failed_no_call_is_made(calls: CallThread, runner: SlowRunner) -> None:
    """Queued before or behind: the device is in an unknown state, and other hosts may take no part."""
    queued = [calls.dispatch(plan(num_steps)) for num_steps in (1, 2, 1)]
    runner.may_go.set()
    for call in (*queued[1:], calls.dispatch(plan())):
        with pytest.raises(ValueError, match="no call of two steps"):
            call.made.result(PATIENCE)
    with pytest.raises(ValueError, match="no call of two steps"):
        calls.settle()
    calls.stop()
    assert runner.made == [queued[0].plan]
