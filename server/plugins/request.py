"""The request as a plug-in sees it, and what the plug-in wants changed in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields as fields_of
from typing import Any, Protocol

from pydantic import ValidationError

from jaxserve.server.parser_api.protocol import ChatCompletionNamedToolChoiceParam
from jaxserve.server.parser_api.requests import ChatCompletionRequest
from jaxserve.server.plugins.errors import plugin_errors
from jaxserve.server.protocol import ChatRequest
from jaxserve.structured_outputs import StructuredOutputsParams

_HELD_NAMES = frozenset(field.name for field in fields_of(StructuredOutputsParams))


class AdjustsRequests(Protocol):
    """A tool or reasoning parser."""

    def adjust_request(self, request: ChatCompletionRequest, /) -> ChatCompletionRequest | None:
        """The request as the parser needs it."""
        ...


def plugin_request(
    fields: ChatRequest | Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None = None
) -> ChatCompletionRequest:
    """A chat request under vLLM's names; fields that were not said have vLLM's defaults.

    `tools` are those that may be called, where the request's tool_choice allows some of its tools only.  What has
    a form that vLLM does not know is left out.
    """
    if isinstance(fields, ChatRequest):
        fields = fields.model_dump(by_alias=True, exclude_none=True)
    data = dict(fields)
    choice = data.get("tool_choice")
    if isinstance(choice, Mapping) and "allowed_tools" in choice:  # vLLM does not know it
        data["tool_choice"] = choice["allowed_tools"].get("mode", "auto")
    if tools is not None:
        data["tools"] = list(tools) or None
    held = data.get("structured_outputs")
    if isinstance(held, Mapping):
        data["structured_outputs"] = {name: value for name, value in held.items() if name in _HELD_NAMES}
    try:
        return ChatCompletionRequest.model_validate(data)
    except ValidationError as error:
        unknown = {each["loc"][0] for each in error.errors()}
        return ChatCompletionRequest.model_validate(
            {name: value for name, value in data.items() if name not in unknown}
        )


def is_forced(request: ChatCompletionRequest) -> bool:
    """Whether the answer must be a tool call."""
    return request.tool_choice == "required" or isinstance(
        request.tool_choice, ChatCompletionNamedToolChoiceParam
    )


def adjusted(parser: AdjustsRequests, request: ChatCompletionRequest) -> dict[str, Any]:
    """The fields that the parser's `adjust_request` changes, and their new values; `request` stays as it is.

    Raises RequestFailedError, or the parser's own RequestError, when the parser fails.
    """
    copy = request.model_copy()
    with plugin_errors(parser):
        result = parser.adjust_request(copy)
    new = dict(copy if result is None else result)
    old = dict(request)
    return {name: value for name, value in new.items() if name not in old or old[name] != value}
