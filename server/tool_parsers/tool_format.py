"""How a model writes tool calls, as a declaration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.server.tool_parsers.call_draft import uuid_id
from jaxserve.server.tool_parsers.call_parser import CallParser
from jaxserve.server.tool_parsers.elements import Element


@dataclass(frozen=True)
class ToolFormat:
    """One format of tool calls; what it is made of is told in elements.py."""

    names: tuple[str, ...]  # under --tool-call-parser
    begins: tuple[str, ...]  # what a section begins with; none is the beginning of another
    section: Element  # reads from there on, one or more calls
    only_at_start: bool = False  # sections begin only where nothing but white space came before
    make_id: Callable[[str, int], str] = uuid_id  # of a call, from its name and its place among the calls

    @property
    def markers(self) -> frozenset[str]:
        """The literals that the parser must see, even if they are special tokens."""
        return frozenset((*self.begins, *self.section.marks()))

    @property
    def is_marked(self) -> bool:
        """Calls have marks that nothing else has, so that they can be looked for inside reasoning too."""
        return not self.only_at_start and all(len(begin) > 1 for begin in self.begins)

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
            self.begins,
            self.section,
            tools=tools,
            make_id=self.make_id,
            only_at_start=self.only_at_start,
            constrained=constrained,
        )
