"""A server process around the scripted engine, for tests of signals.

Its argument is the shutdown timeout in seconds.
Answers are endless ("a" until max_tokens) and held back until SIGUSR1.
"""

from __future__ import annotations

import signal
import sys

from jaxserve.server import serve
from tests.server.serving import say, serving


def main() -> int:
    """Serve until told to stop; the exit status is the process's."""
    with serving(say("a" * 400), engine={"stalled": True}, shutdown_timeout=float(sys.argv[1])) as served:
        signal.signal(signal.SIGUSR1, lambda *_: served.engine.resume())
        return serve(
            served.app,
            served.settings,
            served.llm,
            on_ready=lambda url: print(url, flush=True),
        )


if __name__ == "__main__":
    sys.exit(main())
