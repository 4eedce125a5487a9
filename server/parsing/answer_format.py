"""How one model writes its answers: reasoning, content, tool calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxserve.errors import RequestError
from jaxserve.server.parser_api.abstract import ToolParserManager
from jaxserve.server.parser_api.reasoning import ReasoningParserManager
from jaxserve.server.parsing.events import AnswerParser
from jaxserve.server.parsing.stages import AllContent, CallsInReasoning, ReasoningThenCalls, WithoutBlanks
from jaxserve.server.plugins.formats import (
    adjusted_by_plugins,
    reasoning_plugin_format,
    tool_plugin_format,
)
from jaxserve.server.protocol import ChatRequest
from jaxserve.server.reasoning_parsers.registry import find_reasoning_parser
from jaxserve.server.reasoning_parsers.splitter import ReasoningSplitter
from jaxserve.server.tool_parsers.registry import find_tool_parser
from jaxserve.text.tokenizer import Tokenizer


class CallFormat(Protocol):
    """What tells tool calls from the rest: a built-in format or a plug-in."""

    @property
    def markers(self) -> frozenset[str]:
        """The literals that the parser must see, even if they are special tokens."""
        ...

    @property
    def is_marked(self) -> bool:
        """Calls have marks that nothing else has, so that they can be looked for inside reasoning too."""
        ...

    @property
    def tells_reasoning(self) -> bool:
        """Its parser tells reasoning from content too, and no other does."""
        ...

    def parser(
        self, tools: Sequence[Mapping[str, Any]], *, constrained: bool = False, request: object = None
    ) -> AnswerParser:
        """Reads the calls out of one answer."""
        ...

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any],
        *,
        parallel_tool_calls: bool,
        tokenizer: Tokenizer,
    ) -> str | None:
        """Lark text that holds an answer to calls of these tools; None where nothing is to be held."""
        ...


class ThoughtFormat(Protocol):
    """What tells reasoning from the rest: a built-in format or a plug-in."""

    @property
    def markers(self) -> frozenset[str]:
        """The literals that the parser must see, even if they are special tokens."""
        ...

    @property
    def starts(self) -> tuple[str, ...]:
        """The marks that begin reasoning."""
        ...

    @property
    def ends(self) -> tuple[str, ...]:
        """The marks that end reasoning."""
        ...

    @property
    def has_calls(self) -> bool:
        """Tool calls inside reasoning are calls; then the parser is a ReasoningSplitter."""
        ...

    def parser(self, prompt: str = "", *, request: object = None) -> AnswerParser:
        """Tells the reasoning in one answer from the rest, which comes out as content."""
        ...

    def marks_before_answer(self, prompt: str) -> tuple[str | None, str] | None:
        """See AnswerFormat.reasoning_marks."""
        ...


@dataclass(frozen=True)
class AnswerFormat:
    """What --tool-call-parser and --reasoning-parser say about the model."""

    tools: CallFormat | None  # None: calls are not looked for
    reasoning: ThoughtFormat | None

    def kept_token_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The special tokens that the parsers must see in the text (SamplingParams.kept_special_tokens)."""
        markers = [m for part in (self.tools, self.reasoning) if part is not None for m in part.markers]
        special = {token_id: tokenizer.id_to_token(token_id) for token_id in tokenizer.special_ids}
        return tuple(
            sorted(i for i, token in special.items() if token and any(token in marker for marker in markers))
        )

    def adjusted(self, request: ChatRequest, tools: Sequence[Mapping[str, Any]]) -> ChatRequest:
        """The request as plug-ins want it; without plug-ins as it is.

        `tools` are those that may be called; without any, the tool parser is not asked.
        Raises RequestFailedError when a plug-in fails.
        """
        return adjusted_by_plugins((self.tools if tools else None, self.reasoning), request, tools)

    def parser(
        self,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        prompt: str = "",
        constrained: bool = False,
        request: object = None,
        tokenizer: Tokenizer | None = None,
    ) -> AnswerParser:
        """Tells the parts of one answer apart.

        Args:
            tools: those that may be called, as the request has them; without any, calls are not looked for.
            prompt: the rendered text that the answer follows: it may begin the reasoning, or end it.
            constrained: a grammar holds the answer, so that calls can be announced as soon as they are named.
            request: for plug-ins.
            tokenizer: for plug-ins, which go by token ids: tells them where the reasoning ends.
        """
        if self.tools is not None and self.tools.tells_reasoning:
            return WithoutBlanks(self.tools.parser(tools, constrained=constrained, request=request))
        calls = None
        if self.tools is not None and tools:
            calls = self.tools.parser(tools, constrained=constrained, request=request)
        if self.reasoning is None:
            return AllContent() if calls is None else WithoutBlanks(calls)
        reasoning = self.reasoning.parser(prompt, request=request)
        if calls is None:
            return WithoutBlanks(reasoning)
        is_marked = self.tools is not None and self.tools.is_marked
        if self.reasoning.has_calls and is_marked and isinstance(reasoning, ReasoningSplitter):
            return WithoutBlanks(CallsInReasoning(reasoning, calls))
        ends = () if tokenizer is None else map(tokenizer.token_to_id, self.reasoning.ends)
        end_ids = frozenset(token_id for token_id in ends if token_id is not None)
        return WithoutBlanks(ReasoningThenCalls(reasoning, calls, end_ids))

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any],
        parallel_tool_calls: bool,
        tokenizer: Tokenizer,
    ) -> str | None:
        """Lark text that holds what follows the reasoning to calls of `tools`, in the model's own format.

        Args:
            tools: those that may be called, as the request has them.
            tool_choice: "required", "auto", or an object that names one tool, as the request has it.
            parallel_tool_calls: whether there may be several calls.
            tokenizer: the model's.

        None: nothing is to be held (under "auto", if no tool is strict).  Raises RequestError, naming "tools" or
        "tool_choice", for what the format cannot be held to.
        """
        if self.tools is None:
            raise RequestError("Tool calls need --tool-call-parser.", param="tool_choice")
        return self.tools.grammar(
            tools, tool_choice, parallel_tool_calls=parallel_tool_calls, tokenizer=tokenizer
        )

    def reasoning_marks(self, prompt: str) -> tuple[str | None, str] | None:
        """What stands around the reasoning with which an answer to `prompt` begins, or may begin.

        None: there is none.  (None, end): the answer begins inside it.  (start, end): it begins with the
        reasoning's start, or has no reasoning.
        """
        return None if self.reasoning is None else self.reasoning.marks_before_answer(prompt)

    def reasoning_end(self, prompt: str) -> str | None:
        """The mark that ends the reasoning inside which an answer to `prompt` begins; None if it begins elsewhere."""
        marks = self.reasoning_marks(prompt)
        return marks[1] if marks is not None and marks[0] is None else None


def make_answer_format(
    tool_call_parser: str | None, reasoning_parser: str | None, tokenizer: Tokenizer | None = None
) -> AnswerFormat:
    """The format that these names stand for.  A plug-in's names come before built-in ones; it needs the tokenizer.

    Raises ConfigError for an unknown name, listing the names, and for a plug-in that does not fit the model.
    """
    tools = reasoning = None
    if tool_call_parser is not None:
        tools = tool_plugin_format(tool_call_parser, tokenizer) or find_tool_parser(tool_call_parser)
    if reasoning_parser is not None:
        reasoning = reasoning_plugin_format(reasoning_parser, tokenizer)
        reasoning = reasoning or find_reasoning_parser(reasoning_parser)
    return AnswerFormat(tools, reasoning)


def check_parser_names(tool_call_parser: str | None, reasoning_parser: str | None) -> None:
    """Raise ConfigError, listing the names, for one that is neither a plug-in's nor built in."""
    if tool_call_parser is not None and not ToolParserManager.registry.has(tool_call_parser):
        find_tool_parser(tool_call_parser)
    if reasoning_parser is not None and not ReasoningParserManager.registry.has(reasoning_parser):
        find_reasoning_parser(reasoning_parser)
