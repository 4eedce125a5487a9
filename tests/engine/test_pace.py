"""Bursts grow while the device waits for the host or nearly does, and shrink when they need not be so long."""

from __future__ import annotations

from jaxserve.engine.pace import MAX_BURST, Pace

WORKED = 0.007


def turn(pace: Pace, worked: float, waited: float) -> None:
    """Plans as long as the pace says follow each other."""
    pace.observe(pace.steps, worked, waited, is_single=pace.steps == 1)


def turns(pace: Pace, times: int, waited: float) -> None:
    for _ in range(times):
        turn(pace, WORKED, waited)


def test_a_few_hurried_plans_are_no_reason() -> None:
    pace = Pace()
    for _ in range(50):
        turns(pace, 3, waited=0.0)
        turns(pace, 1, waited=WORKED)
    assert pace.steps == 1


def test_a_slow_host_gets_longer_bursts_up_to_the_limit() -> None:
    pace = Pace()
    turns(pace, 4, waited=0.3 * WORKED)
    assert pace.steps == 2
    turns(pace, 100, waited=0.0)
    assert pace.steps == MAX_BURST


def test_a_device_that_is_busy_for_longer_gets_shorter_ones() -> None:
    pace = Pace()
    turns(pace, 100, waited=0.0)
    turns(pace, 100, waited=3 * WORKED)  # half as long would leave little to wait for
    assert pace.steps == MAX_BURST
    turns(pace, 200, waited=5 * WORKED)
    assert pace.steps == 1


def test_each_burst_settles() -> None:
    """A host whose work does not grow with the burst, before a device of 1.2 times its time a step."""
    pace = Pace()
    lengths = []
    for _ in range(200):
        turn(pace, WORKED, max(0.0, 1.2 * WORKED * pace.steps - WORKED))
        lengths.append(pace.steps)
    assert set(lengths[-150:]) == {2}


def test_calls_that_last_as_long_as_the_device_is_busy() -> None:
    """Whether bursts are worth their while then shows in what single steps took the host."""
    for device, wanted in ((0.9 * WORKED, MAX_BURST), (3 * WORKED, 1)):
        pace = Pace()
        turns(pace, 100, waited=0.0)
        for _ in range(200):
            if pace.steps == MAX_BURST:  # one program
                turn(pace, device * MAX_BURST, 0.0)
            else:
                turn(pace, WORKED, max(0.0, device * pace.steps - WORKED))
        assert pace.steps == wanted


def test_calls_of_prompts_say_nothing_of_single_decode_steps() -> None:
    """Theirs may be quick: of many rows nothing is recorded anew."""
    pace = Pace()
    turns(pace, 100, waited=0.0)
    lengths = set()
    for _ in range(50):
        pace.observe(1, 0.1 * WORKED, 4 * WORKED, is_single=False)
        for _ in range(40):
            turn(pace, 0.9 * WORKED * pace.steps, 0.0)
            lengths.add(pace.steps)
    assert lengths == {MAX_BURST}
