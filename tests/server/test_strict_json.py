"""Bodies that other parsers would take, or would take differently."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.server import strict_json
from jaxserve.server.errors import ApiError
from jaxserve.server.strict_json import MAX_CONTAINERS, MAX_DEPTH, MAX_NAMES, MAX_VALUES, decode_body

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(alphabet='[{"\\\\]}a,:é', max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text('[{"\\\\', max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(value=values, depth=st.integers(0, MAX_DEPTH + 5), indent=st.sampled_from([None, 1]))
def test_it_reads_what_is_not_too_deep(value: Any, depth: int, indent: int | None):
    """Brackets and quotation marks in strings count for nothing."""
    for level in range(depth):
        value = [value] if level % 2 else {"[{": value}
    data = json.dumps(value, indent=indent).encode()

    def height(part: Any) -> int:
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else None
        return 0 if inner is None else 1 + max(map(height, inner), default=0)

    if height(value) <= MAX_DEPTH:
        assert decode_body(data) == value
    else:
        with pytest.raises(ApiError, match="nested too deeply"):
            decode_body(data)


@given(value=values, size=st.integers(1, 9), repeated=st.booleans())
def test_strings_and_names_are_told_apart_wherever_the_text_is_cut(value: Any, size: int, repeated: bool):
    """A body is looked at in parts; where one ends nothing is lost, and nothing counted twice."""
    data = json.dumps({"": value}).encode()
    if repeated:
        data = data[:-1] + b', "\\\\": 1, "\\\\": 2}'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict_json, "_PART", size)
        patch.setattr(strict_json, "MAX_DEPTH", 12)
        if repeated:
            with pytest.raises(ApiError, match="twice"):
                decode_body(data)
        else:
            assert decode_body(data) == {"": value}


@pytest.mark.parametrize("unit", [b"[]", b"{}", b'{"\\"[":[]}'])
def test_more_lists_and_objects_than_any_request_has(unit: bytes):
    num_containers = unit.count(b"{") + unit.count(b"]")
    count = (MAX_CONTAINERS - 1) // num_containers
    assert len(decode_body(b"[" + b",".join([unit] * count) + b"]")) == count
    with pytest.raises(ApiError, match="too many parts: at most 100000 lists and objects") as caught:
        decode_body(b"[" + b",".join([unit] * (count + 1)) + b"]")
    assert (caught.value.status, caught.value.param) == (400, "body")


def test_more_names_than_any_request_has():
    data = b"{" + b",".join(b'"%d":1' % i for i in range(MAX_NAMES)) + b"}"
    assert len(decode_body(data)) == MAX_NAMES
    with pytest.raises(ApiError, match=r"too many parts.* 300000 names"):
        decode_body(data[:-1] + b',"":1}')


def test_more_values_than_any_request_has():
    with pytest.raises(ApiError, match="too many parts"):
        decode_body(b"[" + b"1," * (MAX_VALUES + 1) + b"1]")
    assert len(decode_body(b'["' + b"1," * (MAX_VALUES + 1) + b'"]')[0]) == 2 * (MAX_VALUES + 1)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"\\"[":', b"[[],[],"])
def test_bottomless_nesting_is_refused_before_anything_recurses(opening: bytes):
    with pytest.raises(ApiError, match="nested too deeply") as caught:
        decode_body(opening * 200_000)
    assert (caught.value.status, caught.value.param) == (400, "body")


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b'{"a": 1, "a": 1}', "a"),
        (b'{"a": 1, "\\u0061": 2}', "a"),
        (b'{"x": [{"b": 1, "c": 2, "b": 3}]}', "b"),
    ],
)
def test_a_name_given_twice_is_refused(data: bytes, param: str):
    with pytest.raises(ApiError, match="twice") as caught:
        decode_body(data)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": 1e400}', "out of range"),
        (b'{"a": -1e400}', "out of range"),
        (b'{"a": NaN}', "malformed"),
        (b'{"a": Infinity}', "malformed"),
        (b'{"a": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": "\\udc00\\ud800"}', "surrogate"),
        (b'{"a": "\xed\xa0\x80"}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "malformed"),
        ("{}".encode("utf-16"), "malformed"),
        (b'{"a": 01}', "malformed"),
        (b"{'a': 1}", "malformed"),
        (b'{"a": 1,}', "malformed"),
        (b'{"a": "\x00"}', "not valid JSON"),
        (b"{} {}", "malformed"),
    ],
)
def test_what_is_no_json(data: bytes, says: str):
    with pytest.raises(ApiError, match=says) as caught:
        decode_body(data)
    assert (caught.value.status, caught.value.param) == (400, "body")


def test_pairs_of_surrogates_and_null_characters_are_text():
    assert decode_body(b'{"a": "\\ud83c\\udf89\\u0000"}') == {"a": "\U0001f389\0"}
