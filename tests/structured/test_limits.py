"""Hostile constraints: refused, or taken, but neither slow nor fatal."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from jaxserve.errors import RequestError
from tests.structured.matching import check, follows


def chain(link: Any, count: int) -> dict[str, Any]:
    """Definitions of which each refers to the next."""
    links = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(count)}
    return {"$defs": {**links, f"d{count}": {"type": "object"}}, "$ref": "#/$defs/d0"}


def nested(count: int) -> Any:
    schema: Any = {}
    for _ in range(count):
        schema = {"items": schema}
    return schema


TERMINALS = "\n".join(f'T{i}: ("x" | T{i + 1} "z"){{0,3}}' for i in range(2000))
OPTIONAL = {f"p{i}": {"type": "string"} for i in range(2000)}

LONG = "long text " * 2000

REFUSED = {
    "a regex of a megabyte": {"regex": "a" * 1_000_000},
    "a regex that repeats a million times": {"regex": "a{1000000}"},
    "a regex of many groups": {"regex": "(" * 5000 + ")" * 5000},
    "a schema of megabytes": {"json": {"enum": [f"value {i}" for i in range(200_000)]}},
    "the text of such a schema": {"json": json.dumps({"const": "x" * 2_000_000})},
    "a long constant": {"json": {"items": {"const": LONG}}},
    "a long value of an enum": {"json": {"anyOf": [{"enum": [1, LONG]}]}},
    "a long name": {"json": {"properties": {LONG: True}}},
    "a long choice": {"choice": ["a", LONG]},
    "a long string": {"grammar": f'start: /a/ "{LONG}"'},
    "a long string in GBNF": {"grammar": f'root ::= [a] "{LONG}"'},
    "a long string in a tag": {
        "structural_tag": {"type": "structural_tag", "format": {"type": "const_string", "value": LONG}}
    },
    "a deep schema": {"json": nested(300)},
    "a very deep schema": {"json": '{"items":' * 20_000 + "{}" + "}" * 20_000},
    "a deep structural tag": {"structural_tag": '{"type":"sequence","elements":[' * 300 + "]}" * 300},
    "references that lead nowhere": {"json": chain(lambda ref: ref, 1) | {"$ref": "#/$defs/d9"}},
    "references in a circle": {"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    "too many optional properties": {"json": {"type": "object", "properties": OPTIONAL}},
    "intersections that multiply": {
        "json": chain(lambda ref: {"allOf": [{"anyOf": [ref, {"properties": {c: {}}}]} for c in "pq"]}, 12)
    },
    "terminals in terminals": {"grammar": f'start: T0\n{TERMINALS}\nT2000: "a"'},
    "groups in groups": {"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000},
    "a terminal with a megabyte of spaces behind it": {"grammar": 'start: "a"\nA' + " " * 1_000_000},
    "a megabyte of empty lines": {"grammar": "\n" * 1_000_000 + 'root ::= "a"'},
    "a long GBNF grammar": {"grammar": "root ::= " + '"a" ' * 100_000},
}
TAKEN = {
    "a regex that would backtrack": ({"regex": "(a|a)*(a|aa)*b"}, "aaaab"),
    "a regex with many states": ({"regex": r"(.*a.{20})*"}, "a" * 21),
    "repetitions of repetitions": ({"regex": "((a{0,100}){0,100}){0,100}"}, "aaa"),
    "many choices": ({"choice": [f"choice {i}" for i in range(10_000)]}, "choice 9999"),
    "a large enum": ({"json": {"enum": list(range(10_000))}}, "9999"),
    "a long chain of references": ({"json": chain(lambda ref: ref, 1500)}, "{}"),
    "a long chain of intersections": (
        {"json": chain(lambda ref: {"allOf": [{"type": "object"}, ref]}, 3000)},
        "{}",
    ),
    "a long chain of rules": (
        {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(9000)) + '\nr9000: "a"'},
        "a",
    ),
    "rules that double": (
        {"grammar": "start: r0\n" + "\n".join(f"r{i}: /b/? r{i + 1}" for i in range(40)) + '\nr40: "a"'},
        "bba",
    ),
    "a long choice": ({"choice": ["a", LONG[:15_000]]}, LONG[:15_000]),
    "a long description": ({"json": {"type": "null", "description": LONG}}, "null"),
    "a null byte": ({"regex": "a\0b"}, "a\0b"),
    "a recursive schema": ({"json": {"items": {"$ref": "#"}, "type": "array"}}, "[[[], []]]"),
}


@pytest.mark.parametrize("constraint", REFUSED.values(), ids=REFUSED)
def test_refused(constraint: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        check(**constraint)


@pytest.mark.parametrize(("constraint", "text"), TAKEN.values(), ids=TAKEN)
def test_taken(constraint: dict[str, Any], text: str) -> None:
    check(**constraint)
    assert follows(text, **constraint)


def test_the_front_end_needs_no_jax() -> None:
    code = (
        "import sys, jaxserve.structured.compiler; sys.exit(bool({'jax', 'llguidance'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
