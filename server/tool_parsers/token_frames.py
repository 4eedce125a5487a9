"""Formats that frame calls by control tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from jaxserve.server.tool_parsers.call_draft import CallDraft
from jaxserve.server.tool_parsers.dsml_calls import DsmlCall
from jaxserve.server.tool_parsers.elements import InOrder, Many, Mark, Maybe, One, Space
from jaxserve.server.tool_parsers.gemma_calls import GemmaCall
from jaxserve.server.tool_parsers.grammar import GrammarWriter
from jaxserve.server.tool_parsers.json_calls import JsonArguments, Name
from jaxserve.server.tool_parsers.reader import NoCallError, Reader, Steps
from jaxserve.server.tool_parsers.tool_format import ToolFormat


@dataclass(frozen=True)
class _KimiName:
    """The name of a call as Kimi K2 writes it, which is its id as well: functions.get_weather:0"""

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read it."""
        call.begin()
        call_id = (yield from reader.match(re.compile(r"[\w.:\-\s]*"))).strip()
        match = re.fullmatch(r"(?:functions\.)?([\w.\-]+):\d+", call_id)
        if match is None:
            raise NoCallError(f"{call_id!r} is no function's name")
        call.start(match[1], call_id)

    def marks(self) -> Iterator[str]:
        """None."""
        return iter(())

    def lark(self, writer: GrammarWriter) -> str:
        """The name, and some number."""
        return f"{writer.text(f'functions.{writer.tool.name}:')} /[0-9]{{1,3}}/"


def _framed_list(
    name: str, start: str, call: InOrder, end: str, between: str = "", edge: str = ""
) -> ToolFormat:
    """Calls in frames, in one frame for all.

    A frame of one call is found without the frame around it too, so that a bad call takes no good one with it.
    """
    begin = next(call.marks())
    calls = Many(call, separator="", end=end, usual=between, usual_before_end=edge)
    return ToolFormat((name,), InOrder(Maybe(start, usual=start), Space(edge), calls), (start, begin))


_DEEPSEEK_START, _DEEPSEEK_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"

FORMATS = (
    # DeepSeek V3 and R1: the arguments in a block of code
    _framed_list(
        "deepseek_v3",
        _DEEPSEEK_START,
        InOrder(
            Mark("<｜tool▁call▁begin｜>"),
            Mark("function"),
            Mark("<｜tool▁sep｜>"),
            Name(),
            Space("\n"),
            Mark("```json"),
            Space("\n"),
            JsonArguments(),
            Space("\n"),
            Mark("```"),
            Mark("<｜tool▁call▁end｜>"),
        ),
        _DEEPSEEK_END,
        between="\n",
    ),
    _framed_list(
        "deepseek_v31",
        _DEEPSEEK_START,
        InOrder(
            Mark("<｜tool▁call▁begin｜>"),
            Name(),
            Mark("<｜tool▁sep｜>"),
            Space(),
            JsonArguments(),
            Space(),
            Mark("<｜tool▁call▁end｜>"),
        ),
        _DEEPSEEK_END,
    ),
    _framed_list(
        "deepseek_v32",
        "<｜DSML｜function_calls>",
        InOrder(DsmlCall()),
        "</｜DSML｜function_calls>",
        between="\n",
        edge="\n",
    ),
    # Moonshot Kimi K2
    _framed_list(
        "kimi_k2",
        "<|tool_calls_section_begin|>",
        InOrder(
            Mark("<|tool_call_begin|>"),
            _KimiName(),
            Mark("<|tool_call_argument_begin|>"),
            Space(),
            JsonArguments(),
            Space(),
            Mark("<|tool_call_end|>"),
        ),
        "<|tool_calls_section_end|>",
    ),
    # Google Gemma 4: <|tool_call>call:f{city:<|"|>Paris<|"|>}<tool_call|>
    ToolFormat(
        ("gemma4",),
        InOrder(Mark("<|tool_call>"), One(GemmaCall('<|"|>')), Mark("<tool_call|>")),
        ("<|tool_call>",),
        between="",
    ),
    # Google FunctionGemma: <start_function_call>call:f{city:<escape>Paris<escape>}<end_function_call>
    ToolFormat(
        ("functiongemma",),
        InOrder(
            Mark("<start_function_call>"),
            One(GemmaCall("<escape>", quotes_all=True)),
            Maybe("<end_function_call>", usual="<end_function_call>"),
        ),
        ("<start_function_call>",),
        between="",
    ),
)
