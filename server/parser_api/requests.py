"""The request that a parser sees, under vLLM's names and with its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from jaxserve.server.parser_api.protocol import (
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionToolsParam,
    OpenAIBaseModel,
    random_uuid,
)
from jaxserve.structured_outputs import StructuredOutputsParams

ToolChoice = Literal["none", "auto", "required"] | ChatCompletionNamedToolChoiceParam


class StreamOptions(OpenAIBaseModel):
    """What a stream says beside the text."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class JsonSchemaResponseFormat(OpenAIBaseModel):
    """The schema of a `response_format`; JSON calls the field "schema"."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(OpenAIBaseModel):
    """What form the answer is asked to have."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaResponseFormat | None = None


class ChatCompletionRequest(OpenAIBaseModel):
    """A chat request.  The server has checked it before; here it is only read, and changed by `adjust_request`.

    Fields that are not listed are kept all the same.
    """

    messages: list[Any]
    model: str | None = None
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = 1
    presence_penalty: float | None = 0.0
    response_format: ResponseFormat | None = None
    seed: int | None = None
    stop: str | list[str] | None = Field(default_factory=list)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[ChatCompletionToolsParam] | None = None
    tool_choice: ToolChoice | None = "none"
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    parallel_tool_calls: bool | None = True
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = Field(default_factory=list)
    echo: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    priority: int = 0
    request_id: str = Field(default_factory=random_uuid)
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _choose_by_tools(cls, data: Any) -> Any:
        """Tools without a tool_choice mean auto."""
        if isinstance(data, Mapping) and data.get("tools") and "tool_choice" not in data:
            return {**data, "tool_choice": "auto"}
        return data


class ResponsesRequest(OpenAIBaseModel):
    """A request to /v1/responses.  Parsers name the type in their signatures and ask whether they got one."""

    input: str | list[Any]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    parallel_tool_calls: bool | None = True
    include_reasoning: bool = True
    stream: bool | None = False
    temperature: float | None = None
    text: Any = None
    tool_choice: Any = "auto"
    tools: list[Any] = Field(default_factory=list)
    top_p: float | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    request_id: str = Field(default_factory=lambda: f"resp_{random_uuid()}")
