"""Formats that put calls between tags, with values as plain text."""

from __future__ import annotations

from jaxserve.server.tool_parsers.elements import InOrder, Many, Mark, Maybe, MaybeMark, One, Space
from jaxserve.server.tool_parsers.loose_xml import LooseXmlCall
from jaxserve.server.tool_parsers.tagged_calls import AttributeCall, PairedCall, Values
from jaxserve.server.tool_parsers.tool_format import ToolFormat


def _functions(names: tuple[str, ...], start: str, end: str, wrap: str) -> ToolFormat:
    """<function=f>, with <parameter=city>, between a start and an end that models forget at times."""
    call = AttributeCall(
        "<function=",
        "<parameter=",
        Values("</parameter>", wrap, other_ends=rf"\n</function>(?=\s{{0,4}}{end})", longest_other_end=40),
        end="</function>",
        space="\n",
        other_ends=(end,),
    )
    section = InOrder(MaybeMark(start), Space("\n"), One(call), Space("\n"), Maybe(end, usual=end))
    return ToolFormat(names, section, (start, "<function="), between="\n")


_FUNCTION_TAGS = ("<functionname=", *(f"<function{white}" for white in " \t\n\u0120\u010a"))

FORMATS = (
    # Qwen3-Coder
    _functions(("qwen3_coder", "qwen3_xml"), "<tool_call>", "</tool_call>", "\n"),
    # ByteDance Seed-OSS
    _functions(("seed_oss",), "<seed:tool_call>", "</seed:tool_call>", ""),
    # GLM 4.5, and 4.7 without line ends
    ToolFormat(
        ("glm45", "glm47"),
        InOrder(
            Mark("<tool_call>"),
            One(
                PairedCall(
                    "<arg_key>",
                    "</arg_key>",
                    "<arg_value>",
                    Values("</arg_value>"),
                    end="</tool_call>",
                    space="\n",
                )
            ),
        ),
        ("<tool_call>",),
        between="\n",
    ),
    # MiniMax M2
    ToolFormat(
        ("minimax_m2",),
        InOrder(
            Mark("<minimax:tool_call>"),
            Space("\n"),
            Many(
                AttributeCall(
                    "<invoke name=",
                    "<parameter name=",
                    Values("</parameter>"),
                    end="</invoke>",
                    quote='"',
                    space="\n",
                ),
                separator="",
                end="</minimax:tool_call>",
                usual="\n",
                usual_before_end="\n",
            ),
        ),
        ("<minimax:tool_call>",),
    ),
    # StepFun Step 3
    ToolFormat(
        ("step3",),
        InOrder(
            Mark("<｜tool_calls_begin｜>"),
            Space(),
            Many(
                InOrder(
                    Maybe("<｜tool_sep｜>"),
                    Mark("<｜tool_call_begin｜>"),
                    MaybeMark("function"),
                    MaybeMark("<｜tool_sep｜>"),
                    Space(),
                    AttributeCall(
                        "<steptml:invoke name=",
                        "<steptml:parameter name=",
                        Values("</steptml:parameter>"),
                        end="</steptml:invoke>",
                        quote='"',
                    ),
                    Space(),
                    Mark("<｜tool_call_end｜>"),
                ),
                separator="",
                end="<｜tool_calls_end｜>",
                usual="",
            ),
        ),
        ("<｜tool_calls_begin｜>",),
    ),
    # OpenBMB MiniCPM 5, which forgets the blank in its tags at times
    ToolFormat(
        ("minicpm5",),
        InOrder(
            Mark("<function name=", _FUNCTION_TAGS),
            One(
                LooseXmlCall(
                    "<function", "<param", Values("</param>", is_xml=True), end="</function>", quote='"'
                )
            ),
        ),
        ("<function name=", *_FUNCTION_TAGS),
        between="",
    ),
)
