"""POST /v1/chat/completions/render and /v1/completions/render: what a request becomes; nothing is generated."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from msgspec import UNSET
from quart import Request, Response

from jaxserve.async_llm import LONG_TEXT
from jaxserve.inputs import TokenizedPrompt
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.answers import Rendered
from jaxserve.server.intake import Intake, name_request
from jaxserve.server.prepared_chat import prepare_chat
from jaxserve.server.prepared_completion import prepare_completion
from jaxserve.server.respond import made_response
from jaxserve.server.state import ServerState

# About what comes back, not about which tokens are drawn.
_OF_OUTPUT = ("output_kind", "detokenize")


async def render_chat(state: ServerState, request: Request) -> Response:
    """The prompt, its token ids and the parameters that a chat request would be answered with."""
    prepared = await prepare_chat(state, request)
    answer_id = f"chatcmpl-{name_request(prepared.taken.fields)}"

    def answer() -> Rendered:
        return _rendered(state, prepared.taken, prepared.prompt, prepared.params, answer_id)

    is_large = len(prepared.prompt.token_ids) > LONG_TEXT
    return await made_response(answer, prepared.taken.headers, is_large=is_large)


async def render_completion(state: ServerState, request: Request) -> Response:
    """The same for a plain completion: a list, one for each prompt."""
    prepared = await prepare_completion(state, request)
    answer_id = f"cmpl-{name_request(prepared.taken.fields)}"

    def answer() -> list[Rendered]:
        return [
            _rendered(state, prepared.taken, prompt, prepared.params, f"{answer_id}-{i}")
            for i, prompt in enumerate(prepared.prompts)
        ]

    is_large = sum(len(prompt.token_ids) for prompt in prepared.prompts) > LONG_TEXT
    return await made_response(answer, prepared.taken.headers, is_large=is_large)


def _rendered(
    state: ServerState, taken: Intake[Any], prompt: TokenizedPrompt, params: SamplingParams, answer_id: str
) -> Rendered:
    text = prompt.text
    # Token ids came, or truncation cut into the text, or images have more tokens than placeholders in the text.
    if text is None or prompt.images:
        text = state.llm.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    room = state.llm.info.max_model_len - len(prompt.token_ids)
    return Rendered(
        request_id=answer_id,
        model=taken.model,
        prompt=text,
        token_ids=prompt.token_ids,
        sampling_params=_effective(params, room),
        stream=bool(taken.fields.stream),
        priority=taken.fields.priority or 0,
        cache_salt=UNSET if taken.fields.cache_salt is None else taken.fields.cache_salt,
    )


def _effective(params: SamplingParams, room: int) -> dict[str, Any]:
    """Every parameter that was said or has a default; those that are off without a value are left out."""
    told = {field.name: getattr(params, field.name) for field in fields(params)}
    told["max_tokens"] = room if params.max_tokens is None else min(params.max_tokens, room)
    constraint = params.structured_outputs
    if constraint is not None:
        told["structured_outputs"] = {
            name: value
            for name, value in asdict(constraint).items()
            if value not in (None, False) and name != "param"
        }
    return {name: value for name, value in told.items() if name not in _OF_OUTPUT and value is not None}
