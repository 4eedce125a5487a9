"""Cross-origin requests of browsers, as --allowed-origins says."""

from __future__ import annotations

from collections.abc import Sequence

from quart import Request, Response

from jaxserve.server.errors import ApiError

EXPOSED_HEADERS = "X-Request-Id, X-Ignored-Params, X-Max-Tokens-Reduced"
MAX_AGE_SECONDS = 600  # how long a browser may remember a preflight's answer


def is_preflight(request: Request) -> bool:
    """Whether a browser asks if it may ask."""
    return request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers


def answer_preflight(request: Request, allowed_origins: Sequence[str]) -> Response:
    """The permission.  Raises ApiError 400 for an origin that has none."""
    origin = request.headers.get("Origin", "")
    if not _is_allowed(origin, allowed_origins):
        raise ApiError(400, f"Origin {origin!r:.200} is not allowed here.", param="Origin")
    response = Response("", 200)
    response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
    response.headers["Access-Control-Max-Age"] = str(MAX_AGE_SECONDS)
    response.headers["Access-Control-Allow-Headers"] = request.headers.get(
        "Access-Control-Request-Headers", "*"
    )
    return response


def add_cors_headers(request: Request, response: Response, allowed_origins: Sequence[str]) -> None:
    """Let the browser's page read the answer, if its origin is allowed."""
    origin = request.headers.get("Origin")
    if origin is None or not _is_allowed(origin, allowed_origins):
        return
    if "*" in allowed_origins:
        response.headers["Access-Control-Allow-Origin"] = "*"
    else:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers.add("Vary", "Origin")
    response.headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS


def _is_allowed(origin: str, allowed_origins: Sequence[str]) -> bool:
    return "*" in allowed_origins or origin in allowed_origins
