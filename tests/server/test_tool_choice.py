"""tool_choice in all its forms, and what refuses it."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.errors import RequestError
from jaxserve.server.tool_choice import Mode, tool_choice
from jaxserve.server.tool_fields import Tool
from tests.server.test_answer_parts import parted

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
F, G = (Tool.model_validate(tool) for tool in TOOLS)


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(n) for n in names]}}


@pytest.mark.parametrize(
    ("choice", "mode", "shown", "callable_"),
    [
        (None, Mode.AUTO, (F, G), (F, G)),
        ("auto", Mode.AUTO, (F, G), (F, G)),
        ("none", Mode.NONE, (F, G), ()),
        ("required", Mode.REQUIRED, (F, G), (F, G)),
        (named("g"), Mode.REQUIRED, (F, G), (G,)),
        ({"function": {"name": "g"}}, Mode.REQUIRED, (F, G), (G,)),
        (allowed("auto", "f"), Mode.AUTO, (F,), (F,)),
        (allowed("required", "g", "f"), Mode.REQUIRED, (F, G), (F, G)),
    ],
)
def test_choices(choice: Any, mode: Mode, shown: Any, callable_: Any):
    chosen = tool_choice([F, G], choice, None)
    assert (chosen.mode, chosen.shown, chosen.callable) == (mode, shown, callable_)
    assert chosen.is_single == (choice == named("g") or choice == {"function": {"name": "g"}})
    if callable_:
        assert tool_choice([F, G], choice, False).is_single


def test_without_tools():
    for choice in (None, "none"):
        assert tool_choice(None, choice, True).mode is Mode.NONE


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("maybe", 'must be "none", "auto", "required" or an object, got \'maybe\''),
        (True, "must be"),
        (3, "must be"),
        ([], "must be"),
        ({}, "must name a function"),
        ({"type": "function"}, "must name a function"),
        ({"type": "function", "function": {}}, "must name a function"),
        ({"type": "function", "function": {"name": ""}}, "must name a function"),
        ({"type": "function", "function": {"name": ["f"]}}, "must name a function"),
        (named("h"), "names the function 'h', which is not among tools: "),
        ({"type": "custom", "custom": {"name": "f"}}, 'of type "custom" is not supported'),
        ({"type": "mcp"}, 'must have the type "function" or "allowed_tools", got \'mcp\''),
        ({"type": "allowed_tools"}, "must have allowed_tools with a list of tools"),
        (allowed("auto"), "must have allowed_tools with a list of tools"),
        (allowed("none", "f"), 'with the mode "auto" or "required", got \'none\''),
        (allowed("auto", "f", "h"), "names the function 'h'"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]}},
            "tool_choice.allowed_tools.tools[0] must name a function",
        ),
    ],
)
async def test_wrong_choices(choice: Any, message: str):
    with pytest.raises(RequestError) as refused:
        tool_choice([F, G], choice, None)
    assert refused.value.param == "tool_choice"
    assert message in str(refused.value)
    with parted("") as served:
        answer = await served.chat(tools=TOOLS, tool_choice=choice)
        assert answer.error["param"] == "tool_choice"
        assert answer.error["message"] == str(refused.value)


async def test_forced_calls_and_a_constraint_contradict_each_other():
    with parted("") as served:
        for choice in ("required", named("f"), allowed("required", "f")):
            for field, value in (
                ("response_format", {"type": "json_object"}),
                ("structured_outputs", {"regex": "x"}),
            ):
                answer = await served.chat(tools=TOOLS, tool_choice=choice, **{field: value})
                assert answer.status == 400
                assert answer.error["param"] == field
                assert "must be a tool call" in answer.error["message"]
        for choice in ("auto", "none"):
            fields = {"tool_choice": choice, "response_format": {"type": "json_object"}}
            assert (await served.chat(tools=TOOLS, **fields)).status == 200
        fields = {"tool_choice": "required", "response_format": {"type": "text"}}
        assert (await served.chat(tools=TOOLS, **fields)).status == 200


async def test_a_parser_alone_serves_forced_calls_only():
    with parted("§call f¶{}", enable_auto_tool_choice=False) as served:
        assert (await served.chat(tools=TOOLS, tool_choice="required")).status == 200
        refused = await served.chat(tools=TOOLS)
        assert refused.error["param"] == "tools"
        assert "--enable-auto-tool-choice" in refused.error["message"]


async def test_the_template_shows_allowed_tools_only():
    with parted("") as served:
        for fields in ({"tools": TOOLS, "tool_choice": allowed("auto", "g")}, {"tools": TOOLS[1:]}):
            await served.chat(**fields)
        first, second = served.engine.submitted
        assert first.prompt_token_ids == second.prompt_token_ids


async def test_unknown_fields_inside_tools_and_formats_are_named():
    fields: dict[str, Any] = {
        "tools": [{"type": "function", "function": {"name": name, "nmae": 1}, "x": 2} for name in "fg"],
        "response_format": {"type": "text", "strict": True},
    }
    with parted("") as served:
        answer = await served.chat(**fields)
        assert (
            answer.headers["x-ignored-params"] == "tools[0].x, tools[0].function.nmae, response_format.strict"
        )
        answer = await served.chat(
            structured_outputs={"regex": "x", "backend": "y"}, top_a=1, stream_options=None
        )
        assert answer.headers["x-ignored-params"] == "top_a, structured_outputs.backend"
    with parted("", strict_params=True) as served:
        answer = await served.chat(tools=[{"function": {"name": "f", "paramters": {}}}])
        assert answer.error["param"] == "tools[0].function.paramters"
        assert answer.error["message"] == (
            "Unknown field 'tools[0].function.paramters'. Did you mean tools[0].function.parameters?"
        )
        schema = {"name": "x", "schema": {"type": "object", "titel": "kept"}, "shcema": {}}
        answer = await served.chat(response_format={"type": "json_schema", "json_schema": schema})
        assert answer.error["param"] == "response_format.json_schema.shcema"
        assert "Did you mean response_format.json_schema.schema?" in answer.error["message"]
