"""Formats that write calls as Python does."""

from __future__ import annotations

from jaxserve.server.tool_parsers.elements import InOrder, Many, Mark, Maybe, Space
from jaxserve.server.tool_parsers.python_calls import PythonCall
from jaxserve.server.tool_parsers.tool_format import ToolFormat

_LIST = (Mark("["), Space(), Many(PythonCall(), end="]"))

FORMATS = (
    # Llama 3.2, ToolACE: [f(a=1), g(b="x")]
    ToolFormat(("pythonic",), InOrder(*_LIST), begins_at_start=("[",)),
    # Llama 4: the same, sometimes between marks.
    ToolFormat(
        ("llama4_pythonic",),
        InOrder(Maybe("<|python_start|>"), Space(), *_LIST, Maybe("<|python_end|>")),
        ("<|python_start|>",),
        begins_at_start=("[",),
    ),
    # AI2 OLMo 3: one call a line between tags.
    ToolFormat(
        ("olmo3",),
        InOrder(
            Mark("<function_calls>"),
            Space(),
            Many(PythonCall(), separator="", end="</function_calls>", usual="\n"),
        ),
        ("<function_calls>",),
    ),
    # Liquid LFM2
    ToolFormat(
        ("lfm2",),
        InOrder(Mark("<|tool_call_start|>"), Space(), *_LIST, Space(), Mark("<|tool_call_end|>")),
        ("<|tool_call_start|>",),
    ),
)
