"""Quart responses out of answers and errors."""

from __future__ import annotations

from typing import Any

import msgspec
from quart import Response

from jaxserve.server.errors import ApiError

_encoder = msgspec.json.Encoder()


def json_response(answer: Any, headers: dict[str, str] | None = None) -> Response:
    """200 with `answer` (a msgspec struct or plain data) as JSON."""
    return Response(_encoder.encode(answer), 200, headers, content_type="application/json")


def error_response(error: ApiError) -> Response:
    """The error's status and its JSON object."""
    return Response(error.to_json(), error.status, error.headers, content_type="application/json")
