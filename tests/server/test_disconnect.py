"""A client that hangs up: the engine stops working for it, whatever it was waiting for."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jaxserve.server.validation import read_body
from tests.patience import PATIENCE
from tests.server.serving import Serving, listening, say, serving

SCOPE: Any = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/v1/completions",
    "raw_path": b"/v1/completions",
    "query_string": b"",
    "root_path": "",
    "headers": [(b"host", b"x"), (b"content-type", b"application/json")],
    "client": ("127.0.0.1", 1),
    "server": ("127.0.0.1", 2),
    "extensions": {},
}


async def send(url: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a completion request over a connection of its own."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer


def sent_and_gone(body: bytes, num_turns: int) -> Any:
    """ASGI's receive for a client that hangs up after so many turns of the event loop."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    return receive


async def until(served: Serving, condition: Any) -> None:
    await asyncio.to_thread(served.engine.wait_until, condition)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["x", ["x", "y", "z"]])
@pytest.mark.parametrize("n", [1, 2])
async def test_before_the_first_token(stream: bool, prompt: Any, n: int):
    num_sequences = (1 if isinstance(prompt, str) else 3) * n
    with serving(say("a" * 200), engine={"stalled": True}) as served:
        async with listening(served) as url:
            _, writer = await send(url, {"prompt": prompt, "stream": stream, "n": n})
            await until(served, lambda: len(served.engine.submitted) == num_sequences)
            writer.close()
            await until(served, lambda: served.engine.num_unfinished == 0)
            assert sorted(served.engine.aborted) == sorted(c.request_id for c in served.engine.submitted)
            assert served.llm.num_in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_in_mid_answer(stream: bool):
    with serving(say("a" * 200), engine={"stalled": True}) as served:
        async with listening(served) as url:
            num_tasks = len(asyncio.all_tasks())
            reader, writer = await send(url, {"prompt": ["x", "y"], "stream": stream, "max_tokens": 100})
            await until(served, lambda: len(served.engine.submitted) == 2)
            await asyncio.to_thread(served.engine.step, 2)
            if stream:
                await reader.readuntil(b'"text":"a')
            writer.close()
            await until(served, lambda: served.engine.num_unfinished == 0)
            assert len(served.engine.aborted) == 2
            assert served.llm.num_in_flight == 0
            async with asyncio.timeout(PATIENCE):
                while len(asyncio.all_tasks()) > num_tasks:  # noqa: ASYNC110  # tasks set no event when they go
                    await asyncio.sleep(0)


@pytest.mark.parametrize(
    "constraint", [{}, {"structured_outputs": {"choice": ["yes", "no"]}}], ids=["free", "choice"]
)
async def test_at_any_moment(constraint: dict[str, Any]):
    # Whatever the request waits for, or has got in the same turn of the event loop.
    body = json.dumps({"prompt": "x", "max_tokens": 100, **constraint}).encode()

    async def ignore(_: Any) -> None: ...

    for num_turns in range(40):
        with serving(say("a" * 200), engine={"stalled": True}) as served:
            async with asyncio.timeout(PATIENCE):
                await served.app(SCOPE, sent_and_gone(body, num_turns), ignore)
            await until(served, lambda served=served: served.engine.num_unfinished == 0)
            assert served.llm.num_in_flight == 0


async def test_while_its_body_waits_for_a_thread(monkeypatch: pytest.MonkeyPatch):
    received: list[list[bytes]] = []

    async def recorded(*arguments: Any) -> list[bytes]:
        received.append(await read_body(*arguments))
        assert received[0]
        return received[0]

    async def ignore(_: Any) -> None: ...

    monkeypatch.setattr("jaxserve.server.intake.read_body", recorded)
    threads, go_on = ThreadPoolExecutor(1), threading.Event()
    asyncio.get_running_loop().set_default_executor(threads)
    threads.submit(go_on.wait)
    try:
        with serving() as served:
            body = json.dumps({"prompt": "x" * 100_000}).encode()
            await served.app(SCOPE, sent_and_gone(body, 50), ignore)
            assert received == [[]]
    finally:
        go_on.set()


async def test_one_that_leaves_disturbs_nobody():
    with serving(say("abc"), engine={"stalled": True}) as served:
        async with listening(served) as url:
            reader, staying = await send(url, {"prompt": "stays", "stream": True})
            await until(served, lambda: len(served.engine.submitted) == 1)
            _, leaving = await send(url, {"prompt": "leaves", "stream": True})
            await until(served, lambda: len(served.engine.submitted) == 2)
            leaving.close()
            await until(served, lambda: len(served.engine.aborted) == 1)
            served.engine.resume()
            text = (await reader.readuntil(b"[DONE]")).decode()
            assert '"finish_reason":"stop"' in text
            staying.close()
