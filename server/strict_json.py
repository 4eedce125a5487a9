"""JSON that means one thing only: no names given twice, no numbers beyond range, no bottomless nesting."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec

from jaxserve.server.errors import ApiError

MAX_DEPTH = 100  # lists and objects within each other; a tool's JSON schema has about 10


def decode_body(data: bytes) -> Any:
    """The value of a request's body.

    Raises ApiError 400 for what is no JSON (NaN, numbers beyond a double's range, lone surrogates and bytes that
    are not UTF-8 are not), for nesting deeper than MAX_DEPTH, and for an object that has a name twice: which of
    the two counts differs between parsers, and so between us and whatever has checked the request before us.
    """
    _check_depth(data)
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        hint = ""
        if b"\\ud" in data.lower():
            hint = " (a surrogate, \\ud800 to \\udfff, means something only as a pair)"
        raise ApiError(400, f"The request body is not valid JSON: {error}{hint}.", param="body") from error
    _check_names(data)
    return body


def _check_depth(data: bytes) -> None:
    """Before anything recurses into it.  Costs something only where there are that many brackets at all."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    depth, is_string = 0, False
    # Strings are skipped whole; outside of them only brackets count.
    for part in data.split(b'"'):
        if is_string:
            num_escapes = len(part) - len(part.rstrip(b"\\"))
            is_string = num_escapes % 2 == 1  # the quotation mark after it is part of the string
            continue
        is_string = True
        opened, closed = part.count(b"[") + part.count(b"{"), part.count(b"]") + part.count(b"}")
        if depth + opened > MAX_DEPTH:
            depth = _walk(part, depth)
        else:
            depth += opened - closed


def _walk(part: bytes, depth: int) -> int:
    """The depth after `part`, which is outside of strings.  Raises ApiError 400 where it is too great."""
    for byte in part:
        if byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ApiError(
                    400,
                    f"The request body is nested too deeply: at most {MAX_DEPTH} lists and objects within "
                    "each other.",
                    param="body",
                )
        elif byte in b"]}":
            depth -= 1
    return depth


def _check_names(data: bytes) -> None:
    json.loads(data, object_pairs_hook=_refuse_twice)


def _refuse_twice(pairs: list[tuple[str, Any]]) -> None:
    if len(pairs) < 2:
        return
    counts = Counter(name for name, _ in pairs)
    if len(counts) == len(pairs):
        return
    twice = next(name for name, count in counts.items() if count > 1)
    raise ApiError(400, f"The request body has {twice!r:.60} twice.", param=twice[:60])
