"""Harmony, the format of OpenAI's open models: messages, each with a channel and perhaps a recipient.

    <|channel|>analysis<|message|>I need the weather.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"city": "Paris"}<|call|>

(one after the other, without line feeds).  Reasoning and calls are told by the same marks, so that one parser tells
both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.server.parsing.events import CallArguments, CallStart, Content, Event, Reasoning
from jaxserve.server.parsing.joining import append_event
from jaxserve.server.tool_parsers.call_draft import HELD_CHARACTERS, CallDraft, uuid_id
from jaxserve.server.tool_parsers.grammar import GrammarWriter, called_tools, is_strict
from jaxserve.server.tool_parsers.reader import NoCallError, Reader, Steps
from jaxserve.text.tokenizer import Tokenizer

_START, _CHANNEL, _CONSTRAIN, _MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
_END, _RETURN, _CALL = "<|end|>", "<|return|>", "<|call|>"
_MARKS = frozenset((_START, _CHANNEL, _CONSTRAIN, _MESSAGE, _END, _RETURN, _CALL))
_BEHIND_TEXT = (_START, _CHANNEL, _END, _RETURN, _CALL)
_HEADER_TEXT = re.compile(r"[^<\n]*")
_FUNCTION = re.compile(r"\bto=functions\.([\w.\-]+)")
_RECIPIENT = re.compile(r"\bto=\S")
_IN_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class HarmonyParser:
    """Tells the messages of one answer apart: reasoning, content and calls.

    What is said to other recipients than functions is nothing for the user, and counts as reasoning.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]], *, constrained: bool = False) -> None:
        """Without tools, what is said to functions is content."""
        self._has_tools = bool(tools)
        self._reader = Reader()
        held_characters = 0 if constrained else HELD_CHARACTERS
        self._draft = CallDraft(self._reader, self._announce, tools, uuid_id, held_characters)
        self._events: list[Event] = []
        self._sink: Callable[[str], None] = self._say  # of text at this place
        self._steps: Steps[None] = self._read()

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Event]:
        """What is certain once `text` has come too."""
        self._reader.feed(text)
        next(self._steps)
        return self._take_events()

    def finish(self) -> list[Event]:
        """What is left when the answer has ended."""
        rest = self._reader.rest()
        if rest and not self._draft.is_announced:
            self._sink(rest)
        self._draft.drop()
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _read(self) -> Steps[None]:
        """Never ends: after a message comes another one."""
        reader = self._reader
        # The prompt ends with the beginning of a header, which may go on with a recipient.
        mark = " to=" if (yield from reader.literal(" to=")) else ""
        while True:
            if mark in (_START, _CHANNEL, " to="):
                mark = yield from self._message(mark)
            else:
                reader.settle()
                self._sink = self._say
                mark = yield from reader.up_to(_BEHIND_TEXT, self._sink)

    def _message(self, begin: str) -> Steps[str]:
        """Read a message; the mark that ends it, or nothing where there is none."""
        reader, draft = self._reader, self._draft
        self._sink = self._say
        try:
            header = begin + (yield from self._header())
            function = _FUNCTION.search(header)
            if function and self._has_tools:
                draft.begin()
                draft.start(function[1])
                if (yield from reader.white()) != "<":
                    yield from reader.json(draft.add)
                draft.end()
                return ""
        except NoCallError:
            draft.drop()
            self._say(reader.give_back())
            return ""
        reader.settle()
        channel = _IN_CHANNEL.search(header)
        is_thought = channel is not None and channel[1] == "analysis"
        is_for_others = bool(_RECIPIENT.search(header)) and not function
        self._sink = self._think if is_thought or is_for_others else self._say
        return (yield from reader.up_to(_BEHIND_TEXT, self._sink))

    def _header(self) -> Steps[str]:
        """Read up to the message's text."""
        reader, header = self._reader, ""
        while True:
            header += yield from reader.match(_HEADER_TEXT)
            for mark in (_MESSAGE, _CHANNEL, _CONSTRAIN):
                if (yield from reader.literal(mark)):
                    header += mark
                    break
            else:
                raise NoCallError("this is no header")
            if mark == _MESSAGE:
                return header

    def _announce(self, event: CallStart | CallArguments) -> None:
        append_event(self._events, event)

    def _say(self, text: str) -> None:
        self._reader.settle()
        if text:
            append_event(self._events, Content(text))

    def _think(self, text: str) -> None:
        self._reader.settle()
        append_event(self._events, Reasoning(text))


@dataclass(frozen=True)
class HarmonyCalls:
    """Harmony as a format of tool calls."""

    names: tuple[str, ...] = ("openai",)
    markers: frozenset[str] = _MARKS
    is_marked: bool = False
    tells_reasoning: bool = True

    def parser(
        self, tools: Sequence[Mapping[str, Any]], *, constrained: bool = False, request: object = None
    ) -> HarmonyParser:
        """Tells the parts of one answer apart; see ToolFormat.parser."""
        return HarmonyParser(tools, constrained=constrained)

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any],
        *,
        parallel_tool_calls: bool,
        tokenizer: Tokenizer,
    ) -> str | None:
        """Lark text that holds an answer to a call, with thoughts before it; see ToolFormat.grammar.

        These models make one call an answer: they end it with the call.
        """
        if tool_choice == "auto" and not any(is_strict(tool["function"]) for tool in tools):
            return None
        writer = GrammarWriter(tokenizer, called_tools(tools, tool_choice), is_parallel=False)

        def call() -> str:
            recipient = f" to=functions.{writer.tool.name} "
            # Piece by piece, as in other messages: the lexer is greedy.
            begin = map(writer.text, (_CHANNEL, "commentary", recipient, _CONSTRAIN, "json", _MESSAGE))
            return f"{' '.join(begin)} {writer.json(writer.tool.schema)}"

        def messages(channels: Iterable[str]) -> str:
            kinds = " | ".join(writer.text(channel) for channel in channels)
            return f"{writer.text(_CHANNEL)} ({kinds}) {writer.text(_MESSAGE)}"

        one_call = writer.calls(call)
        next_message = writer.text(f"{_START}assistant")
        if tool_choice != "auto":
            thoughts = f"{messages(['analysis'])} {writer.free_text_before(_END)} {next_message}"
            return writer.finish(f"({thoughts})* {one_call}")
        begin = messages(["analysis", "commentary", "final"])
        more = f"{begin} {writer.free_text_before(_END)} {next_message}"
        return writer.finish(f"({more})* ({one_call} | {begin} {writer.free_text()})")


@dataclass(frozen=True)
class HarmonyReasoning:
    """Harmony as a format of reasoning, where no calls are looked for."""

    names: tuple[str, ...] = ("openai_gptoss",)
    markers: frozenset[str] = _MARKS
    starts: tuple[str, ...] = ()  # no pair of marks tells reasoning from the rest
    ends: tuple[str, ...] = ()
    has_calls: bool = False

    def parser(self, prompt: str = "", *, request: object = None) -> HarmonyParser:
        """Tells the parts of one answer apart."""
        return HarmonyParser(())

    def marks_before_answer(self, prompt: str) -> tuple[str | None, str] | None:
        """None: a pair of marks does not tell."""
        return None
