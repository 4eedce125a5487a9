"""Who answers in `jaxserve chat`: a server over HTTP, or the model in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from jaxserve.bench.sse import DONE, SseParser
from jaxserve.errors import ConfigError, JaxserveError

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig
    from jaxserve.inputs import TokenizedPrompt

Message = dict[str, str]


class ChatBackend(Protocol):
    """Answers a conversation."""

    name: str

    def answer(self, messages: list[Message], write: Callable[[str], None]) -> None:
        """Call `write` with each piece of the answer.  KeyboardInterrupt stops it at its source, too."""
        ...

    def close(self) -> None: ...


class HttpBackend:
    """Any server that speaks the OpenAI API."""

    def __init__(self, url: str, *, model: str | None, api_key: str | None, sampling: dict[str, Any]) -> None:
        import httpx

        base = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Reading has no limit: a long prompt may wait for its turn.
        self._client = httpx.Client(
            base_url=base if base.endswith("/v1") else f"{base}/v1",
            headers=headers,
            timeout=httpx.Timeout(None, connect=10.0),
            trust_env=False,  # a proxy has no business between a terminal and its own server
            verify=httpx.create_ssl_context(),  # with SSL_CERT_FILE, which trust_env would leave out
        )
        self._sampling = sampling
        self.name = model or self._first_model()

    def answer(self, messages: list[Message], write: Callable[[str], None]) -> None:
        """Stream one chat completion; leaving the block hangs up, which ends the request at the server."""
        import httpx

        payload = {"model": self.name, "messages": messages, "stream": True, **self._sampling}
        parser = SseParser()
        try:
            with self._client.stream("POST", "/chat/completions", json=payload) as response:
                if response.status_code != 200:
                    response.read()
                    raise JaxserveError(_error_message(response.status_code, response.text))
                for chunk in response.iter_bytes():
                    for data in parser.feed(chunk):
                        if data == DONE:
                            return
                        write(_delta_text(data))
        except httpx.HTTPError as error:
            raise JaxserveError(f"{self._client.base_url}: {error or type(error).__name__}") from error
        raise JaxserveError("the server ended the stream early")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _first_model(self) -> str:
        import httpx

        try:
            response = self._client.get("/models")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise JaxserveError(f"no answer from {self._client.base_url}: {error}") from error
        if response.status_code != 200:
            raise JaxserveError(_error_message(response.status_code, response.text))
        try:
            return response.json()["data"][0]["id"]
        except (ValueError, LookupError, TypeError) as error:
            raise JaxserveError(f"{response.url} does not list models as the OpenAI API does") from error


class LocalBackend:
    """The model, loaded into this process."""

    def __init__(self, config: EngineConfig, *, sampling: dict[str, Any]) -> None:
        """Loads the model.  RequestError, before that, names a sampling field that is out of range."""
        from jaxserve.sampling_params import SamplingParams

        SamplingParams(**sampling)

        from jaxserve.async_llm import AsyncLLM
        from jaxserve.sampling_params import OutputKind

        # The runner turns Ctrl-C into a cancelled task: the stream is closed before KeyboardInterrupt.
        self._runner = asyncio.Runner()
        self._llm = AsyncLLM.from_engine_config(config)
        if self._llm.tokenizer.chat_template is None:
            self.close()
            raise ConfigError(f"{config.model} has no chat template: use `jaxserve generate`")
        self._params = self._llm.default_sampling_params(**sampling, output_kind=OutputKind.DELTA)
        self.name = config.model

    def answer(self, messages: list[Message], write: Callable[[str], None]) -> None:
        """Render the conversation and stream the model's answer; Ctrl-C aborts it in the engine."""
        self._runner.run(self._stream(self._llm.render_chat(messages), write))

    def close(self) -> None:
        """Stop the engine."""
        self._llm.shutdown()
        self._runner.close()

    async def _stream(self, prompt: TokenizedPrompt, write: Callable[[str], None]) -> None:
        async with self._llm.generate(prompt, self._params) as stream:
            async for output in stream:
                write(output.outputs[0].text)


def _delta_text(data: bytes) -> str:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise JaxserveError(f"the server sent an event that is not JSON: {data[:80]!r}") from error
    if event.get("error"):
        raise JaxserveError(str(event["error"].get("message", event["error"])))
    choices = event.get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""


def _error_message(status: int, body: str) -> str:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = body[:200] or "no further explanation"
    return f"the server answered {status}: {message}"
