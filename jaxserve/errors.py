"""Every error that jaxserve raises on purpose: what was wrong, and what would be right."""

from __future__ import annotations


class JaxserveError(Exception):
    """Root of the errors a caller may want to catch."""


class ConfigError(JaxserveError):
    """A setting is impossible: names the field, its value and what would do."""


class CheckpointError(JaxserveError):
    """A weights file or directory is missing, damaged, incomplete or of an unknown architecture."""


class RequestError(JaxserveError):
    """One request is wrong (HTTP 400).  Nothing else is disturbed.

    `param` names the offending request field in the caller's own words, e.g. "temperature".
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def copied(error: RequestError) -> RequestError:
    """The same, without the frames that it came through: a raised error holds them, and all that is in them."""
    return type(error)(str(error), param=error.param)


class ContextLengthError(RequestError):
    """A prompt leaves no room for an answer in the model's context (HTTP 400 with a code of its own)."""


class QueueFullError(JaxserveError):
    """The engine has as many requests waiting as it was told to hold (HTTP 429)."""


class EngineDeadError(JaxserveError):
    """The engine cannot go on; every waiting request fails with this and /health answers 503."""


class RecompileError(JaxserveError):
    """A step asked for a shape outside the compiled lattice under --forbid-recompile."""


class RequestFailedError(JaxserveError):
    """The engine gave up on this one request, through no fault of its text (HTTP 500)."""


class ShuttingDownError(JaxserveError):
    """The front end is draining: what runs may finish, nothing new is taken (HTTP 503)."""
