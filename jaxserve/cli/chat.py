"""`jaxserve chat`: talk to a model in the terminal."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from jaxserve.cli.config_file import add_config_flag
from jaxserve.cli.engine_flags import (
    MODEL_HELP,
    add_engine_flags,
    add_model_argument,
    engine_config,
    given_engine_flags,
)
from jaxserve.cli.sampling_flags import add_sampling_flags, sampling_fields
from jaxserve.errors import ConfigError


def add_parser(subparsers: Any) -> dict[str, argparse.ArgumentParser]:
    """Add the command; returns its parser by name."""
    parser = subparsers.add_parser(
        "chat",
        allow_abbrev=False,
        help="talk to a model in the terminal",
        description="Talk to a model: to the one behind --url, or to one loaded into this process. "
        "With input from a pipe every line is a message.",
    )
    add_model_argument(parser)
    add_config_flag(parser)
    parser.add_argument("--url", help="talk to a running server, for example http://127.0.0.1:8000")
    parser.add_argument("--api-key", help="key of that server (default: $OPENAI_API_KEY)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    add_sampling_flags(parser, max_tokens=1024)
    add_engine_flags(parser)
    parser.set_defaults(run=run)
    return {"chat": parser}


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends; 1 if an answer to piped input failed."""
    from jaxserve.cli.chat_backends import ChatBackend, HttpBackend, LocalBackend
    from jaxserve.cli.chat_loop import ChatLoop

    sampling = sampling_fields(args)
    backend: ChatBackend
    if args.url:
        idle = given_engine_flags(args)
        if idle:
            raise ConfigError(
                f"{', '.join(idle)}: has no effect with --url, where the server runs the engine"
            )
        api_key = args.api_key or os.environ.get("OPENAI_API_KEY")
        backend = HttpBackend(args.url, model=args.model, api_key=api_key, sampling=sampling)
    else:
        if args.api_key:
            raise ConfigError("--api-key: has no effect without --url")
        if args.model is None:
            raise ConfigError(f"MODEL is missing: give a {MODEL_HELP}, or --url of a running server")
        print("loading the model …", file=sys.stderr, flush=True)
        backend = LocalBackend(engine_config(args), sampling=sampling)
    try:
        loop = ChatLoop(backend, system=args.system)
        return loop.run_terminal() if sys.stdin.isatty() else loop.run_pipe(sys.stdin)
    finally:
        backend.close()
