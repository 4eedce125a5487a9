"""What parsers say: tool calls, whole or as deltas, under vLLM's names and with its defaults."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator


def random_uuid() -> str:
    """32 hexadecimal digits."""
    return uuid.uuid4().hex


def make_tool_call_id(id_type: str = "random", func_name: str | None = None, idx: int | None = None) -> str:
    """An id for a tool call: random, or of the form that Kimi K2 counts its calls by."""
    if id_type == "kimi_k2":
        return f"functions.{func_name}:{idx}"
    return f"chatcmpl-tool-{random_uuid()}"


class OpenAIBaseModel(BaseModel):
    """Takes fields that it does not know and keeps them."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class FunctionDefinition(OpenAIBaseModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return _drop_none(dump(self), "strict", "defer_loading")


class ChatCompletionToolsParam(OpenAIBaseModel):
    """One entry of a request's `tools`."""

    type: Literal["function"] = "function"
    function: FunctionDefinition
    defer_loading: bool | None = None

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return _drop_none(dump(self), "defer_loading")


class ChatCompletionNamedFunction(OpenAIBaseModel):
    """The function that `tool_choice` names."""

    name: str


class ChatCompletionNamedToolChoiceParam(OpenAIBaseModel):
    """A `tool_choice` that names a function."""

    function: ChatCompletionNamedFunction
    type: Literal["function"] = "function"


class FunctionCall(OpenAIBaseModel):
    """A call; `arguments` is JSON text.  `id` carries an id that the model itself wrote, if it writes any."""

    id: str | None = Field(default=None, exclude=True)
    name: str
    arguments: str


class ToolCall(OpenAIBaseModel):
    """A complete tool call, as answers show it."""

    id: str = Field(default_factory=make_tool_call_id)
    type: Literal["function"] = "function"
    function: FunctionCall


class DeltaFunctionCall(BaseModel):
    """What is new in a call: its name, or more of its arguments."""

    name: str | None = None
    arguments: str | None = None


class DeltaToolCall(OpenAIBaseModel):
    """What is new in the `index`-th call of an answer."""

    id: str | None = None
    type: Literal["function"] | None = None
    index: int
    function: DeltaFunctionCall | None = None


class InitialDeltaToolCall(DeltaToolCall):
    """The first delta of a call, as vLLM 0.6 had it: with an id from the start."""

    id: str | None = Field(default_factory=make_tool_call_id)
    type: Literal["function"] | None = "function"


class ExtractedToolCallInformation(BaseModel):
    """What a whole answer holds: calls, and the text beside them."""

    tools_called: bool
    tool_calls: list[ToolCall]
    content: str | None = None


class DeltaMessage(OpenAIBaseModel):
    """What is new in an answer.  `reasoning_content` is `reasoning` under its name before vLLM 0.12."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[DeltaToolCall] = Field(default_factory=list)

    @model_validator(mode="after")
    def _same_under_both_names(self) -> DeltaMessage:
        if self.reasoning is None:
            self.reasoning = self.reasoning_content
        else:
            self.reasoning_content = self.reasoning
        return self

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        data = _drop_none(dump(self), "reasoning_content")
        if not data.get("tool_calls"):
            data.pop("tool_calls", None)
        return data


class ChatMessage(OpenAIBaseModel):
    """A whole answer."""

    role: str = "assistant"
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)


def _drop_none(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if value is not None or name not in names}
