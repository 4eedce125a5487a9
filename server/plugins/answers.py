"""Parsers written for vLLM as AnswerParsers: called as vLLM calls them, their deltas told as events."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from jaxserve.errors import RequestFailedError
from jaxserve.server.parser_api.abstract import ToolParser
from jaxserve.server.parser_api.protocol import DeltaToolCall, make_tool_call_id
from jaxserve.server.parser_api.reasoning import ReasoningParser
from jaxserve.server.parser_api.requests import ChatCompletionRequest
from jaxserve.server.parsing.events import (
    AnswerParser,
    CallArguments,
    CallStart,
    Content,
    Event,
    Reasoning,
)
from jaxserve.server.plugins.errors import plugin_errors
from jaxserve.server.plugins.pieces import TokenPieces
from jaxserve.server.plugins.tokenizer import PluginTokenizer


def make_tool_parser(
    cls: type[ToolParser], tokenizer: PluginTokenizer, request: ChatCompletionRequest
) -> ToolParser:
    """A parser object for one answer.  Classes from before vLLM 0.20 do not take the tools.

    Raises RequestFailedError when the class cannot be made.
    """
    with plugin_errors(cls):
        return cls(tokenizer, request.tools) if _takes(cls, 2) else cls(tokenizer)


def make_reasoning_parser(
    cls: type[ReasoningParser], tokenizer: PluginTokenizer, request: ChatCompletionRequest
) -> ReasoningParser:
    """A parser object for one answer.  Classes that can be told get `chat_template_kwargs`.

    Raises RequestFailedError when the class cannot be made.
    """
    kwargs: Mapping[str, Any] = request.chat_template_kwargs or {}
    with plugin_errors(cls):
        if _takes(cls, 1, "chat_template_kwargs"):
            return cls(tokenizer, chat_template_kwargs=dict(kwargs))
        return cls(tokenizer)


class _Pieces:
    """What an answer has said so far, as vLLM tells it to parsers."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []

    def call(self, text: str, token_ids: list[int]) -> tuple[str, str, str, list[int], list[int], list[int]]:
        """Take one more piece; the first six arguments of the streaming methods."""
        before, ids_before = self.text, self.token_ids
        self.text = before + text
        self.token_ids = ids_before + token_ids  # a new list each time: parsers may keep what they were given
        return before, self.text, text, ids_before, self.token_ids, token_ids


class ToolPluginAnswer:
    """Drives a tool parser through one answer: token by token where it is streamed, else over the whole text.

    `by_token` false gives it each piece as it comes, with all its tokens.
    Raises RequestFailedError when the parser fails.
    """

    def __init__(
        self,
        parser: ToolParser,
        request: ChatCompletionRequest,
        tokenizer: PluginTokenizer,
        *,
        streamed: bool,
        by_token: bool = True,
    ) -> None:
        self._parser = parser
        self._request = request
        self._tokenizer = tokenizer
        self._is_streamed = streamed
        self._by_token = by_token
        self._pieces = TokenPieces(
            tokenizer.jaxserve_tokenizer, skip_special_tokens=request.skip_special_tokens
        )
        self._said = _Pieces()
        self._whole: list[str] = []
        self._content: list[str] = []  # told, of a streamed answer
        self._index_of: dict[int, int] = {}  # among the answer's calls, by the parser's own number
        self._was_call = False  # the last piece gave more of a call

    def push(self, text: str, token_ids: Sequence[int]) -> list[Event]:
        """What the parser says of one more piece of the answer."""
        if not self._is_streamed:
            self._whole.append(text)
            return []
        events: list[Event] = []
        pieces = self._pieces.push(text, token_ids) if self._by_token else [(text, list(token_ids))]
        for piece, ids in pieces:
            with plugin_errors(self._parser):
                delta = self._parser.extract_tool_calls_streaming(*self._said.call(piece, ids), self._request)
            self._was_call = bool(delta and delta.tool_calls)
            if delta is None:
                continue
            if delta.content:
                events.append(Content(delta.content))
                self._content.append(delta.content)
            events += self._call_events(delta.tool_calls or ())
        return events

    def finish(self) -> list[Event]:
        """The rest: of a streamed answer, what the parser knows and has not told."""
        if self._is_streamed:
            return self._untold_arguments() if self._index_of else self._untold_content()
        return self._read_whole(self._parser, "".join(self._whole))

    def _read_whole(self, parser: ToolParser, text: str) -> list[Event]:
        """What a parser says of a whole answer.  Without calls it is content, as the parser says it or as it is."""
        with plugin_errors(parser):
            found = parser.extract_tool_calls(text, self._request)
        content = found.content or ("" if found.tools_called else text)
        events: list[Event] = [Content(content)] if content else []
        if not found.tools_called:
            return events
        for index, call in enumerate(found.tool_calls):
            events.append(CallStart(index, call.id or make_tool_call_id(), call.function.name))
            if call.function.arguments:
                events.append(CallArguments(index, call.function.arguments))
        return events

    def _call_events(self, deltas: Iterable[DeltaToolCall]) -> list[Event]:
        events: list[Event] = []
        for delta in deltas:
            function = delta.function
            if function is None:
                continue
            if function.name and delta.index not in self._index_of:
                index = self._index_of[delta.index] = len(self._index_of)
                events.append(CallStart(index, delta.id or make_tool_call_id(), function.name))
            if function.arguments:
                if delta.index not in self._index_of:
                    raise RequestFailedError(
                        f"the plug-in {type(self._parser).__qualname__} gave arguments of call {delta.index} "
                        f"before its name: {function.arguments!r}"
                    )
                events.append(CallArguments(self._index_of[delta.index], function.arguments))
        return events

    def _untold_arguments(self) -> list[Event]:
        """vLLM's last look: if the answer ended within a call, the arguments that are still owed."""
        if not self._was_call:
            return []
        with plugin_errors(self._parser):
            rest = self._parser.get_remaining_unstreamed_args()
        return [CallArguments(max(self._index_of.values()), rest)] if rest else []

    def _untold_content(self) -> list[Event]:
        """Text that was held back, since it might have become a call.

        vLLM's interface has no end of a stream, so vLLM loses it.
        """
        told, text = "".join(self._content), self._said.text
        if told == text:
            return []
        match self._read_whole(make_tool_parser(type(self._parser), self._tokenizer, self._request), text):
            case [Content(whole)] if whole.startswith(told) and whole != told:
                return [Content(whole[len(told) :])]
        return []


