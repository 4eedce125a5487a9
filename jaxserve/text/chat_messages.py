"""OpenAI chat messages brought into the form that a chat template takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.errors import RequestError

# Kinds of content parts that are text, and the key that holds it.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}

# The two names under which an assistant's thoughts come back; templates read one or the other.
_REASONING = ("reasoning", "reasoning_content")


def plain_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    takes_strings: bool,
    takes_parts: bool,
    takes_argument_objects: bool,
) -> list[dict[str, Any]]:
    """Copies of `messages` with contents and tool calls as the template wants them.

    As in vLLM: parts are joined by line ends where the template wants strings, a missing content is empty,
    keys whose value is null are left out, and the arguments of tool calls are objects (empty if broken JSON).

    Raises:
        RequestError: there is no message, one is malformed, or one has parts other than text.
    """
    if not messages:
        raise RequestError("messages must have at least one message.", param="messages")
    plain: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"{where} must be an object with a role.", param="messages")
        copy = {key: value for key, value in message.items() if value is not None}
        copy["content"] = _content(
            message.get("content"), where, takes_strings=takes_strings, takes_parts=takes_parts
        )
        calls = copy.pop("tool_calls", None)
        if calls:
            copy["tool_calls"] = _tool_calls(calls, where, takes_argument_objects)
        for name, other in (_REASONING, _REASONING[::-1]):
            if name in copy:
                copy.setdefault(other, copy[name])
        plain.append(copy)
    return plain


def _content(
    content: Any, where: str, *, takes_strings: bool, takes_parts: bool
) -> str | list[dict[str, Any]]:
    if content is None:
        return "" if takes_strings else []
    if isinstance(content, str):
        return content if takes_strings else [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise RequestError(
            f"{where}.content must be a string or a list of parts, got {type(content).__name__}.",
            param="messages",
        )
    texts = [_text_of(part, f"{where}.content[{k}]") for k, part in enumerate(content)]
    return [{"type": "text", "text": text} for text in texts] if takes_parts else "\n".join(texts)


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise RequestError(f"{where} must be an object with a type.", param="messages")
    if kind not in _TEXT_PARTS:
        raise RequestError(
            f"{where} is of type {kind!r}, but this model takes text only; leave the part out or ask a "
            "multimodal model.",
            param="messages",
        )
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise RequestError(f"{where}.{_TEXT_PARTS[kind]} must be a string, got {text!r}.", param="messages")
    return text


def _tool_calls(calls: Any, where: str, takes_argument_objects: bool) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{where}.tool_calls must be a list.", param="messages")
    plain: list[dict[str, Any]] = []
    for k, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}.tool_calls[{k}] must have a function with a name.", param="messages")
        arguments = _arguments(function.get("arguments"), takes_argument_objects)
        plain.append({**call, "function": {**function, "arguments": arguments}})
    return plain


def _arguments(arguments: Any, takes_objects: bool) -> Any:
    """Arguments come as JSON text (OpenAI's form) or as an object."""
    if not takes_objects:
        if arguments is None:
            return "{}"
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return {}  # a model wrote them, and its next turn should not fail over that
    return {} if parsed is None else parsed
