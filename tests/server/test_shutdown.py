"""The end: SIGTERM lets requests in flight finish, a second signal or the time limit does not."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from jaxserve.server import bind_socket
from jaxserve.server.launch import HttpServer
from tests.patience import PATIENCE
from tests.server.serving import Serving, http_client, read_events, say, serving

ROOT = Path(__file__).parent.parent.parent


@contextmanager
def process(shutdown_timeout: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its URL."""
    command = [sys.executable, "-m", "tests.server.serve_scripted", str(shutdown_timeout)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:")
            yield server, url
        finally:
            if server.poll() is None:
                server.kill()


def get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=PATIENCE)


def complete(url: str) -> httpx.Response:
    body = {"prompt": "x", "max_tokens": 5}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE)


def wait_for_load(url: str, count: int) -> None:
    while get(f"{url}/load").json()["server_load"] != count:
        pass


def wait_for_health(url: str, status: int) -> None:
    while get(f"{url}/health").status_code != status:
        pass


def test_sigterm_lets_running_requests_end():
    with process(60) as (server, url), ThreadPoolExecutor() as pool:
        running = pool.submit(complete, url)
        wait_for_load(url, 1)
        assert get(f"{url}/health").status_code == 200
        server.send_signal(signal.SIGTERM)
        wait_for_health(url, 503)
        refused = complete(url)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "ServiceUnavailableError"
        server.send_signal(signal.SIGUSR1)
        answer = running.result()
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["text"] == "aaaaa"
        assert server.wait(PATIENCE) == 0


def test_the_time_limit_cuts_answers_off():
    with process(0.2) as (server, url), ThreadPoolExecutor() as pool:
        running = pool.submit(complete, url)
        wait_for_load(url, 1)
        server.send_signal(signal.SIGTERM)
        answer = running.result()
        assert answer.status_code == 503
        assert "shutting down" in answer.json()["error"]["message"]
        assert server.wait(PATIENCE) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number: signal.Signals):
    with process(600) as (server, url), ThreadPoolExecutor() as pool:
        running = pool.submit(complete, url)
        wait_for_load(url, 1)
        server.send_signal(number)
        wait_for_health(url, 503)
        server.send_signal(number)
        assert server.wait(PATIENCE) == 1
        assert running.result().status_code == 503


def test_an_idle_server_goes_at_once():
    with process(600) as (server, _):
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) == 0


@pytest.mark.parametrize("num_in_flight", [0, 1])
async def test_the_log_says_what_is_waited_for(caplog: pytest.LogCaptureFixture, num_in_flight: int):
    caplog.set_level("INFO", "jaxserve.server.launch")
    with serving(say("abc"), engine={"stalled": True}, shutdown_timeout=60) as served:
        server = HttpServer(served.app, served.settings, served.llm)
        task = asyncio.create_task(server.run_on(bind_socket(served.settings)))
        asking = [asyncio.create_task(served.complete()) for _ in range(num_in_flight)]
        await asyncio.to_thread(
            served.engine.wait_until, lambda: len(served.engine.submitted) == num_in_flight
        )
        server.stop("SIGTERM")
        served.engine.resume()
        await asyncio.gather(task, *asking)
    (line,) = (message for message in caplog.messages if message.startswith("SIGTERM"))
    if num_in_flight:
        assert line.startswith("SIGTERM: stopping once requests in flight (1) have ended, in 60 s at most;")
    else:
        assert line == "SIGTERM: stopping"


async def cut_off(served: Serving) -> httpx.Response:
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = HttpServer(served.app, served.settings, served.llm, ready.set_result)
    task = asyncio.create_task(server.run_on(bind_socket(served.settings)))
    async with http_client(await ready) as client:
        request = client.build_request("POST", "/v1/completions", json={"prompt": "x", "stream": True})
        sending = asyncio.create_task(client.send(request, stream=True))
        await asyncio.to_thread(served.engine.wait_until, lambda: len(served.engine.submitted) == 1)
        await asyncio.to_thread(served.engine.step)
        response = await sending
        server.stop()
        await response.aread()
        await task
        return response


async def test_a_stream_that_is_cut_off_says_so():
    with serving(say("a" * 9), engine={"stalled": True}, shutdown_timeout=0) as served:
        response = await cut_off(served)
        *chunks, error = read_events(response.content)
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
        assert error["error"]["type"] == "ServiceUnavailableError"


async def test_a_unix_socket_is_removed_at_the_end(tmp_path: Path):
    path = str(tmp_path / "server.sock")
    with serving(uds=path) as served:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        server = HttpServer(served.app, served.settings, served.llm, ready.set_result)
        task = asyncio.create_task(server.run_on(bind_socket(served.settings)))
        assert (await ready) == f"http+unix://{path}"
        transport = httpx.AsyncHTTPTransport(uds=path)
        async with http_client("http://server", transport=transport) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
        server.stop()
        await task
        assert not await asyncio.to_thread((tmp_path / "server.sock").exists)
