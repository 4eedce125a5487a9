"""How many decode steps a plan holds: as many as it takes for the device never to wait for the host."""

from __future__ import annotations

MAX_BURST = 8  # what comes out of a burst comes at once, and a new request waits for its end
_GROW_BELOW = (
    0.5  # times the host's work that its waiting should last: less, and a hiccup leaves the device idle
)
_SHRINK_ABOVE = 4.0  # half as long a burst would then still leave it waiting for more than it works
_HURRIED = 4  # plans in a row that leave too little, before bursts grow
_IDLE = 32  # and that leave too much, before they shrink


class Pace:
    """Doubles and halves the bursts' length, by how long the host waits for the device.

    Answers do not depend on it: a token is a function of its sequence alone.
    """

    def __init__(self) -> None:
        self.steps = 1
        self._hurried = 0
        self._idle = 0

    def observe(self, worked: float, waited: float) -> None:
        """One plan's turn: the host's seconds, of planning and of waiting for the oldest plan to come back."""
        self._hurried = self._hurried + 1 if waited < _GROW_BELOW * worked else 0
        self._idle = self._idle + 1 if waited > _SHRINK_ABOVE * worked else 0
        if self._hurried >= _HURRIED:
            self.steps, self._hurried = min(2 * self.steps, MAX_BURST), 0
        if self._idle >= _IDLE:
            self.steps, self._idle = max(self.steps // 2, 1), 0
