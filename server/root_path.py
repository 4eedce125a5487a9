"""Serving under a prefix: behind a proxy that cuts the prefix off as well as behind one that leaves it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


def strip_root_path(app: AsgiApp, root_path: str) -> AsgiApp:
    """`app` with `root_path` (e.g. "/llm") taken off the front of every path that has it."""

    async def stripped(scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if path == root_path or path.startswith(root_path + "/"):
            scope = {**scope, "path": path[len(root_path) :] or "/"}
        await app(scope, receive, send)

    return stripped
