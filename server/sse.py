"""Server-sent events: the frame around each JSON chunk."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
from quart import Response

from jaxserve.server.errors import to_api_error

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


def event(chunk: Any) -> bytes:
    """One event holding `chunk` (a msgspec struct) as JSON."""
    return b"data: " + _encoder.encode(chunk) + b"\n\n"


def sse_response(events: AsyncIterator[bytes], headers: dict[str, str], request_id: str) -> Response:
    """A streamed answer: the events, an error event where one is due, and always `data: [DONE]`.

    Closing the response (the client went away) closes `events`.
    """
    return Response(
        _framed(events, request_id),  # pyright: ignore[reportArgumentType]  # async generators are taken as they are
        content_type="text/event-stream; charset=utf-8",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers},
    )


async def _framed(events: Any, request_id: str) -> AsyncIterator[bytes]:
    async with aclosing(events):
        try:
            async for data in events:
                yield data
        except Exception as error:  # noqa: BLE001  # the server's error handler for what happens after the headers
            yield b"data: " + to_api_error(error, request_id).to_json() + b"\n\n"
    yield DONE
