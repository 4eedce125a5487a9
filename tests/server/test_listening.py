"""The server as clients meet it, over real sockets: TLS, Unix sockets, keys, names and browsers' origins."""

from __future__ import annotations

import asyncio
import io
import ssl
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from jaxserve.cli.main import main, parse
from jaxserve.cli.server_flags import server_settings
from tests.server.openai_client import openai_client
from tests.server.serving import PARIS, QUESTION, http_client, listening, read_events, serving

TLS = Path(__file__).parents[1] / "data" / "tls"
KEY, CERTIFICATE = str(TLS / "test_only_key.pem"), str(TLS / "test_only_certificate.pem")


def client_that_trusts(url: str, authorities: ssl.SSLContext) -> openai.AsyncOpenAI:
    """The openai package's client, which believes these."""
    return openai_client(url, http_client=openai.DefaultAsyncHttpxClient(verify=authorities))


async def ask(client: openai.AsyncOpenAI, model: str = "") -> str | None:
    """The answer to the usual question."""
    completion = await client.chat.completions.create(model=model, messages=QUESTION, max_tokens=64)
    return completion.choices[0].message.content


async def ask_streamed(client: openai.AsyncOpenAI) -> str:
    """The same as a stream."""
    stream = await client.chat.completions.create(model="", messages=QUESTION, max_tokens=64, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def test_tls():
    trusting = ssl.create_default_context(cafile=CERTIFICATE)
    with serving(ssl_keyfile=KEY, ssl_certfile=CERTIFICATE) as served:
        async with listening(served) as url:
            assert url.startswith("https://127.0.0.1:")
            async with client_that_trusts(url, trusting) as client:
                assert await ask(client) == PARIS
                assert await ask_streamed(client) == PARIS
            async with openai_client(url) as client:
                with pytest.raises(openai.APIConnectionError) as caught:
                    await ask(client)
                assert "CERTIFICATE_VERIFY_FAILED" in str(caught.value.__cause__)
            async with openai_client(url.replace("https", "http")) as client:
                with pytest.raises(openai.APIConnectionError):
                    await ask(client)
            async with client_that_trusts(url, trusting) as client:
                assert await ask(client) == PARIS


async def test_chat_trusts_ssl_cert_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    with serving(ssl_keyfile=KEY, ssl_certfile=CERTIFICATE) as served:
        async with listening(served) as url:
            for trusted, status in ((None, 1), (CERTIFICATE, 0)):
                if trusted is not None:
                    monkeypatch.setenv("SSL_CERT_FILE", trusted)
                monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION[0]['content']}\n"))
                assert await asyncio.to_thread(main, ["chat", "--url", url, "--max-tokens", "64"]) == status
    said = capsys.readouterr()
    assert said.out == f"{PARIS}\n"
    assert "CERTIFICATE_VERIFY_FAILED" in said.err


@pytest.mark.parametrize("has_tls", [False, True])
async def test_unix_socket(tmp_path: Path, has_tls: bool):
    path, scheme = tmp_path / "jaxserve.sock", "https" if has_tls else "http"
    files: dict[str, Any] = {"ssl_keyfile": KEY, "ssl_certfile": CERTIFICATE} if has_tls else {}
    verify: Any = ssl.create_default_context(cafile=CERTIFICATE) if has_tls else True
    body = {"messages": QUESTION, "max_tokens": 64}
    with serving(uds=str(path), **files) as served:
        async with listening(served) as url:
            assert url == f"{scheme}+unix://{path}"
            transport = httpx.AsyncHTTPTransport(uds=str(path), verify=verify)
            async with http_client(f"{scheme}://localhost", transport=transport) as client:
                answer = await client.post("/v1/chat/completions", json=body)
                assert answer.json()["choices"][0]["message"]["content"] == PARIS
                answer = await client.post("/v1/chat/completions", json={**body, "stream": True})
                chunks = read_events(answer.content)
                assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == PARIS
    assert not path.exists()


async def test_any_of_several_keys():
    with serving(api_keys=("sk-one", "sk-two")) as served:
        async with listening(served) as url:
            for key in ("sk-one", "sk-two"):
                async with openai_client(url, api_key=key) as client:
                    assert await ask(client) == PARIS
                    assert [model.id async for model in client.models.list()] == ["scripted"]
            for key in ("sk-three", "sk-one,sk-two", "sk-"):
                async with openai_client(url, api_key=key) as client:
                    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
                        await ask(client)
                    with pytest.raises(openai.AuthenticationError):
                        await ask_streamed(client)
            async with http_client(url) as client:
                assert (await client.get("/health")).status_code == 200
                answer = await client.get("/v1/models")
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"


async def test_several_names():
    with serving(served_model_names=("small", "org/small", "gpt-4")) as served:
        async with listening(served) as url, openai_client(url) as client:
            assert [model.id async for model in client.models.list()] == ["small", "org/small", "gpt-4"]
            for name in ("small", "org/small", "gpt-4"):
                completion = await client.chat.completions.create(
                    model=name, messages=QUESTION, max_tokens=64
                )
                assert completion.model == name
                assert (await client.models.retrieve(name)).id == name
            for name in ("scripted", "SMALL"):
                with pytest.raises(openai.NotFoundError, match="does not exist"):
                    await ask(client, name)


async def test_browsers():
    origin = {"Origin": "https://a.example"}
    asks = {
        **origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    body = {"messages": QUESTION, "max_tokens": 64, "stream": True}
    with serving(allowed_origins=("https://a.example", "https://b.example"), api_keys=("sk",)) as served:
        async with listening(served) as url, http_client(url) as client:
            answer = await client.options("/v1/chat/completions", headers=asks)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
            assert answer.headers["access-control-allow-headers"] == "authorization"
            bearer = {**origin, "Authorization": "Bearer sk"}
            answer = await client.post("/v1/chat/completions", json=body, headers=bearer)
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
            assert answer.headers["vary"] == "Origin"
            foreign = {**asks, "Origin": "https://c.example"}
            answer = await client.options("/v1/chat/completions", headers=foreign)
            assert answer.status_code == 400
            assert "access-control-allow-origin" not in answer.headers


async def test_prefix_of_a_proxy():
    with serving(root_path="/llm") as served:
        async with listening(served) as url, openai_client(url) as client:
            assert url.endswith("/llm")
            assert await ask(client) == PARIS
            assert await ask_streamed(client) == PARIS


def test_lists_of_keys_and_names_add_up():
    def settings(*flags: str) -> Any:
        return server_settings(parse(["serve", "m", *flags]))

    assert settings("--api-key", "a", "b").api_keys == ("a", "b")
    assert settings("--api-key", "a", "--api-key", "b", "c").api_keys == ("a", "b", "c")
    names = settings("--served-model-name", "a", "b", "--served-model-name", "c").served_model_names
    assert names == ("a", "b", "c")
    assert settings().api_keys == settings().served_model_names == ()
