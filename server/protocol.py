"""The requests of the OpenAI API with vLLM's extra fields: names and types, nothing else.

Bounds are SamplingParams' business, and fields that later versions will serve are unsupported.py's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from jaxserve.sampling_params import check_num_biases
from jaxserve.server.format_fields import ResponseFormat, StructuredOutputs
from jaxserve.server.tool_fields import MAX_TOOLS, Tool


def _list_of_strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _few_biases(value: Any) -> Any:
    if isinstance(value, dict):
        check_num_biases(len(value))
    return value


# Lists end with the first wrong item: an error for each of a million takes pydantic seconds, and a gigabyte.
StringOrList = Annotated[list[str], Field(fail_fast=True), BeforeValidator(_list_of_strings)]


class StreamOptions(BaseModel):
    """What a stream says beside the text."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(BaseModel):
    """The fields that chat and plain completions share.  None means: not said."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: StringOrList | None = None
    stop_token_ids: list[int] | None = Field(default=None, fail_fast=True)
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few_biases)] | None = None
    allowed_token_ids: list[int] | None = Field(default=None, fail_fast=True)
    bad_words: StringOrList | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None  # like metadata: for the log
    metadata: dict[str, Any] | None = None


class TemplateFields(BaseModel):
    """How a conversation becomes a prompt; shared by chat and /tokenize."""

    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS, fail_fast=True)
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = Field(default=None, fail_fast=True)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None  # bounds of the images of messages


class ChatRequest(GenerationRequest, TemplateFields):
    """POST /v1/chat/completions"""

    messages: list[Any] = Field(default_factory=list)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Any = None  # a word or an object: tool_choice.py tells them apart
    parallel_tool_calls: bool | None = None  # says nothing without tool calls
    include_reasoning: bool | None = None  # says nothing where reasoning is not told apart from the answer
    return_prompt_text: bool | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: Any = None  # text, token ids, or a list of either: prompts.py tells them apart
    logprobs: int | None = None


class TokenizeRequest(TemplateFields):
    """POST /tokenize: of a text or of a conversation"""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize"""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    tokens: list[int] = Field(fail_fast=True)
