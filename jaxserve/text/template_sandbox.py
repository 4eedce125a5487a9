"""The jinja2 environment that chat templates run in: transformers' conventions, sandboxed and limited."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_LOOP_STEPS = 200_000  # of all loops of one rendering together
MAX_CHARACTERS = 64_000_000  # of one rendering, and of any string made by repeating or padding

# The budget travels in the rendering's variables under a name that no template can write.
_BUDGET = "loop budget"


_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})")


class TemplateLimitError(jinja2.TemplateError):
    """A template does more work than any conversation needs."""


@dataclass(slots=True)
class _LoopBudget:
    steps_left: int = MAX_LOOP_STEPS

    def spend(self, steps: int) -> None:
        self.steps_left -= steps
        if self.steps_left < 0:
            raise TemplateLimitError(f"its loops take more than {MAX_LOOP_STEPS:,} steps")


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Render under the limits.  Raises whatever the template raises, and TemplateLimitError."""
    pieces: list[str] = []
    num_characters = 0
    for piece in template.generate({**variables, _BUDGET: _LoopBudget()}):
        num_characters += len(piece)
        if num_characters > MAX_CHARACTERS:
            raise TemplateLimitError(f"it writes more than {MAX_CHARACTERS:,} characters")
        pieces.append(piece)
    return "".join(pieces)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with limits.

    Beside jinja2's own: trimmed blocks, `break` and `continue`, `raise_exception`, `strftime_now`, a `tojson`
    that does not escape HTML, and `{% generation %}`, which marks the assistant's words for training and is
    nothing here.  What is limited: loop steps (jinja2 limits only `range`, to 100,000), repeating with `*`,
    powers, and `%` padding.  What is not: the cost of one filter or method call, so templates from strangers
    still deserve a switch.
    """

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        self.filters["tojson"] = _to_json
        self.filters[_COUNT_STEPS] = _count_steps
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            if loop.recursive:  # its calls of itself bring their own items, so it counts in the body too
                loop.body.insert(0, nodes.ExprStmt(_counting(nodes.Const(("once",))), lineno=loop.lineno))
            loop.iter = _counting(loop.iter)
        return template

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    _check_size(len(sequence) * times)
            if isinstance(left, int) and isinstance(right, int):
                _check_size(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise TemplateLimitError(f"it pads with {left!r}")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    tags = frozenset(("generation",))  # pyright: ignore[reportAssignmentType] - jinja2 declares a set, reads only

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_COUNT_STEPS = "count steps"


def _counting(items: nodes.Node) -> nodes.Expr:
    assert isinstance(items, nodes.Expr)
    return nodes.Filter(items, _COUNT_STEPS, [], [], None, None, lineno=items.lineno)


@jinja2.pass_context
def _count_steps(context: Context, items: Iterable[Any]) -> Iterable[Any]:
    budget = context.parent[_BUDGET]
    if isinstance(items, Sized):  # keeps `loop.length` and friends cheap
        budget.spend(len(items))
        return items
    return _counted(items, budget)


def _counted(items: Iterable[Any], budget: _LoopBudget) -> Iterator[Any]:
    for item in items:
        budget.spend(1)
        yield item


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TemplateLimitError(f"it makes a value of {size:,} characters or bits")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
