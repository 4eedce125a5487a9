"""The first steps of every POST: body, fields, model name, request id."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel
from quart import Request, g

from jaxserve.server.body_budget import BodyShare, share_of
from jaxserve.server.errors import ApiError
from jaxserve.server.protocol import GenerationRequest
from jaxserve.server.state import ServerState
from jaxserve.server.unsupported import Rule, refuse_unsupported
from jaxserve.server.validation import (
    ignored_fields,
    ignored_header,
    json_object,
    parse,
    read_body,
    refuse_ignored,
)

LARGE_BODY = 65536  # bytes beyond which reading would hold up the event loop (a millisecond, as a rule)
HUGE_BODY = 2**20  # bytes beyond which bodies are read one at a time: more threads would not be faster

_ID = re.compile(r"[!-~]{1,128}")

Fields = TypeVar("Fields", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Intake(Generic[Fields]):
    """A request that has passed the door."""

    fields: Fields
    model: str  # the name to answer under
    ignored: tuple[str, ...]  # names of fields that nobody reads
    share: BodyShare  # of the memory for bodies

    @property
    def num_bytes(self) -> int:
        """Of the body."""
        return self.share.num_bytes

    @property
    def headers(self) -> dict[str, str]:
        """Those of the answer that tell of the request."""
        return ignored_header(self.ignored)


async def take(
    state: ServerState,
    request: Request,
    kind: type[Fields],
    unsupported: Mapping[str, Rule],
) -> Intake[Fields]:
    """Read a request.  Raises ApiError (400, 404, 413, 503) naming what is wrong with it."""

    def read(parts: list[bytes]) -> tuple[Fields, list[str]]:
        body = json_object(_joined(parts))
        refuse_unsupported(body, unsupported)
        fields = parse(kind, body)
        ignored = ignored_fields(fields, known=tuple(unsupported))
        if state.settings.strict_params:
            refuse_ignored(fields, ignored)
        return fields, ignored

    share = share_of(request)
    parts = await read_body(request, state.settings.receive_timeout, share)
    try:
        if share.num_bytes <= LARGE_BODY:
            fields, ignored = read(parts)
        else:
            async with state.bodies.turn if share.num_bytes > HUGE_BODY else nullcontext():
                fields, ignored = await asyncio.to_thread(read, parts)
    finally:
        parts.clear()  # a call that waits for a thread stays in the line when its client has left
    if ignored:
        g.labels["ignored"] = ", ".join(ignored)
    model = state.check_model(getattr(fields, "model", None))
    return Intake(fields, model, tuple(ignored), share)


def begin_request_id(request: Request) -> None:
    """Take the X-Request-Id header, or make one up.

    Raises ApiError 400 for one that no header can carry back.
    """
    g.request_id, g.labels = uuid.uuid4().hex, {}
    given = request.headers.get("X-Request-Id")
    g.is_request_id_given = given is not None
    if given is not None:
        g.request_id = _checked("X-Request-Id", given)


def name_request(fields: GenerationRequest) -> str:
    """The id of the current request: the header's, else the body's `request_id`, else the made-up one.

    `user` and `metadata` are noted for the log, which is what they are good for on one's own server.
    """
    if fields.request_id is not None and not g.is_request_id_given:
        g.request_id = _checked("request_id", fields.request_id)
    g.labels |= {name: value for name in ("user", "metadata") if (value := getattr(fields, name)) is not None}
    return g.request_id


def _joined(parts: list[bytes]) -> bytes:
    """The body, in place of its parts."""
    body = b"".join(parts)
    parts.clear()
    return body


def _checked(name: str, value: str) -> str:
    if _ID.fullmatch(value) is None:
        raise ApiError(
            400,
            f"{name} must be 1 to 128 printable ASCII characters without spaces, got {value!r:.60}.",
            param=name,
        )
    return value
