"""From request fields to SamplingParams, over the model's own defaults."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from jaxserve.async_llm import AsyncLLM
from jaxserve.errors import RequestError
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.server.protocol import ChatRequest, CompletionRequest, GenerationRequest

MAX_N = 128  # of OpenAI's document
COMPLETION_MAX_TOKENS = 16  # likewise, where a plain completion says nothing

# Written one way only: "7" and "07" must not be two entries for one token.
_TOKEN_ID = re.compile(r"-?(?:0|[1-9][0-9]{0,18})")

# Fields that SamplingParams has under the same name and with the same meaning.
_SAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


def chat_sampling(llm: AsyncLLM, request: ChatRequest) -> SamplingParams:
    """Sampling parameters of a chat request.  Raises RequestError naming the field that is wrong."""
    top_logprobs = request.top_logprobs
    if top_logprobs is not None:
        limit = llm.info.max_logprobs
        if not 0 <= top_logprobs <= limit:
            raise RequestError(
                f"top_logprobs must be from 0 to {limit}, got {top_logprobs}.", param="top_logprobs"
            )
        if top_logprobs and not request.logprobs:
            raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
    _check_max_tokens(llm, "max_completion_tokens", request.max_completion_tokens)
    said = _said(llm, request)
    if request.max_completion_tokens is not None:
        said["max_tokens"] = request.max_completion_tokens
    elif request.max_tokens is None:
        said["max_tokens"] = _model_max_tokens(llm)
    if request.logprobs:
        said["logprobs"] = top_logprobs or 0
    return _params(llm, said)


def completion_sampling(llm: AsyncLLM, request: CompletionRequest) -> SamplingParams:
    """Sampling parameters of a plain completion.  Raises RequestError naming the field that is wrong.

    As in vLLM, an answer without max_tokens has at most 16 tokens (OpenAI's default, whatever the model says),
    and max_tokens null asks for the model's own default, or for as much as the context holds.

    With `echo`, max_tokens may be 0: the engine is then asked for one token, which nobody sees.
    Log-probabilities of an echoed prompt are its prompt_logprobs.
    """
    is_prompt_only = bool(request.echo) and request.max_tokens == 0
    said = _said(llm, request, may_be_empty=is_prompt_only)
    if is_prompt_only:
        said["max_tokens"] = 1
    elif "max_tokens" not in request.model_fields_set:
        said["max_tokens"] = COMPLETION_MAX_TOKENS
    elif request.max_tokens is None:
        said["max_tokens"] = _model_max_tokens(llm)
    if request.logprobs is not None:
        said["logprobs"] = request.logprobs
        if request.echo:
            said["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
    return _params(llm, said)


def check_stream_options(request: GenerationRequest) -> None:
    """Refuse what makes sense only in a stream, or only outside of one."""
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream: true.", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError(
            "prompt_logprobs is not available in a stream: leave it out, or send stream: false.",
            param="prompt_logprobs",
        )


def _said(llm: AsyncLLM, request: GenerationRequest, *, may_be_empty: bool = False) -> dict[str, Any]:
    """What the request says, in SamplingParams' words."""
    if not may_be_empty:
        _check_max_tokens(llm, "max_tokens", request.max_tokens)
    if request.n is not None and request.n > MAX_N:
        raise RequestError(f"n must be at most {MAX_N}, got {request.n}.", param="n")
    allowed, vocab_size = request.allowed_token_ids, llm.info.vocab_size
    if allowed is not None and len(allowed) > vocab_size:
        raise RequestError(
            f"allowed_token_ids must have at most {vocab_size} entries, the vocabulary's, got {len(allowed)}.",
            param="allowed_token_ids",
        )
    said = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    if request.max_tokens is not None:
        said["max_tokens"] = request.max_tokens
    if request.logit_bias is not None:
        said["logit_bias"] = {_token_id(key): bias for key, bias in request.logit_bias.items()}
    said["output_kind"] = OutputKind.DELTA if request.stream else OutputKind.FINAL_ONLY
    return said


def _model_max_tokens(llm: AsyncLLM) -> int | None:
    """max_new_tokens of the generation config; None, the rest of the context, where that says nothing."""
    return llm.defaults.sampling.get("max_tokens")


def _params(llm: AsyncLLM, said: dict[str, Any]) -> SamplingParams:
    """What was said, over the defaults and under the operator's limit on the length of answers."""
    params = llm.default_sampling_params(**said)
    limit = llm.defaults.max_tokens_limit
    if limit is None or (params.max_tokens is not None and params.max_tokens <= limit):
        return params
    return replace(params, max_tokens=limit, min_tokens=min(params.min_tokens, limit))


def _check_max_tokens(llm: AsyncLLM, name: str, value: int | None) -> None:
    if value is None:
        return
    if value < 1:
        raise RequestError(f"{name} must be at least 1, got {value}.", param=name)
    limit = llm.info.max_model_len
    if value > limit:
        raise RequestError(
            f"{name} must be at most the model's context of {limit} tokens, got {value}.", param=name
        )


def _token_id(key: str) -> int:
    if _TOKEN_ID.fullmatch(key) is None:
        raise RequestError(
            f"logit_bias must map token ids to numbers; {key!r:.60} is not a token id.", param="logit_bias"
        )
    return int(key)
