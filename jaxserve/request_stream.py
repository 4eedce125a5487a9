"""The async iterator over one request's outputs; letting go of it aborts the request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from jaxserve.outputs import RequestOutput
    from jaxserve.request_state import RequestState


# Positions of a prompt with log-probabilities beyond which giving them texts would hold up the event loop: a hundred
# with 20 candidates each take some 2 ms.
LONG_PROMPT = 100


class Inbox:
    """Where a request's outputs gather until its reader takes them; whatever gathers is one output.

    Lives apart from the reader, so that a reader that nobody holds any more is noticed.
    """

    __slots__ = ("_error", "_loop", "_waiter", "state")

    def __init__(self, state: RequestState, loop: asyncio.AbstractEventLoop) -> None:
        self.state = state
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None

    def wake(self) -> None:
        """The state has changed: let the reader look."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        """Nothing more comes: the reader gets `error` at once."""
        self._error = error
        self.wake()

    async def next(self) -> RequestOutput:
        """Wait for something to say.  Raises what ended the request, if it failed."""
        while True:
            if self._error is not None:
                raise self._error
            if self.state.num_untold_positions > LONG_PROMPT:
                await asyncio.to_thread(self.state.tell_prompt)
                continue  # what has come meanwhile may be its end
            output = self.state.take()
            if output is not None:
                return output
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None


class RequestStream(AsyncIterator["RequestOutput"]):
    """Outputs of one submitted request, as they come.

    The request is aborted when the stream is closed, when a wait for its next output is cancelled, or when
    the last reference to the stream goes.  `async with` closes it on the way out.  For one reader.
    """

    def __init__(self, inbox: Inbox, loop: asyncio.AbstractEventLoop, drop: Callable[[Inbox], None]) -> None:
        self._inbox = inbox
        self._loop = loop
        self._drop = drop
        self._is_over = False

    @property
    def request_id(self) -> str:
        """The id under which `AsyncLLM.abort` knows the request."""
        return self._inbox.state.request_id

    @property
    def max_tokens(self) -> int:
        """Tokens that the answer may have: what was asked for, cut to the room that the prompt leaves."""
        max_tokens = self._inbox.state.core_requests[0].params.max_tokens
        assert max_tokens is not None
        return max_tokens

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt as the engine sees it, known before the first output."""
        return self._inbox.state.core_requests[0].prompt_token_ids

    async def __anext__(self) -> RequestOutput:
        if self._is_over:
            raise StopAsyncIteration
        try:
            output = await self._inbox.next()
        except BaseException:  # cancelled, or the request failed: either way nobody reads on
            self.close()
            raise
        self._is_over = output.finished
        return output

    def close(self) -> None:
        """Abort the request unless it has ended.  Closing twice is fine."""
        if not self._is_over:
            self._is_over = True
            self._drop(self._inbox)

    async def aclose(self) -> None:
        """`close`, under the name that async generators have."""
        self.close()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Collection may run on any thread, the registry belongs to the loop's.
        if not self._is_over:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._drop, self._inbox)
