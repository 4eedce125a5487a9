"""One client's connection: uvicorn's, with limits on what a client sends before a request is one, or leaves unread."""

from __future__ import annotations

import asyncio
from collections import deque
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from jaxserve.server.errors import ApiError
from jaxserve.server.http_versions import AnyVersion

MAX_HEAD_BYTES = 64 * 1024  # of the request line and the headers
MAX_HEADERS = 256
MAX_PIPELINED = 512  # requests that wait for those before them; each takes some kilobytes
LINGER_SECONDS = 5.0  # that a client may go on sending after it has its answer
STALL_SECONDS = 300.0  # in which nothing of an answer is taken; the system, too, holds some megabytes of it


class Connection(AnyVersion):
    """Refuses heads that are too long, too slow or no HTTP, with the API's own error objects; lets clients read them.

    uvicorn reads a head of any length, waits for it forever, and answers what is no HTTP in plain text.  It also waits
    forever for those who do not read, and closes before an answer to what still comes in can be read.
    """

    def __init__(self, *args: Any, receive_timeout: float, **kwargs: Any) -> None:
        """`receive_timeout` is the seconds that a head may take to arrive."""
        super().__init__(*args, **kwargs)
        self._receive_timeout = receive_timeout
        self._timer: asyncio.TimerHandle | None = None  # runs while a head is awaited
        self._linger: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None  # runs while much is unread, or any behind the end
        self._is_in_head = False  # a head has begun and is not complete
        self._num_fragment_bytes = 0  # in reads that neither completed a head nor had any of a body
        self._num_new_bytes = 0  # of the latest read, unless it completed something
        self._num_field_bytes = 0  # of the head's complete fields
        self._refusal: ApiError | None = None
        self._is_refused = False
        self._cycles: deque[RequestResponseCycle] = deque()  # requests without a whole answer, and some with

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # as uvicorn's own
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._unset_keepalive_if_required()  # uvicorn does so behind clean ends
        for timer in (self._linger, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        for cycle in self._cycles:  # uvicorn tells the newest alone
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return  # what follows is not looked at
        self._num_new_bytes = len(data)
        super().data_received(data)
        if self._is_refused or self.transport.is_closing():
            return
        if self._is_in_head or (self.cycle is not None and self.cycle.more_body):
            self._num_fragment_bytes += self._num_new_bytes
            if self._num_fragment_bytes > MAX_HEAD_BYTES:
                self._refuse(_too_long())
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
            self._refusal = ApiError(
                431, f"The request has more than {MAX_HEADERS} headers.", param="headers"
            )
            raise ValueError(self._refusal.message)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError(f"more than {MAX_PIPELINED} requests wait for those before them")
        self._is_in_head = False
        self._num_new_bytes = self._num_fragment_bytes = 0
        self._stop_waiting()
        super().on_headers_complete()
        if self._offers_upgrade:
            return
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        self._cycles.append(self.cycle)
        if not self.parser.should_keep_alive():
            self.cycle.keep_alive = False  # to older uvicorns, too, which see it later or not at all
        if not self.cycle.keep_alive:
            self._close_gently(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._num_new_bytes = self._num_fragment_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_new_bytes = 0
        super().on_message_complete()
        if not self._offers_upgrade:
            self.cycle.more_body = False  # also behind its answer, where uvicorn leaves it

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()
            return
        cycle = self.cycle
        if self._linger is None and cycle.response_complete and cycle.more_body:
            self._linger = self.loop.call_later(LINGER_SECONDS, self._end_linger, cycle)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None and not self.transport.is_closing():
            self._stall.cancel()
            self._stall = None

    def timeout_keep_alive_handler(self) -> None:
        """uvicorn's name for the end of a connection without requests."""
        self._close()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's name for the end of a connection whose bytes the parser, or a callback of ours, refused."""
        self._refuse(self._refusal or ApiError(400, msg))

    def _count(self, num_bytes: int) -> None:
        self._num_field_bytes += num_bytes
        if self._num_field_bytes > MAX_HEAD_BYTES:
            self._refusal = _too_long()
            raise ValueError(self._refusal.message)  # out of the parser, which then refuses all that follows

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(self._receive_timeout, self._end_wait)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_wait(self) -> None:
        self._timer = None
        if self._is_in_head:
            self._refuse(ApiError(408, "The request's head did not arrive in time.", param="headers"))
        else:
            self._close()

    def _await_reader(self, num_unread: int) -> None:
        self._stall = self.loop.call_later(STALL_SECONDS, self._end_stall, num_unread)

    def _end_stall(self, num_before: int) -> None:
        # Nothing is added while it is so large, or behind the end.
        num_unread = self.transport.get_write_buffer_size()
        if num_unread < num_before:
            self._await_reader(num_unread)
        else:
            self.transport.abort()

    def _close(self) -> None:
        """Close as soon as all is read, or nothing more of it."""
        if not self.transport.is_closing():
            self.transport.close()  # behind a second call, TLS could no longer be aborted
        if self._stall is None and (num_unread := self.transport.get_write_buffer_size()):
            self._await_reader(num_unread)

    def _close_gently(self, cycle: RequestResponseCycle) -> None:
        """Let an answer behind which the connection ends be read by a client that still sends."""
        send = cycle.send

        async def sent(message: Any) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not (is_last and cycle.more_body):
                await send(message)
                return
            cycle.keep_alive = True  # to uvicorn, which would close here
            await send(message)
            if not self._is_refused and not self.transport.is_closing():
                self._hang_up()

        cycle.send = sent

    def _end_linger(self, cycle: Any) -> None:
        self._linger = None
        if self._is_refused or (self.cycle is cycle and cycle.more_body):
            self._close()

    def _refuse(self, error: ApiError) -> None:
        """Say why and close; in the middle of an answer, only close."""
        self._is_refused, self._is_in_head = True, False
        self._stop_waiting()
        cycle = self.cycle
        if cycle is not None and cycle.response_complete and cycle.more_body:
            self._hang_up()  # it has its answer
            return
        if cycle is not None and not cycle.response_complete:
            # A body that breaks off has no answer yet, unless it waits for that of a request before it.
            if cycle.response_started or not cycle.more_body or self.pipeline:
                self._close()
                return
            cycle.disconnected = True  # to the application the client is gone
            cycle.message_event.set()
        body = error.to_json()
        self.transport.write(
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n".encode()
            + body
        )
        self._hang_up()

    def _hang_up(self) -> None:
        """Nothing more is said or listened to."""
        self._is_refused = True
        if not self.transport.can_write_eof():  # TLS has no half-closed connections
            self._close()
            return
        # Closing while the client still sends would reset the connection before it has read all.
        self.transport.write_eof()
        if self._linger is not None:
            self._linger.cancel()
        self._linger = self.loop.call_later(LINGER_SECONDS, self._end_linger, None)


def _too_long() -> ApiError:
    return ApiError(
        431, f"The request line and headers are longer than {MAX_HEAD_BYTES} bytes.", param="headers"
    )
