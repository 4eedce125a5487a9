"""How models write calls in each format, for tests to read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Calls = Sequence[tuple[str, Mapping[str, Any]]]
Writer = Callable[[Calls], str]


def dumps(value: Any) -> str:
    """JSON as models write it."""
    return json.dumps(value, ensure_ascii=False)


def an_object(name: str, arguments: Mapping[str, Any], key: str = "arguments") -> str:
    """A call as an object."""
    return f'{{"name": {dumps(name)}, "{key}": {dumps(arguments)}}}'


def objects(calls: Calls, separator: str, key: str = "arguments") -> str:
    """Calls as objects."""
    return separator.join(an_object(name, arguments, key) for name, arguments in calls)


def tagged(start: str, end: str, between: str = "\n") -> Writer:
    """A writer of objects between tags."""
    return lambda calls: between.join(f"{start}{an_object(*call)}{end}" for call in calls)


def a_list(start: str, end: str, separator: str = ", ") -> Writer:
    """A writer of lists of objects."""
    return lambda calls: f"{start}{objects(calls, separator)}{end}"


def internlm(calls: Calls) -> str:
    """Action marks."""
    return "\n".join(
        f"<|action_start|><|plugin|>\n{an_object(*call, 'parameters')}<|action_end|>" for call in calls
    )


def python_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as Python writes it."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def pythonic(start: str, end: str, separator: str = ", ") -> Writer:
    """A writer of Python's calls."""
    return lambda calls: f"{start}{separator.join(python_call(*call) for call in calls)}{end}"


hermes = tagged("<tool_call>\n", "\n</tool_call>")

# By the first name of a registered format: one for each.
WRITERS: dict[str, Writer] = {
    "hermes": hermes,
    "granite4": hermes,
    "ernie45": hermes,
    "longcat": tagged("<longcat_tool_call>\n", "\n</longcat_tool_call>"),
    "jamba": a_list("<tool_calls>[\n    ", "\n]</tool_calls>", ",\n    "),
    "hunyuan_a13b": a_list("<tool_calls>[", "]</tool_calls>"),
    "granite": a_list("<|tool_call|>[", "]"),
    "granite-20b-fc": tagged("<function_call> ", "", " "),
    "internlm": internlm,
    "phi4_mini_json": a_list("functools[", "]"),
    "llama3_json": lambda calls: objects(calls, "; ", "parameters"),
    "mistral": a_list("[TOOL_CALLS][", "]"),
    "xlam": a_list("[", "]"),
    "pythonic": pythonic("[", "]"),
    "llama4_pythonic": pythonic("[", "]"),
    "olmo3": pythonic("<function_calls>", "</function_calls>", "\n"),
    "lfm2": pythonic("<|tool_call_start|>[", "]<|tool_call_end|>"),
}

# Formats whose arguments are no JSON text: values may differ by what the format cannot say.
COERCED: frozenset[str] = frozenset()
