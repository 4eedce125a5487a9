"""Which part of a constraint is at fault, and why, in words for who sent it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from jaxserve.errors import RequestError
from jaxserve.structured.grammar import json_options
from jaxserve.structured.lark import lark_json
from jaxserve.structured.limits import parser_limits
from jaxserve.structured.schema import Schema, close_objects, find, read_json, subschemas

if TYPE_CHECKING:
    from jaxserve.structured_outputs import StructuredOutputsParams

_MAX_SECONDS = 0.2  # of processor time to find the subschema at fault
_MAX_REASON = 400  # characters
_PLAIN = {  # what llguidance says -> what it means
    "oneOf constraints are not supported": "a oneOf whose members may both match is not supported; anyOf is.",
    "NoExtensionBias": "nothing satisfies it.",
    "recursion limit exceeded": "it is nested too deeply.",
    "Current row has": "it allows too many alternatives at one place.",
    "too many expressions constructed": "it is too large.",
}


def explain(constraint: StructuredOutputsParams, error: str) -> str:
    """A sentence or two: the kind of constraint, the part of it, and llguidance's reason in plain words."""
    kind = constraint.kind
    if kind == "json":
        return f"the JSON schema cannot be used: {_where(constraint, error)}{reason(error)}"
    said = {"json_object": "JSON grammar", "structural_tag": "structural tag"}.get(kind, kind)
    return f"the {said} cannot be used: {reason(error)}"


def reason(error: str) -> str:
    """What llguidance says, in plain words: a sentence that goes on from a colon."""
    # What follows is the library's state, or our text.
    error = error.split("\n<")[0].split("\n   1 | ")[0].strip()
    if ours := re.match(r"at \d+\(\d+\): failed to compile JSON schema: (.*)", error, re.DOTALL):
        error = ours[1]
    if found := re.search(r"Unimplemented keys: (\[.*?\])", error):
        keys = ", ".join(map(repr, json.loads(found[1])))
        return f"the keyword {keys} is not supported."
    if found := re.search(r"Unknown format: (.*)", error):
        return f"the format {found[1]!r:.60} is not supported."
    if found := re.search(r"regex parse error:.*error: (.*)", error, re.DOTALL):
        return f"not a usable regular expression: {found[1].splitlines()[0]}."
    if found := re.search(r"invalid regex (.*)", error):
        error = found[0].split("\n")[0]
    for said, reason in _PLAIN.items():
        if said in error:
            return reason
    if error.startswith("panic"):
        error = error.split("\n")[0]
    error = error if len(error) <= _MAX_REASON else f"{error[:_MAX_REASON]}…"
    return error if error.endswith((".", "…")) else f"{error}."


def _where(constraint: StructuredOutputsParams, error: str) -> str:
    """The innermost subschema that fails alone in the same way; nothing if that is the whole."""
    try:
        schema = read_json(constraint.json, "json") if isinstance(constraint.json, str) else constraint.json
        if not isinstance(schema, Mapping):
            return ""
        if constraint.disable_additional_properties:
            schema = close_objects(schema)
    except RequestError:
        return ""
    assert isinstance(schema, Mapping)
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    wanted = reason(error)
    pointer, inner = "", schema
    end = time.thread_time() + _MAX_SECONDS
    seen = {""}
    while True:
        for place, part in _parts(schema, inner, pointer):
            if place in seen:
                continue
            seen.add(place)
            if time.thread_time() > end:
                return ""
            if reason(_error_of(part, shared, constraint)) == wanted:
                pointer, inner = place, part
                break
        else:
            return f"at {pointer}: " if pointer else ""


def _parts(root: Schema, schema: Schema, pointer: str) -> Iterator[tuple[str, Schema]]:
    """The schemas inside a schema, and the one that it refers to."""
    yield from subschemas(schema, pointer)
    if isinstance(schema, Mapping) and (target := find(root, schema.get("$ref"))) is not None:
        yield str(schema["$ref"]).removeprefix("#"), target


def _error_of(part: Schema, shared: Mapping[str, object], constraint: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    alone = {**shared, **part} if isinstance(part, Mapping) else part
    lark = f"start: {lark_json(alone, json_options(constraint))}"
    return LLMatcher.validate_grammar(lark, None, limits=parser_limits())
