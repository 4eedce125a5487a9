"""Which of a request's tools its answer may call, and whether it must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.server.tool_fields import Tool

_NAMED_FORM = '{"type": "function", "function": {"name": "my_function"}}'
_ALLOWED_FORM = (
    '{"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": '
    '[{"type": "function", "function": {"name": "my_function"}}]}}'
)


class Mode(Enum):
    """Whether an answer has tool calls."""

    NONE = "none"
    AUTO = "auto"  # the model decides
    REQUIRED = "required"  # one at least


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What a request says about tool calls, brought into one form."""

    mode: Mode
    shown: tuple[Tool, ...] = ()  # to the model
    callable: tuple[Tool, ...] = ()  # those that the answer may call
    is_single: bool = False  # at most one call
    named: str | None = None  # the function that the request insists on

    @property
    def said(self) -> str:
        """What the request said, for messages."""
        if self.named is not None:
            return f"tool_choice with the function {self.named[:60]!r}"
        return f'tool_choice "{self.mode.value}"'


def tool_choice(tools: Sequence[Tool] | None, choice: Any, parallel: bool | None) -> ToolChoice:
    """The choice that `tools`, `tool_choice` and `parallel_tool_calls` make together, as in OpenAI's document.

    Tools alone mean "auto".  Raises RequestError naming the field that is wrong.
    """
    if tools is not None and not tools:
        raise RequestError(
            "tools must not be an empty array: provide at least one tool or leave the field out.",
            param="tools",
        )
    if tools is None:
        if choice is None or choice == "none":
            return ToolChoice(Mode.NONE)
        raise RequestError("tool_choice needs tools: send both, or neither.", param="tool_choice")
    offered, is_single = tuple(tools), parallel is False
    if choice is None or choice == "auto":
        return ToolChoice(Mode.AUTO, offered, offered, is_single)
    if choice == "none":
        return ToolChoice(Mode.NONE, offered)
    if choice == "required":
        return ToolChoice(Mode.REQUIRED, offered, offered, is_single)
    if isinstance(choice, dict):
        return _from_object(offered, choice, is_single)
    raise _refusal('must be "none", "auto", "required" or an object', choice)


def _from_object(offered: tuple[Tool, ...], choice: dict[str, Any], is_single: bool) -> ToolChoice:
    kind = choice.get("type", "function")
    if kind == "function":
        name = _name_in(choice, "tool_choice", _NAMED_FORM)
        return ToolChoice(Mode.REQUIRED, offered, _named(offered, [name]), is_single=True, named=name)
    if kind == "allowed_tools":
        return _from_allowed(offered, choice, is_single)
    if kind == "custom":
        raise RequestError(
            'tool_choice of type "custom" is not supported: tools are functions here; send '
            f"{_NAMED_FORM} instead.",
            param="tool_choice",
        )
    raise _refusal('must have the type "function" or "allowed_tools"', kind)


def _from_allowed(offered: tuple[Tool, ...], choice: dict[str, Any], is_single: bool) -> ToolChoice:
    """The others are as if they had not been sent, so that "auto" keeps to the list, too."""
    allowed = choice.get("allowed_tools")
    if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list) or not allowed["tools"]:
        raise _refusal(f"must have allowed_tools with a list of tools: {_ALLOWED_FORM}", choice)
    mode = allowed.get("mode")
    if mode not in ("auto", "required"):
        raise _refusal('must have allowed_tools with the mode "auto" or "required"', mode)
    names = [
        _name_in(tool, f"tool_choice.allowed_tools.tools[{i}]", _NAMED_FORM)
        for i, tool in enumerate(allowed["tools"])
    ]
    chosen = _named(offered, names)
    return ToolChoice(Mode(mode), chosen, chosen, is_single)


def _name_in(value: Any, where: str, form: str) -> str:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where} must name a function: {form}; got {value!r:.100}.", param="tool_choice")
    return name


def _named(offered: tuple[Tool, ...], names: Sequence[str]) -> tuple[Tool, ...]:
    known = {tool.function.name for tool in offered}
    for name in names:
        if name not in known:
            listed = ", ".join(f"{one[:60]!r}" for one in list(known)[:8])
            raise RequestError(
                f"tool_choice names the function {name[:60]!r}, which is not among tools: {listed}"
                f"{', …' if len(known) > 8 else ''}.",
                param="tool_choice",
            )
    return tuple(tool for tool in offered if tool.function.name in names)


def _refusal(wants: str, value: Any) -> RequestError:
    return RequestError(f"tool_choice {wants}, got {value!r:.100}.", param="tool_choice")
