"""What a model may write so that its calls are read again: grammars derived from the declarations of formats."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.structured.lark import ANY_TEXT, lark_json, lark_literal, lark_regex, lark_text
from jaxserve.text.tokenizer import Tokenizer

# As chat templates write arguments (Jinja's tojson), so that the model sees what it was trained on.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_OTHER_PROPERTIES = (
    "additionalProperties",
    "patternProperties",
    "unevaluatedProperties",
    "$ref",
    "allOf",
    "anyOf",
    "oneOf",
)

ANY_NAME = "/[A-Za-z_][A-Za-z0-9_]*/"  # Lark for a key that no schema names


@dataclass(frozen=True)
class CalledTool:
    """A function that a call may name."""

    name: str
    schema: Mapping[str, Any]  # of its arguments; always of an object


class GrammarWriter:
    """Puts a Lark grammar together (llguidance's dialect) from what elements say of themselves."""

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[CalledTool], *, is_parallel: bool) -> None:
        self.is_parallel = is_parallel
        self._tokenizer = tokenizer
        self._tools = tools
        self._tool: CalledTool | None = None
        self._rules: list[str] = []
        self._num_rules = 0

    @property
    def tool(self) -> CalledTool:
        """The function that the call is for which is being written."""
        assert self._tool is not None, "this element belongs into One or Many"
        return self._tool

    def calls(self, write: Callable[[], str]) -> str:
        """A call of any of the tools; `write` gives the expression for `self.tool`."""
        assert self._tool is None
        names: list[str] = []
        for tool in self._tools:
            self._tool = tool
            names.append(self.rule(write()))
        self._tool = None
        return names[0] if len(names) == 1 else f"({' | '.join(names)})"

    def text(self, text: str) -> str:
        """Exactly this; control tokens in it are tokens."""
        return lark_text(self._tokenizer, text) if text else ""

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON that the schema describes, as a chat template would write it."""
        return lark_json(schema, _JSON_STYLE)

    def name_of_rule(self) -> str:
        """The name of a rule that is still to be written."""
        self._num_rules += 1
        return f"r{self._num_rules}"

    def rule(self, expression: str, attributes: str = "", name: str = "") -> str:
        """Give an expression a rule of its own; its name."""
        name = name or self.name_of_rule()
        self._rules.append(f"{name}{attributes}: {expression}")
        return name

    def finish(self, start: str) -> str:
        """The grammar whose texts are those of `start`."""
        return "\n".join(("%llguidance {}", f"start: {start}", *self._rules, ""))

    def free_text(self) -> str:
        """Any text."""
        return self.rule(ANY_TEXT)

    def free_text_before(self, mark: str) -> str:
        """Any text up to and including the first `mark`."""
        written = self.text(mark)
        if written.startswith("<["):
            return f"{self.free_text()} {written}"
        return self.rule(f"{ANY_TEXT} {lark_literal(mark)}", "[lazy]")

    def plain_string(self, schema: Mapping[str, Any], end: str, without: str = "") -> str:
        """A string that is written as it is, up to and including the mark `end`.

        Length and pattern are held to by leaving out the character that the mark begins with, and `without`;
        `format` is taken for the remark that it is in JSON Schema.
        """
        fewest, most, pattern = schema.get("minLength", 0), schema.get("maxLength", ""), schema.get("pattern")
        if not fewest and most == "" and pattern is None:
            return self.free_text_before(end)
        characters = f"[^{re.escape(end[0] + without)}]"
        regex = lark_regex(f"{characters}{{{fewest},{most}}}")
        if pattern is not None:
            start = "" if pattern.startswith("^") else f"{characters}*"
            rest = "" if re.search(r"(?<!\\)(?:\\\\)*\$$", pattern) else f"{characters}*"
            regex += (
                f" & {lark_regex(start + '(?:' + pattern.removeprefix('^').removesuffix('$') + ')' + rest)}"
            )
        terminal = f"T{self.name_of_rule()[1:]}"
        return f"{self.rule(regex, name=terminal)} {self.text(end)}"

    def has_token(self, text: str) -> bool:
        """Whether the model has a token that is written so."""
        return self._tokenizer.token_to_id(text) is not None

    def required(self, schema: Mapping[str, Any]) -> set[str]:
        """The properties that must be there.  Raises RequestError for one that the schema does not describe."""
        required: set[str] = set(schema.get("required") or ())
        unknown = required - set(schema.get("properties") or ())
        if unknown:
            raise self.refuse(f"{sorted(unknown)[0]!r} is required and not among the properties")
        return required

    def refuse(self, why: str) -> RequestError:
        """The error to raise for what this format cannot be held to."""
        name = "" if self._tool is None else f" of {self._tool.name!r}"
        return RequestError(f"The arguments{name} cannot be constrained: {why}.", param="tools")


def called_tools(
    tools: Sequence[Mapping[str, Any]], tool_choice: str | Mapping[str, Any]
) -> tuple[CalledTool, ...]:
    """The tools that a constrained call may be for.

    Under "auto" those that are not strict may have any arguments.
    """
    functions = [tool["function"] for tool in tools]
    if not isinstance(tool_choice, str):
        name = tool_choice["function"]["name"]
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise RequestError(
                f"tool_choice names {name!r}, which is none of the tools.", param="tool_choice"
            )
    is_free = tool_choice == "auto"
    return tuple(
        CalledTool(f["name"], {"type": "object"} if is_free and not is_strict(f) else _arguments_schema(f))
        for f in functions
    )


def is_strict(function: Mapping[str, Any]) -> bool:
    """Whether the request wants the function's calls to follow its schema."""
    return function.get("strict") is True


def json_text(value: str) -> str:
    """A string as JSON text."""
    return json.dumps(value, ensure_ascii=False)


def _arguments_schema(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of the arguments: always of an object, and of none but the named properties unless it says more."""
    schema = dict(function.get("parameters") or {})
    if not any(key in schema for key in ("type", "$ref", "allOf", "anyOf", "oneOf", "enum", "const")):
        schema["type"] = "object"
    if "properties" in schema and not any(key in schema for key in _OTHER_PROPERTIES):
        schema["additionalProperties"] = False
    return schema
