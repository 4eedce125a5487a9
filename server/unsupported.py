"""Fields that the API knows and this server version does not serve: refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.server.errors import ApiError

_TEXT_ONLY = "this server version serves text models only; leave it out"
_UNCONSTRAINED = "this server version does not constrain what the model writes; leave it out"
_BEAM = "this server version does not search beams; leave it out (or send false) and use n instead"


def refuse_unsupported(body: Mapping[str, Any], fields: Mapping[str, Callable[[Any], str | None]]) -> None:
    """Raise ApiError 400 naming the first of `fields` whose value asks for something that is not served.

    A rule is given the value (never None) and says what is wrong with it, or None where it asks for nothing.
    """
    for name, rule in fields.items():
        value = body.get(name)
        if value is None:
            continue
        reason = rule(value)
        if reason is not None:
            raise ApiError(400, f"{name} is not supported: {reason}.", param=name)


def _always(reason: str) -> Callable[[Any], str | None]:
    return lambda value: reason


def _unless(harmless: Any, reason: str) -> Callable[[Any], str | None]:
    return lambda value: None if value == harmless else reason


def _response_format(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else value
    if kind == "text":
        return None
    if kind in ("json_object", "json_schema", "structural_tag"):
        return f"type {kind!r} asks for structured output, and {_UNCONSTRAINED}, or send type 'text'"
    return f'it must be an object whose type is "text" (the only one that is served), got {value!r:.100}'


def _modalities(value: Any) -> str | None:
    return None if value == ["text"] else f'got {value!r:.100}, and {_TEXT_ONLY}, or send ["text"]'


_SHARED: dict[str, Callable[[Any], str | None]] = {
    "response_format": _response_format,
    "structured_outputs": _always(_UNCONSTRAINED),
    "use_beam_search": _unless(False, _BEAM),
    "length_penalty": _unless(1.0, _BEAM),
    "logprob_token_ids": _always("ask for top_logprobs (chat) or logprobs (completions) instead"),
    "kv_transfer_params": _always("prefill and decode run in one engine; leave it out"),
}

CHAT_FIELDS: dict[str, Callable[[Any], str | None]] = {
    **_SHARED,
    "mm_processor_kwargs": _always(_TEXT_ONLY),
    "media_io_kwargs": _always(_TEXT_ONLY),
    "modalities": _modalities,
    "audio": _always(_TEXT_ONLY),
    "web_search_options": _always("this server searches no web; leave it out"),
    "functions": _always("it is the old name of `tools`, and this server version does not serve tool calls"),
    "function_call": _unless(
        "none", "this server version does not serve tool calls; leave it out or send 'none'"
    ),
}

COMPLETION_FIELDS: dict[str, Callable[[Any], str | None]] = {
    **_SHARED,
    "suffix": _unless("", "no served model fills in the middle; leave it out"),
    "prompt_embeds": _always("send the prompt as text or token ids"),
}


def refuse_tool_calls(tools: Any, tool_choice: Any) -> None:
    """Raise ApiError 400 for what needs tool calls; tool_choice "none" leaves tools to the template."""
    if tools is not None and len(tools) == 0:
        message = "tools must not be an empty array: provide at least one tool or leave the field out."
        raise ApiError(400, message, param="tools")
    if tool_choice == "none" or (tool_choice is None and tools is None):
        return
    if tools is None:
        raise ApiError(400, "tool_choice needs tools: send both, or neither.", param="tool_choice")
    if tool_choice is None:
        raise ApiError(
            400,
            'tools is not supported: tool_choice "auto" (what tools alone means) needs tool calls, which '
            'this server version does not serve. Send tool_choice "none", or leave tools out.',
            param="tools",
        )
    raise ApiError(
        400,
        f"tool_choice {tool_choice!r:.100} is not supported: this server version does not serve tool calls. "
        'Send "none", or leave tools and tool_choice out.',
        param="tool_choice",
    )
