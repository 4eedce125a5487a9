"""Errors as the OpenAI API words them: one JSON object, a type by status, a field name and a code."""

from __future__ import annotations

import logging
from http import HTTPStatus

import msgspec
from werkzeug.exceptions import HTTPException

from jaxserve.errors import (
    ContextLengthError,
    EngineDeadError,
    QueueFullError,
    RequestError,
    RequestFailedError,
    ShuttingDownError,
)

_log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1  # what a client that was turned away should wait at least

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """An answer other than 200: status, message and, where known, the field at fault and a code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def to_json(self) -> bytes:
        """The body of the answer, and the data of an error event in a stream."""
        error = {
            "message": self.message,
            "type": _TYPES.get(
                self.status, "BadRequestError" if self.status < 500 else "InternalServerError"
            ),
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})


def unavailable(message: str) -> ApiError:
    """503: nothing is wrong with the request, another server or a later moment may serve it."""
    return ApiError(503, message, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def to_api_error(error: BaseException, request_id: str | None = None) -> ApiError:
    """The answer to any exception.  Unexpected ones are logged; the client never sees their text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), param=error.param, code="context_length_exceeded")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
    if isinstance(error, EngineDeadError):
        return unavailable(str(error))
    if isinstance(error, ShuttingDownError):
        return unavailable(str(error))
    if isinstance(error, RequestFailedError):
        return ApiError(500, str(error))
    if isinstance(error, HTTPException):
        return _from_http(error)
    _log.error("request %s failed", request_id or "-", exc_info=error)
    named = f" (request {request_id})" if request_id else ""
    return ApiError(500, f"Internal server error{named}. The server's log has the details.")


def _from_http(error: HTTPException) -> ApiError:
    """Routing's own errors."""
    status = error.code or 500
    return ApiError(status, f"{HTTPStatus(status).phrase}.")
