"""A server around the scripted engine: for Quart's test client, or listening on a loopback port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import httpx
from quart import Quart

from jaxserve.async_llm import AsyncLLM
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.media.policy import MediaPolicy
from jaxserve.server import ServerSettings, bind_socket, connection_end, create_app
from jaxserve.server.launch import HttpServer
from tests.patience import PATIENCE
from tests.scripted import Script, ScriptedClient, saying, scripted_info
from tests.tiny import CHAT_TEMPLATE, EOS, byte_tokenizer

PARIS = "The capital of France is Paris."
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass(frozen=True)
class Serving:
    """One server and what stands behind it."""

    engine: ScriptedClient
    llm: AsyncLLM
    settings: ServerSettings
    app: Quart

    async def post(self, path: str, body: Any, **headers: str) -> Answer:
        """POST JSON through Quart's test client."""
        response = await self.app.test_client().post(path, json=body, headers=headers)
        return await _answer(response)

    async def request(self, method: str, path: str, **arguments: Any) -> Answer:
        """Any request through Quart's test client."""
        return await _answer(await self.app.test_client().open(path, method=method, **arguments))

    async def chat(self, **fields: Any) -> Answer:
        """A chat request; fields replace or add to the usual ones."""
        return await self.post("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 64, **fields})

    async def complete(self, **fields: Any) -> Answer:
        """A plain completion; fields replace or add to the usual ones."""
        return await self.post("/v1/completions", {"prompt": "Say it:", "max_tokens": 64, **fields})


@dataclass(frozen=True)
class Answer:
    """A response, read whole."""

    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def error(self) -> dict[str, Any]:
        """The OpenAI error object; checks its shape."""
        body = self.json
        assert set(body) == {"error"}
        error = body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        assert error["param"] is None or isinstance(error["param"], str)
        assert error["code"] is None or isinstance(error["code"], str)
        return error

    @property
    def chunks(self) -> list[Any]:
        """The JSON events of a stream; checks the frame and the end."""
        assert self.headers["content-type"] == "text/event-stream; charset=utf-8"
        return read_events(self.data)


def read_events(data: bytes) -> list[Any]:
    """JSON of every event; the last one must be [DONE]."""
    *events, end = data.decode().split("\n\n")
    assert end == ""
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def say(text: str) -> Script:
    """A script that says `text`, a byte a token."""
    return saying(list(text.encode()))


@contextmanager
def serving(
    script: Script | None = None,
    *,
    info: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    eos_token_ids: tuple[int, ...] = (EOS,),
    max_tokens_limit: int | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    special_tokens: tuple[str, ...] = (),
    max_num_queued_reqs: int | None = None,
    media: MediaPolicy | None = None,
    **settings: Any,
) -> Iterator[Serving]:
    """A server that answers by `script` (by default: that Paris is the capital)."""
    client = ScriptedClient(
        script or say(PARIS), info=scripted_info(**{"max_model_len": 512, **(info or {})}), **(engine or {})
    )
    llm = AsyncLLM(
        client,
        byte_tokenizer(chat_template=chat_template, special=special_tokens),
        GenerationDefaults(eos_token_ids, sampling or {}, max_tokens_limit),
        max_num_queued_reqs=max_num_queued_reqs,
        media=media,
    )
    llm._admission.grammars.time_limit = PATIENCE
    try:
        chosen = ServerSettings(**{"port": 0, **settings})
        yield Serving(client, llm, chosen, create_app(llm, chosen))
    finally:
        llm.shutdown()


@asynccontextmanager
async def listening(served: Serving) -> AsyncIterator[str]:
    """The server on uvicorn on a loopback port; gives its URL.

    It bears with clients that are slow to send the rest of what it has refused: the machine may be busy.
    """
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = HttpServer(served.app, served.settings, served.llm, ready.set_result)
    with mock.patch.object(connection_end, "LINGER_SECONDS", PATIENCE):
        task = asyncio.create_task(server.run_on(bind_socket(served.settings)))
        await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
        try:
            yield ready.result()
        finally:
            if not task.done():
                server.stop()
            await task


def http_client(url: str, **options: Any) -> httpx.AsyncClient:
    """A client of a listening server, which waits longer than httpx's few seconds."""
    return httpx.AsyncClient(base_url=url, timeout=PATIENCE, **options)


async def _answer(response: Any) -> Answer:
    data = await response.get_data(as_text=False)
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Answer(response.status_code, headers, data)
