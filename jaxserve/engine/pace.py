"""How many decode steps a plan holds: as many as it takes for the device never to wait for the host."""

from __future__ import annotations

MAX_BURST = 8  # what comes out of a burst comes at once, and a new request waits for its end
_LATE = 4  # times in a row that the device was found waiting, before bursts grow
_EARLY = 32  # and times that the host waited for longer than it worked, before they shrink
_SPARE = 1.5  # times the host's work that its waiting must exceed: half the burst would leave some of it


class Pace:
    """Doubles and halves the bursts' length, by who waits for whom.

    Answers do not depend on it: a token is a function of its sequence alone.
    """

    def __init__(self) -> None:
        self.steps = 1
        self._late = 0
        self._early = 0

    def observe(self, *, is_late: bool, worked: float, waited: float) -> None:
        """One turn of the loop: whether the device had finished before the host came to ask, and the host's seconds."""
        if is_late:
            self._late, self._early = self._late + 1, 0
            if self._late >= _LATE:
                self.steps, self._late = min(2 * self.steps, MAX_BURST), 0
            return
        self._late = 0
        self._early = self._early + 1 if waited > _SPARE * worked else 0
        if self._early >= _EARLY:
            self.steps, self._early = max(self.steps // 2, 1), 0
