"""How a model writes tool calls, as a declaration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.server.tool_parsers.call_draft import uuid_id
from jaxserve.server.tool_parsers.call_parser import CallParser
from jaxserve.server.tool_parsers.elements import Element, InOrder
from jaxserve.server.tool_parsers.grammar import GrammarWriter, called_tools, is_strict
from jaxserve.structured.lark import lark_regex
from jaxserve.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolFormat:
    """One format of tool calls; what it is made of is told in elements.py."""

    names: tuple[str, ...]  # under --tool-call-parser
    section: Element  # reads one or more calls, with their marks
    begins: tuple[str, ...] = ()  # what a section begins with
    begins_at_start: tuple[str, ...] = ()  # the same, where nothing but white space came before, and calls
    # what the model writes between two sections; None: one section holds all calls
    between: str | None = None
    make_id: Callable[[str, int], str] = uuid_id  # of a call, from its name and its place among the calls

    @property
    def markers(self) -> frozenset[str]:
        """The literals that the parser must see, even if they are special tokens."""
        return frozenset((*self.begins, *self.begins_at_start, *self.section.marks()))

    @property
    def tells_reasoning(self) -> bool:
        """Its parser tells reasoning from content too, and no other does."""
        return False

    @property
    def is_marked(self) -> bool:
        """Calls have marks that nothing else has, so that they can be looked for inside reasoning too."""
        return not self.begins_at_start and all(len(begin) > 1 for begin in self.begins)

    def parser(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        constrained: bool = False,
        request: object = None,
    ) -> CallParser:
        """Reads the calls out of one answer.

        Args:
            tools: those that the request offers.
            constrained: a grammar holds the answer, so that calls can be announced as soon as they are named.
            request: for plug-ins; not looked at.
        """
        return CallParser(
            self.section,
            begins=self.begins,
            begins_at_start=self.begins_at_start,
            tools=tools,
            make_id=self.make_id,
            constrained=constrained,
        )

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any],
        *,
        parallel_tool_calls: bool,
        tokenizer: Tokenizer,
    ) -> str | None:
        """Lark text that holds an answer to calls of these tools, as this format writes them.

        Args:
            tools: those that the request offers.
            tool_choice: "required", an object that names one tool, or "auto": then nothing is held unless a tool is
                strict; free text until a call begins, and calls whose arguments follow the schemas of strict tools.
            parallel_tool_calls: whether there may be several calls.
            tokenizer: the model's: marks that are control tokens of it are written as these tokens.

        Raises RequestError for what cannot be held to.
        """
        if tool_choice == "auto" and not any(is_strict(tool["function"]) for tool in tools):
            return None
        called = called_tools(tools, tool_choice)
        writer = GrammarWriter(tokenizer, called, is_parallel=parallel_tool_calls)
        if tool_choice == "auto":
            return writer.finish(self._calls_in_text(writer))
        section = writer.rule(self.section.lark(writer))
        if parallel_tool_calls and self.between is not None:
            between = writer.text(self.between)
            # Some models end the line behind the last call, and would otherwise have to go on with another one.
            end = f" {between}?" if self.between.isspace() else ""
            return writer.finish(f"{section} ({between} {section})*{end}")
        return writer.finish(section)

    def _calls_in_text(self, writer: GrammarWriter) -> str:
        if not self.is_marked:
            # Nothing tells a call in a text from the text: the answer is calls, or it begins otherwise.
            first = "".join(sorted({re.escape(begin[0]) for begin in (*self.begins, *self.begins_at_start)}))
            other = lark_regex(rf"[^{first}\s]")
            text = f"{other} {writer.free_text()}"
            return f'{writer.rule(self.section.lark(writer))} | {text} | ""'
        assert isinstance(self.section, InOrder)
        begin = self.begins[0]
        head = writer.free_text_before(begin)
        body = writer.rule(self.section.behind(begin).lark(writer))
        text = writer.free_text()
        return f"({head} {body})* {text}" if writer.is_parallel else f"{text} | {head} {body}"
