"""The openai package's client of a listening server."""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI

from tests.patience import PATIENCE


def openai_client(url: str, **options: Any) -> AsyncOpenAI:
    """It asks once, and waits longer than its few seconds for a connection."""
    usual: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE}
    return AsyncOpenAI(base_url=f"{url}/v1", **{**usual, **options})
