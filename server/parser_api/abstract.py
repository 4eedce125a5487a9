"""ToolParser and ToolParserManager: what tool-parser plug-ins derive from and register with, as vLLM has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from jaxserve.server.parser_api.class_registry import ParserManager, ParserRegistry
from jaxserve.server.parser_api.protocol import (
    ChatCompletionToolsParam,
    DeltaMessage,
    ExtractedToolCallInformation,
)
from jaxserve.server.parser_api.requests import ChatCompletionRequest
from jaxserve.server.parser_api.schemas import get_json_schema_from_tools
from jaxserve.structured_outputs import StructuredOutputsParams

Tool = ChatCompletionToolsParam


class ToolParser:
    """Finds the tool calls in one answer.  One object sees one answer.

    `supports_required_and_named` says who reads an answer that must be a call (`tool_choice` "required" or a
    named function): the server, which then asks the model for plain JSON (True), or this parser, in the
    model's own format (False).
    """

    supports_required_and_named: bool = True
    structural_tag_model: str | None = None
    engine_based_streaming: bool = False

    def __init__(self, tokenizer: Any, tools: Sequence[Any] | None = None) -> None:
        self.prev_tool_call_arr: list[dict[str, Any]] = []  # the calls so far, as far as they are known
        self.current_tool_id: int = -1  # index of the call that is being parsed
        self.current_tool_name_sent: bool = False
        self.streamed_args_for_tool: list[str] = []  # per call, the arguments told so far
        self.model_tokenizer = tokenizer
        self.tools: list[Any] = list(tools or ())

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        return self.model_tokenizer.get_vocab()

    def adjust_request(self, request: ChatCompletionRequest) -> ChatCompletionRequest:
        """The request as this parser needs it.  Here: where the answer must be a call, its JSON schema.

        A parser that reads special tokens sets `request.skip_special_tokens = False`.
        """
        if not request.tools or not self.supports_required_and_named:
            return request
        stated = getattr(request, "structured_outputs", None)
        if stated is not None and stated.structural_tag is not None:
            return request
        schema = get_json_schema_from_tools(
            request.tool_choice, request.tools, getattr(request, "parallel_tool_calls", None)
        )
        if schema is not None:
            request.structured_outputs = StructuredOutputsParams(json=schema)
            request.response_format = None
        return request

    def extract_tool_calls(
        self, model_output: str, request: ChatCompletionRequest
    ) -> ExtractedToolCallInformation:
        """The calls in a whole answer, and the text beside them."""
        raise NotImplementedError(f"{type(self).__name__} does not implement extract_tool_calls")

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: ChatCompletionRequest,
    ) -> DeltaMessage | None:
        """What is new in an answer with one more piece (current = previous + delta); None: nothing yet."""
        raise NotImplementedError(f"{type(self).__name__} does not implement extract_tool_calls_streaming")

    def get_remaining_unstreamed_args(self) -> str:
        """The last call's arguments that are known but were not told yet."""
        if not self.prev_tool_call_arr:
            return ""
        index = len(self.prev_tool_call_arr) - 1
        arguments = self.prev_tool_call_arr[index].get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        told = self.streamed_args_for_tool[index] if index < len(self.streamed_args_for_tool) else ""
        return arguments[len(told) :] if arguments.startswith(told) else ""


def _builtin(name: str) -> type | None:
    from jaxserve.server.tool_parsers.declared import builtin_tool_parser  # derives from this module's class

    return builtin_tool_parser(name)


def _builtin_names() -> list[str]:
    from jaxserve.server.tool_parsers.declared import builtin_tool_parsers

    return builtin_tool_parsers()


class ToolParserManager(ParserManager):
    """The registry of tool parsers."""

    registry: ClassVar = ParserRegistry("tool parser", ToolParser, _builtin, _builtin_names)
    tool_parsers: ClassVar[dict[str, type[ToolParser]]] = registry.classes
    lazy_parsers: ClassVar[dict[str, tuple[str, str]]] = registry.lazy

    @classmethod
    def get_tool_parser(cls, name: str) -> type[ToolParser]:
        """The class registered under a name.  Raises KeyError if there is none."""
        return cls.registry.get(name)

    @classmethod
    def import_tool_parser(cls, plugin_path: str) -> None:
        """Import a plug-in file, which registers its parsers.  Raises ConfigError if it cannot be imported."""
        from jaxserve.server.plugins.load import load_plugin  # serves this module to plug-ins

        load_plugin(plugin_path)
