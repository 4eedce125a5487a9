"""Attacking a server: requests made to hurt, and a look whether it serves on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.server.serving import PARIS, QUESTION, Serving, http_client, listening, serving

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
MIB = 2**20
_JSON = {"Content-Type": "application/json"}


class Target:
    """A server and a client that sends it bytes."""

    def __init__(self, served: Serving, client: httpx.AsyncClient) -> None:
        self.served = served
        self.client = client

    async def attack(self, path: str, body: Any) -> httpx.Response:
        """The answer to a body (bytes, or anything JSON can say), after which the server must serve as before."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
        answer = await self.client.post(path, content=data, headers=_JSON)
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text[:500]
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["param"]
            assert len(error["message"]) < 2000
        after = await self.client.post(CHAT, json={"messages": QUESTION, "max_tokens": 64})
        assert after.json()["choices"][0]["message"]["content"] == PARIS
        assert self.served.llm.num_in_flight == 0
        return answer

    async def is_refused(self, path: str, body: Any, param: str, message: str = "") -> None:
        """The body is refused with a 400 that names the field."""
        answer = await self.attack(path, body)
        assert answer.status_code == 400, answer.text[:500]
        error = answer.json()["error"]
        assert error["param"] == param, error
        assert message in error["message"]


@asynccontextmanager
async def attacked(**settings: Any) -> AsyncIterator[Target]:
    """A listening server that reads tool calls, and takes templates from requests."""
    usual: dict[str, Any] = {
        "trust_request_chat_template": True,
        "enable_auto_tool_choice": True,
        "tool_call_parser": "hermes",
        "info": {"max_model_len": 32768},
    }
    with serving(**{**usual, **settings}) as served:
        async with listening(served) as url, http_client(url) as client:
            yield Target(served, client)


def chat(**fields: Any) -> dict[str, Any]:
    """A small chat request with fields of one's own."""
    return {"messages": QUESTION, "max_tokens": 3, **fields}
