"""Every built-in format as a class with vLLM's interface, for plug-ins and tests that look for one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

from jaxserve.server.parser_api.abstract import ToolParser
from jaxserve.server.parser_api.class_registry import class_of_format
from jaxserve.server.parser_api.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from jaxserve.server.parser_api.requests import ChatCompletionRequest
from jaxserve.server.parsing.events import AnswerParser, CallArguments, CallStart, Content, Event, Reasoning
from jaxserve.server.parsing.joining import add_text
from jaxserve.server.parsing.stages import WithoutBlanks
from jaxserve.server.tool_parsers.harmony import HarmonyCalls
from jaxserve.server.tool_parsers.registry import TOOL_FORMATS
from jaxserve.server.tool_parsers.tool_format import ToolFormat


class DeclaredToolParser(ToolParser):
    """Reads what its format declares.

    vLLM's interface does not say when a stream ends: what may still become a call, or white space beside one,
    is held back until more text comes.
    """

    tool_format: ClassVar[ToolFormat | HarmonyCalls]

    def __init__(self, tokenizer: Any, tools: Sequence[Any] | None = None) -> None:
        super().__init__(tokenizer, tools)
        self._stream: AnswerParser | None = None
        self._num_read = 0  # characters of the streamed answer

    def adjust_request(self, request: ChatCompletionRequest) -> ChatCompletionRequest:
        """Keep the special tokens that mark calls."""
        request = super().adjust_request(request)
        if request.tools and request.tool_choice != "none":
            request.skip_special_tokens = False
        return request

    def extract_tool_calls(
        self, model_output: str, request: ChatCompletionRequest | None
    ) -> ExtractedToolCallInformation:
        """The calls in a whole answer, and the text beside them."""
        parser = self._new_parser(request)
        delta = self._told([*parser.push(model_output, ()), *parser.finish()])
        calls = [
            ToolCall(
                id=call.id or "",
                function=FunctionCall(name=call.function.name, arguments=call.function.arguments or ""),
            )
            for call in delta.tool_calls
            if call.function is not None and call.function.name is not None
        ]
        return ExtractedToolCallInformation(
            tools_called=bool(calls), tool_calls=calls, content=delta.content or None
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: ChatCompletionRequest | None,
    ) -> DeltaMessage | None:
        """What is new in an answer with one more piece; None: nothing yet.

        A `current_text` without a `previous_text` begins anew.  Without both, `delta_text` is one more piece.
        """
        if self._stream is None or (current_text and not previous_text):
            self._stream, self._num_read = self._new_parser(request), 0
        text = current_text[self._num_read :] if current_text else delta_text
        self._num_read += len(text)
        events = self._stream.push(text, delta_token_ids)
        return self._told(events) if events else None

    def _new_parser(self, request: ChatCompletionRequest | None) -> AnswerParser:
        self.prev_tool_call_arr, self.streamed_args_for_tool = [], []
        self.current_tool_id, self.current_tool_name_sent = -1, False
        tools = self.tools or (request.tools if request is not None else None) or ()
        # A parser was asked for, so calls are looked for, even if nobody says which there are.
        return WithoutBlanks(self.tool_format.parser([_as_mapping(tool) for tool in tools] or [{}]))

    def _told(self, events: Iterable[Event]) -> DeltaMessage:
        """The events as one message; notes what was told, as vLLM's parsers do."""
        delta = DeltaMessage()
        for event in events:
            match event:
                case Content() | Reasoning():
                    add_text(delta, event)
                case CallStart(index, call_id, name):
                    self.current_tool_id, self.current_tool_name_sent = index, True
                    self.prev_tool_call_arr.append({"name": name, "arguments": ""})
                    self.streamed_args_for_tool.append("")
                    function = DeltaFunctionCall(name=name)
                    delta.tool_calls.append(
                        DeltaToolCall(id=call_id, type="function", index=index, function=function)
                    )
                case CallArguments(index, text):
                    self.streamed_args_for_tool[index] += text
                    self.prev_tool_call_arr[index]["arguments"] = self.streamed_args_for_tool[index]
                    function = _function_of(delta, index)
                    function.arguments = (function.arguments or "") + text
        return delta


@cache
def builtin_tool_parser(name: str) -> type[DeclaredToolParser] | None:
    """The class of a built-in format, the same for all of its names; None if there is none of this name."""
    entry = TOOL_FORMATS.get(name)
    if entry is None:
        return None
    if name != entry.names[0]:
        return builtin_tool_parser(entry.names[0])
    return class_of_format(name, DeclaredToolParser, tool_format=entry)


def builtin_tool_parsers() -> list[str]:
    """Their names."""
    return sorted(TOOL_FORMATS)


def _function_of(delta: DeltaMessage, index: int) -> DeltaFunctionCall:
    """What the message says of the call `index`; added if it says nothing yet."""
    if not delta.tool_calls or delta.tool_calls[-1].index != index:
        delta.tool_calls.append(DeltaToolCall(index=index, function=DeltaFunctionCall()))
    function = delta.tool_calls[-1].function
    assert function is not None
    return function


def _as_mapping(tool: Any) -> Mapping[str, Any]:
    """A tool as requests have it, whatever class it came in."""
    if isinstance(tool, Mapping):
        return tool
    function = getattr(tool, "function", tool)  # in /v1/responses tools are flat
    return {"type": "function", "function": {"name": function.name, "parameters": function.parameters}}
