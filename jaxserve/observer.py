"""Who wants to know how answers come along, and the times that they are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jaxserve.request_state import RequestState


@dataclass(slots=True)
class AnswerTimes:
    """When an answer got how far, in seconds of time.monotonic(); 0 where it has not got there yet."""

    arrival: float  # at the door
    scheduled: float = 0.0  # its first tokens were put into a step
    first_token: float = 0.0
    last_token: float = 0.0


class Observer(Protocol):
    """Is told how answers come along, for /metrics; on the thread that processes the engine's outputs."""

    def on_first_token(self, request: RequestState, index: int, times: AnswerTimes) -> None:
        """Answer `index` has its first token."""
        ...

    def on_tokens(self, num_tokens: int, pauses: Sequence[float]) -> None:
        """A step brought tokens to all answers together; `pauses` are the seconds that each took after the first.

        `pauses` is the caller's again afterwards.
        """
        ...

    def on_end(self, request: RequestState, num_tokens: int, finish_reason: str, times: AnswerTimes) -> None:
        """An answer of `num_tokens` has ended."""
        ...
