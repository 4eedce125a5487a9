"""Runs the application on uvicorn until told to stop; what runs then may end first."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from functools import partial

import uvicorn
from quart import Quart

from jaxserve.async_llm import AsyncLLM
from jaxserve.server.connection import Connection
from jaxserve.server.freed_memory import give_back
from jaxserve.server.listen import address_of, bind_socket
from jaxserve.server.settings import ServerSettings

_log = logging.getLogger(__name__)

BACKLOG = 2048  # connections that wait to be accepted
KEEP_ALIVE_SECONDS = 75  # longer than the idle time of usual proxies, so that the proxy closes first
FLUSH_SECONDS = 5  # for the last bytes of answers after the engine is done with them


def serve(
    app: Quart,
    settings: ServerSettings,
    llm: AsyncLLM,
    *,
    sock: socket.socket | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; returns the process's exit status.

    The first signal lets requests in flight end, up to settings.shutdown_timeout seconds, while new ones and
    /health get 503; the second one ends at once.  `sock` comes from `bind_socket`, called before the model
    was loaded; `on_ready` is called with the server's URL once it listens.
    """
    sock = sock or bind_socket(settings)
    server = HttpServer(app, settings, llm, on_ready)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(server.run_on(sock))
    return 1 if server.is_cut_short else 0


class HttpServer(uvicorn.Server):
    """uvicorn's server with our way of ending."""

    def __init__(
        self,
        app: Quart,
        settings: ServerSettings,
        llm: AsyncLLM,
        on_ready: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(_uvicorn_config(app, settings))
        self._settings = settings
        self._llm = llm
        self._on_ready = on_ready
        self.is_cut_short = False  # told twice to stop
        self._drain: asyncio.Task[None] | None = None

    async def run_on(self, sock: socket.socket) -> None:
        """Listen on a bound socket until told to stop."""
        self._address = address_of(sock, self._settings)
        if sock.family != socket.AF_UNIX:
            # Connections inherit it, so that the next server need not wait for their TIME_WAIT.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            await self.serve(sockets=[sock])
        finally:
            if self._settings.uds is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._settings.uds)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await asyncio.to_thread(give_back)  # what loading and compiling had: hundreds of megabytes
        await super().startup(sockets)
        _log.info("listening on %s", self._address)
        if self._on_ready is not None:
            self._on_ready(self._address)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Replaces uvicorn's, which stops listening at once and at the end raises the signal once more."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals belong to the main thread; who runs us elsewhere calls `stop`
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop, signal.Signals(number).name)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def stop(self, reason: str = "stop") -> None:
        """Drain and end; called again, cut the answers off and end.  On the server's loop only."""
        if self._drain is None:
            seconds = self._settings.shutdown_timeout
            if num_in_flight := self._llm.num_in_flight:
                _log.info(
                    "%s: stopping once requests in flight (%d) have ended, in %g s at most; a second signal "
                    "ends at once",
                    reason,
                    num_in_flight,
                    seconds,
                )
            else:
                _log.info("%s: stopping", reason)
        else:
            _log.warning("%s again: ending at once", reason)
            self._drain.cancel()
            self.is_cut_short, seconds = True, 0.0
            self.config.timeout_graceful_shutdown = 1
        self._drain = asyncio.get_running_loop().create_task(self._drain_and_exit(seconds))

    async def _drain_and_exit(self, seconds: float) -> None:
        await self._llm.drain(seconds)
        self.should_exit = True


def _uvicorn_config(app: Quart, settings: ServerSettings) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=partial(Connection, receive_timeout=settings.receive_timeout),  # pyright: ignore[reportArgumentType]  # is called only
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=FLUSH_SECONDS,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
    )
    config.load()  # reads the TLS files, which bind_socket has seen
    return config
