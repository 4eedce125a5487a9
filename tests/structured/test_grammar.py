"""What each kind of constraint lets through."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from jaxserve import StructuredOutputsParams
from jaxserve.errors import RequestError
from tests.structured.matching import check, follows

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize(
    ("constraint", "texts"),
    [
        ({"json": OBJECT}, ['{"a":1}', '{"a": -1}', '{\n  "a" : 1, "b": null }']),
        ({"json": MappingProxyType(OBJECT)}, ['{"a":1}']),
        ({"json": '{"type": "integer"}'}, ["12"]),
        ({"json": True}, ["null", "[]", '{"x": [1.5]}', '"\u00e9"']),
        ({"json": TREE}, ['{"next": {"next": {}}}']),
        ({"json_object": True}, ["{}", '{"a": [1, {"b": "c"}]}']),
        ({"regex": r"[a-c]+/\d?"}, ["abc/", "a/7"]),
        ({"regex": "a\nb|\\n"}, ["a\nb", "\n"]),
        ({"regex": ""}, [""]),
        ({"choice": ["yes", "no", 'say "hi"\n', ""]}, ["yes", "no", 'say "hi"\n', ""]),
        ({"grammar": 'start: "a" b\nb: /[0-9]/'}, ["a1"]),
        ({"grammar": 'root ::= "yes" | "n" [o0]+'}, ["yes", "no", "n00"]),
        ({"grammar": 'start: "a" <tool_call> "b" </tool_call>'}, ["a<tool_call>b</tool_call>"]),
    ],
)
def test_what_follows_a_constraint(constraint: dict[str, Any], texts: list[str]) -> None:
    for text in texts:
        assert follows(text, **constraint), text


@pytest.mark.parametrize(
    ("constraint", "texts"),
    [
        ({"json": OBJECT}, ['{"a":"1"}', "{}", '{"a":1', ' {"a":1}', "12"]),
        ({"json_object": True}, ["[]", "1", "{a: 1}"]),
        ({"regex": "[a-c]+"}, ["", "abcd"]),
        ({"regex": ""}, ["a"]),
        ({"choice": ["yes", "no"]}, ["ye", "yesno", ""]),
        ({"grammar": 'start: "a" <tool_call>'}, ["a"]),
        # The name of a token, written as text, is not the token.
        ({"choice": ["<tool_call>"]}, ["<tool_call>"]),
    ],
)
def test_what_does_not(constraint: dict[str, Any], texts: list[str]) -> None:
    for text in texts:
        assert not follows(text, **constraint), text


def test_white_space_is_as_told() -> None:
    spaced, compact = '{ "a": 1}', '{"a":1}'
    assert follows(compact, json=OBJECT, disable_any_whitespace=True)
    assert not follows(spaced, json=OBJECT, disable_any_whitespace=True)
    assert follows(spaced, json=OBJECT, whitespace_pattern=" ?")
    assert not follows('{  "a": 1}', json=OBJECT, whitespace_pattern=" ?")
    assert follows("{" + " " * 64 + '"a":1}', json=OBJECT)
    assert not follows("{" + " " * 65 + '"a":1}', json=OBJECT), "no answer is blanks until it is cut off"


def test_objects_can_be_closed() -> None:
    more, inner = '{"a":1,"b":2}', '{"a":1,"c":{"d":1}}'
    closed = {"json": OBJECT, "disable_additional_properties": True}
    assert follows(more, json=OBJECT)
    assert not follows(more, **closed)
    nested = {**OBJECT, "properties": {**OBJECT["properties"], "c": {"properties": {}, "type": "object"}}}
    assert follows(inner, json=nested)
    assert not follows(inner, **{**closed, "json": nested})
    named = {"type": "object", "properties": {"properties": {"type": "object"}}}
    assert follows('{"properties":{"x":1}}', **{**closed, "json": named}), (
        "a property may be called properties"
    )
    with pytest.raises(RequestError, match="allOf"):
        check(json={"allOf": [OBJECT, {"properties": {"b": {}}}]}, disable_additional_properties=True)


def test_properties_can_be_counted_where_their_names_differ() -> None:
    two = {"type": "object", "minProperties": 2, "additionalProperties": {"type": "integer"}}
    assert follows('{"a":1,"b":2}', json={**two, "properties": {"a": {}}, "required": ["a"]})
    assert follows('{"a":1}', json={**two, "minProperties": 1})
    assert not follows("{}", json={**two, "minProperties": 1})


def test_reasoning_comes_before_the_constraint() -> None:
    token = {"choice": ["yes", "no"], "reasoning_end": "<tool_call>"}
    assert follows("I think: <|im_start|> so<tool_call>yes", **token)
    assert follows("<tool_call>no", **token)
    assert not follows("yes", **token)
    assert not follows("x<|im_end|><tool_call>yes", **token), "an end token ends"
    assert follows("hm<tool_call>\n\nno", **token)
    assert not follows("hm<tool_call>" + "\n" * 9 + "no", **token)
    text = {"json": OBJECT, "reasoning_end": "</think>"}
    assert follows('a </thi b</think>{"a": 1}', **text)
    assert not follows('</think>{"a": 1} so', **text)
    for start, end in (("<tool_call>", "</tool_call>"), ("<think>", "</think>"), ("<think>", "</tool_call>")):
        may = {"json": OBJECT, "reasoning_start": start, "reasoning_end": end}
        assert follows(f'{start}hm{end}\n\n{{"a": 1}}', **may)
        assert follows('{"a":1}', **may)
        assert not follows(f'hm{end}{{"a":1}}', **may)
        assert not follows(start, **may)


def test_an_alternative_stands_beside_the_constraint() -> None:
    rules = 'start: <tool_call> name </tool_call>\nname: "f"'
    both = {"grammar": 'start: name\nname: "plain"', "alternative": rules}
    assert follows("plain", **both)
    assert follows("<tool_call>f</tool_call>", **both)
    assert not follows("f", **both)
    assert follows("hm</think>plain", **both, reasoning_end="</think>")
    assert follows("hm</think><tool_call>f</tool_call>", **both, reasoning_end="</think>")


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ({"json": '{"a":'}, "not valid JSON"),
        ({"json": "[1]"}, "must be an object or a boolean"),
        ({"json": {"type": "array", "uniqueItems": True}}, "the keyword 'uniqueItems' is not supported"),
        ({"json": {"properties": {"a/b": {"format": "zip"}}}}, "at /properties/a~1b: the format 'zip'"),
        (
            {"json": {"items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"type": "?"}}}},
            r"at /\$defs/x: Invalid type",
        ),
        ({"json": {"$ref": "#/$defs/nope"}}, "/\\$defs/nope' does not exist"),
        ({"json": {"$ref": "https://example.com/a.json"}}, "example.com"),
        ({"json": {"$ref": "#"}}, "nothing satisfies it"),
        ({"json": {"enum": []}}, "Unsatisfiable schema"),
        ({"json": {"type": "integer", "minimum": 2, "maximum": 1}}, "Unsatisfiable schema"),
        ({"json": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}, "oneOf"),
        ({"json": {"const": float("nan")}}, "cannot be read"),
        ({"json": {"items": {"type": "object", "minProperties": 2}}}, "at /items: minProperties of 2"),
        ({"json": {"const": {1}}}, "set is no JSON"),
        ({"json": {"const": "\ud800"}}, "lone surrogates"),
        ({"json": {}, "whitespace_pattern": "["}, "unclosed character class"),
        ({"regex": "[a"}, "unclosed character class"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": "\udfff"}, "lone surrogates"),
        ({"grammar": "yes or no"}, "neither"),
        ({"grammar": "start: b"}, 'unknown name: "b"'),
        ({"grammar": "start: <nope>"}, 'unknown special token: "<nope>"'),
        ({"grammar": "root ::= b"}, "Rule 'b' not found"),
        ({"choice": ["a"], "alternative": "start: b"}, 'unknown name: "b"'),
    ],
)
def test_a_bad_constraint_is_refused_by_name(constraint: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        check(param="response_format", **constraint)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ({}, "exactly one of"),
        ({"regex": "a", "choice": ["b"]}, "got regex, choice"),
        ({"choice": []}, "choice must be a list"),
        ({"choice": "yes"}, "choice must be a list"),
        ({"choice": ["a", 1]}, "choice must be a list"),
        ({"json": 3}, "json must be"),
        ({"regex": ["a"]}, "regex must be"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern is for JSON"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "exclude each other"),
        ({"regex": "a", "reasoning_end": ""}, "reasoning_end"),
        ({"regex": "a", "reasoning_start": "<think>"}, "reasoning_start"),
    ],
)
def test_a_constraint_of_the_wrong_form_is_refused_at_once(constraint: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        StructuredOutputsParams(**constraint)
