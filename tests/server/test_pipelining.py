"""Several requests on one connection: one after the other, and behind ones that are not answered yet."""

from __future__ import annotations

import asyncio
import json

import pytest

from jaxserve.server import connection
from jaxserve.server.connection import Connection
from tests.patience import PATIENCE
from tests.server.connecting import (
    HOST,
    POST,
    arrival,
    completion,
    connected,
    is_well,
    open_connection,
    said_before_the_end,
)
from tests.server.serving import listening, say, serving


async def test_a_connection_is_used_again_and_again():
    async with connected() as (_, url):
        reader, writer = await open_connection(url)
        body = b'{"prompt": "a", "max_tokens": 2}'
        head = POST + b"Content-Length: %d\r\n\r\n" % len(body)
        for _ in range(3):
            for part in (head[:20], head[20:] + body[:5], body[5:]):
                writer.write(part)
                await asyncio.sleep(0)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200")
            length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            assert json.loads(await reader.readexactly(length))["choices"][0]["text"] == "Th"
        writer.write((head + body) * 3)  # pipelined
        for _ in range(3):
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        writer.close()


async def test_many_requests_at_once_are_no_long_head():
    async with connected() as (_, url):
        asked = b"GET /health HTTP/1.1\r\n" + HOST + b"X-Padding: " + b"a" * 1000 + b"\r\n\r\n"
        reader, writer = await open_connection(url)
        for _ in range(3):
            writer.write(asked * 100 + asked[:500])  # more than a head may have, and it ends in one
            for _ in range(100):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            writer.write(asked[500:])
            await reader.readuntil(b"\r\n\r\n")
        writer.close()


async def test_requests_that_wait_for_one_have_a_limit():
    with serving(say("abc"), engine={"stalled": True}) as served:
        async with listening(served) as url:
            reader, writer = await open_connection(url)
            writer.write(completion(b'{"prompt": "a", "max_tokens": 3}'))
            await asyncio.to_thread(served.engine.wait_until, lambda: len(served.engine.submitted) == 1)
            writer.write(b"GET /health HTTP/1.1\r\n\r\n" * (connection.MAX_PIPELINED + 1))
            assert await said_before_the_end(reader) == b""
            writer.close()
            await asyncio.to_thread(served.engine.wait_until, lambda: served.engine.num_unfinished == 0)


async def test_of_what_waits_for_an_answer_little_is_read(monkeypatch: pytest.MonkeyPatch):
    connections: list[Connection] = []
    connection_made = Connection.connection_made

    def made(self: Connection, transport: asyncio.Transport) -> None:
        connection_made(self, transport)
        connections.append(self)

    monkeypatch.setattr(Connection, "connection_made", made)
    one, small = (
        completion(json.dumps({"prompt": "a", "max_tokens": 3, "user": "x" * size}).encode())
        for size in (60_000, 6_000)
    )
    with serving(say("abc"), engine={"stalled": True}) as served:
        async with listening(served) as url:
            reader, writer = await open_connection(url)
            writer.write(one)
            await asyncio.to_thread(served.engine.wait_until, lambda: len(served.engine.submitted) == 1)
            # Too much together; what follows has no body, and does not change that.
            writer.write(one + small + b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
            async with asyncio.timeout(PATIENCE):
                while connections[0].transport.is_reading():  # noqa: ASYNC110  # transports set no event
                    await asyncio.sleep(0)
            writer.write(one * 40 + b"GET /health HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n")
            assert await is_well(url)
            assert sum(len(cycle.body) for cycle, _ in connections[0].pipeline) < 20 * 60_000
            served.engine.resume()
            assert (await reader.read()).count(b"HTTP/1.1 200") == 45
            writer.close()


async def test_a_body_that_breaks_off_behind_another_request():
    with serving(say("abc"), engine={"stalled": True}) as served:
        async with listening(served) as url:
            reader, writer = await open_connection(url)
            writer.write(completion(b'{"prompt": "a", "max_tokens": 3}'))
            writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n")
            # Nothing that could be taken for the first one's answer.
            assert await said_before_the_end(reader) == b""
            writer.close()
            await asyncio.to_thread(served.engine.wait_until, lambda: served.engine.num_unfinished == 0)
            assert await is_well(url)


@pytest.mark.parametrize("num_at_once", [1, 2])
async def test_hanging_up_ends_the_first_of_several_requests(
    num_at_once: int, arrivals: asyncio.Queue[bytes]
):
    one = completion(b'{"prompt": "a", "max_tokens": 3}')
    with serving(say("abc"), engine={"stalled": True}) as served:
        async with listening(served) as url:
            _, writer = await open_connection(url)
            writer.write(one * num_at_once)
            await asyncio.to_thread(served.engine.wait_until, lambda: len(served.engine.submitted) == 1)
            writer.write(one * (2 - num_at_once))
            await arrival(arrivals, one * 2)
            writer.close()
            await asyncio.to_thread(served.engine.wait_until, lambda: served.engine.num_unfinished == 0)
