"""Answers that a client reads late, slowly or never."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from typing import Any

import pytest

from jaxserve.server import connection_end, launch
from jaxserve.server.connection import Connection
from tests.hourglass import Hourglass
from tests.patience import PATIENCE
from tests.server.connecting import HOST, JSON, ask, connected, error_of
from tests.server.test_listening import CERTIFICATE, KEY

ROOM = 100_000  # bytes that the systems hold on either side: or much of an answer would be on its way
PROMPT = json.dumps({"prompt": "a" * 1_000_000, "return_token_strs": True}).encode()
MILLION_TOKENS = HOST + JSON + b"Content-Length: %d\r\n\r\n" % len(PROMPT) + PROMPT


@pytest.mark.parametrize(("path", "status"), [(b"/nothing", 404), (b"/v1/completions", 413)])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_who_sends_on_can_read_why_there_is_no_need(path: bytes, status: int, version: bytes):
    async with connected(max_body_bytes=4096) as (_, url):
        head = b"POST " + path + b" HTTP/" + version + b"\r\nConnection: close\r\n" + HOST + JSON
        answer = await ask(url, head + b"Content-Length: 9000000\r\n\r\n", *[b"a" * 1_000_000] * 9)
        assert answer[0] == status
        assert answer[1]["connection"] == "close"
        assert error_of(answer)["message"]


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when a server has lost a connection; its system holds little of answers."""
    lost = asyncio.Event()
    connection_made, connection_lost = Connection.connection_made, Connection.connection_lost

    def shortened(self: Connection, transport: asyncio.Transport) -> None:
        connection_made(self, transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)

    def noticed(self: Connection, exc: Exception | None) -> None:
        connection_lost(self, exc)
        lost.set()

    monkeypatch.setattr(Connection, "connection_made", shortened)
    monkeypatch.setattr(Connection, "connection_lost", noticed)
    return lost


async def open_short_connection(
    url: str, **options: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection of whose answers the client's system, too, holds little."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ROOM)
    await asyncio.to_thread(client.connect, ("127.0.0.1", int(url.rpartition(":")[2])))
    client.setblocking(False)
    return await asyncio.open_connection(sock=client, **options)


async def test_an_answer_that_is_never_read(lost: asyncio.Event, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection_end, "STALL_SECONDS", 0.1)
    async with connected() as (_, url):
        _, writer = await open_short_connection(url)
        writer.write(b"POST /tokenize HTTP/1.1\r\n" + MILLION_TOKENS)
        await asyncio.wait_for(lost.wait(), PATIENCE)
        writer.close()


async def test_an_answer_that_is_read_slowly(lost: asyncio.Event):
    hourglass = Hourglass()
    async with connected() as (_, url):
        reader, writer = await open_short_connection(url)
        writer.write(b"POST /tokenize HTTP/1.1\r\n" + MILLION_TOKENS)
        answer = await reader.readuntil(b"\r\n\r\n")
        left = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert left > 6_000_000
        for _ in range(10):  # of which three are more than what is on its way
            hourglass.turn(0.4 * connection_end.STALL_SECONDS)
            await reader.readexactly(400_000)
        await reader.readexactly(left - 4_000_000)
        assert not lost.is_set()
        writer.close()


@pytest.mark.parametrize("keep_alive", [False, True])
@pytest.mark.parametrize("has_tls", [False, True])
async def test_what_little_is_left_is_never_read(
    keep_alive: bool, has_tls: bool, lost: asyncio.Event, monkeypatch: pytest.MonkeyPatch
):
    """Nobody waits for it to become less but the connection's end."""
    monkeypatch.setattr(connection_end, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(launch, "KEEP_ALIVE_SECONDS", 0.1)
    monkeypatch.setattr(Connection, "pause_writing", lambda self: None)  # as if it were little
    files: dict[str, Any] = {"ssl_keyfile": KEY, "ssl_certfile": CERTIFICATE} if has_tls else {}
    trusting = ssl.create_default_context(cafile=CERTIFICATE)
    options = {"ssl": trusting, "server_hostname": "127.0.0.1"} if has_tls else {}
    async with connected(**files) as (_, url):
        _, writer = await open_short_connection(url, **options)
        head = b"POST /tokenize HTTP/1.1\r\n" + (b"" if keep_alive else b"Connection: close\r\n")
        writer.write(head + MILLION_TOKENS)
        await asyncio.wait_for(lost.wait(), PATIENCE)
        writer.transport.abort()
