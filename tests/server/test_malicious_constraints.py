"""Constraints and tools made to hurt, against a listening server: a clear 4xx or a right answer, and it serves on.

Nothing here is timed; what must be quick would otherwise take minutes, and the client gives up before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.attacking import CHAT, MIB, Target, attacked, chat


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    async with attacked() as attacked_server:
        yield attacked_server


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def a_tool(name: str = "f", **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": an_object(**properties)}}


def nested_schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = an_object(a=schema)
    return schema


CYCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
TREE = {
    "$ref": "#/$defs/n",
    "$defs": {"n": an_object(left={"$ref": "#/$defs/n"}, right={"$ref": "#/$defs/n"})},
}

# A schema, and whether it can be used: True, False, or None where either will do.
SCHEMAS: list[tuple[Any, bool | None]] = [
    (an_object(a={"enum": [f"value {i}" for i in range(100_000)]}), False),
    (an_object(a={"enum": list(range(100_000))}), None),
    (an_object(a={"const": "x" * 2 * MIB}), False),
    (an_object(**{f"p{i}": {"type": "string"} for i in range(20_000)}), None),
    ({"allOf": [{"anyOf": [an_object(**{f"p{i}x{j}": {}}) for j in range(10)]} for i in range(12)]}, None),
    (nested_schema(24), True),
    (CYCLE, False),
    ({"$ref": "#"}, False),
    (TREE, True),
    ({"$ref": "http://169.254.169.254/latest"}, False),
    ({"$ref": "file:///etc/passwd"}, False),
    (an_object(a={"type": "string", "minLength": 10**9}), None),
    (an_object(a={"type": "array", "minItems": 10**9}), None),
    (an_object(a={"type": "integer", "minimum": -(10**18), "maximum": 10**18}), True),
    (an_object(a={"type": "number", "multipleOf": 1e-300}), None),
    ({**an_object(a=False), "required": ["a"]}, False),
    (an_object(a={"type": "no-such-type"}), False),
    (an_object(**{"\0": {}, '"\\\n': {}, "é\U0001f389": {}, "": {}, "__proto__": {}}), True),
]

# A regular expression, likewise.
PATTERNS: list[tuple[str, bool | None]] = [
    ("a" * MIB, None),
    ("(a+)+$", True),
    ("((a{1,1000}){1,1000}){1,1000}", None),
    ("|".join(f"a{i}" for i in range(100_000)), None),
    ("(" * 50_000, False),
    ("(" * 20_000 + ")" * 20_000, False),
    ("[" * 50_000, False),
    ("(?=a)b", False),
    (r"(a)\1", False),
    ("a{1000000}", None),
    ("(a?){500}a{500}", None),
    (r"\p{L}{1,500}", None),
    ("\0", True),
    ("(?P<a>x)(?P<a>y)", False),
    ("a{5,2}", False),
    ("*", False),
]


class TestConstraints:
    @pytest.mark.parametrize(("schema", "is_usable"), SCHEMAS, ids=lambda value: str(value)[:40])
    async def test_schemas(self, target: Target, schema: Any, is_usable: bool | None):
        response_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        answer = await target.attack(CHAT, chat(response_format=response_format))
        if is_usable is not None:
            assert (answer.status_code == 200) == is_usable, answer.text[:500]
        if answer.status_code != 200:
            assert answer.json()["error"]["param"] == "response_format"

    @pytest.mark.parametrize(("pattern", "is_usable"), PATTERNS, ids=lambda value: repr(value)[:40])
    async def test_patterns(self, target: Target, pattern: str, is_usable: bool | None):
        schema = an_object(a={"type": "string", "pattern": pattern})
        response_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        for field, value in (
            ("structured_outputs", {"regex": pattern}),
            ("response_format", response_format),
        ):
            answer = await target.attack(CHAT, chat(**{field: value}))
            if is_usable is not None:
                assert (answer.status_code == 200) == is_usable, answer.text[:500]
            if answer.status_code != 200:
                assert answer.json()["error"]["param"] == field

    @pytest.mark.parametrize(
        "grammar",
        [
            "x" * MIB,
            "start: start",
            "start: a\na: b\nb: a",
            'start: start start | "a" | ""',
            'start: a*\na: b*\nb: ""',
            'root ::= root root | "a"',
            "start: missing",
            "start: /(/",
            'start: "' + "a" * 100_000,
            "start: " + "(" * 20_000 + '"a"' + ")" * 20_000,
            "\0",
        ],
        ids=lambda text: repr(text)[:30],
    )
    async def test_grammars(self, target: Target, grammar: str):
        await target.attack(CHAT, chat(structured_outputs={"grammar": grammar}))

    async def test_choices(self, target: Target):
        for choice in (["x" * 2 * MIB], [], ["\0", "", "a"], ["a"] * 10_000):
            await target.attack(CHAT, chat(structured_outputs={"choice": choice}))

    async def test_structural_tags(self, target: Target):
        tag = {"begin": "<a>", "schema": {"type": "object"}, "end": "</a>"}
        for structures, triggers in (
            ([tag] * 300, ["<a>"]),
            ([{**tag, "begin": "x" * MIB}], ["x"]),
            ([tag], ["b"]),
            ([{**tag, "begin": ""}], [""]),
            ([tag], ["<a>"] * 10_000),
        ):
            tags = {"structures": structures, "triggers": triggers}
            await target.attack(CHAT, chat(structured_outputs={"structural_tag": tags}))

    @pytest.mark.parametrize("pattern", ["(a+)+" * 1000, "(", "[^\0]*", ""])
    async def test_patterns_of_white_space(self, target: Target, pattern: str):
        wanted = {"json": {"type": "object"}, "whitespace_pattern": pattern}
        await target.attack(CHAT, chat(structured_outputs=wanted))


NAMES = [
    "\0",
    "a b",
    "é",
    "<tool_call>",
    "</tool_call>",
    '"',
    "{{ x }}",
    "\n",
    "<|im_end|>",
    "f(x)",
    "__class__",
    "\\",
]


class TestTools:
    @pytest.mark.parametrize("name", NAMES, ids=repr)
    async def test_names(self, target: Target, name: str):
        tools = [a_tool(name, a={"type": "string"})]
        for choice in ("auto", "required", {"type": "function", "function": {"name": name}}):
            answer = await target.attack(CHAT, chat(tools=tools, tool_choice=choice))
            assert answer.status_code == 200

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("", "tools[0].function.name must not be empty"),
            ("f" * 257, "name must have at most 256 characters, got 257"),
            ("f" * MIB, "at most 256 characters"),
        ],
        ids=["empty", "long", "very long"],
    )
    async def test_names_that_are_none(self, target: Target, name: str, message: str):
        await target.is_refused(CHAT, chat(tools=[a_tool(name)]), "tools", message)

    async def test_very_many(self, target: Target):
        await target.is_refused(CHAT, chat(tools=[a_tool()] * 10_000), "tools", "1024")
        some = [a_tool(f"f{i}", a={"type": "string"}, b={"enum": ["x", "y"]}) for i in range(150)]
        for choice in ("auto", "required", {"type": "function", "function": {"name": "f149"}}):
            assert (await target.attack(CHAT, chat(tools=some, tool_choice=choice))).status_code == 200
        twice = [a_tool("f", a={"type": "string"}), a_tool("f", b={"type": "integer"})]
        await target.attack(CHAT, chat(tools=twice, tool_choice="required"))

    @pytest.mark.parametrize(
        "choice",
        [
            {"type": "function", "function": {"name": "x" * 2 * MIB}},
            {"type": "function", "function": {"name": ["f"]}},
            {"type": "function", "function": "f" * MIB},
            {"type": "x" * MIB},
            "x" * 2 * MIB,
            [["f"]] * 1000,
            {"type": "allowed_tools", "allowed_tools": {"mode": "x" * MIB, "tools": [{}]}},
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{}] * 90_000}},
        ],
        ids=lambda value: repr(value)[:60],
    )
    async def test_choices(self, target: Target, choice: Any):
        await target.is_refused(CHAT, chat(tools=[a_tool()], tool_choice=choice), "tool_choice")

    async def test_allowed_tools_without_end(self, target: Target):
        allowed = [{"type": "function", "function": {"name": "f"}}] * 40_000
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": allowed}}
        assert (await target.attack(CHAT, chat(tools=[a_tool()], tool_choice=choice))).status_code == 200

    @pytest.mark.parametrize(("schema", "is_usable"), SCHEMAS, ids=lambda value: str(value)[:40])
    async def test_parameters(self, target: Target, schema: Any, is_usable: bool | None):
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        for choice in ("auto", "required"):
            answer = await target.attack(CHAT, chat(tools=tools, tool_choice=choice))
            if is_usable:
                assert answer.status_code == 200, answer.text[:500]
