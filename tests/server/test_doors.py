"""Who may ask: API keys, browsers' origins, prefixes, body sizes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.serving import http_client, listening, serving

KEYS = ("sk-one", "sk-two")


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/chat/completions", "/v1/nothing-here", "/tokenize", "/v1"]
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "sk-one"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer sk-three"},
        {"Authorization": "Bearer sk-on"},
        {"Authorization": "Basic sk-one"},
    ],
)
async def test_without_a_key(path: str, headers: dict[str, str]):
    with serving(api_keys=KEYS) as served:
        for method in ("GET", "POST"):
            answer = await served.request(method, path, headers=headers, data=b"{")
            assert answer.status == 401
            assert answer.error["type"] == "AuthenticationError"
            assert answer.error["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert served.engine.submitted == []


@pytest.mark.parametrize("header", ["Bearer sk-one", "bearer sk-two", "Bearer  sk-two "])
async def test_with_a_key(header: str):
    with serving(api_keys=KEYS) as served:
        answer = await served.request("GET", "/v1/models", headers={"Authorization": header})
        assert answer.status == 200


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/metrics", "/load"])
async def test_what_machines_ask_needs_no_key(path: str):
    with serving(api_keys=KEYS) as served:
        assert (await served.request("GET", path)).status == 200
        assert "sk-one" not in repr(served.settings)


PREFLIGHT = {
    "Origin": "https://a.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}


async def test_browsers_of_any_origin():
    with serving(api_keys=KEYS) as served:
        answer = await served.request("OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
        assert "POST" in answer.headers["access-control-allow-methods"]
        refused = await served.request("GET", "/v1/models", headers={"Origin": "https://a.example"})
        assert refused.status == 401
        assert refused.headers["access-control-allow-origin"] == "*"  # or the page could not read why


async def test_browsers_of_chosen_origins():
    with serving(allowed_origins=("https://a.example",)) as served:
        answer = await served.request("OPTIONS", "/v1/models", headers=PREFLIGHT)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert answer.headers["vary"] == "Origin"
        other = {**PREFLIGHT, "Origin": "https://b.example"}
        answer = await served.request("OPTIONS", "/v1/models", headers=other)
        assert answer.status == 400
        assert "access-control-allow-origin" not in answer.headers
        answer = await served.request("GET", "/v1/models", headers={"Origin": "https://b.example"})
        assert answer.status == 200
        assert "access-control-allow-origin" not in answer.headers
        assert "access-control-allow-origin" not in (await served.request("GET", "/v1/models")).headers


@pytest.mark.parametrize("path", ["/llm/v1/models", "/v1/models"])
async def test_prefix_of_a_proxy(path: str):
    with serving(root_path="/llm") as served:
        assert (await served.request("GET", path)).status == 200
        answer = await served.request("GET", "/llm/v1/models/")
        assert answer.status == 307
        assert answer.headers["location"] == "/llm/v1/models"
        assert (await served.request("GET", "/llmx/v1/models")).status == 404


async def test_slash_at_the_end():
    with serving() as served:
        answer = await served.request("POST", "/v1/completions/", data=b"{}")
        assert answer.status == 307
        assert answer.headers["location"] == "/v1/completions"
        assert (await served.request("GET", "/nothing/")).status == 404


@pytest.mark.parametrize("path", ["/v1//models", "/v1/models//", "/v1///models"])
async def test_too_many_slashes(path: str):
    with serving() as served:
        answer = await served.request("GET", path, headers={"Host": "elsewhere.example"})
        assert answer.status == 307
        assert answer.headers["location"] == "/v1/models"  # on no other host: the header is the client's
        assert (await served.request("GET", "/v1//nothing")).status == 404


async def test_large_bodies_over_the_wire():
    """With and without a Content-Length, and the connection stays good."""

    async def chunked() -> AsyncIterator[bytes]:
        for _ in range(160):
            yield b" " * 65536

    with serving() as served:
        async with listening(served) as url, http_client(url) as client:
            json_type = {"Content-Type": "application/json"}
            contents: list[Any] = [b" " * (10 * 1024 * 1024), chunked()]
            for content in contents:
                answer = await client.post("/v1/chat/completions", content=content, headers=json_type)
                assert answer.status_code == 413
                assert "4194304 bytes" in answer.json()["error"]["message"]
            assert (await client.get("/health")).status_code == 200


async def test_no_route_reads_a_body_it_does_not_need():
    with serving(max_body_bytes=1024) as served:
        async with listening(served) as url, http_client(url) as client:
            answers = await asyncio.gather(
                *(client.post("/nothing", content=b"x" * 100_000) for _ in range(4))
            )
            assert [answer.status_code for answer in answers] == [404] * 4
