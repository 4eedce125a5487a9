"""Bytes over a connection of one's own, to a listening server and back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.server.serving import Serving, listening, serving

HOST = b"Host: x\r\n"
JSON = b"Content-Type: application/json\r\n"
Answered = tuple[int, dict[str, str], bytes]  # status, headers, body
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON  # the head, but for the length and its end


@asynccontextmanager
async def connected(**settings: Any) -> AsyncIterator[tuple[Serving, str]]:
    """A listening server, and its URL."""
    with serving(**settings) as served:
        async with listening(served) as url:
            yield served, url


async def open_connection(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the server at `url`."""
    host, port = url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def arrival(arrivals: asyncio.Queue[bytes], last: bytes) -> None:
    """Wait until the server has got what ends so."""
    got = await arrivals.get()
    while not (got.endswith(last) if last else got == last):
        got += await arrivals.get()


async def said_before_the_end(reader: asyncio.StreamReader) -> bytes:
    """What a server says until it closes, with a reset where it has not read all that it was sent."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := await reader.read(2**16):
            said += piece
    return said


async def ask(url: str, *pieces: bytes) -> Answered:
    """Send bytes and read until the server closes."""
    reader, writer = await open_connection(url)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return answer_in(await reader.read())
    finally:
        writer.close()


def answer_in(data: bytes) -> Answered:
    """The answer that these bytes are."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


def error_of(answer: Answered) -> dict[str, Any]:
    """The OpenAI error object of what `ask` gives; checks its shape."""
    status, headers, body = answer
    assert status >= 400
    assert headers["content-type"] == "application/json"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def is_well(url: str) -> bool:
    """Whether somebody else is served as usual."""
    status, _, body = await ask(url, b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
    return (status, body) == (200, b"")


def completion(body: bytes) -> bytes:
    """The whole request of a completion."""
    return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
