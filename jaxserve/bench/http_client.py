"""A small HTTP/1.1 client for load: keep-alive, streamed bodies, little CPU per chunk.

A general client spends more time on a streamed token than a fast server does.  Here httptools parses in C,
and body bytes go straight from the socket callback to the caller.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

from jaxserve.errors import ConfigError, JaxserveError

OnBody = Callable[[bytes], None]


class TransportError(JaxserveError):
    """No connection, or one that ended before the answer did."""


@dataclass(slots=True)
class Response:
    """Status, headers (lower-case names) and, unless it was streamed, the body of one answer."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class HttpClient:
    """Connections to one server, re-used when idle."""

    def __init__(self, base_url: str, headers: dict[str, str] | None = None) -> None:
        """`base_url` is `http(s)://host[:port][/prefix]`; ConfigError for anything else."""
        try:
            parts = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{base_url!r} is not a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{base_url!r} is not a URL like http://127.0.0.1:8000")
        self._host = parts.hostname
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._ssl else 80)
        self._prefix = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}{self._prefix}"
        shared = {"host": parts.netloc.rpartition("@")[2], "user-agent": "jaxserve-bench", "accept": "*/*"}
        self._head = "".join(f"{k}: {v}\r\n" for k, v in (shared | (headers or {})).items())
        self._idle: list[_Connection] = []

    async def get(self, path: str) -> Response:
        """GET `path`; TransportError if there is no whole answer."""
        return await self._request("GET", path, None, None)

    async def post(self, path: str, body: bytes, on_body: OnBody | None = None) -> Response:
        """POST JSON.  The body of a 200 goes to `on_body` as it arrives, if given; cancelling hangs up."""
        return await self._request("POST", path, body, on_body)

    def close(self) -> None:
        """Close idle connections."""
        while self._idle:
            self._idle.pop().abort()

    async def _request(self, method: str, path: str, body: bytes | None, on_body: OnBody | None) -> Response:
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}"
        if body is not None:
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        message = head.encode("latin-1") + b"\r\n" + (body or b"")
        while True:
            connection, is_fresh = await self._connection()
            try:
                response = await connection.exchange(message, on_body)
            except TransportError:
                # An idle connection that the server closed just now shows it only when it is used.
                if is_fresh or connection.has_answered:
                    raise
                continue
            except BaseException:
                # Cancelled, or on_body failed: the rest of this answer must not reach anybody.
                connection.abort()
                raise
            if connection.is_reusable:
                self._idle.append(connection)
            else:
                connection.abort()
            return response

    async def _connection(self) -> tuple[_Connection, bool]:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection, False
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        except OSError as error:
            raise TransportError(f"{self.url}: {error.strerror or error}") from error
        return connection, True


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time.  The parser calls the `on_…` methods below."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Response] | None = None
        self._on_body: OnBody | None = None
        self._reset()
        self._keep_alive = True

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._response = Response()
        self._body: list[bytes] = []
        self.has_answered = False

    @property
    def is_reusable(self) -> bool:
        return self._keep_alive and self._transport is not None and not self._transport.is_closing()

    def abort(self) -> None:
        """Hang up at once."""
        if self._transport is not None:
            self._transport.abort()

    async def exchange(self, message: bytes, on_body: OnBody | None) -> Response:
        if self._transport is None or self._transport.is_closing():
            raise TransportError("the connection is closed")
        self._reset()
        self._on_body = on_body
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        try:
            return await self._done
        finally:
            self._done = self._on_body = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by class

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._fail(error.__context__ or error)
        except httptools.HttpParserError as error:
            self._fail(TransportError(f"the answer is not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep_alive = False
        if self.has_answered and not self._is_framed():
            self.on_message_complete()  # HTTP/1.0 style: the end of the connection ends the body
        self._fail(TransportError(f"the connection ended before the answer did{f': {exc}' if exc else ''}"))

    # httptools

    def on_status(self, status: bytes) -> None:
        self.has_answered = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self._response.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._response.status = self._parser.get_status_code()
        self.has_answered = True

    def on_body(self, body: bytes) -> None:
        if self._on_body is not None and self._response.status == 200:
            self._on_body(body)
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if 100 <= self._response.status < 200:
            return
        self._keep_alive = self._keep_alive and self._parser.should_keep_alive()
        self._response.body = b"".join(self._body)
        if self._done is not None and not self._done.done():
            self._done.set_result(self._response)

    def _is_framed(self) -> bool:
        headers = self._response.headers
        return "content-length" in headers or "chunked" in headers.get("transfer-encoding", "")

    def _fail(self, error: BaseException) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
        self.abort()
