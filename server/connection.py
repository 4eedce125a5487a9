"""One client's connection: uvicorn's, with limits on the head of a request and on the wait for it."""

from __future__ import annotations

import asyncio
from typing import Any

from jaxserve.server.connection_end import GentleEnd
from jaxserve.server.errors import ApiError

MAX_HEAD_BYTES = 64 * 1024  # of the request line and the headers
MAX_HEADERS = 256
MAX_PIPELINED = 512  # requests that wait for those before them; each takes some kilobytes


class Connection(GentleEnd):
    """Refuses heads that are too long, too slow or no HTTP, with the API's own error objects.

    uvicorn reads a head of any length, waits for it forever, and answers what is no HTTP in plain text.
    """

    def __init__(self, *args: Any, receive_timeout: float, **kwargs: Any) -> None:
        """`receive_timeout` is the seconds that a head may take to arrive."""
        super().__init__(*args, **kwargs)
        self._receive_timeout = receive_timeout
        self._timer: asyncio.TimerHandle | None = None  # runs while a head is awaited
        self._is_in_head = False  # a head has begun and is not complete
        self._num_fragment_bytes = 0  # in reads that neither completed a head nor had any of a body
        self._num_new_bytes = 0  # of the latest read, unless it completed something
        self._num_field_bytes = 0  # of the head's complete fields
        self._head_error: ApiError | None = (
            None  # why the parser stopped, if it was not for what it read itself
        )

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # as uvicorn's own
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_new_bytes = len(data)
        super().data_received(data)
        if self.is_over:
            return
        if self._is_in_head or (self.cycle is not None and self.cycle.more_body):
            self._num_fragment_bytes += self._num_new_bytes
            if self._num_fragment_bytes > MAX_HEAD_BYTES:
                self._refuse_head(_too_long())
                return
        if (
            self._timer is None
            and not self._is_in_head
            and (self.cycle is None or self.cycle.response_complete)
        ):
            self._await_head()  # line ends between requests, which the parser skips

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._num_fragment_bytes = self._num_field_bytes = 0
        if self._timer is None:
            self._await_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._stop_parser(
                ApiError(431, f"The request has more than {MAX_HEADERS} headers.", param="headers")
            )

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError(f"more than {MAX_PIPELINED} requests wait for those before them")
        self._is_in_head = False
        self._num_new_bytes = self._num_fragment_bytes = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_new_bytes = self._num_fragment_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_new_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's name for the end of a connection whose bytes the parser, or a callback of ours, refused."""
        self._refuse_head(self._head_error or ApiError(400, msg))

    def _count(self, num_bytes: int) -> None:
        self._num_field_bytes += num_bytes
        if self._num_field_bytes > MAX_HEAD_BYTES:
            self._stop_parser(_too_long())

    def _stop_parser(self, error: ApiError) -> None:
        self._head_error = error
        raise ValueError(error.message)  # out of the parser, which then refuses all that follows

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(self._receive_timeout, self._end_wait)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_wait(self) -> None:
        self._timer = None
        if self._is_in_head:
            self._refuse_head(ApiError(408, "The request's head did not arrive in time.", param="headers"))
        else:
            self._close()

    def _refuse_head(self, error: ApiError) -> None:
        self._is_in_head = False
        self._stop_waiting()
        self._refuse(error)


def _too_long() -> ApiError:
    return ApiError(
        431, f"The request line and headers are longer than {MAX_HEAD_BYTES} bytes.", param="headers"
    )
