"""Formats that put calls as JSON between tags."""

from __future__ import annotations

from jaxserve.server.tool_parsers.elements import InOrder, JsonCall, Mark, One, Space
from jaxserve.server.tool_parsers.tool_format import ToolFormat

# Hermes 2 and 3, Qwen 2.5, Qwen 3: <tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>
HERMES = ToolFormat(
    names=("hermes",),
    begins=("<tool_call>",),
    section=InOrder(Mark("<tool_call>"), Space("\n"), One(JsonCall()), Space("\n"), Mark("</tool_call>")),
    between="\n",
)

FORMATS = (HERMES,)
