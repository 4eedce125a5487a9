"""The memory of requests' bodies: how long it counts, and that nobody's is counted for ever."""

from __future__ import annotations

import asyncio
import json
import platform
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from PIL import Image

from jaxserve.server import freed_memory
from jaxserve.server.freed_memory import FreedMemory
from tests.patience import PATIENCE
from tests.server.seeing import seeing
from tests.server.serving import Answer, Serving, http_client, listening, say, serving
from tests.vision import part, user

LARGE: dict[str, Any] = {"prompt": "x" * 100_000, "truncate_prompt_tokens": 5, "max_tokens": 3}
LARGE_BODY = json.dumps(LARGE).encode()
ONE = 150_000  # bytes: room for one of those


async def submitted(served: Serving, request: Any) -> asyncio.Task[Any]:
    """The task of a request whose answer the engine works on."""
    before = len(served.engine.submitted)
    task = asyncio.ensure_future(request)
    await asyncio.to_thread(served.engine.wait_until, lambda: len(served.engine.submitted) > before)
    return task


def is_full(answer: Answer) -> bool:
    if answer.status != 503:
        return False
    assert answer.error["type"] == "ServiceUnavailableError"
    assert "max_total_body_bytes is" in answer.error["message"]
    assert answer.headers["retry-after"] == "1"
    return True


@pytest.mark.parametrize("stream", [False, True])
async def test_a_body_counts_until_the_end_of_the_answer(stream: bool):
    with serving(max_total_body_bytes=ONE, max_body_bytes=ONE, engine={"stalled": True}) as served:
        first = await submitted(served, served.complete(**LARGE, stream=stream))
        assert is_full(await served.complete(**LARGE))
        assert is_full(await served.post("/tokenize", {"prompt": LARGE["prompt"]}))
        assert (
            await served.post("/tokenize", {"prompt": "x" * 60_000})
        ).status == 200  # small ones never wait
        served.engine.resume()
        assert (await first).status == 200
        assert (await served.complete(**LARGE)).status == 200


@asynccontextmanager
async def nine_clients(
    url: str, num_bytes: int
) -> AsyncIterator[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    """Clients that have sent the head of a request with a large body, and the first bytes of that."""
    host, port = url.removeprefix("http://").split(":")
    clients = [await asyncio.open_connection(host, int(port)) for _ in range(9)]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(LARGE_BODY)
    for _, writer in clients:
        writer.write(head + LARGE_BODY[:num_bytes])
    async with http_client(url) as client:
        for _ in range(10):  # by then the server has read what it was sent
            await client.get("/health")
    yield clients
    for _, writer in clients:
        writer.close()


async def test_who_announces_a_large_body_holds_nobody_up():
    with serving(max_total_body_bytes=3 * ONE, max_body_bytes=ONE) as served:
        async with listening(served) as url, nine_clients(url, 10):
            assert (await served.complete(**LARGE)).status == 200


@pytest.mark.parametrize("num_bytes", [10, 49_000, 51_000])
async def test_of_many_that_come_together_some_are_answered(num_bytes: int):
    """Some have room to their ends: not all of them are refused in the middle."""
    with serving(max_total_body_bytes=3 * ONE, max_body_bytes=ONE, engine={"stalled": True}) as served:
        async with listening(served) as url, nine_clients(url, num_bytes) as clients:
            for _, writer in clients:
                writer.write(LARGE_BODY[num_bytes:])
            answers = {asyncio.ensure_future(reader.readuntil(b"\r\n")) for reader, _ in clients}
            waiting = answers
            while len(waiting) > 4:
                done, waiting = await asyncio.wait(waiting, timeout=PATIENCE, return_when="FIRST_COMPLETED")
                assert done
            served.engine.resume()
            assert sorted([(await answer)[9:12] for answer in answers]) == [b"200"] * 4 + [b"503"] * 5


async def test_images_count_until_they_are_loaded():
    """What they take then is counted elsewhere (test_bad_images.py)."""
    noise = Image.frombytes("RGB", (224, 224), random.Random(0).randbytes(224 * 224 * 3))
    messages = [user(part(noise))]
    limit = len(json.dumps(messages)) + 300
    with seeing({"max_num_seqs": 4}, max_total_body_bytes=limit, engine={"stalled": True}) as served:
        waiting = [await submitted(served, served.chat(messages=messages)) for _ in range(2)]
        served.engine.resume()
        assert [(await task).status for task in waiting] == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
async def test_of_a_client_that_leaves_nothing_is_counted(stream: bool):
    body = json.dumps({**LARGE, "max_tokens": 400, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with serving(
        say("a" * 400), max_total_body_bytes=ONE, max_body_bytes=ONE, engine={"stalled": True}
    ) as served:
        async with listening(served) as url:
            host, port = url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            await asyncio.to_thread(served.engine.wait_until, lambda: len(served.engine.submitted) == 1)
            assert is_full(await served.post("/tokenize", {"prompt": LARGE["prompt"]}))
            writer.close()
            await asyncio.to_thread(served.engine.wait_until, lambda: served.engine.num_unfinished == 0)
            answers = [await served.post("/tokenize", {"prompt": LARGE["prompt"]})]
            while is_full(answers[-1]) and len(answers) < 1000:
                answers.append(await served.post("/tokenize", {"prompt": LARGE["prompt"]}))
            assert answers[-1].status == 200


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have their own ways")
async def test_freed_memory_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(freed_memory, "PAUSE", 0.0)
    pieces = [b"x" * 60_000 + b"%d" % i for i in range(1500)]
    kept = pieces[::50]  # everywhere among them: the allocator keeps what is between
    pieces.clear()
    before = resident()
    FreedMemory().after(freed_memory.LARGE)
    for _ in range(round(PATIENCE / 0.01)):
        if before - resident() > 50_000_000:
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail(f"{before} bytes became {resident()}")
    assert kept


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
