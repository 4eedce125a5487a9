"""API keys: who may ask."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from quart import Request

from jaxserve.server.errors import ApiError

# What load balancers, orchestrators and dashboards ask without a key.
OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics", "/load"})


def check_api_key(request: Request, api_keys: Sequence[str]) -> None:
    """Raise ApiError 401 unless the request bears one of `api_keys`, needs none, or there are none."""
    if not api_keys or request.method == "OPTIONS" or request.path.rstrip("/") in OPEN_PATHS:
        return
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        _refuse("Missing API key: send the header 'Authorization: Bearer KEY'.")
    # All keys are compared, each in constant time: how long it takes tells nothing about them.
    given = key.strip().encode()
    if sum(hmac.compare_digest(given, known.encode()) for known in api_keys) == 0:
        _refuse("Incorrect API key.")


def _refuse(message: str) -> None:
    raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
