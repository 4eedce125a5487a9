"""From the bytes of a request to its fields: every refusal names the field, the value and what would do."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from quart import Request, current_app
from werkzeug.exceptions import RequestEntityTooLarge

from jaxserve.server.body_budget import BodyShare
from jaxserve.server.errors import ApiError
from jaxserve.server.strict_json import decode_body

IGNORED_HEADER = "X-Ignored-Params"
MAX_SHOWN = 60  # characters of a wrong value that an error message repeats
MAX_IGNORED = 32  # names in that header: clients take heads of some kilobytes

Fields = TypeVar("Fields", bound=BaseModel)

_WANTED = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "string": "a string",
    "list": "a list",
    "dict": "an object",
    "model": "an object",
}


async def read_body(request: Request, receive_timeout: float, share: BodyShare) -> list[bytes]:
    """The body of a request that says it is JSON, in parts as it came: joining megabytes takes a while.

    Raises ApiError 400 when it does not say so or has none, 415 when it is compressed, 408 when the body has not come
    after `receive_timeout` seconds, 503 where all bodies are too large together, RequestEntityTooLarge when it is.
    """
    media_type = request.mimetype
    if media_type != "application/json" and not media_type.endswith("+json"):
        said = f"got {media_type!r:.100}" if media_type else "it is missing"
        raise ApiError(400, f"Content-Type must be application/json; {said}.", param="Content-Type")
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            415,
            f"Content-Encoding {encoding!r:.60} is not supported: send the body uncompressed.",
            param="Content-Encoding",
            headers={"Accept-Encoding": "identity"},
        )
    parts: list[bytes] = []
    limit, expected = current_app.config["MAX_CONTENT_LENGTH"], request.content_length or 0
    if expected > limit:
        raise RequestEntityTooLarge
    share.announce(expected)
    try:
        async with asyncio.timeout(receive_timeout):
            async for part in request.body:
                share.add(len(part))
                if share.num_bytes > limit:  # Quart counts what has not been taken
                    raise RequestEntityTooLarge
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, "The request body did not arrive in time.", param="body") from None
    if not share.num_bytes:
        raise ApiError(400, "The request body must be a JSON object, got nothing.", param="body")
    return parts


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object that `data` is.  Raises ApiError 400 when it is not JSON or not an object."""
    body = decode_body(data)
    if not isinstance(body, dict):
        raise ApiError(400, f"The request body must be a JSON object, got {_shown(body)}.", param="body")
    return body


def parse(kind: type[Fields], body: Mapping[str, Any]) -> Fields:
    """The fields of `body` as `kind`.  Raises ApiError 400 naming the first wrong field."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ApiError(400, _message(first), param=str(first["loc"][0]) if first["loc"] else "body") from None


def ignored_fields(request: BaseModel, known: Sequence[str] = ()) -> list[str]:
    """Names of the fields that nobody reads, nested ones too ("tools[0].function.nmae"); `known` are read elsewhere."""
    return [where for where, _, _ in _unknown(request, "") if where not in known]


def refuse_ignored(request: BaseModel, names: Sequence[str]) -> None:
    """Raise ApiError 400 for the first of `names`, with the nearest name that would do (--strict-params)."""
    for where, inner, kind in _unknown(request, ""):
        if where in names:
            inner = inner[:MAX_SHOWN]  # names are the caller's, and of any length
            near = difflib.get_close_matches(inner, [name for name, _ in _named_fields(kind)], n=1)
            hint = f" Did you mean {where.removesuffix(inner)}{near[0]}?" if near else ""
            raise ApiError(400, f"Unknown field {_shown(where)}.{hint}", param=where[: 2 * MAX_SHOWN])


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names ignored fields; empty when there are none."""
    # Names are the caller's: quoted, so that none can end the header or the encoding.
    quoted = [quote(name[:MAX_SHOWN], safe="[]") for name in names[:MAX_IGNORED]]
    return {IGNORED_HEADER: ", ".join(quoted)} if quoted else {}


def _unknown(value: Any, where: str) -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Every unknown field in the models of `value`: its path, its own name, and the model that does not know it.

    Of a list's items, only the first one that has it is told.
    """
    if isinstance(value, BaseModel):
        kind = type(value)
        for name in value.model_extra or {}:
            yield where + name, name, kind
        for name, attribute in _named_fields(kind):
            yield from _unknown(getattr(value, attribute), f"{where}{name}.")
    elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
        told: set[str] = set()
        for i, item in enumerate(value):
            for path, name, kind in _unknown(item, ""):
                if path not in told:
                    told.add(path)
                    yield f"{where.removesuffix('.')}[{i}].{path}", name, kind


def _named_fields(kind: type[BaseModel]) -> list[tuple[str, str]]:
    """A model's fields: their names in a request, and the attributes that hold them."""
    return [(field.alias or name, name) for name, field in kind.model_fields.items()]


def _message(error: ErrorDetails) -> str:
    where, kind, value = _path(error["loc"]), error["type"], error["input"]
    if kind == "missing":
        return f"{where} is required."
    if kind == "literal_error":
        return f"{where} must be one of {error.get('ctx', {}).get('expected', '')}, got {_shown(value)}."
    if kind == "string_too_short":
        return f"{where} must not be empty."
    if kind == "string_too_long":
        limit = error.get("ctx", {})["max_length"]
        return f"{where} must have at most {limit} characters, got {len(value)}."
    wanted = _WANTED.get(kind.split("_")[0])
    if wanted is None:
        return f"{where}: {error['msg']}, got {_shown(value)}."
    return f"{where} must be {wanted}, got {_shown(value)}."


def _path(loc: Sequence[str | int]) -> str:
    """("messages", 0, "role") → messages[0].role"""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part[:MAX_SHOWN]}" for part in loc]
    return "".join(parts).removeprefix(".") or "body"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
