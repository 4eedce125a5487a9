"""Formats that put calls as JSON between tags."""

from __future__ import annotations

from jaxserve.server.tool_parsers.elements import JsonCall, Mark, Sequence, Space
from jaxserve.server.tool_parsers.tool_format import ToolFormat

# Hermes 2 and 3, Qwen 2.5, Qwen 3: <tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>
HERMES = ToolFormat(
    names=("hermes",),
    begins=("<tool_call>",),
    section=Sequence(Mark("<tool_call>"), Space("\n"), JsonCall(), Space("\n"), Mark("</tool_call>")),
)

FORMATS = (HERMES,)
