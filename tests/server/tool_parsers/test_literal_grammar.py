"""Schemas held to in formats whose values, or arguments, are not JSON."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher

from jaxserve.errors import RequestError
from jaxserve.server.parsing.answer_format import make_answer_format
from tests.server.tool_parsers.test_grammar import BYTES, NO_SPECIALS, allows

TREE = {
    "type": "object",
    "properties": {
        "root": {"$ref": "#/$defs/node"},
        "tags": {"type": "array", "items": {"enum": ["a", 1, None]}, "minItems": 1, "maxItems": 2},
        "either": {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[0-9]+$"}]},
        "free": {},
    },
    "required": ["root"],
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"name": {"type": "string", "minLength": 1}, "below": {"$ref": "#/$defs/node"}},
            "required": ["name"],
        }
    },
}


def _grammar(name: str, schema: Any) -> LLMatcher:
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    grammar = make_answer_format(name, None).grammar(tools, "required", False, NO_SPECIALS)
    assert grammar is not None
    made = LLMatcher(BYTES, grammar, log_level=0)
    assert made.get_error() == "", grammar
    return made


def test_python_literals():
    made = _grammar("pythonic", TREE)
    for arguments, is_allowed in (
        ('root={"name": "x"}', True),
        ('root={"name": "x", "below": {"name": \'y\'}}, tags=["a", 1]', True),
        ('root={"name": "x"}, tags=[None], either=True', True),
        ('root={"name": "x"}, either="12"', True),
        ('root={"name": "x"}, free=[1, {"k": None}, "s"]', True),
        ('root={"below": {"name": "y"}}', False),
        ('root={"name": ""}', False),
        ('root={"name": "x"}, tags=[]', False),
        ('root={"name": "x"}, tags=["a", 1, None]', False),
        ('root={"name": "x"}, tags=["b"]', False),
        ('root={"name": "x"}, either="x"', False),
        ('root={"name": "x"}, other=1', False),
        ("tags=[1]", False),
    ):
        assert allows(made, f"[f({arguments})]") == is_allowed, arguments


def test_gemma_values():
    made = _grammar("gemma4", TREE)
    quoted = '<|"|>{}<|"|>'.format
    for arguments, is_allowed in (
        (f"root:{{name:{quoted('x')}}}", True),
        (f"root:{{name:{quoted('x y')},below:{{name:{quoted('z')}}}}},tags:[{quoted('a')},null]", True),
        (f"root:{{name:{quoted('x')}}},either:{quoted('12')}", True),
        (f"root:{{name:{quoted('x')}}},either:{quoted('1x')}", False),
        ("root:{}", False),
    ):
        assert allows(made, f"<|tool_call>call:f{{{arguments}}}<tool_call|>") == is_allowed, arguments


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"properties": {"a": {"not": {}}}}, "'not'"),
        ({"properties": {"a": {"type": "date"}}}, "'date'"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "'#/\\$defs/b'"),
        ({"properties": {"a": {"$ref": "https://x/y"}}}, "outside"),
        ({"properties": {"a": {}}, "required": ["b"]}, "'b' is required"),
        ({"properties": {"a": False}}, "false"),
    ],
)
def test_what_cannot_be_held_to_is_refused(schema, says):
    with pytest.raises(RequestError, match=says) as refused:
        _grammar("pythonic", schema)
    assert refused.value.param == "tools"


@pytest.mark.parametrize("name", ["pythonic", "gemma4", "deepseek_v32", "qwen3_coder", "glm45"])
def test_a_required_argument_that_is_not_described_is_refused(name):
    with pytest.raises(RequestError, match="'b' is required"):
        _grammar(name, {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["b"]})
