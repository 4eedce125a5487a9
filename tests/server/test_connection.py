"""What a client may do on its connection before, beside and after a request: limits, and what they disturb."""

from __future__ import annotations

import asyncio
import json

import pytest

from jaxserve.server import connection_end
from tests.hourglass import Hourglass
from tests.server.connecting import (
    HOST,
    JSON,
    POST,
    Answered,
    answer_in,
    arrival,
    ask,
    completion,
    connected,
    error_of,
    is_well,
    open_connection,
    said_before_the_end,
)
from tests.server.serving import listening, read_events, say, serving


@pytest.mark.parametrize(
    "head",
    [
        [b"GET /health HTTP/1.1\r\n", HOST, b"X-Long: " + b"a" * 70_000 + b"\r\n\r\n"],
        [b"GET /health HTTP/1.1\r\n", HOST, b"X-Long: ", *[b"a" * 30_000] * 3],
        [b"GET /health HTTP/1.1\r\n", HOST, *[b"X-%d: " % i + b"b" * 500 + b"\r\n" for i in range(200)]],
        [b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n"],
        [b"GET /health HTTP/1.1\r\n", HOST, b"".join(b"X-%d: y\r\n" % i for i in range(300)), b"\r\n"],
    ],
    ids=["long", "endless", "many long", "path", "many"],
)
async def test_a_head_that_is_too_long(head: list[bytes]):
    async with connected() as (_, url):
        answer = await ask(url, *head)
        assert answer[0] == 431
        assert error_of(answer)["param"] == "headers"
        assert await is_well(url)


async def test_a_usual_head_is_none():
    async with connected() as (_, url):
        cookies = b"Cookie: " + b"c" * 8000 + b"\r\n"
        head = b"GET /health HTTP/1.1\r\n" + HOST + cookies * 4 + b"Connection: close\r\n\r\n"
        assert (await ask(url, *[head[i : i + 1000] for i in range(0, len(head), 1000)]))[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"FOO / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02hello\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n"
        + HOST
        + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_what_is_no_http_gets_an_error_object(data: bytes):
    async with connected() as (_, url):
        answer = await ask(url, data)
        assert answer[0] == 400
        assert error_of(answer)["type"] == "BadRequestError"
        assert await is_well(url)


async def closed(hourglass: Hourglass, reader: asyncio.StreamReader, seconds: float) -> bytes:
    """What a server says until it closes a connection on which so many seconds pass."""
    return await hourglass.outlast(asyncio.ensure_future(reader.read()), seconds)


async def test_a_head_that_does_not_come(arrivals: asyncio.Queue[bytes]):
    hourglass = Hourglass()
    async with connected() as (served, url):
        for sent in (b"GET /health HTTP/1.1\r\nHost", b"", b"\r\n"):
            reader, writer = await open_connection(url)
            writer.write(sent)
            await arrival(arrivals, sent)
            hourglass.turn(served.settings.receive_timeout)
            said = await reader.read()
            writer.close()
            if b"GET" in sent:
                answer = answer_in(said)
                assert answer[0] == 408
                assert error_of(answer)["param"] == "headers"
            else:
                assert said == b""  # closed without a word: nothing was asked
        assert await is_well(url)


async def test_line_ends_do_not_hold_a_connection(arrivals: asyncio.Queue[bytes]):
    hourglass = Hourglass()
    async with connected() as (served, url):
        reader, writer = await open_connection(url)
        writer.write(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\r\n")
        await arrival(arrivals, b"\r\n\r\n" + b"\r\n")
        hourglass.turn(served.settings.receive_timeout)
        assert await reader.read() == b""
        writer.close()


async def test_a_body_that_does_not_come(arrivals: asyncio.Queue[bytes]):
    hourglass = Hourglass()
    async with connected() as (served, url):
        reader, writer = await open_connection(url)
        writer.write(POST + b'Content-Length: 30\r\n\r\n{"prompt"')
        await arrival(arrivals, b'{"prompt"')
        answer = answer_in(await closed(hourglass, reader, served.settings.receive_timeout))
        writer.close()
        assert answer[0] == 408
        assert error_of(answer)["param"] == "body"
        assert served.engine.submitted == []
        assert await is_well(url)


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_that_never_ends(is_chunked: bool, arrivals: asyncio.Queue[bytes]):
    hourglass = Hourglass()
    async with connected(max_body_bytes=4096) as (_, url):
        length = b"Transfer-Encoding: chunked\r\n" if is_chunked else b"Content-Length: 99999999999\r\n"
        piece = b"1000\r\n" + b"a" * 4096 + b"\r\n" if is_chunked else b"a" * 4096
        last = piece.replace(b"a", b"z")
        reader, writer = await open_connection(url)
        for part in (POST + length + b"\r\n", *[piece] * 10, last):
            writer.write(part)
            await writer.drain()
        said = await reader.readuntil(b"\r\n\r\n")
        await arrival(arrivals, last)  # what is not yet read when it closes would reset the connection
        said += await closed(hourglass, reader, connection_end.LINGER_SECONDS)  # which waits for more
        writer.close()
        answer = answer_in(said)
        assert answer[0] == 413
        assert error_of(answer)["param"] == "body"
        assert await is_well(url)


@pytest.mark.parametrize("broken", [b"xyz\r\n", b"5\r\nabcdefgh\r\n"], ids=["length", "longer than it says"])
async def test_a_body_that_breaks_off(broken: bytes):
    async with connected() as (served, url):
        head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
        answer = await ask(url, head, b'9\r\n{"prompt"\r\n', broken)
        assert answer[0] == 400
        assert error_of(answer)["type"] == "BadRequestError"
        assert served.engine.submitted == []
        assert await is_well(url)


@pytest.mark.parametrize("between", [b"0\r\nX-Trailer: ", b"5;extension="], ids=["trailer", "extension"])
async def test_what_never_ends_beside_a_body(between: bytes):
    async with connected() as (served, url):
        head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
        answer = await ask(url, head, b"2\r\n{}\r\n" + between, *[b"a" * 200_000] * 9)
        assert answer[0] == 431
        assert error_of(answer)["param"] == "headers"
        assert served.engine.submitted == []
        assert await is_well(url)


async def test_a_body_that_comes_behind_its_answer(arrivals: asyncio.Queue[bytes]):
    hourglass = Hourglass()
    async with connected(receive_timeout=1e6) as (_, url):  # which begins to pass behind the body
        reader, writer = await open_connection(url)
        writer.write(b"POST /nothing HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404")
        await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.write(b"late")
        await arrival(arrivals, b"late")
        hourglass.turn(2 * connection_end.LINGER_SECONDS)  # longer than the connection is kept for a body
        for _ in range(2):
            await asyncio.sleep(0)  # so that it would be closed
        writer.write(b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
ABC = b'{"prompt": "a", "max_tokens": 3}'


@pytest.mark.parametrize(
    "offer", [OFFER, b"Connection: upgrade\r\nUpgrade: websocket\r\n"], ids=["h2c", "ws"]
)
@pytest.mark.parametrize("cut", [10, 100, -40, -20, None])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_an_offer_to_change_the_protocol_is_not_taken(offer: bytes, cut: int | None, is_chunked: bool):
    async with connected() as (_, url):
        body = b"%x\r\n" % len(ABC) + ABC + b"\r\n0\r\n\r\n" if is_chunked else ABC
        length = b"Transfer-Encoding: chunked\r\n" if is_chunked else b"Content-Length: %d\r\n" % len(ABC)
        first = POST + offer + length + b"\r\n" + body
        last = POST + b"Connection: close\r\n" + length + b"\r\n" + body
        reader, writer = await open_connection(url)
        writer.write(first[:cut])
        await asyncio.sleep(0.01)
        writer.write((first[cut:] if cut else b"") + first + last)  # the others pipelined
        answers = (await reader.read()).split(b"HTTP/1.1 ")[1:]
        writer.close()
        assert len(answers) == 3
        for answer in answers:
            assert answer.startswith(b"200")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == "The"


async def test_many_offers_on_one_connection():
    async with connected() as (_, url):
        ask_health = b"GET /health HTTP/1.1\r\n" + HOST + OFFER + b"\r\n"
        reader, writer = await open_connection(url)
        writer.write(ask_health * 300 + b"CONNECT /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
        answers = await reader.read()
        writer.close()
        assert answers.count(b"HTTP/1.1 200") == 300
        assert answers.count(b"HTTP/1.1 405") == 1
        assert await is_well(url)


async def test_an_offer_of_one_who_leaves_after_it():
    async with connected() as (_, url):
        offer = OFFER.replace(b"Upgrade,", b"close, Upgrade,", 1)
        head = POST + b"Content-Length: %d\r\n" % len(ABC)
        status, _, answer = await ask(url, head + offer + b"\r\n", ABC)
        assert status == 200
        assert json.loads(answer)["choices"][0]["text"] == "The"


@pytest.mark.parametrize("stream", [b"false", b"true"])
async def test_http_1_0_gets_no_chunks(stream: bytes):
    async with connected() as (_, url):
        body = ABC[:-1] + b', "stream": ' + stream + b"}"
        head = b"POST /v1/completions HTTP/1.0\r\n" + JSON + b"Content-Length: %d\r\n\r\n" % len(body)
        status, headers, answer = await ask(url, head + body)
        assert status == 200
        assert "transfer-encoding" not in headers
        if stream == b"true":
            assert "".join(chunk["choices"][0]["text"] for chunk in read_events(answer)) == "The"
        else:
            assert json.loads(answer)["choices"][0]["text"] == "The"


async def test_nonsense_in_the_middle_of_an_answer_ends_it():
    with serving(say("a" * 200), engine={"stalled": True}) as served:
        async with listening(served) as url:
            reader, writer = await open_connection(url)
            writer.write(completion(b'{"prompt": "a", "stream": true, "max_tokens": 100}'))
            await asyncio.to_thread(served.engine.wait_until, lambda: len(served.engine.submitted) == 1)
            await asyncio.to_thread(served.engine.step, 2)
            await reader.readuntil(b'"text":"a')
            writer.write(b"\x00\x01nonsense\r\n\r\n")
            # Nothing that could be taken for a part of the answer.
            assert b"400" not in await said_before_the_end(reader)
            await asyncio.to_thread(served.engine.wait_until, lambda: served.engine.num_unfinished == 0)
            writer.close()


async def test_bodies_have_a_limit_together(arrivals: asyncio.Queue[bytes]):
    body = json.dumps({"prompt": "x" * 80_000, "truncate_prompt_tokens": 5, "max_tokens": 1}).encode()
    small = b'{"prompt": "x", "max_tokens": 1}'
    post = b"POST /v1/completions HTTP/1.1\r\nConnection: close\r\n" + HOST + JSON + b"Content-Length: "
    head = post + b"%d\r\n\r\n" % len(body)

    async def answered(status: int) -> Answered:
        """An answer to the whole request, of that status as soon as the server has seen what was done before."""
        answers = [await ask(url, head, body)]
        while answers[-1][0] != status and len(answers) < 100:
            answers.append(await ask(url, head, body))
        return answers[-1]

    async def begun() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection on which all but the last byte has come, before anybody asks."""
        reader, writer = await open_connection(url)
        writer.write(head + body[:-1])
        await arrival(arrivals, body[-9:-1])
        return reader, writer

    async with connected(max_total_body_bytes=len(body) + 10) as (_, url):
        reader, writer = await begun()
        refused = await answered(503)
        assert error_of(refused)["type"] == "ServiceUnavailableError"
        assert refused[1]["retry-after"] == "1"
        assert await is_well(url)
        assert (await ask(url, post, b"%d\r\n\r\n" % len(small), small))[0] == 200
        writer.write(body[-1:])
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        _, writer = await begun()
        assert (await answered(503))[0] == 503
        writer.close()  # and leaves
        assert (await answered(200))[0] == 200
