"""A constraint as one grammar: the text that llguidance compiles, and by which compiled grammars are found again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jaxserve.errors import RequestError
from jaxserve.structured.lark import (
    ANY_TEXT,
    control_id,
    lark_json,
    lark_literal,
    lark_marker,
    lark_regex,
    lark_token,
)
from jaxserve.structured.limits import check_lark, check_length, check_literals, check_regex
from jaxserve.structured.schema import check_counted_names, close_objects, literals, read_json
from jaxserve.structured.structural_tag import structural_tag_grammars

if TYPE_CHECKING:
    from jaxserve.structured_outputs import StructuredOutputsParams
    from jaxserve.text.tokenizer import Tokenizer

# White space between JSON tokens: enough to indent a deeply nested line.  Small models would otherwise write blanks
# until their answer is cut off.
JSON_WHITESPACE = r"[ \n\r\t]{1,64}"
# A line that only Lark has.  llguidance's own test for it takes time in the square of the number of empty lines.
_LARK_LINE = re.compile(r"^[^\S\n]*(?:%llguidance\b|start\s*:)", re.MULTILINE)


def grammar_text(
    constraint: StructuredOutputsParams, tokenizer: Tokenizer, end_token_ids: Iterable[int]
) -> str:
    """The constraint as text for llguidance: JSON with a list of Lark grammars, of which the first is the whole.

    Raises RequestError for what is too large, no JSON, or no grammar by its form; the rest shows when the text is
    compiled.
    """
    param = constraint.param
    try:
        grammars = _grammars(constraint, tokenizer, end_token_ids)
        text = json.dumps({"grammars": grammars}, ensure_ascii=False)
        text.encode()
    except RequestError as error:
        raise RequestError(str(error), param=param) from error
    except RecursionError as error:
        raise RequestError(f"the {_said(constraint.kind)} is nested too deeply.", param=param) from error
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the {_said(constraint.kind)} is not valid Unicode: it has lone surrogates (\\ud800 to \\udfff).",
            param=param,
        ) from error
    except (TypeError, ValueError) as error:
        raise RequestError(f"the {_said(constraint.kind)} cannot be read: {error}.", param=param) from error
    return text


def _grammars(
    constraint: StructuredOutputsParams, tokenizer: Tokenizer, end_token_ids: Iterable[int]
) -> list[dict[str, str]]:
    end_token_ids = tuple(end_token_ids)
    grammars = _by_kind(constraint, tokenizer, end_token_ids)
    if constraint.alternative is None and constraint.reasoning_end is None:
        return grammars
    # A grammar of its own each: their rules may have the same names.
    grammars[0] = {"name": "constraint", **grammars[0]}
    answer = "@constraint"
    if constraint.alternative is not None:
        grammars.append({"name": "alternative", "lark_grammar": _lark(constraint.alternative)})
        answer = "(@constraint | @alternative)"
    rules = f"start: {answer}"
    if constraint.reasoning_end is not None:
        rules = _after_reasoning(constraint, answer, tokenizer, end_token_ids)
    return [{"lark_grammar": rules}, *grammars]


def _after_reasoning(
    constraint: StructuredOutputsParams, answer: str, tokenizer: Tokenizer, end_token_ids: Iterable[int]
) -> str:
    """Rules for the reasoning, which may hold control tokens but no end token, and then the answer."""
    start, end = constraint.reasoning_start, constraint.reasoning_end
    assert end is not None
    token_id = control_id(tokenizer, end)
    if token_id is None:
        rules = [f"up_to_end[lazy]: {ANY_TEXT} {lark_literal(end)}"]
    else:
        ids = ",".join(map(str, sorted({token_id, *end_token_ids})))
        rules = [f"up_to_end: <[^{ids}]>* {lark_token(token_id)}"]
    # Models write an empty line before they answer.
    rules += [r"BLANKS: /[ \n\r\t]{1,8}/", f"answer: {answer}"]
    if start is None:
        return "\n".join(["start: up_to_end BLANKS? answer", *rules])
    return "\n".join([f"start: ({lark_marker(tokenizer, start)} up_to_end BLANKS?)? answer", *rules])


def _by_kind(
    constraint: StructuredOutputsParams, tokenizer: Tokenizer, end_token_ids: Iterable[int]
) -> list[dict[str, str]]:
    kind = constraint.kind
    if kind == "regex":
        assert constraint.regex is not None
        check_regex(constraint.regex)
        # Lark has no empty terminal, and `//` would begin a comment.
        pattern = lark_regex(constraint.regex) if constraint.regex else '""'
        return [{"lark_grammar": f"start: {pattern}"}]
    if kind == "choice":
        assert constraint.choice is not None
        check_length("choice", *constraint.choice)
        # One terminal rather than a rule a choice: its automaton does not grow with what has not been said.
        choices = " | ".join(map(lark_literal, dict.fromkeys(constraint.choice)))
        return [{"lark_grammar": f"start: CHOICE\nCHOICE: {choices}"}]
    if kind == "grammar":
        assert constraint.grammar is not None
        return [{"lark_grammar": _lark(constraint.grammar)}]
    options = json_options(constraint)
    if kind == "json_object":
        return [{"lark_grammar": f"start: {lark_json({'type': 'object'}, options)}"}]

    def schema_text(schema: Mapping[str, Any] | bool) -> str:
        if constraint.disable_additional_properties:
            schema = close_objects(schema)
        text = lark_json(schema, options)
        check_length("JSON schema", text)
        check_counted_names(schema)
        check_literals(*literals(schema))
        return text

    if kind == "json":
        return [{"lark_grammar": f"start: {schema_text(_schema(constraint.json))}"}]
    tag = constraint.structural_tag
    if isinstance(tag, str):
        check_length("structural tag", tag)
    content = read_json(tag, "structural_tag") if isinstance(tag, str) else tag
    if not isinstance(content, Mapping):
        raise RequestError(f"structural_tag must be a JSON object, got {content!r:.60}.")
    return structural_tag_grammars(content, tokenizer, end_token_ids, schema_text, _lark)


def json_options(constraint: StructuredOutputsParams) -> dict[str, Any]:
    """llguidance's options for the white space of JSON."""
    if constraint.disable_any_whitespace:
        return {"whitespace_flexible": False}
    return {"whitespace_pattern": constraint.whitespace_pattern or JSON_WHITESPACE}


def _schema(schema: str | Mapping[str, Any] | bool | None) -> Mapping[str, Any] | bool:
    if isinstance(schema, str):
        check_length("JSON schema", schema)
        schema = read_json(schema, "json")
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"the JSON schema must be an object or a boolean, got {schema!r:.60}.")
    return schema


def _lark(text: str) -> str:
    """The text as Lark: itself, or translated from GBNF."""
    check_length("grammar", text)
    if _LARK_LINE.search(text) is None:
        if "::=" not in text:
            raise RequestError(
                "the grammar has neither a rule `start: …` (Lark) nor a rule `root ::= …` (GBNF)."
            )
        check_length("GBNF grammar", text)
        text = _lark_from_gbnf(text)
    check_lark(text)
    return text


@lru_cache(maxsize=16)  # a request asks twice: when it is checked and when it is submitted
def _lark_from_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # the translator raises plain Exception for what it cannot read
        raise RequestError(f"the grammar cannot be read as GBNF: {error}.") from error


def _said(kind: str) -> str:
    return {
        "json": "JSON schema",
        "json_object": "JSON schema",
        "structural_tag": "structural tag",
    }.get(kind, kind)
