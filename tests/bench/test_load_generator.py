"""The load generator against a scripted server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from jaxserve.bench.http_client import HttpClient, TransportError
from jaxserve.bench.load_generator import Api, LoadGenerator, Prompt
from jaxserve.errors import ConfigError
from tests.bench.fake_server import WORDS, FakeServer
from tests.deaf_port import deaf_port
from tests.hourglass import Hourglass
from tests.patience import PATIENCE

ANSWER = "".join(WORDS)


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[HttpClient]:
    client = HttpClient(f"{server.url}/v1")
    yield client
    client.close()


def generator(client: HttpClient, model: str = "fake", api: Api = "chat", **body: object) -> LoadGenerator:
    return LoadGenerator(client, api=api, model=model, extra_body=body)


@pytest.mark.parametrize("api", ["chat", "completions"])
async def test_a_streamed_answer(server: FakeServer, client: HttpClient, api: Api) -> None:
    record = await generator(client, api=api, temperature=0).ask(Prompt("Which?", 16))
    assert record.error is None
    assert record.text == ANSWER
    assert record.finish_reason == "stop"
    assert (record.num_prompt_tokens, record.num_output_tokens) == (5, len(WORDS))
    assert len(record.chunk_times) == len(WORDS)  # the chunk that only says "assistant" is no token
    assert len(record.inter_token_latencies) == len(WORDS) - 1
    assert record.start < record.chunk_times[0] <= record.chunk_times[-1] <= record.end
    [body] = server.bodies
    assert body["temperature"] == 0
    assert body["max_tokens"] == 16
    assert body["stream_options"] == {"include_usage": True}
    if api == "chat":
        assert body["messages"] == [{"role": "user", "content": "Which?"}]
    else:
        assert body["prompt"] == "Which?"


async def test_tokens_are_counted_by_usage_not_by_chunks(client: HttpClient) -> None:
    record = await generator(client, "two-a-chunk").ask(Prompt("Which?", 16))
    assert record.num_output_tokens == 2 * len(WORDS)
    assert record.time_per_output_token == pytest.approx(
        (record.end - record.chunk_times[0]) / (2 * len(WORDS) - 1)
    )


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("refuses", "400: temperature must be in [0, 2]"),
        ("plain-error", "502: bad gateway"),
        ("breaks", "error in the stream: the engine died"),
        ("cuts", "the connection ended before the answer did"),
        ("no-done", "the stream ended without [DONE]"),
    ],
)
async def test_failures_are_recorded(client: HttpClient, model: str, error: str) -> None:
    record = await generator(client, model).ask(Prompt("Which?", 16))
    assert record.error == error
    assert record.end >= record.start


async def test_nobody_listens() -> None:
    with deaf_port() as port:
        client = HttpClient(f"http://127.0.0.1:{port}/v1")
        record = await LoadGenerator(client, api="chat", model="m").ask(Prompt("x", 1))
    assert record.error is not None
    assert "refused" in record.error or "Connect" in record.error


async def test_an_answer_that_never_ends_times_out(server: FakeServer, client: HttpClient) -> None:
    hourglass, seen = Hourglass(), asyncio.Event()
    slow = LoadGenerator(client, api="chat", model="hangs", timeout=500)
    asking = asyncio.create_task(slow.ask(Prompt("Which?", 16), seen.set))
    await seen.wait()
    hourglass.turn(500)
    record = await asking
    assert record.error == "no whole answer within 500 s"
    assert await asyncio.to_thread(server.hang_ups.acquire, timeout=PATIENCE)


async def test_cancelling_hangs_up(server: FakeServer, client: HttpClient) -> None:
    seen = asyncio.Event()
    request = asyncio.create_task(generator(client, "hangs").ask(Prompt("Which?", 16), seen.set))
    await seen.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert await asyncio.to_thread(server.hang_ups.acquire, timeout=PATIENCE)


async def test_closed_loop_keeps_to_its_concurrency(server: FakeServer, client: HttpClient) -> None:
    server.meeting = 3
    done = []
    prompts = [Prompt(f"prompt {i}", 16) for i in range(20)]
    records = await generator(client).run_closed_loop(prompts, 3, done.append)
    assert [record.error for record in records] == [None] * 20
    assert done == records
    assert sorted(body["messages"][0]["content"] for body in server.bodies) == sorted(
        p.content for p in prompts
    )
    assert server.max_open == 3
    assert server.num_connections == 3  # kept alive from one request to the next


async def test_arrivals_are_waited_for(client: HttpClient) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    prompts = [Prompt(f"prompt {i}", 4) for i in range(4)]
    records = await generator(client).run_arrivals(prompts, [0, 0, 1e6, 2e6], sleep=sleep)
    assert len(records) == 4
    assert waited == pytest.approx([1e6, 2e6], rel=0.01)  # less what it took until then


async def test_arrivals_beyond_the_limit_wait_their_turn(server: FakeServer, client: HttpClient) -> None:
    server.meeting = 2
    prompts = [Prompt(f"prompt {i}", 4) for i in range(12)]
    records = await generator(client).run_arrivals(prompts, [0.0] * 12, max_concurrency=2)
    assert [record.error for record in records] == [None] * 12
    assert server.max_open == 2


async def test_a_connection_the_server_closed_is_replaced(client: HttpClient) -> None:
    assert (await client.get("/models")).status == 200
    broken = LoadGenerator(client, api="chat", model="cuts")
    assert (await broken.ask(Prompt("x", 4))).error is not None
    assert (await client.get("/models")).status == 200


async def test_headers_reach_the_server(server: FakeServer) -> None:
    client = HttpClient(server.url, {"authorization": "Bearer secret"})
    await client.get("/v1/models")
    client.close()
    assert "authorization: bearer secret" in server.headers[0]


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://host:port"])
def test_a_bad_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a URL"):
        HttpClient(url)


async def test_transport_errors_name_the_server() -> None:
    with deaf_port() as port:
        url = f"http://127.0.0.1:{port}"
        with pytest.raises(TransportError, match=url):
            await HttpClient(url).get("/health")
