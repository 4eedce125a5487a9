"""What chat and plain completions do alike: submit, count tokens, say when max_tokens was cut."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import UNSET

from jaxserve.inputs import TokenizedPrompt
from jaxserve.request_stream import RequestStream
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.answers import PromptTokensDetails, Usage
from jaxserve.server.fan_in import submit
from jaxserve.server.protocol import GenerationRequest
from jaxserve.server.state import ServerState

MAX_TOKENS_HEADER = "X-Max-Tokens-Reduced"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every answer and every chunk of a request repeats, and the choices that shape them."""

    id: str
    created: int  # seconds since 1970
    model: str
    state: ServerState
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    tokens_as_ids: bool  # logprobs say "token_id:123"

    @classmethod
    def of(cls, state: ServerState, request: GenerationRequest, model: str, answer_id: str) -> Envelope:
        """The envelope of a request's answer."""
        options = request.stream_options
        as_ids = request.return_tokens_as_token_ids
        return cls(
            id=answer_id,
            created=int(time.time()),
            model=model,
            state=state,
            include_usage=state.settings.enable_force_include_usage
            or bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            return_token_ids=bool(request.return_token_ids),
            tokens_as_ids=state.settings.return_tokens_as_token_ids if as_ids is None else as_ids,
        )

    def usage(self, num_prompt_tokens: int, num_tokens: int, num_cached_tokens: int) -> Usage:
        """Token counts, with the cached ones where the operator wants them told."""
        shows_details = self.state.settings.enable_prompt_tokens_details
        return Usage(
            prompt_tokens=num_prompt_tokens,
            total_tokens=num_prompt_tokens + num_tokens,
            completion_tokens=num_tokens,
            prompt_tokens_details=PromptTokensDetails(num_cached_tokens) if shows_details else UNSET,
        )


def start(
    state: ServerState,
    request: GenerationRequest,
    prompts: Sequence[TokenizedPrompt],
    params: SamplingParams,
    answer_id: str,
    unique_id: str,
) -> tuple[list[RequestStream], dict[str, str]]:
    """Submit the prompts: their streams, and the header that says how many tokens an answer was cut down to.

    `unique_id` tells requests apart whose callers chose the same id.
    """
    streams = submit(
        state.llm,
        prompts,
        params,
        f"{answer_id}-{unique_id}",
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
    )
    room = min(stream.max_tokens for stream in streams)
    asked = getattr(request, "max_completion_tokens", None) or request.max_tokens
    if asked is None or room >= asked:
        return streams, {}
    return streams, {MAX_TOKENS_HEADER: str(room)}
