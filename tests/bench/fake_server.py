"""An OpenAI-compatible server that answers by script: a thread with an event loop of its own.

It is written on bare sockets, apart from the project's own HTTP code, so that it can also misbehave.  The
model name of a request chooses what happens (see `_stream`).
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WORDS = ["Paris", " is", " the", " capital", " of", " France", "."]


class FakeServer:
    """What the server saw.

    `meeting` requests, from the second one on, must come together before any of them is answered: whoever counts how
    many are open at once needs that, or they come one by one where the client's thread is slow.
    """

    def __init__(self) -> None:
        self.meeting = 1
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.num_connections = 0
        self.num_open = 0  # generation requests being answered
        self.max_open = 0
        self._have_met = asyncio.Event()
        self.hang_ups = threading.Semaphore(0)  # released when a client goes away during an answer

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, path, _ = head.split(" ", 2)
                self.headers.append(head.lower())
                length = next(
                    (
                        int(h.split(":")[1])
                        for h in head.lower().split("\r\n")
                        if h.startswith("content-length")
                    ),
                    0,
                )
                body = json.loads(await reader.readexactly(length)) if length else {}
                if not await self._answer(method, path, body, reader, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(
        self,
        method: str,
        path: str,
        body: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Answer one request; False ends the connection."""
        match method, path:
            case "GET", "/v1/models":
                _send_json(writer, 200, {"object": "list", "data": [{"id": "fake", "object": "model"}]})
            case "POST", "/tokenize":
                # One token a word, and a begin token.
                _send_json(writer, 200, {"count": 1 + len(body["prompt"].split()), "tokens": []})
            case "POST", "/v1/chat/completions" | "/v1/completions":
                self.bodies.append(body)
                self.num_open += 1
                self.max_open = max(self.max_open, self.num_open)
                if self.num_open >= self.meeting:
                    self._have_met.set()
                try:
                    if len(self.bodies) > 1:
                        await self._have_met.wait()
                    return await self._stream(path.endswith("chat/completions"), body, reader, writer)
                except ConnectionError:
                    # What a client leaves unread, or is sent after it went, resets the connection.
                    self.hang_ups.release()
                    raise
                finally:
                    self.num_open -= 1
            case _:
                _send_json(writer, 404, {"error": {"message": f"no route {path}", "type": "NotFoundError"}})
        return True

    async def _stream(
        self, is_chat: bool, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        model = body["model"]
        if model == "refuses":
            _send_json(
                writer, 400, {"error": {"message": "temperature must be in [0, 2]", "param": "temperature"}}
            )
            return True
        if model == "plain-error":
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 11\r\n\r\nbad gateway")
            return True
        if not body.get("stream"):
            message = {"role": "assistant", "content": "".join(WORDS)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            _send_json(
                writer,
                200,
                {"id": "1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice]},
            )
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        words = (WORDS * body["max_tokens"])[: body["max_tokens"]] if body.get("ignore_eos") else WORDS
        if is_chat:
            _send_event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for number, word in enumerate(words):
            if model == "breaks" and number == 2:
                _send_event(writer, {"error": {"message": "the engine died", "type": "InternalServerError"}})
                break
            if model == "cuts" and number == 2:
                writer.transport.abort()
                return False
            if model == "hangs" and number == 2:
                await writer.drain()
                await reader.read()  # until the client hangs up
                self.hang_ups.release()
                return False
            choice = {"index": 0, "delta": {"content": word}} if is_chat else {"index": 0, "text": word}
            _send_event(writer, {"choices": [choice]})
            await writer.drain()
            await asyncio.sleep(0)
        usage = {"prompt_tokens": 5, "completion_tokens": len(words) * (2 if model == "two-a-chunk" else 1)}
        _send_event(writer, {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]})
        if body.get("stream_options", {}).get("include_usage"):
            _send_event(writer, {"choices": [], "usage": usage})
        if model != "no-done":
            _send_chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A running FakeServer."""
    server = FakeServer()
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        connections: set[asyncio.Task[None]] = set()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            try:
                await server.handle(reader, writer)
            except asyncio.CancelledError:  # the end of the test; asyncio would log it as an error
                writer.transport.abort()  # closed, it would wait for whoever does not read
            finally:
                connections.discard(task)

        listener = await asyncio.start_server(handle, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        started.set()
        await stop.wait()
        listener.close()
        for task in connections.copy():
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    started.wait()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def _send_json(writer: asyncio.StreamWriter, status: int, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


def _send_event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    _send_chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")


def _send_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
