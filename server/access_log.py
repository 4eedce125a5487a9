"""A line in the log for each request, written once its answer has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterable, Callable
from types import TracebackType

from quart import Request, Response, g
from quart.wrappers.response import IterableBody, ResponseBody

_log = logging.getLogger(__name__)


def log_request(request: Request, response: Response) -> None:
    """Log the request that `response` answers, with the seconds since `g.started_at`.

    Of a streamed answer these are known at its end only, and then the line also says if the client has not stayed.
    """
    head = f"{request.method} {request.path!r} {response.status_code}"
    labels = "".join(f" {name}={value!r:.200}" for name, value in g.labels.items())
    started_at, request_id = g.started_at, g.request_id

    def write(is_whole: bool) -> None:
        elapsed_ms = (time.monotonic() - started_at) * 1000
        note = "" if is_whole else " (the client hung up)"
        _log.info("%s %.1f ms%s %s%s", head, elapsed_ms, note, request_id, labels)

    if isinstance(response.response, IterableBody):
        response.response = _WatchedBody(response.response, write)
    else:
        write(True)


class _WatchedBody(ResponseBody):
    """Another body, and a call at its end that tells whether all of it was sent."""

    def __init__(self, body: ResponseBody, on_end: Callable[[bool], None]) -> None:
        self._body = body
        self._on_end = on_end

    async def __aenter__(self) -> AsyncIterable[bytes]:
        return await self._body.__aenter__()

    async def __aexit__(self, exc_type: type, exc_value: BaseException, tb: TracebackType) -> None:
        try:
            await self._body.__aexit__(exc_type, exc_value, tb)
        finally:
            self._on_end(exc_type is None)