class ReasoningPluginAnswer:
    """Drives a reasoning parser through one answer; what comes after the reasoning goes to `rest`.

    Raises RequestFailedError when the parser fails.
    """

    def __init__(
        self,
        parser: ReasoningParser,
        request: ChatCompletionRequest,
        tokenizer: PluginTokenizer,
        rest: AnswerParser,
        *,
        streamed: bool,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._parser = parser
        self._request = request
        self._rest = rest
        self._is_streamed = streamed
        self._pieces = TokenPieces(
            tokenizer.jaxserve_tokenizer, skip_special_tokens=request.skip_special_tokens
        )
        self._said = _Pieces()
        prompt = list(prompt_token_ids)
        with plugin_errors(parser):
            parser.set_prompt_token_ids(prompt)
            self._is_over = bool(prompt) and parser.is_reasoning_end(prompt)
            if not self._is_over:
                parser.adjust_initial_state_from_prompt(prompt)

    def push(self, text: str, token_ids: Sequence[int]) -> list[Event]:
        """What the parser says of one more piece of the answer."""
        if not self._is_streamed:
            self._said.call(text, list(token_ids))
            return []
        if self._is_over:
            return self._rest.push(text, token_ids)
        events: list[Event] = []
        for piece, ids in self._pieces.push(text, token_ids):
            events += self._rest.push(piece, ids) if self._is_over else self._step(piece, ids)
        return events

    def finish(self) -> list[Event]:
        """The rest of the answer."""
        if self._is_streamed:
            return self._rest.finish()
        events: list[Event] = []
        ids, content = self._said.token_ids, self._said.text
        if not self._is_over:
            with plugin_errors(self._parser):
                reasoning, rest = self._parser.extract_reasoning(content, self._request)
                ids = list(self._parser.extract_content_ids(ids))
            events += [Reasoning(reasoning)] if reasoning else []
            content = rest or ""
        return [*events, *self._rest.push(content, ids), *self._rest.finish()]

    def _step(self, text: str, token_ids: list[int]) -> list[Event]:
        arguments = self._said.call(text, token_ids)
        parser = self._parser
        with plugin_errors(parser):
            delta = parser.extract_reasoning_streaming(*arguments)
            self._is_over = parser.is_reasoning_end_streaming(self._said.token_ids, token_ids)
            ids = list(parser.extract_content_ids(token_ids)) if self._is_over else []
        if delta is None:
            return []
        reasoning = delta.reasoning or getattr(delta, "reasoning_content", None)
        events: list[Event] = [Reasoning(reasoning)] if reasoning else []
        if self._is_over:
            return events + (self._rest.push(delta.content or "", ids) if delta.content or ids else [])
        return events + ([Content(delta.content)] if delta.content else [])


@cache
def _takes(cls: type, num_positional: int, keyword: str | None = None) -> bool:
    """Whether a class can be made with so many arguments, and the keyword."""
    try:
        inspect.signature(cls).bind(*[None] * num_positional, **({keyword: None} if keyword else {}))
    except TypeError:
        return False
    return True
