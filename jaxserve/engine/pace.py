"""How many decode steps a plan holds: as many as it takes for the device never to wait for the host."""

from __future__ import annotations

import math

MAX_BURST = 8  # what comes out of a burst comes at once, and a new request waits for its end
_GROW_BELOW = (
    0.5  # times the host's work that its waiting should last: less, and a hiccup leaves the device idle
)
_SHRINK_ABOVE = 4.0  # half as long a burst would then still leave it waiting for more than it works
_SLOW_DEVICE = (
    2.0  # times the host's work for a single step that the device takes for one: no need for bursts
)
_HURRIED = 4  # plans in a row that leave too little, before bursts grow
_IDLE = 32  # and that leave too much, before they shrink
_FORGET = 1.1  # how fast the least work for a single step is forgotten, a step


class Pace:
    """Doubles and halves the bursts' length, by how long the host waits for the device.

    Answers do not depend on it: a token is a function of its sequence alone.
    """

    def __init__(self) -> None:
        self.steps = 1
        self._single = math.inf  # the host's work for one decode step, about
        self._hurried = 0
        self._idle = 0

    def observe(self, num_steps: int, worked: float, waited: float, *, is_single: bool) -> None:
        """One plan's turn: its steps, and the host's seconds, of planning and calling and of waiting for the device.

        The call of a burst may return only as the burst ends, which looks like work: so its length is also judged by
        the host's work for single steps, when there last were some.  `is_single`: the host worked for one, decoding.
        """
        if is_single:
            self._single = min(worked, _FORGET * self._single)
        is_slow = worked + waited > _SLOW_DEVICE * num_steps * self._single
        self._hurried = self._hurried + 1 if waited < _GROW_BELOW * worked else 0
        self._idle = self._idle + 1 if waited > _SHRINK_ABOVE * worked or (num_steps > 1 and is_slow) else 0
        if self._hurried >= _HURRIED:
            self.steps, self._hurried = min(2 * self.steps, MAX_BURST), 0
        if self._idle >= _IDLE:
            self.steps, self._idle = max(self.steps // 2, 1), 0
