"""Structural tags in each of their shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jaxserve.errors import RequestError
from tests.structured.matching import check, follows
from tests.tiny import TOOL_CALL, TOOL_CALL_END

DIGITS = {"type": "regex", "pattern": "[0-9]+"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tag(begin: Any, end: Any, content: Any = DIGITS) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def matches(text: str, format_: Any) -> bool:
    return follows(text, structural_tag={"type": "structural_tag", "format": format_})


def token(name: int | str) -> dict[str, Any]:
    return {"type": "token", "token": name}


FORMATS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "const": ({"type": "const_string", "value": "hi <tool_call>"}, ["hi <tool_call>"], ["hi"]),
    "schema": ({"type": "json_schema", "json_schema": CITY}, ['{"city": "x"}'], ["{}", ""]),
    "grammar": ({"type": "grammar", "grammar": 'root ::= "a" | "b"'}, ["a", "b"], ["c"]),
    "text": ({"type": "any_text"}, ["", "anything\n at all"], ["<|im_start|>"]),
    "text without": (
        {"type": "any_text", "excludes": ["<f", "zz"]},
        ["a < f z", ""],
        ["a <f", "zz", "azzb"],
    ),
    "short text": ({"type": "any_text", "max_chars": 3}, ["abc", ""], ["abcd"]),
    "or": ({"type": "or", "elements": [DIGITS, {"type": "const_string", "value": "-"}]}, ["12", "-"], ["1-"]),
    "optional": ({"type": "optional", "content": DIGITS}, ["", "1"], ["x"]),
    "star": ({"type": "star", "content": {"type": "const_string", "value": "ab"}}, ["", "abab"], ["aba"]),
    "plus": ({"type": "plus", "content": {"type": "const_string", "value": "ab"}}, ["ab"], [""]),
    "repeat": (
        {"type": "repeat", "min": 1, "max": 2, "content": {"type": "const_string", "value": "a"}},
        ["a", "aa"],
        ["", "aaa"],
    ),
    "tag": (tag("<a>", ["</a>", "</b>"]), ["<a>1</a>", "<a>22</b>"], ["<a></a>", "<a>1"]),
    "tag with text": (tag("<a>", "</a>", {"type": "any_text"}), ["<a>x</</a>", "<a></a>"], ["<a>x</a>y"]),
    "tag of tokens": (
        tag(token(TOOL_CALL), token("</tool_call>")),
        ["<tool_call>1</tool_call>"],
        ["1", "<tool_call>1"],
    ),
    "tag of marks with text": (
        tag("<tool_call>\n", "\n</tool_call>", {"type": "any_text"}),
        ["<tool_call>\nab\n</tool_call>"],
        ["<tool_call>ab</tool_call>", "<tool_call>\nab"],
    ),
    "text, then a tag": (
        {"type": "sequence", "elements": [{"type": "any_text"}, tag("<a>", "</a>"), DIGITS]},
        ["so <a>1</a>2", "<a>1</a>2"],
        ["so <a>1</a>", "so 2", "so <a>x</a>2"],
    ),
    "triggered": (
        {"type": "triggered_tags", "triggers": ["<f="], "tags": [tag("<f=a>", "</f>"), tag("<f=b>", "</f>")]},
        ["", "no call", "x <f=a>1</f> y <f=b>2</f>"],
        ["<f=c>1</f>", "<f=a>x</f>", "x <f="],
    ),
    "triggered by marks": (
        {"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": [tag("<tool_call>", "</tool_call>")]},
        ["", "x <tool_call>1</tool_call> y"],
        ["<tool_call>x</tool_call>"],
    ),
    "one call and no more": (
        {
            "type": "triggered_tags",
            "triggers": ["<f>"],
            "tags": [tag("<f>", "</f>")],
            "at_least_one": True,
            "stop_after_first": True,
        },
        ["<f>1</f>"],
        ["", "x<f>1</f>", "<f>1</f>x"],
    ),
    "a call first": (
        {"type": "triggered_tags", "triggers": ["<f>"], "tags": [tag("<f>", "</f>")], "at_least_one": True},
        ["<f>1</f>", "<f>1</f> and <f>2</f>."],
        ["", "x<f>1</f>"],
    ),
    "at most one call": (
        {
            "type": "triggered_tags",
            "triggers": ["<f>"],
            "tags": [tag("<f>", "</f>")],
            "stop_after_first": True,
        },
        ["", "text", "text <f>1</f>"],
        ["text <f>1</f>more"],
    ),
    "triggered inside a tag": (
        tag("<r>", "</r>", {"type": "triggered_tags", "triggers": ["<f>"], "tags": [tag("<f>", "</f>")]}),
        ["<r>a<f>1</f>b</r>", "<r></r>"],
        ["<r>a<f>x</f>b</r>", "<r>a</r>b"],
    ),
    "separated": (
        {"type": "tags_with_separator", "tags": [tag("<a>", "</a>")], "separator": ","},
        ["", "<a>1</a>", "<a>1</a>,<a>2</a>"],
        [",", "<a>1</a>,", "<a>1</a><a>2</a>"],
    ),
    "one of the separated": (
        {
            "type": "tags_with_separator",
            "tags": [tag("<a>", "</a>")],
            "separator": ",",
            "at_least_one": True,
            "stop_after_first": True,
        },
        ["<a>1</a>"],
        ["", "<a>1</a>,<a>2</a>"],
    ),
    "tokens": (
        {"type": "any_tokens", "exclude_tokens": ["<tool_call>"]},
        ["", "a<|im_start|>"],
        ["<tool_call>", "a<|im_end|>b"],
    ),
    "triggered by tokens": (
        {
            "type": "token_triggered_tags",
            "trigger_tokens": ["<tool_call>"],
            "tags": [tag(token("<tool_call>"), token(TOOL_CALL_END))],
        },
        ["", "x<tool_call>1</tool_call>y"],
        ["<tool_call>x</tool_call>"],
    ),
}


@pytest.mark.parametrize(("format_", "good", "bad"), FORMATS.values(), ids=FORMATS)
def test_formats(format_: dict[str, Any], good: list[str], bad: list[str]) -> None:
    for text in good:
        assert matches(text, format_), text
    for text in bad:
        assert not matches(text, format_), text


def test_the_older_shape_and_text() -> None:
    older = {"structures": [{"begin": "<f=x>", "schema": CITY, "end": "</f>"}], "triggers": ["<f="]}
    for shape in (older, {"type": "structural_tag", **older}, json.dumps(older)):
        assert follows('see <f=x>{"city":"a"}</f> there', structural_tag=shape)
        assert not follows("<f=x>{}</f>", structural_tag=shape)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"format": {"type": "zip"}}, "structural_tag.format.type 'zip' is not supported"),
        ({"format": tag("<a>", 3)}, "structural_tag.format.end must be"),
        ({"format": {"type": "or", "elements": [{"type": "tag"}]}}, r"elements\[0\].begin is missing"),
        ({"format": token("<nope>")}, "'<nope>' is no token"),
        ({"format": {"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}}, "style 'qwen_xml'"),
        ({"format": {"type": "any_text", "max_tokens": 3}}, "max_tokens is not supported"),
        ({"format": {"type": "repeat", "min": 3, "max": 1, "content": DIGITS}}, "max of at least min"),
        (
            {"structures": [{"begin": "<a>", "end": ""}], "triggers": ["<a"]},
            r"structures\[0\].schema is missing",
        ),
        ({"structures": [{"begin": "<a>", "schema": {}}], "triggers": ["<b"]}, "exactly one of the triggers"),
        ({"type": "structural_tag"}, "must have a format"),
        ("[]", "must be a JSON object"),
        ("{", "not valid JSON"),
        ({"format": {"type": "json_schema", "json_schema": {"type": "?"}}}, "Invalid type"),
    ],
)
def test_a_bad_tag_is_refused_by_name(shape: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        check(structural_tag=shape)
