"""What an answer must look like: one constraint, as a caller states it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jaxserve.errors import RequestError

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one kind of constraint, under vLLM's names.

    Raises RequestError (param "structured_outputs") unless exactly one kind is given.
    """

    json: str | Mapping[str, Any] | bool | None = None  # a JSON schema, or its text
    regex: str | None = None  # the whole answer matches it
    choice: Sequence[str] | None = None  # the answer is one of these
    grammar: str | None = None  # Lark (llguidance's dialect), or GBNF or EBNF with `::=`
    json_object: bool | None = None  # true: any JSON object
    structural_tag: str | Mapping[str, Any] | None = None  # free text in which tags begin constrained parts
    whitespace_pattern: str | None = None  # regex of what may stand between JSON tokens
    disable_any_whitespace: bool = False  # JSON without optional white space
    disable_additional_properties: bool = False  # schemas allow no property that they do not name

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            said = f"got {', '.join(given)}" if given else "got none"
            raise RequestError(
                f"structured_outputs must have exactly one of {', '.join(_KINDS)}; {said}.",
                param="structured_outputs",
            )

    @property
    def kind(self) -> str:
        """The name of the constraint that is given."""
        return next(
            f.name for f in fields(self) if f.name in _KINDS and getattr(self, f.name) not in (None, False)
        )
