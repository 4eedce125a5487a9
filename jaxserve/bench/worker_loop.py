"""The child's side of a throughput run: one engine in a process of its own, driven by JSON lines.

This file and `transformers_worker` run under the peer's interpreter, so they import neither jax nor anything
else that only jaxserve needs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Protocol, TextIO


class Engine(Protocol):
    """Something that generates greedily."""

    def describe(self) -> dict[str, Any]:
        """Versions, device, dtype."""
        ...

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[int]]:
        """Exactly `output_len` greedy tokens for each prompt, all as one batch, end tokens ignored."""
        ...


def claim_stdout() -> TextIO:
    """Our own handle on stdout; what libraries print from now on goes to stderr and garbles no reply."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def serve_runs(engine: Engine, load_seconds: float, replies: TextIO) -> None:
    """Say that the engine is ready, then run each request from stdin until it ends."""
    _reply(replies, {"load_seconds": load_seconds, **engine.describe()})
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        token_ids = engine.generate(request["prompts"], request["output_len"])
        seconds = time.perf_counter() - start
        _reply(replies, {"seconds": seconds, "token_ids": token_ids})


def _reply(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()
