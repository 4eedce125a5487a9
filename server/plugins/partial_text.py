"""Helpers of vLLM's plug-ins for text and JSON that have come only in part."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partial_json_parser.core.options import Allow


def find_common_prefix(s1: str, s2: str) -> str:
    """What both texts begin with."""
    length = 0
    for a, b in zip(s1, s2, strict=False):
        if a != b:
            break
        length += 1
    return s1[:length]


def find_common_suffix(s1: str, s2: str) -> str:
    """What both texts end with, as far as it has neither letters nor digits: closing quotes and brackets."""
    length = 0
    for a, b in zip(reversed(s1), reversed(s2), strict=False):
        if a != b or a.isalnum():
            break
        length += 1
    return s1[len(s1) - length :]


def extract_intermediate_diff(curr: str, old: str) -> str:
    """What `curr`, a completed piece of JSON, has more than `old`, an earlier one, but for the closing marks.

    extract_intermediate_diff('{"a": "xyz"}', '{"a": "x"}') is 'yz'.
    """
    suffix = find_common_suffix(curr, old)
    return curr.removesuffix(suffix)[len(find_common_prefix(curr, old.removesuffix(suffix))) :]


def find_all_indices(string: str, substring: str) -> list[int]:
    """Where `substring` begins in `string`, overlaps included."""
    found, at = [], string.find(substring)
    while at >= 0:
        found.append(at)
        at = string.find(substring, at + 1)
    return found


def partial_tag_overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may begin `tag`; a complete tag does not count."""
    return next((k for k in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:k])), 0)


def consume_space(i: int, s: str) -> int:
    """The first position from `i` on that holds no white space."""
    return len(s) - len(s[i:].lstrip()) if i < len(s) else i


def is_complete_json(input_str: str) -> bool:
    """Whether a text is one JSON value."""
    try:
        json.loads(input_str)
    except json.JSONDecodeError:
        return False
    return True


def partial_json_loads(input_str: str, flags: Allow) -> tuple[Any, int]:
    """The JSON value that a text begins with, cut off or not, and how many characters it takes.

    `flags` says which kinds of values may be cut off.  Raises partial_json_parser's errors for what cannot
    become JSON.
    """
    start = consume_space(0, input_str)
    try:
        value, end = json.JSONDecoder().raw_decode(input_str, start)
    except json.JSONDecodeError:
        import partial_json_parser  # only plug-ins need it

        return partial_json_parser.loads(input_str, flags), len(input_str)
    return value, end if input_str[end:].strip() else len(input_str)
