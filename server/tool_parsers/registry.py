"""Every built-in format of tool calls, under the names of vLLM's --tool-call-parser."""

from __future__ import annotations

from types import MappingProxyType

from jaxserve.server.parser_api.abstract import ToolParserManager
from jaxserve.server.parser_api.class_registry import format_named
from jaxserve.server.tool_parsers import bare_json, json_in_tags, pythonic, token_frames, xml_tags
from jaxserve.server.tool_parsers.harmony import HarmonyCalls
from jaxserve.server.tool_parsers.tool_format import ToolFormat

_FORMATS: tuple[ToolFormat | HarmonyCalls, ...] = (
    *json_in_tags.FORMATS,
    *bare_json.FORMATS,
    *pythonic.FORMATS,
    *token_frames.FORMATS,
    *xml_tags.FORMATS,
    HarmonyCalls(),
)

TOOL_FORMATS = MappingProxyType({name: entry for entry in _FORMATS for name in entry.names})


def find_tool_parser(name: str) -> ToolFormat | HarmonyCalls:
    """The format of that name.  Raises ConfigError, listing the names, if there is none."""
    return format_named(name, TOOL_FORMATS, "tool_call_parser", ToolParserManager.registry)
