"""The requests in flight: each output of the engine finds its answer, and its end is told to whom it concerns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from jaxserve.errors import RequestError
from jaxserve.outputs import FINISH_ABORT, FINISH_ERROR, FINISH_STOP

if TYPE_CHECKING:
    from jaxserve.engine.protocol import TokenOutput
    from jaxserve.observer import Observer
    from jaxserve.request_state import RequestState


class OutputProcessor:
    """The requests in flight, and the way from a core request's id to its answer."""

    def __init__(self) -> None:
        self.observer: Observer | None = None
        self._num_new_tokens = 0  # of the step being processed, for the observer
        self._pauses: list[float] = []  # likewise
        self._requests: dict[str, RequestState] = {}
        self._answers: dict[str, tuple[RequestState, int]] = {}  # by core request id; only running ones

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_sequences(self) -> int:
        """Answers that the engine still works on."""
        return len(self._answers)

    @property
    def requests(self) -> list[RequestState]:
        """The requests in flight, oldest first."""
        return list(self._requests.values())

    def add(self, request: RequestState) -> None:
        """Expect outputs for a request.  Raises RequestError when its id is in use."""
        if request.request_id in self._requests:
            raise RequestError(
                f"request_id {request.request_id!r} is in use by a request in flight; give another.",
                param="request_id",
            )
        self._requests[request.request_id] = request
        for index, core in enumerate(request.core_requests):
            self._answers[core.request_id] = (request, index)

    def drop(self, request_id: str, reason: str = FINISH_ABORT) -> list[str]:
        """Forget a request, if known; the core requests of it that the engine must be told to abort.

        The observer hears that its running answers ended for `reason`.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        request.let_pixels_go()
        running = [core.request_id for core in request.core_requests if core.request_id in self._answers]
        for core_id in running:
            _, index = self._answers.pop(core_id)
            self._observe_end(request, index, reason)
        return running

    def process(self, outputs: Iterable[TokenOutput]) -> tuple[list[RequestState], list[str]]:
        """Take one step's outputs: the requests that changed, and the core requests to abort.

        A request that has ended is forgotten here.  Outputs of forgotten requests are late and dropped.
        """
        changed: dict[str, RequestState] = {}
        aborts: list[str] = []
        self._num_new_tokens = 0
        self._pauses.clear()
        for output in outputs:
            answer = self._answers.get(output.request_id)
            if answer is None:
                continue
            request, index = answer
            changed[request.request_id] = request
            if output.error is not None:
                del self._answers[output.request_id]
                self._observe_end(request, index, FINISH_ERROR)
                request.fail(output)
                aborts += self.drop(request.request_id, FINISH_ERROR)
            elif self._push(request, index, output):
                del self._answers[output.request_id]
                self._observe_end(request, index, request.answer(index).finish_reason or FINISH_STOP)
                if output.finish_reason is None:  # a stop string: the engine does not know yet
                    aborts.append(output.request_id)
                if request.is_finished:
                    del self._requests[request.request_id]
        if self.observer is not None and self._num_new_tokens:
            self.observer.on_tokens(self._num_new_tokens, self._pauses)
        return list(changed.values()), aborts

    def _push(self, request: RequestState, index: int, output: TokenOutput) -> bool:
        answer = request.answer(index)
        times, num_before = answer.times, len(answer.token_ids)
        has_ended = request.push(index, output)
        num_new = len(answer.token_ids) - num_before
        is_first, pause = num_before == 0, output.time - times.last_token
        times.scheduled, times.last_token = output.scheduled_time, output.time
        if is_first:
            times.first_token = output.time
        if self.observer is not None and num_new:
            self._num_new_tokens += num_new
            if is_first:
                self.observer.on_first_token(request, index, times)
            else:
                self._pauses += [pause / num_new] * num_new
        return has_ended

    def _observe_end(self, request: RequestState, index: int, reason: str) -> None:
        if self.observer is not None:
            answer = request.answer(index)
            self.observer.on_end(request, len(answer.token_ids), reason, answer.times)
