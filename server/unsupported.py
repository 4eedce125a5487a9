"""Fields that the API knows and this server version does not serve: refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.server.errors import ApiError

_TEXT_ONLY = "answers are text; leave it out"
_TRANSFER = "prefill and decode run in one engine; leave it out"
_BEAM = "this server version does not search beams; leave it out (or send false) and use n instead"


# Given a field's value (never None) and the whole body, what is wrong with it; None where it asks for nothing.
Rule = Callable[[Any, Mapping[str, Any]], str | None]


def refuse_unsupported(body: Mapping[str, Any], fields: Mapping[str, Rule]) -> None:
    """Raise ApiError 400 naming the first of `fields` whose value asks for something that is not served."""
    for name, rule in fields.items():
        value = body.get(name)
        if value is None:
            continue
        reason = rule(value, body)
        if reason is not None:
            raise ApiError(400, f"{name} is not supported: {reason}.", param=name)


def _always(reason: str) -> Rule:
    return lambda value, body: reason


def _unless(harmless: Any, reason: str) -> Rule:
    return lambda value, body: None if value == harmless else reason


def _best_of(value: Any, body: Mapping[str, Any]) -> str | None:
    n = body.get("n") or 1
    if isinstance(value, int) and isinstance(n, int) and value <= n:
        return None
    return "answers are not ranked; leave it out, and n of them are returned"


def _modalities(value: Any, body: Mapping[str, Any]) -> str | None:
    return None if value == ["text"] else f'got {value!r:.100}, and {_TEXT_ONLY}, or send ["text"]'


_SHARED: dict[str, Rule] = {
    "use_beam_search": _unless(False, _BEAM),
    "length_penalty": _unless(1.0, _BEAM),
    "early_stopping": _unless(False, _BEAM),
    "best_of": _best_of,
    "logits_processors": _unless([], "use logit_bias, allowed_token_ids or bad_words"),
    "thinking_token_budget": _unless(
        -1, "max_tokens bounds the whole answer, reasoning included; leave it out"
    ),
    "repetition_detection": _always("use repetition_penalty or max_tokens; leave it out"),
    "truncation_side": _unless("left", "it is the beginning of a prompt that truncate_prompt_tokens cuts"),
    "stream_interval": _unless(1, "a chunk of a stream has what there is; leave it out"),
    "vllm_xargs": _unless({}, "there are no extensions that would read it; leave it out"),
    "watermarking": _unless(False, "answers have no watermark; leave it out"),
    "return_token_offsets": _unless(False, "offsets of tokens are not told; leave it out"),
    "routed_experts_prompt_start": _unless(0, "the experts of tokens are not told; leave it out"),
    "logprob_token_ids": _always("ask for top_logprobs (chat) or logprobs (completions) instead"),
    "kv_transfer_params": _always(_TRANSFER),
    "ec_transfer_params": _always(_TRANSFER),
}

CHAT_FIELDS: dict[str, Rule] = {
    **_SHARED,
    "media_io_kwargs": _always("images are decoded in one way, transparent parts on white; leave it out"),
    "modalities": _modalities,
    "audio": _always(_TEXT_ONLY),
    "web_search_options": _always("this server searches no web; leave it out"),
    "functions": _always('it is the old form of `tools`: send [{"type": "function", "function": {…}}] there'),
    "function_call": _unless("none", "it is the old form of `tool_choice`: send that instead"),
}

COMPLETION_FIELDS: dict[str, Rule] = {
    **_SHARED,
    "suffix": _unless("", "no served model fills in the middle; leave it out"),
    "prompt_embeds": _always("send the prompt as text or token ids"),
}
