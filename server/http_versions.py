"""uvicorn's HTTP/1.1, also for clients that speak HTTP/1.0 or would like to speak something else."""

from __future__ import annotations

import sys
from typing import Any

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


class AnyVersion(HttpToolsProtocol):
    """Answers HTTP/1.0 without chunks, and in HTTP/1.1 whoever offers to change to another protocol.

    Java's HttpClient, on which many Java libraries for models stand, offers HTTP/2 with its first request.  httptools
    ends a request with such an `Upgrade` header behind its head, and uvicorn, which knows no upgrade but WebSockets,
    answers as if it had no body and loses what comes after it.  Here the head is read once more without the offer.
    """

    _offers_upgrade = False  # the request that is being read does, and nothing of it was answered
    _fed = b""  # what is being read
    _unread = b""  # the head without the offer, and all that came behind it

    def data_received(self, data: bytes) -> None:
        while data:
            self._fed, self._unread = data, b""
            super().data_received(data)
            data = self._unread
        self._fed = b""

    def on_headers_complete(self) -> None:
        # CONNECT is an upgrade with or without the header, and has no body.
        self._offers_upgrade = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if self._offers_upgrade:
            return
        is_old = self.parser.get_http_version() == "1.0"
        super().on_headers_complete()
        if is_old:
            _end_by_closing(self.cycle)

    def on_message_complete(self) -> None:
        if not self._offers_upgrade:
            super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """uvicorn's name for what it does about an upgrade, in place of reading on."""
        upgrade = sys.exception()
        if not self._offers_upgrade or not isinstance(upgrade, HttpParserUpgrade):
            return
        (num_read,) = upgrade.args
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = HttpRequestParser(self)  # this one takes the rest for another protocol's
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self._unread = b"\r\n".join(lines) + b"\r\n\r\n" + self._fed[num_read:]


def _end_by_closing(cycle: RequestResponseCycle) -> None:
    """Let an answer of unknown length end with the connection: HTTP/1.0 knows no chunks."""
    send = cycle.send
    is_open_ended = False

    async def sent(message: Any) -> None:
        nonlocal is_open_ended
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            is_open_ended = b"content-length" not in names
            if is_open_ended:
                cycle.chunked_encoding = False
        elif is_open_ended:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = sent
