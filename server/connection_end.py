"""How a connection ends: what was said is read first, or given up where nobody reads."""

from __future__ import annotations

import asyncio
from collections import deque
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from jaxserve.server.errors import ApiError
from jaxserve.server.http_versions import AnyVersion

LINGER_SECONDS = 5.0  # that a client may go on sending after it has its answer
STALL_SECONDS = 300.0  # in which nothing of an answer is taken; the system, too, holds some megabytes of it


class GentleEnd(AnyVersion):
    """Lets clients that still send read their last answer, waits for slow readers and gives up those who do not read.

    uvicorn closes before an answer to what still comes in can be read, waits forever for those who do not read, tells
    the newest request alone that its client has left, and while others wait behind one does not see it leave.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._linger: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None  # runs while much is unread, or any behind the end
        self._is_refused = False
        self._cycles: deque[RequestResponseCycle] = deque()  # requests without a whole answer, and some with
        self._num_waiting_bytes = 0  # of the bodies of requests that wait for those before them

    @property
    def is_over(self) -> bool:
        """Whether nothing that comes is looked at any more."""
        return self._is_refused or self.transport.is_closing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_keepalive_if_required()  # uvicorn does so behind clean ends
        for timer in (self._linger, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        for cycle in self._cycles:  # uvicorn tells the newest alone
            _tell_gone(cycle)

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self._offers_upgrade:
            return
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        self._cycles.append(self.cycle)
        if self.pipeline:
            if len(self.pipeline) == 1:
                self._num_waiting_bytes = 0
            if self._num_waiting_bytes <= HIGH_WATER_LIMIT:
                self.flow.resume_reading()  # or nobody would see the client leave
        if not self.parser.should_keep_alive():
            self.cycle.keep_alive = False  # to older uvicorns, too, which see it later or not at all
        if not self.cycle.keep_alive:
            self._close_gently(self.cycle)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.pipeline:
            self._num_waiting_bytes += len(body)
            if self._num_waiting_bytes > HIGH_WATER_LIMIT:
                self.flow.pause_reading()

    def on_message_complete(self) -> None:
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

    def _refuse(self, error: ApiError) -> None:
        """Say why and close; in the middle of an answer, only close."""
        self._is_refused = True
        cycle = self.cycle
        if cycle is not None and cycle.response_complete and cycle.more_body:
            self._hang_up()  # it has its answer
            return
        if cycle is not None and not cycle.response_complete:
            # A body that breaks off has no answer yet, unless it waits for that of a request before it.
            if cycle.response_started or not cycle.more_body or self.pipeline:
                self._close()
                return
            _tell_gone(cycle)  # to the application the client is gone
        body = error.to_json()
        self.transport.write(
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n".encode()
            + body
        )
        self._hang_up()

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
            if not self.is_over:
                self._hang_up()

        cycle.send = sent

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

    def _end_linger(self, cycle: Any) -> None:
        self._linger = None
        if self._is_refused or (self.cycle is cycle and cycle.more_body):
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


def _tell_gone(cycle: RequestResponseCycle) -> None:
    cycle.disconnected = True
    cycle.message_event.set()
