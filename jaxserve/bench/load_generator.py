"""Sends requests to an OpenAI-compatible server and times what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from jaxserve.bench.http_client import HttpClient, TransportError
from jaxserve.bench.sse import DONE, SseParser

Api = Literal["chat", "completions"]
PATHS: dict[Api, str] = {"chat": "/chat/completions", "completions": "/completions"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One thing to ask: a text or a conversation, and how long the answer may be."""

    content: str | list[dict[str, Any]]
    max_tokens: int
    num_tokens: int | None = None  # of the prompt, where it was counted


@dataclass(slots=True)
class RequestRecord:
    """What one request did.  Times are time.perf_counter() seconds."""

    start: float
    end: float = 0.0
    chunk_times: list[float] = field(default_factory=list)  # arrivals of chunks that carry text
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from sending to the first text; None for an answer of special tokens only."""
        return self.chunk_times[0] - self.start if self.chunk_times else None

    @property
    def latency(self) -> float:
        """Seconds from sending to the end of the answer."""
        return self.end - self.start

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds per token after the first; None for answers of one token."""
        if self.num_output_tokens < 2 or not self.chunk_times:
            return None
        return (self.end - self.chunk_times[0]) / (self.num_output_tokens - 1)

    @property
    def inter_token_latencies(self) -> list[float]:
        """Seconds between neighbouring chunks."""
        return [b - a for a, b in zip(self.chunk_times, self.chunk_times[1:], strict=False)]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # what vLLM called `reasoning` before 0.11


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    """The parts of a chunk that matter here; msgspec skips the rest without building it."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class LoadGenerator:
    """Turns prompts into requests of one API at one server."""

    def __init__(
        self,
        client: HttpClient,
        *,
        api: Api,
        model: str,
        extra_body: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> None:
        """`client`'s URL ends in /v1.  `extra_body` goes into every request (temperature, ignore_eos, …).

        `timeout` is seconds for one request as a whole.
        """
        self._client = client
        self._api: Api = api
        self._shared = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **(extra_body or {}),
        }
        self._timeout = timeout
        self._decode = msgspec.json.Decoder(_Chunk).decode

    async def ask(self, prompt: Prompt, on_chunk: Callable[[], None] | None = None) -> RequestRecord:
        """Send one request and follow its stream.  Failures are in the record, not raised."""
        body = msgspec.json.encode(self._payload(prompt))
        record = RequestRecord(start=time.perf_counter(), num_prompt_tokens=prompt.num_tokens or 0)
        follower = _StreamFollower(record, self._decode, on_chunk)
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._client.post(PATHS[self._api], body, follower.feed)
        except TimeoutError:
            record.error = f"no whole answer within {self._timeout:g} s"
        except (TransportError, msgspec.MsgspecError) as error:
            record.error = str(error)
        else:
            if response.status != 200:
                record.error = f"{response.status}: {_error_text(response.body)}"
        record.end = time.perf_counter()
        follower.finish()
        return record

    async def run_closed_loop(
        self,
        prompts: Iterable[Prompt],
        concurrency: int,
        on_done: Callable[[RequestRecord], None] | None = None,
    ) -> list[RequestRecord]:
        """Keep `concurrency` requests under way until all prompts are answered; records as they end."""
        queue = iter(prompts)
        records: list[RequestRecord] = []

        async def worker() -> None:
            for prompt in queue:  # shared by all workers: each takes the next prompt when it is free
                _note(await self.ask(prompt), records, on_done)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
        return records

    async def run_arrivals(
        self,
        prompts: Sequence[Prompt],
        arrivals: Iterable[float],
        *,
        max_concurrency: int | None = None,
        on_done: Callable[[RequestRecord], None] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> list[RequestRecord]:
        """Send each prompt at its arrival time (seconds from now), whether or not earlier ones are answered.

        Beyond `max_concurrency` a request waits for its turn before it is sent, as behind a gateway.
        """
        records: list[RequestRecord] = []
        gate = asyncio.Semaphore(max_concurrency or len(prompts) or 1)

        async def send(prompt: Prompt) -> None:
            async with gate:
                _note(await self.ask(prompt), records, on_done)

        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for prompt, arrival in zip(prompts, arrivals, strict=True):
                delay = start + arrival - time.perf_counter()
                if delay > 0:
                    await sleep(delay)
                group.create_task(send(prompt))
        return records

    def _payload(self, prompt: Prompt) -> dict[str, Any]:
        if self._api == "completions":
            if not isinstance(prompt.content, str):
                raise ValueError("a conversation needs the chat API")
            return {"prompt": prompt.content, "max_tokens": prompt.max_tokens, **self._shared}
        messages = prompt.content
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return {"messages": messages, "max_tokens": prompt.max_tokens, **self._shared}


class _StreamFollower:
    """Fills a record from the bytes of a stream, in the socket's callback."""

    def __init__(
        self, record: RequestRecord, decode: Callable[[bytes], _Chunk], on_chunk: Callable[[], None] | None
    ) -> None:
        self._record = record
        self._decode = decode
        self._on_chunk = on_chunk
        self._sse = SseParser()
        self._pieces: list[str] = []
        self._usage_tokens: int | None = None
        self._is_done = False

    def feed(self, data: bytes) -> None:
        now = time.perf_counter()
        for event in self._sse.feed(data):
            if event == DONE:
                self._is_done = True
                continue
            chunk = self._decode(event)
            if chunk.error is not None:
                self._record.error = f"error in the stream: {_message(chunk.error)}"
            if chunk.usage is not None:
                self._record.num_prompt_tokens = chunk.usage.prompt_tokens
                self._usage_tokens = chunk.usage.completion_tokens
            if chunk.choices:
                self._take(chunk.choices[0], now)

    def finish(self) -> None:
        """Settle the counts; a stream that says it is fine but is cut is an error."""
        record = self._record
        record.text = "".join(self._pieces)
        record.num_output_tokens = self._usage_tokens if self._usage_tokens is not None else len(self._pieces)
        if record.error is None and not self._is_done:
            record.error = "the stream ended without [DONE]"
        if record.error is None and not record.num_output_tokens:
            record.error = "the answer is empty"

    def _take(self, choice: _Choice, now: float) -> None:
        if choice.finish_reason is not None:
            self._record.finish_reason = choice.finish_reason
        delta = choice.delta
        text = choice.text
        if delta is not None:
            text = delta.content or delta.reasoning or delta.reasoning_content
        if not text:
            return
        self._record.chunk_times.append(now)
        self._pieces.append(text)
        if self._on_chunk is not None:
            self._on_chunk()


def _note(
    record: RequestRecord, records: list[RequestRecord], on_done: Callable[[RequestRecord], None] | None
) -> None:
    records.append(record)
    if on_done is not None:
        on_done(record)


def _error_text(body: bytes) -> str:
    try:
        return _message(msgspec.json.decode(body)["error"])
    except (msgspec.MsgspecError, LookupError, TypeError):
        return body[:200].decode("utf-8", "replace") or "no further explanation"


def _message(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
