"""Filters of chat templates that differ from jinja2's own: transformers' JSON, and limits on what can grow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import Environment, filters, pass_environment, pass_eval_context
from jinja2.nodes import EvalContext
from markupsafe import soft_str

from jaxserve.text.template_limits import (
    TemplateLimitError,
    check_nesting,
    check_operation,
    check_size,
    checked_join,
    replaced_size,
    width_of,
)

_MAX_FILLING = 32  # characters of an indentation or a separator, decimal places


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' `tojson`: nothing is escaped for HTML, and characters stay what they are."""
    check_nesting(value)
    for filling in (indent, *(separators or ())):
        _check_filling(filling)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _center(value: Any, width: int = 80) -> str:
    check_size(width_of(str(value), width))
    return filters.do_center(value, width)


def _indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    num_characters = width if isinstance(width, int) else len(width)
    check_size(len(value) + (value.count("\n") + 1) * num_characters)
    return filters.do_indent(value, width, first, blank)


@pass_eval_context
def _replace(eval_ctx: EvalContext, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    check_size(replaced_size(str(value), str(old), str(new), -1 if count is None else count))
    return filters.do_replace(eval_ctx, value, old, new, count)


@pass_eval_context
def _join(
    eval_ctx: EvalContext, value: Iterable[Any], d: Any = "", attribute: str | int | None = None
) -> str:
    if attribute is not None:
        value = map(filters.make_attrgetter(eval_ctx.environment, attribute), value)
    return checked_join(value, str(d))


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    check_operation("%", str(value), [*args, *kwargs.values()])
    return filters.do_format(value, *args, **kwargs)


def _batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Iterator[list[Any]]:
    check_size(linecount)
    return filters.do_batch(value, linecount, fill_with)


def _slice(value: Iterable[Any], slices: int, fill_with: Any = None) -> Iterator[list[Any]]:
    check_size(slices)
    return filters.sync_do_slice(list(value), slices, fill_with)


def _string(value: Any) -> str:
    return soft_str(check_nesting(value))


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    _check_filling(precision)
    return filters.do_round(value, precision, method)


@pass_environment
def _sum(
    environment: Environment, value: Iterable[Any], attribute: str | int | None = None, start: Any = 0
) -> Any:
    """jinja2's `sum`, also of lists, of which Python's would make a new one for each."""
    if attribute is not None:
        value = map(filters.make_attrgetter(environment, attribute), value)
    if not isinstance(start, list | tuple):
        return sum(value, start)
    kind, total = type(start), list(start)
    for item in value:
        if not isinstance(item, kind):
            raise TypeError(f"can only add {kind.__name__}s to a {kind.__name__}, not {type(item).__name__}")
        check_size(len(total) + len(item))
        total += item
    return kind(total)


def _check_filling(filling: int | str | None) -> None:
    size = len(filling) if isinstance(filling, str) else abs(filling or 0)
    if size > _MAX_FILLING:
        raise TemplateLimitError(f"it fills up with {size:,} characters at a time")


FILTERS: dict[str, Callable[..., Any]] = {
    "batch": _batch,
    "center": _center,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "slice": _slice,
    "string": _string,
    "sum": _sum,
    "tojson": _to_json,
}
"""What replaces jinja2's filters of the same names."""

REMOVED = ("pprint", "urlize", "wordwrap", "xmlattr")
"""jinja2's filters that are for web pages and grow in ways that are not checked."""
