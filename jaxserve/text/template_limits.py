"""How large the values of a chat template may become: checks made before anything is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

MAX_CHARACTERS = 16_000_000  # of one rendering, and of any value made on the way
MAX_VALUES = 1_000_000  # in a nested list or object, each counted wherever it occurs
MAX_BITS = 16_384  # of whole numbers

_WIDE = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})")  # of the % operator
_WIDE_FIELD = re.compile(r":[^{}]*(\d{5}|\{)")  # of str.format: a great width, or one that is a field itself


class TemplateLimitError(jinja2.TemplateError):
    """A template does more work than any conversation needs."""


def check_size(size: int) -> None:
    """Raise TemplateLimitError for more characters or items than any conversation needs."""
    if size > MAX_CHARACTERS:
        raise TemplateLimitError(f"it makes a value of {size:,} characters or items")


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Raise TemplateLimitError for `left operator right` whose result would be too large."""
    if operator == "+":
        if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            check_size(len(left) + len(right))
    elif operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                check_size(len(sequence) * times)
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
    elif operator == "%" and isinstance(left, str):
        if _WIDE.search(left):
            raise TemplateLimitError(f"it pads with {left!r:.60}")
        check_nesting(right)


def check_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Raise TemplateLimitError for a call whose result would be too large, SecurityError for a method unknown here.

    Returns the arguments to call with: an iterator that had to be read is now a list.
    """
    owner = getattr(function, "__self__", None)
    if isinstance(owner, int | float | complex | bytes):
        raise SecurityError(f"methods of {type(owner).__name__} are not for templates")
    if not isinstance(owner, str):
        return args
    name = function.__name__
    if name in _NOT_FOR_TEMPLATES:
        raise SecurityError(f"str.{name} is not for templates")
    if name == "join" and args:
        args = (list(args[0]), *args[1:])
        check_size(sum(len(text) for text in args[0] if isinstance(text, str)) + len(owner) * len(args[0]))
    elif (size := _GROWING.get(name)) is not None:
        check_size(size(owner, *args, **kwargs))
    return args


def check_format(format: str) -> None:
    """Raise TemplateLimitError for a str.format text that pads without measure."""
    if _WIDE_FIELD.search(format):
        raise TemplateLimitError(f"it pads with {format!r:.60}")


def check_nesting(value: Any) -> Any:
    """`value` itself; raises TemplateLimitError when writing it out would take too long.

    A list that holds another one twice, which holds another one twice, and so on, is small in memory only.
    """
    if not isinstance(value, list | tuple | dict):
        return value
    num_values = 0
    rest: list[Any] = [value]
    while rest:
        item = rest.pop()
        num_values += len(item)
        if num_values > MAX_VALUES:
            raise TemplateLimitError(f"it nests more than {MAX_VALUES:,} values")
        items = item.values() if isinstance(item, dict) else item
        rest.extend(inner for inner in items if isinstance(inner, list | tuple | dict))
    return value


def checked_join(items: Iterable[Any], separator: str = "") -> str:
    """The items' texts, joined.  Raises TemplateLimitError when that is too long."""
    texts = [item if isinstance(item, str) else str(check_nesting(item)) for item in items]
    check_size(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def replaced_size(text: str, old: str, new: str, count: int = -1) -> int:
    """Length of text.replace(old, new, count)."""
    if len(new) <= len(old):
        return len(text)
    times = text.count(old)
    return len(text) + (times if count < 0 else min(times, count)) * (len(new) - len(old))


def width_of(text: Sized, width: int, *_: Any) -> int:
    """Length of a text that is filled up to `width`."""
    return max(len(text), width)


def _expanded_size(text: str, tabsize: int = 8) -> int:
    return len(text) + text.count("\t") * tabsize


def _check_bits(num_bits: int) -> None:
    if num_bits > MAX_BITS:
        raise TemplateLimitError(f"it makes a number of {num_bits:,} bits")


_GROWING: dict[str, Callable[..., int]] = {
    "center": width_of,
    "ljust": width_of,
    "rjust": width_of,
    "zfill": width_of,
    "expandtabs": _expanded_size,
    "replace": replaced_size,
}
_NOT_FOR_TEMPLATES = frozenset(("encode", "maketrans", "translate"))
