"""Pieces of Lark text, in llguidance's dialect, for grammars that are put together from parts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxserve.structured.limits import check_literals

if TYPE_CHECKING:
    from jaxserve.text.tokenizer import Tokenizer

ANY_TEXT = r"/(.|\n)*/"  # text of any length; a control token is no text


def lark_literal(text: str) -> str:
    """A string that must be written exactly so.  Raises RequestError for one that is too long."""
    check_literals(text)
    return json.dumps(text, ensure_ascii=False)  # Lark's strings are read as JSON's


def lark_regex(pattern: str) -> str:
    """A regular expression between slashes.  Raises ValueError for one that is empty: Lark has no such terminal."""
    if not pattern:
        raise ValueError("the regular expression is empty")
    # A slash would end it, and a line feed cannot stand between slashes.
    unescaped = re.sub(r"(\\.)|(/)", lambda m: m[1] or r"\/", pattern, flags=re.DOTALL)
    return "/" + unescaped.replace("\\\n", r"\n").replace("\n", r"\n").replace("\r", r"\r") + "/"


def lark_json(schema: Mapping[str, Any] | bool, options: Mapping[str, Any] | None = None) -> str:
    """JSON text that a schema describes; options are llguidance's ("x-guidance"), beneath those in the schema.

    Raises ValueError, TypeError or RecursionError for what is no JSON.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    own = schema.get("x-guidance")
    merged = {**(options or {}), **(own if isinstance(own, Mapping) else {})}
    if merged:
        schema = {**schema, "x-guidance": merged}
    return "%json " + json.dumps(schema, ensure_ascii=False, allow_nan=False, default=_as_dict)


def lark_marker(tokenizer: Tokenizer, marker: str) -> str:
    """What matches a marker such as "<tool_call>" or "[TOOL_CALLS]": its token if it is a control token, else its text.

    For rules; a terminal (in capitals) cannot hold tokens.
    """
    token_id = control_id(tokenizer, marker)
    return lark_literal(marker) if token_id is None else lark_token(token_id)


def lark_text(tokenizer: Tokenizer, text: str) -> str:
    """What matches a text in which control tokens may stand; for rules.  Never empty: `""` matches the empty text."""
    parts = [lark_token(p) if isinstance(p, int) else lark_literal(p) for p in split_text(tokenizer, text)]
    return " ".join(parts) or '""'


def lark_token(token_id: int) -> str:
    """Exactly this token."""
    return f"<[{token_id}]>"


def split_text(tokenizer: Tokenizer, text: str) -> list[str | int]:
    """A text cut into plain strings and the ids of the control tokens written in it."""
    contents = [re.escape(tokenizer.id_to_token(i) or "") for i in control_ids(tokenizer)]
    if not contents:
        return [text] if text else []
    longest_first = "|".join(sorted(filter(None, contents), key=len, reverse=True))
    parts: list[str | int] = []
    for index, part in enumerate(re.split(f"({longest_first})", text)):
        if part:
            token_id = tokenizer.token_to_id(part) if index % 2 else None
            parts.append(part if token_id is None else token_id)
    return parts


def control_id(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of the control token that is written so, if there is one."""
    token_id = tokenizer.token_to_id(text)
    return token_id if token_id is not None and is_control(tokenizer, token_id) else None


def control_ids(tokenizer: Tokenizer) -> list[int]:
    """All control tokens, in order of their ids."""
    return sorted(i for i in tokenizer.added_ids if is_control(tokenizer, i))


def is_control(tokenizer: Tokenizer, token_id: int) -> bool:
    """Whether a token is a mark of its own, and no text.

    Some checkpoints have marks like <tool_call> as added tokens that are not special, and others runs of spaces: what
    stands in brackets is a mark.
    """
    if token_id in tokenizer.special_ids:
        return True
    if token_id not in tokenizer.added_ids:
        return False
    content = tokenizer.id_to_token(token_id) or ""
    return len(content) > 2 and content[0] + content[-1] in ("<>", "[]")


def _as_dict(value: object) -> object:
    if isinstance(value, Mapping):  # such as a mapping proxy: a schema need not be made of dicts
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON")
