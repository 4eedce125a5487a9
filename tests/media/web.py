"""A small web on this machine: 127.0.0.1 plays a public address, 127.0.0.2 a private one."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Answer = bytes | None  # None: the server takes the request and never says a word


@dataclass
class Web:
    """Where it is, and what was asked for."""

    port: int = 0
    asked: list[str] = field(default_factory=list)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


def is_allowed(address: str) -> bool:
    """In place of is_public."""
    return address == "127.0.0.1"


def answer(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    """A whole response."""
    told = {"Content-Length": str(len(body)), **{name.replace("_", "-"): v for name, v in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


@asynccontextmanager
async def web(pages: Mapping[str, Answer], tls: ssl.SSLContext | None = None) -> AsyncIterator[Web]:
    """Serves `pages` by path on all loopback addresses; {port} in an answer becomes the port."""
    here = Web()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ", 2)[1].decode()
        here.asked.append(path)
        page = pages[path]
        try:
            if page is None:
                await reader.read()  # until the client hangs up
            else:
                writer.write(page.replace(b"{port}", str(here.port).encode()))
                await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "0.0.0.0", 0, ssl=tls)
    here.port = server.sockets[0].getsockname()[1]
    async with server:
        yield here
