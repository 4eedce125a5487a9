"""Whatever the schema: an answer that its grammar lets end is JSON that jsonschema accepts."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve import StructuredOutputsParams
from jaxserve.structured.constraint import TokenConstraint
from tests.patience import PATIENCE
from tests.structured.matching import TOKENIZER, compiler
from tests.tiny import EOS, IM_END

ENDS = (EOS, IM_END)
CLOSING = [ord(character) for character in '"]}']
KEYS = st.sampled_from(["a", "b", "name", "x y", 'q"', "é", "$ref"])
NUMBERS = st.integers(-300, 300)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text('ab"\\é\n', max_size=4))


def strings() -> st.SearchStrategy[dict[str, Any]]:
    lengths = st.tuples(st.integers(0, 4), st.integers(4, 8)).map(
        lambda pair: {"minLength": pair[0], "maxLength": pair[1]}
    )
    patterns = st.sampled_from(["^[a-c]{2,4}$", "^(x|yy)+z?$", r"^\d{3}-\d{2}$", "q"]).map(
        lambda pattern: {"pattern": pattern}
    )
    formats = st.sampled_from(["date", "time", "ipv4", "uuid"]).map(lambda name: {"format": name})
    return st.one_of(lengths, patterns, formats).map(lambda more: {"type": "string", **more})


def numbers() -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.tuples(NUMBERS, st.integers(0, 500)).map(
        lambda pair: {"minimum": pair[0], "maximum": pair[0] + pair[1]}
    )
    exclusive = NUMBERS.map(lambda low: {"exclusiveMinimum": low, "exclusiveMaximum": low + 3})
    return st.tuples(st.sampled_from(["integer", "number"]), st.one_of(bounds, exclusive)).map(
        lambda pair: {"type": pair[0], **pair[1]}
    )


def leaves() -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        strings(),
        numbers(),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}, {}]),
        st.lists(SCALARS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
        SCALARS.map(lambda value: {"const": value}),
        st.just({"$ref": "#/$defs/leaf"}),
        st.just({"$ref": "#/$defs/tree"}),
    )


def containers(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    objects = st.dictionaries(KEYS, inner, max_size=4).flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties) or ["a"])).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required & set(properties)),
                "additionalProperties": False,
            }
        )
    )
    arrays = st.tuples(inner, st.integers(0, 2), st.integers(2, 3)).map(
        lambda parts: {"type": "array", "items": parts[0], "minItems": parts[1], "maxItems": parts[2]}
    )
    tuples = st.lists(inner, min_size=1, max_size=3).map(
        lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    )
    unions = st.lists(inner, min_size=1, max_size=3).map(lambda members: {"anyOf": members})
    return st.one_of(objects, arrays, tuples, unions)


SCHEMAS = st.recursive(leaves(), containers, max_leaves=8)
DEFINITIONS = {
    "leaf": {"enum": ["leaf", 1]},
    "tree": {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/tree"}},
        "required": ["v"],
        "additionalProperties": False,
    },
}


def walk(constraint: TokenConstraint, rng: random.Random, most: int) -> list[int] | None:
    """A random answer, inclined to come to an end; None if it is not there after `most` tokens."""
    token_ids: list[int] = []
    while len(token_ids) < most:
        if constraint.forced:
            allowed = constraint.forced[:1]
        else:
            mask = int.from_bytes(constraint.matcher.compute_bitmask(), "little")
            allowed = [i for i in range(mask.bit_length()) if mask >> i & 1]
            assert allowed
        ends, closing = set(allowed) & set(ENDS), set(allowed) & set(CLOSING)
        if ends and rng.random() < 0.6:
            return token_ids
        if closing and rng.random() < 0.4:
            allowed = sorted(closing)
        token_id = rng.choice(allowed)
        if token_id in ENDS:
            return token_ids
        constraint.accept(token_id)
        token_ids.append(token_id)
    return None


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(schema=SCHEMAS, compact=st.booleans(), seed=st.integers(0, 2**32))
def test_answers_validate(schema: dict[str, Any], compact: bool, seed: int) -> None:
    whole = {"$defs": DEFINITIONS, **schema}
    grammar = compiler().text(StructuredOutputsParams(json=whole, disable_any_whitespace=compact))
    compiled = compiler().compile(grammar).result(PATIENCE)
    assert compiled.error == ""
    rng = random.Random(seed)
    for _ in range(3):
        token_ids = walk(TokenConstraint(compiler(), grammar, compiled, ENDS), rng, most=300)
        if token_ids is not None:
            text = TOKENIZER.decode(token_ids)
            jsonschema.validate(json.loads(text), whole, jsonschema.Draft202012Validator)


def test_walks_come_to_an_end() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    grammar = compiler().text(StructuredOutputsParams(json=schema))
    compiled = compiler().compile(grammar).result(PATIENCE)
    rng = random.Random(0)
    answers = [walk(TokenConstraint(compiler(), grammar, compiled, ENDS), rng, most=300) for _ in range(20)]
    assert sum(answer is not None for answer in answers) > 10
