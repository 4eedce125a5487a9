"""The answers of the OpenAI API: what is sent, key by key.

OpenAI's OpenAPI document is the law: keys that it requires are always there, keys that it does not allow to
be null and vLLM's extra keys appear only when they hold something (UNSET leaves a key out).
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType


class PromptTokensDetails(msgspec.Struct):
    """Part of Usage, under --enable-prompt-tokens-details."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Token counts of a request."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    """One candidate at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    """The sampled token at a position, and the most likely ones."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a chat answer."""

    content: list[Raw]  # each a TokenLogprob
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a plain completion."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[Raw | None]  # each a dict[str, float]


class PromptLogprob(msgspec.Struct):
    """One candidate at a position of the prompt (vLLM's own shape)."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[Raw | None]  # each a dict[str, PromptLogprob]


class CalledFunction(msgspec.Struct):
    """The function of a tool call, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call that the caller is asked to make."""

    id: str
    type: str
    function: CalledFunction


class Message(msgspec.Struct):
    """What the assistant says."""

    role: str
    content: str | None
    refusal: None = None
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """One of the n answers."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: int | str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    """The answer to a chat request that is not streamed."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET


class FunctionDelta(msgspec.Struct):
    """Of a streamed call: the name when it begins, then more of the arguments."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct):
    """What is new in a streamed call; the first one of a call has id, type and name."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class Delta(msgspec.Struct):
    """What is new in a streamed message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """What is new in one of the n answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct):
    """One event of a streamed chat answer."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType = UNSET
    system_fingerprint: str | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET


class CompletionChoice(msgspec.Struct):
    """One of the answers to the prompts; in a stream, what is new in it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct):
    """The answer to a plain completion request, or one event of it when streamed."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str | UnsetType = UNSET
    usage: Usage | UnsetType = UNSET


class ModelPermission(msgspec.Struct):
    """Part of ModelCard that old clients look for."""

    id: str
    created: int
    object: str = "model_permission"
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    is_blocking: bool = False


class ModelCard(msgspec.Struct):
    """One model that is served."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    max_model_len: int
    permission: list[ModelPermission]


class ModelList(msgspec.Struct):
    """GET /v1/models"""

    object: str
    data: list[ModelCard]


class Tokens(msgspec.Struct):
    """POST /tokenize"""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedText(msgspec.Struct):
    """POST /detokenize"""

    prompt: str


class Rendered(msgspec.Struct):
    """POST …/render: what a request becomes, under vLLM's names."""

    request_id: str
    model: str
    prompt: str
    token_ids: list[int]
    sampling_params: dict[str, Any]
    stream: bool
    priority: int
    cache_salt: str | UnsetType = UNSET
