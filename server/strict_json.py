"""JSON that means one thing only: no names given twice, no numbers beyond range, no bottomless nesting."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec

from jaxserve.server.errors import ApiError

MAX_DEPTH = 100  # lists and objects within each other; a tool's JSON schema has about 10
MAX_CONTAINERS = 100_000  # lists and objects of a body; each costs more time and memory than its two bytes
MAX_NAMES = 300_000  # of all objects together
MAX_VALUES = 2**22  # token ids, as a rule

_PART = 2**20  # bytes that one call looks at while no other thread runs
_STRUCTURE = b'[]{},:"'
_NO_STRUCTURE = bytes(byte for byte in range(256) if byte not in _STRUCTURE)


def decode_body(data: bytes) -> Any:
    """The value of a request's body.

    Raises ApiError 400 for what is no JSON (NaN, numbers beyond a double's range, lone surrogates and bytes that
    are not UTF-8 are not), for nesting deeper than MAX_DEPTH, for more lists, objects and values than any request has,
    and for an object that has a name twice: which of the two counts differs between parsers, and so between us and
    whatever has checked the request before us.
    """
    num_names = _checked_structure(data)  # before anything recurses into it
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        hint = ""
        if b"\\ud" in data.lower():
            hint = " (a surrogate, \\ud800 to \\udfff, means something only as a pair)"
        raise ApiError(400, f"The request body is not valid JSON: {error}{hint}.", param="body") from error
    if _num_names(body) != num_names:
        json.loads(data, object_pairs_hook=_refuse_twice)
    return body


def _checked_structure(data: bytes) -> int:
    """How many names the objects of `data` have together, if it is JSON.

    Raises ApiError 400 for too many lists, objects and values, and too many of them within each other.
    """
    depth = num_containers = num_values = num_names = 0
    is_string = False
    backslash = b""  # one that escapes what the next part begins with
    for start in range(0, len(data), _PART):
        part = backslash + data[start : start + _PART]
        bare = part.rstrip(b"\\")
        backslash = b"\\" * ((len(part) - len(bare)) % 2)
        if b"\\" in bare:
            bare = bare.replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = bare.translate(None, _NO_STRUCTURE).split(b'"')
        outside = b"".join(pieces[is_string::2])
        is_string ^= len(pieces) % 2 == 0
        opened, closed = (sum(map(outside.count, brackets)) for brackets in ((b"[", b"{"), (b"]", b"}")))
        depth = depth + opened - closed if depth + opened <= MAX_DEPTH else _walk(outside, depth)
        num_containers += opened
        num_values += outside.count(b",")
        num_names += outside.count(b":")
        if num_containers > MAX_CONTAINERS or num_names > MAX_NAMES or num_values > MAX_VALUES:
            raise ApiError(
                400,
                f"The request body has too many parts: at most {MAX_CONTAINERS} lists and objects, {MAX_NAMES} names "
                f"in objects, and {MAX_VALUES} values in all.",
                param="body",
            )
    return num_names


def _walk(outside: bytes, depth: int) -> int:
    """The depth after `outside`, a part without its strings.  Raises ApiError 400 where it is too great."""
    for byte in outside:
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


def _num_names(value: Any) -> int:
    """How many names the objects in `value` have together."""
    count, left = 0, [value]
    while left:
        container = left.pop()
        if isinstance(container, dict):
            count += len(container)
            container = container.values()
        elif not isinstance(container, list):
            continue
        left.extend(inner for inner in container if isinstance(inner, dict | list))
    return count


def _refuse_twice(pairs: list[tuple[str, Any]]) -> None:
    if len(pairs) < 2:
        return
    counts = Counter(name for name, _ in pairs)
    if len(counts) == len(pairs):
        return
    twice = next(name for name, count in counts.items() if count > 1)
    raise ApiError(400, f"The request body has {twice!r:.60} twice.", param=twice[:60])
