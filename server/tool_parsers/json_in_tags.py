"""Formats that put calls as JSON between tags."""

from __future__ import annotations

from jaxserve.server.tool_parsers.elements import InOrder, Many, Mark, Maybe, One, Space
from jaxserve.server.tool_parsers.json_calls import JsonCall
from jaxserve.server.tool_parsers.tool_format import ToolFormat


def _tagged(names: tuple[str, ...], start: str, end: str) -> ToolFormat:
    """One object between two tags."""
    section = InOrder(Mark(start), Space("\n"), One(JsonCall()), Space("\n"), Mark(end))
    return ToolFormat(names, section, (start,), between="\n")


def _tagged_list(names: tuple[str, ...], inside: str = "") -> ToolFormat:
    """A list of objects between <tool_calls> tags; `inside` is what the model writes inside the brackets."""
    start, end = "<tool_calls>", "</tool_calls>"
    calls = Many(JsonCall(), end="]", usual=f",{inside or ' '}", usual_before_end=inside.rstrip(" "))
    section = InOrder(Mark(start), Space(), Mark("["), Space(inside), calls, Space(), Mark(end))
    return ToolFormat(names, section, (start,))


FORMATS = (
    # Hermes 2 and 3, Qwen 2.5, Qwen 3: <tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>
    _tagged(("hermes",), "<tool_call>", "</tool_call>"),
    # The same tags: IBM Granite 4, Baidu ERNIE 4.5.
    _tagged(("granite4",), "<tool_call>", "</tool_call>"),
    _tagged(("ernie45",), "<tool_call>", "</tool_call>"),
    _tagged(("longcat",), "<longcat_tool_call>", "</longcat_tool_call>"),
    # AI21 Jamba: <tool_calls>[\n    {…},\n    {…}\n]</tool_calls>
    _tagged_list(("jamba",), inside="\n    "),
    # Tencent Hunyuan A13B: <tool_calls>[{…}, {…}]</tool_calls>
    _tagged_list(("hunyuan_a13b",)),
    # IBM Granite 3.0: <|tool_call|>[{…}], 3.1: <tool_call>[{…}]; sometimes the list alone.
    ToolFormat(
        ("granite",),
        InOrder(
            Maybe("<|tool_call|>", "<tool_call>", usual="<|tool_call|>"),
            Space(),
            Mark("["),
            Space(),
            Many(JsonCall(), end="]"),
        ),
        ("<|tool_call|>", "<tool_call>"),
        begins_at_start=("[",),
    ),
    # IBM granite-20b-functioncalling: <function_call> {…} <function_call> {…}
    ToolFormat(
        ("granite-20b-fc",),
        InOrder(Mark("<function_call>"), Space(" "), One(JsonCall())),
        ("<function_call>",),
        between=" ",
    ),
    # InternLM 2: <|action_start|><|plugin|>\n{"name": …, "parameters": {…}}<|action_end|>
    ToolFormat(
        ("internlm",),
        InOrder(
            Mark("<|action_start|>"),
            Space(),
            Mark("<|plugin|>"),
            Space("\n"),
            One(JsonCall(argument_keys=("parameters", "arguments"))),
            Space(),
            Mark("<|action_end|>"),
        ),
        ("<|action_start|>",),
        between="\n",
    ),
    # Microsoft Phi-4-mini: functools[{…}, {…}]
    ToolFormat(
        ("phi4_mini_json",),
        InOrder(Mark("functools["), Space(), Many(JsonCall(), end="]")),
        ("functools[",),
    ),
)
