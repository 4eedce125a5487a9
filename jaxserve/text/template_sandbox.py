"""The jinja2 environment that chat templates run in: transformers' conventions, sandboxed and limited."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from jaxserve.text.template_filters import FILTERS, REMOVED
from jaxserve.text.template_limits import (
    MAX_CHARACTERS,
    TemplateLimitError,
    check_call,
    check_format,
    check_nesting,
    check_operation,
    checked_join,
)

MAX_STEPS = 300_000  # loop steps and calls of one rendering together
MAX_SECONDS = 5.0  # of processor time that one rendering may take

_TICK = 64  # steps between two looks at the clock, a system call; a step may go through a long list

# The budget travels in the rendering's variables under a name that no template can write.
_BUDGET = "work budget"
_COUNTED = "counted items"
_EACH = "items counted one by one"
_STEP = "one step"
_JOINED = "joined texts"
_NESTED = "checked literal"

_LOOPING = ("map", "select", "reject", "selectattr", "rejectattr")  # filters that call others for each item


@dataclass(slots=True)
class WorkBudget:
    """What one rendering, or several together, may still do."""

    steps_left: int = field(default_factory=lambda: MAX_STEPS)
    seconds: float = field(default_factory=lambda: MAX_SECONDS)
    _started_at: float = field(default_factory=time.thread_time)

    def spend(self, steps: int) -> None:
        """Raise TemplateLimitError when nothing is left; looks at the clock now and then."""
        before = self.steps_left
        self.steps_left = before - steps
        if self.steps_left < 0:
            raise TemplateLimitError(f"it takes more than {MAX_STEPS:,} steps")
        if before // _TICK != self.steps_left // _TICK:
            self.check_clock()

    def check_clock(self) -> None:
        """Raise TemplateLimitError when the time is over."""
        if time.thread_time() - self._started_at > self.seconds:
            raise TemplateLimitError(f"it takes longer than {self.seconds:g} seconds")


def render(template: jinja2.Template, variables: dict[str, Any], budget: WorkBudget | None = None) -> str:
    """Render under the limits.  Raises whatever the template raises, and TemplateLimitError."""
    pieces: list[str] = []
    num_characters = 0
    budget = budget or WorkBudget()
    for piece in template.generate({**variables, _BUDGET: budget}):
        num_characters += len(piece)
        if num_characters > MAX_CHARACTERS:
            raise TemplateLimitError(f"it writes more than {MAX_CHARACTERS:,} characters")
        pieces.append(piece)
        if len(pieces) % _TICK == 0:
            budget.check_clock()
    return "".join(pieces)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with limits.

    Beside jinja2's own: trimmed blocks, `break` and `continue`, `raise_exception`, `strftime_now`, a `tojson`
    that does not escape HTML, and `{% generation %}`, which marks the assistant's words for training and is
    nothing here.

    What is limited: steps of loops and calls, processor time, the size of what is written and of every value
    that an operator, filter or method makes bigger than its parts (template_limits.py), and what strings have
    methods for.  What is not: comparing values that a template has nested into each other on purpose, so
    templates from strangers still deserve a switch.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
            finalize=check_nesting,
        )
        self.filters = {name: f for name, f in self.filters.items() if name not in REMOVED} | FILTERS
        self.filters[_COUNTED] = _counted
        self.filters[_EACH] = _each
        self.filters[_STEP] = _step
        self.filters[_JOINED] = checked_join
        self.filters[_NESTED] = check_nesting
        self.concat = checked_join
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Limits().visit(super()._parse(source, name, filename))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        context.parent[_BUDGET].spend(1)
        # jinja2 hands the variables of loops and blocks along with every call.
        given = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
        args = check_call(obj, args, given)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            check_format(value.__self__)
        return wrapped


class _GenerationTag(Extension):
    tags = frozenset(("generation",))  # pyright: ignore[reportAssignmentType] - jinja2 declares a set, reads only

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Limits(NodeTransformer):
    """Makes a template's loops and filters that loop count, and what it writes as `~` and as literals check sizes."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _COUNTED)
        # In the body too: a recursive loop's calls of itself bring their own items, and steps take time.
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(1), _STEP), lineno=node.lineno))
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Filter:
        self.generic_visit(node)
        if node.name in _LOOPING and node.node is not None:
            node.node = _filtered(node.node, _EACH)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else _filtered(node, _NESTED)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        if node.ctx != "load" or all(isinstance(item, nodes.Const) for item in node.items):
            return node  # names that a loop or `set` unpacks into are a tuple too
        return _filtered(node, _NESTED)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        values = [pair.value for pair in node.items]
        return node if all(isinstance(value, nodes.Const) for value in values) else _filtered(node, _NESTED)


def _filtered(value: nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(value, nodes.Expr)
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


@jinja2.pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterable[Any]:
    budget = context.parent[_BUDGET]
    if isinstance(items, Sized):  # keeps `loop.length` and friends cheap
        budget.spend(len(items))
        return items
    return _counting(items, budget)


@jinja2.pass_context
def _each(context: Context, items: Iterable[Any]) -> Iterable[Any]:
    return _counting(items, context.parent[_BUDGET]) if items else items


def _counting(items: Iterable[Any], budget: WorkBudget) -> Iterator[Any]:
    for item in items:
        budget.spend(1)
        yield item


@jinja2.pass_context
def _step(context: Context, num_steps: int) -> None:
    context.parent[_BUDGET].spend(num_steps)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
