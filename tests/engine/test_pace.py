"""Bursts grow while the device waits for the host, and shrink when they need not be so long."""

from __future__ import annotations

from jaxserve.engine.pace import MAX_BURST, Pace


def late(pace: Pace, times: int) -> None:
    for _ in range(times):
        pace.observe(is_late=True, worked=0.007, waited=0.0)


def early(pace: Pace, times: int, waited: float) -> None:
    for _ in range(times):
        pace.observe(is_late=False, worked=0.007, waited=waited)


def test_one_late_step_is_no_reason() -> None:
    pace = Pace()
    for _ in range(50):
        late(pace, 3)
        early(pace, 1, waited=0.001)
    assert pace.steps == 1


def test_a_slow_host_gets_longer_bursts_up_to_the_limit() -> None:
    pace = Pace()
    late(pace, 4)
    assert pace.steps == 2
    late(pace, 100)
    assert pace.steps == MAX_BURST


def test_a_device_that_is_busy_for_longer_gets_shorter_ones() -> None:
    pace = Pace()
    late(pace, 100)
    early(pace, 100, waited=0.007)  # half as long would leave the device waiting
    assert pace.steps == MAX_BURST
    early(pace, 200, waited=0.020)
    assert pace.steps == 1
