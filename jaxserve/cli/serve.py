"""`jaxserve serve`: the OpenAI API over HTTP."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from jaxserve.cli.config_file import add_config_flag
from jaxserve.cli.engine_flags import add_engine_flags, add_model_argument, engine_config
from jaxserve.cli.logs import log_to_stderr
from jaxserve.cli.server_flags import add_server_flags, server_settings
from jaxserve.cli.vllm_flags import environment_note

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig
    from jaxserve.server.settings import ServerSettings

_log = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> dict[str, argparse.ArgumentParser]:
    """Add the command; returns its parser by name."""
    parser = subparsers.add_parser(
        "serve", allow_abbrev=False, help="serve a model over HTTP with the OpenAI API"
    )
    add_model_argument(parser)
    add_config_flag(parser)
    add_server_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run)
    return {"serve": parser}


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit status is 0 when all requests in flight could end."""
    note = environment_note()
    if note is not None:
        print(f"jaxserve: {note}", file=sys.stderr)
    config = engine_config(args)
    settings = server_settings(args)
    return _follow(config) if config.node_rank else _serve(config, settings)


def _serve(config: EngineConfig, settings: ServerSettings) -> int:
    from jaxserve.server.listen import bind_socket

    # Before the seconds that loading takes: a port in use is known at once.
    with bind_socket(settings) as sock:
        from jaxserve.async_llm import AsyncLLM
        from jaxserve.cli.banner import banner
        from jaxserve.engine.start_clock import process_age
        from jaxserve.server.app import create_app
        from jaxserve.server.launch import serve
        from jaxserve.server.state import check_tokenizer

        log_to_stderr()
        print(f"loading {config.model} …", file=sys.stderr, flush=True)
        start = time.monotonic()
        llm = AsyncLLM.from_engine_config(config, lambda tokenizer: check_tokenizer(tokenizer, settings))
        try:
            app = create_app(llm, settings)
            age = process_age()
            seconds = time.monotonic() - start if age is None else age  # as the lines of the parts count
            print(f"ready after {seconds:.1f} s", file=sys.stderr, flush=True)
            if llm.defaults.sampling:
                told = ", ".join(f"{name} {value:g}" for name, value in llm.defaults.sampling.items())
                print(
                    f"requests that say nothing else get {told} (see --generation-config)",
                    file=sys.stderr,
                    flush=True,
                )

            def greet(url: str) -> None:
                print(banner(url, settings, llm.info), flush=True)

            status = serve(app, settings, llm, sock=sock, on_ready=greet)
        finally:
            llm.shutdown()
        if config.nnodes > 1 and llm.error is not None:
            raise llm.error
        _log.info("stopped")
        return status


def _follow(config: EngineConfig) -> int:
    """Be one of the other hosts of a server, until the first one ends."""
    from jaxserve.assembly import follow

    print(
        f"loading {config.model} as host {config.node_rank} of {config.nnodes} …", file=sys.stderr, flush=True
    )
    follow(config)
    _log.info("stopped, since node_rank 0 was")
    return 0
