"""What an answer must look like: one constraint, as a caller states it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jaxserve.errors import RequestError

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_MARKERS = ("reasoning_start", "reasoning_end")
_JSON_OPTIONS = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one kind of constraint, under vLLM's names.

    Raises RequestError (param as given) unless exactly one kind is given, and for a part of a wrong type.
    What the constraint says is checked when it is compiled: see AsyncLLM.check_structured.
    """

    json: str | Mapping[str, Any] | bool | None = None  # a JSON schema, or its text; true: any JSON value
    regex: str | None = None  # the whole answer matches it
    choice: Sequence[str] | None = None  # the answer is one of these
    grammar: str | None = None  # Lark (llguidance's dialect), or GBNF or EBNF with `::=`
    json_object: bool | None = None  # true: any JSON object
    structural_tag: str | Mapping[str, Any] | None = None  # free text in which tags begin constrained parts
    whitespace_pattern: str | None = None  # regex of what may stand between JSON tokens
    disable_any_whitespace: bool = False  # JSON without optional white space
    disable_additional_properties: bool = False  # schemas allow no property that they do not name
    # Around the constraint, whatever its kind.  reasoning_end: what comes first is free, up to and including this
    # marker and some white space; with reasoning_start it may be left out, and begins with that marker otherwise.
    # alternative: Lark or GBNF text that the answer may follow in place of the constraint.
    reasoning_start: str | None = None
    reasoning_end: str | None = None
    alternative: str | None = None
    param: str = "structured_outputs"  # the request's field that says so: errors name it

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            said = f"got {', '.join(given)}" if given else "got none"
            raise RequestError(
                f"structured_outputs must have exactly one of {', '.join(_KINDS)}; {said}.",
                param=self.param,
            )

        def need(ok: bool, name: str, wants: str) -> None:
            if not ok:
                raise RequestError(
                    f"structured_outputs.{name} must be {wants}, got {getattr(self, name)!r:.60}.",
                    param=self.param,
                )

        need(
            isinstance(self.json, str | Mapping | bool | None),
            "json",
            "a JSON schema: an object, its text, or true",
        )
        need(
            isinstance(self.structural_tag, str | Mapping | None),
            "structural_tag",
            "an object or its JSON text",
        )
        for name in ("regex", "grammar", "whitespace_pattern", *_MARKERS, "alternative"):
            need(isinstance(getattr(self, name), str | None), name, "a string")
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            need(isinstance(getattr(self, name), bool | None), name, "true or false")
        if self.choice is not None:
            is_list = not isinstance(self.choice, str) and isinstance(self.choice, Sequence)
            strings = is_list and all(isinstance(text, str) for text in self.choice)
            need(bool(strings and self.choice), "choice", "a list of one or more strings")
        for name in _MARKERS:
            need(getattr(self, name) != "", name, "a marker that is not empty")
        need(
            self.reasoning_start is None or self.reasoning_end is not None,
            "reasoning_start",
            "left out where there is no reasoning_end",
        )
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise RequestError(
                "structured_outputs: whitespace_pattern and disable_any_whitespace exclude each other.",
                param=self.param,
            )
        misplaced = [name for name in _JSON_OPTIONS if getattr(self, name) not in (None, False)]
        if misplaced and self.kind not in ("json", "json_object", "structural_tag"):
            raise RequestError(
                f"structured_outputs: {', '.join(misplaced)} is for JSON, and the constraint is a {self.kind}.",
                param=self.param,
            )

    @property
    def kind(self) -> str:
        """The name of the constraint that is given."""
        return next(
            f.name for f in fields(self) if f.name in _KINDS and getattr(self, f.name) not in (None, False)
        )
