"""The JSON scanner, compared with the library's parser."""

from __future__ import annotations

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve.server.tool_parsers.json_scanner import BadJsonError, JsonScanner
from tests.server.tool_parsers.replaying import json_values, pieces


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _length(text: str) -> int | None:
    """How long the JSON value at the beginning of `text` is, by the library; None: none is complete."""
    try:
        return (
            json.JSONDecoder(parse_constant=_refuse).raw_decode(text.lstrip(" \t\n\r"))[1]
            + len(text)
            - len(text.lstrip(" \t\n\r"))
        )
    except (ValueError, RecursionError):
        return None


def _scan(parts: list[str]) -> int | None:
    scanner, length = JsonScanner(), 0
    try:
        for part in parts:
            length += scanner.scan(part)
            if scanner.is_done:
                return length
    except BadJsonError:
        pass
    return None


@settings(max_examples=150)
@given(
    value=json_values,
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
    tail=st.sampled_from([" ", "}", ", 1", "]"]),
    cuts=st.lists(st.integers(1, 100), max_size=10),
)
def test_a_value_ends_where_it_ends(value, indent, ascii_only, tail, cuts):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert _scan(pieces(text + tail, cuts)) == len(text)


@settings(max_examples=300)
@example(text="01 ")
@example(text='{"a":1,} ')
@example(text="[1 2] ")
@example(text='"\\x" ')
@example(text='"\n" ')
@example(text="-.5 ")
@example(text="１ ")
@given(text=st.text(st.sampled_from('{}[]":,\\ \n019.-+eEtrufalsn'), max_size=12))
def test_what_is_json_is_what_the_library_takes(text):
    text += " "  # so that numbers end
    length = _length(text)
    found = _scan([text])
    if text.lstrip().startswith(tuple("-0123456789")):
        assert found in (length, None)  # the library reads "01" as 0 and a rest; here it is bad
    else:
        assert found == length


def test_deep_nesting_is_no_recursion():
    depth = 100_000
    assert _scan(["[" * depth + "]" * depth]) == 2 * depth
