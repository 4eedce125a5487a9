"""A `jaxserve serve` of our own for a benchmark: started on a free port, watched, and stopped."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from jaxserve.errors import JaxserveError

_POLL_SECONDS = 0.1
_LOG_TAIL = 20  # lines shown when the server fails


class ServerProcess:
    """`with ServerProcess(model) as server:` runs the server from ready to drained."""

    def __init__(self, model: str, flags: Sequence[str] = (), *, startup_timeout: float = 900.0) -> None:
        """`flags` go to `jaxserve serve` as they are; `startup_timeout` is seconds from launch to ready."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [
            *(sys.executable, "-m", "jaxserve", "serve", model),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *flags,
        ]
        self._startup_timeout = startup_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self.startup_seconds = 0.0

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self._log = tempfile.NamedTemporaryFile(prefix="jaxserve-serve-", suffix=".log", delete=False)
        start = time.monotonic()
        self._process = subprocess.Popen(
            self._command, stdout=self._log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            self._wait_until_ready(start + self._startup_timeout)
        except BaseException:
            self._stop()
            raise
        self.startup_seconds = time.monotonic() - start
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if error is None:
            Path(self._log.name).unlink(missing_ok=True)
        else:
            print(f"the server's log is in {self._log.name}", file=sys.stderr)

    def _wait_until_ready(self, deadline: float) -> None:
        assert self._process is not None
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                status = self._process.returncode
                raise JaxserveError(
                    f"the server ended with status {status} before it was ready:\n{self._tail()}"
                )
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                    if response.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass  # not listening yet
            time.sleep(_POLL_SECONDS)
        raise JaxserveError(f"the server was not ready within {self._startup_timeout:g} s:\n{self._tail()}")

    def _stop(self) -> None:
        """SIGTERM drains; SIGKILL if that takes too long."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def _tail(self) -> str:
        lines = Path(self._log.name).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL:])


@contextmanager
def server_at(base_url: str | None, model: str, flags: Sequence[str]) -> Iterator[str]:
    """The URL of a server: the one that is given, or of one started for as long as this lasts."""
    if base_url is not None:
        yield base_url
        return
    print(f"starting a server for {model} …", flush=True)
    with ServerProcess(model, flags) as server:
        yield server.url


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
