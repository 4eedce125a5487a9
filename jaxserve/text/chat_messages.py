"""OpenAI chat messages, checked and brought into the form that a chat template takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.text.image_parts import ImageMarks, image_kind, other_media

Content = str | list[dict[str, Any]]

# Kinds of content parts that are text, and the key that holds it.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}

# The two names under which an assistant's thoughts come back; templates read one or the other.
_REASONING = ("reasoning", "reasoning_content")


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of our own making, free to be changed, and where in the request it came from."""

    message: dict[str, Any]
    index: int

    @property
    def role(self) -> str:
        """Who speaks."""
        return self.message["role"]


def checked_turns(messages: Sequence[Mapping[str, Any]], marks: ImageMarks | None = None) -> list[Turn]:
    """Copies of `messages`: contents are text or lists of parts, keys whose value is null are left out.

    Parts are text; with `marks`, for a model that takes images, they may be images too, which `marks` numbers.

    A tool's message gets the id and name of the call that it answers where it does not say them, so that
    templates which write those have something to write.

    Raises:
        RequestError: there is no message, one is malformed, or one has parts of another kind (param "messages").
    """
    if not messages:
        raise RequestError("messages must have at least one message.", param="messages")
    turns = [Turn(_checked(message, f"messages[{i}]", marks), i) for i, message in enumerate(messages)]
    _name_results(turns)
    return turns


def text_of(content: Content) -> str:
    """The text of a content; parts are joined by line ends, as in vLLM."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def joined_contents(first: Content, second: Content) -> Content:
    """Two contents as one, with an empty line between them."""
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return [*_parts(first), *_parts(second)]


def shaped_content(content: Content, *, takes_strings: bool, takes_parts: bool) -> Content:
    """`content` as text or as parts, whichever the template takes; as it is where both will do."""
    if isinstance(content, str):
        return content if takes_strings else _parts(content)
    return content if takes_parts else text_of(content)


def shaped_calls(calls: Sequence[Mapping[str, Any]], takes_argument_objects: bool) -> list[dict[str, Any]]:
    """Tool calls with arguments as objects (empty if they are no JSON) or as JSON text."""
    return [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": _arguments(call["function"].get("arguments"), takes_argument_objects),
            },
        }
        for call in calls
    ]


def arguments_text(call: Mapping[str, Any]) -> str:
    """The arguments of a call as JSON text."""
    return _arguments(call["function"].get("arguments"), takes_objects=False)


def _checked(message: Any, where: str, marks: ImageMarks | None) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} must be an object with a role.", param="messages")
    copy = {key: value for key, value in message.items() if value is not None}
    copy["content"] = _content(message.get("content"), where, marks)
    calls = copy.pop("tool_calls", None)
    if calls:
        copy["tool_calls"] = _checked_calls(calls, where)
    for name, other in (_REASONING, _REASONING[::-1]):
        if name in copy:
            copy.setdefault(other, copy[name])
    return copy


def _content(content: Any, where: str, marks: ImageMarks | None) -> Content:
    if content is None:
        return ""
    if isinstance(content, str):
        return _unreserved(content, f"{where}.content", marks)
    if not isinstance(content, Sequence):
        raise RequestError(
            f"{where}.content must be a string or a list of parts, got {type(content).__name__}.",
            param="messages",
        )
    return [_part(part, f"{where}.content[{k}]", marks) for k, part in enumerate(content)]


def _part(part: Any, where: str, marks: ImageMarks | None) -> dict[str, Any]:
    if marks is not None and isinstance(part, Mapping) and image_kind(part) is not None:
        return marks.new_part()
    return {"type": "text", "text": _unreserved(_text_of_part(part, where, marks), where, marks)}


def _unreserved(text: str, where: str, marks: ImageMarks | None) -> str:
    """The text, unless it has what stands for an image: an error in vLLM as well."""
    if marks is not None and marks.reserved in text:
        raise RequestError(
            f"{where} must not contain {marks.reserved}, which stands for an image; send an image_url part.",
            param="messages",
        )
    return text


def _text_of_part(part: Any, where: str, marks: ImageMarks | None) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise RequestError(f"{where} must be an object with a type.", param="messages")
    if kind not in _TEXT_PARTS:
        if marks is not None:
            raise other_media(kind, where)
        raise RequestError(
            f"{where} is of type {kind!r:.60}, but this model takes text only; leave the part out or ask a "
            "multimodal model.",
            param="messages",
        )
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise RequestError(
            f"{where}.{_TEXT_PARTS[kind]} must be a string, got {text!r:.60}.", param="messages"
        )
    return text


def _checked_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{where}.tool_calls must be a list.", param="messages")
    for k, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}.tool_calls[{k}] must have a function with a name.", param="messages")
    return [dict(call) for call in calls]


def _name_results(turns: Sequence[Turn]) -> None:
    """Give tools' messages, in place, the `tool_call_id` and `name` that they leave out."""
    waiting: dict[Any, dict[str, Any]] = {}  # calls of the last assistant's message without a result so far
    for turn in turns:
        message = turn.message
        if turn.role == "assistant":
            calls = message.get("tool_calls", ())
            waiting = {_key(call.get("id"), k): call for k, call in enumerate(calls)}
        elif turn.role == "tool" and waiting:
            call = waiting.pop(_key(message.get("tool_call_id"), next(iter(waiting))), None)
            if call is None:
                continue
            if call.get("id") is not None:
                message.setdefault("tool_call_id", call["id"])
            message.setdefault("name", call["function"]["name"])


def _key(call_id: Any, otherwise: Any) -> Any:
    return call_id if isinstance(call_id, str) else otherwise


def _parts(content: Content) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content


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
    except (ValueError, RecursionError):
        return {}  # a model wrote them, and its next turn should not fail over that
    return {} if parsed is None else parsed
