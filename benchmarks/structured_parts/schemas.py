"""JSON schemas to ask for: some written by hand, and as many more as wanted from a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]


def text(longest: int = 24, **more: Any) -> Schema:
    return {"type": "string", "minLength": 1, "maxLength": longest, **more}


def record(properties: Schema, **more: Any) -> Schema:
    """An object that has all of these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


def listed(items: Any, most: int = 3, least: int = 1, **more: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most, **more}


def whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


ADDRESS = record({"street": text(), "zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "city": text(16)})
NULL = {"type": "null"}

# fmt: off
BY_HAND: list[tuple[str, Schema]] = [
    ("a person", record({"name": text(), "age": whole(0, 120), "email": text(40, format="email")})),
    ("a capital city", record({"city": text(), "country": text(), "population": whole(1000, 40_000_000)})),
    ("the weather", record({"sky": {"enum": ["sunny", "cloudy", "rain"]}, "celsius": whole(-40, 50)})),
    ("a customer", {
        "$defs": {"address": ADDRESS}, **record({"name": text(), "address": {"$ref": "#/$defs/address"}}),
    }),
    ("a book", record({
        "title": text(40), "authors": listed(text()), "isbn": text(13, pattern="^97[89][0-9]{10}$"),
    })),
    ("a calendar event", record({
        "title": text(), "on": {"type": "string", "format": "date"}, "at": {"type": "string", "format": "time"},
    })),
    ("a log line", record({
        "time": {"type": "string", "format": "date-time"}, "level": {"enum": ["info", "error"]}, "message": text(40),
    })),
    ("an order", record({
        "id": {"type": "string", "format": "uuid"},
        "lines": listed(record({"sku": text(8, pattern="^[A-Z]{3}-[0-9]{4}$"), "count": whole(1, 9)})),
    })),
    ("a file tree", {
        "$defs": {"node": record({"name": text(10), "children": listed({"$ref": "#/$defs/node"}, 2, 0)})},
        "$ref": "#/$defs/node",
    }),
    ("a linked list", {
        "$defs": {"link": record({"value": whole(0, 9), "next": {"anyOf": [{"$ref": "#/$defs/link"}, NULL]}})},
        "$ref": "#/$defs/link",
    }),
    ("a shape", {"anyOf": [
        record({"kind": {"const": "circle"}, "radius": whole(1, 99)}),
        record({"kind": {"const": "square"}, "side": whole(1, 99)}),
    ]}),
    ("a vote", {"enum": ["yes", "no", "abstain"]}),
    ("some primes", listed(whole(2, 97), most=5, least=5)),
    ("a point", {
        "type": "array", "prefixItems": [whole(-180, 180), whole(-90, 90)], "items": False, "minItems": 2,
    }),
    ("a setting", record({
        "key": text(12, pattern="^[a-z_]+$"),
        "value": {"type": ["string", "integer", "boolean", "null"], "maxLength": 12, "minimum": 0, "maximum": 100},
    })),
    ("scores by player", {"type": "object", "additionalProperties": whole(0, 100), "maxProperties": 3}),
    ("translations", {
        "type": "object", "patternProperties": {"^[a-z]{2}$": text(16)}, "additionalProperties": False,
        "maxProperties": 3,
    }),
    ("a server", record({
        "host": text(40, format="hostname"), "ip": {"type": "string", "format": "ipv4"}, "port": whole(1, 65535),
    })),
    ("a recipe", record({"name": text(), "steps": listed(text(40), 4, 2), "vegan": {"type": "boolean"}})),
    ("an employee", {"allOf": [
        {"type": "object", "properties": {"name": text()}, "required": ["name"]},
        {"type": "object", "properties": {"salary": whole(1000, 9999)}, "required": ["salary"]},
    ]}),
    ("a grid", listed(listed(whole(0, 1), most=3, least=3), most=3, least=3)),
    ("a survey", record({"q1": whole(1, 5), "q2": whole(1, 5), "comment": {"anyOf": [text(30), NULL]}})),
    ("a price", record({
        "amount": {"type": "number", "exclusiveMinimum": 0, "maximum": 1000}, "currency": {"enum": ["EUR", "USD"]},
    })),
    ("a pet", record({
        "name": text(12), "kind": {"enum": ["cat", "dog", "fish", None]}, "friends": listed(text(12), least=0),
    })),
]

TOPICS = ("a shop", "a school", "a planet", "a ship", "a game", "a garden", "a train", "a film", "a bank", "a band")
NAMES = (
    "name", "id", "title", "kind", "status", "count", "price", "rating", "color", "size", "owner", "tags", "items",
    "note", "created", "active", "level", "code", "city", "country", "score", "parts", "children", "history", "unit",
)
WORDS = ("red", "green", "blue", "small", "large", "new", "old", "open", "closed", "fast", "slow", "north", "first")
PATTERNS = (
    "^[A-Z]{2}[0-9]{3}$", "^[a-z]{3,8}$", "^#[0-9a-f]{6}$", "^[0-9]{3}-[0-9]{4}$", "^(left|right)-[0-9]$",
    "^v[0-9]+\\.[0-9]+$",
)
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
# fmt: on


def made_schema(rng: random.Random) -> Schema:
    """A random schema: objects in objects, lists, enums, unions, references, patterns, formats, bounds."""
    definitions: Schema = {}
    schema = _object(rng, 3, definitions)
    return {"$defs": definitions, **schema} if definitions else schema


def _value(rng: random.Random, depth: int, definitions: Schema) -> Schema:
    makers: list[tuple[int, Callable[[], Schema]]] = [
        (3, lambda: text(rng.randint(4, 30))),
        (3, lambda: _number(rng)),
        (2, lambda: {"type": "boolean"}),
        (2, lambda: {"enum": rng.sample(WORDS, rng.randint(2, 6))}),
        (1, lambda: {"enum": rng.sample([*range(10), None, True, "other"], 3)}),
        (1, lambda: {"const": rng.choice(WORDS)}),
        (2, lambda: {"type": "string", "pattern": rng.choice(PATTERNS)}),
        (2, lambda: {"type": "string", "format": rng.choice(FORMATS)}),
        (1, lambda: {"type": [rng.choice(["integer", "boolean"]), "null"]}),
    ]
    if depth:
        makers += [
            (3, lambda: _object(rng, depth - 1, definitions)),
            (3, lambda: listed(_value(rng, depth - 1, definitions), rng.randint(1, 3), rng.randint(0, 1))),
            (2, lambda: {"anyOf": [_value(rng, depth - 1, definitions) for _ in range(rng.randint(2, 3))]}),
            (2, lambda: _reference(rng, depth - 1, definitions)),
        ]
    weights = [weight for weight, _ in makers]
    return rng.choices(makers, weights)[0][1]()


def _object(rng: random.Random, depth: int, definitions: Schema) -> Schema:
    names = rng.sample(NAMES, rng.randint(1, 5))
    schema = record({name: _value(rng, depth, definitions) for name in names})
    schema["required"] = [name for name in names if rng.random() < 0.8]
    return schema


def _number(rng: random.Random) -> Schema:
    kind = rng.choice(["integer", "number"])
    low = rng.randint(-50, 100)
    high = low + rng.randint(1, 5000)
    if rng.random() < 0.3:
        return {"type": kind, "exclusiveMinimum": low, "exclusiveMaximum": high + 1}
    if kind == "integer" and rng.random() < 0.2:
        return {"type": kind, "minimum": 0, "maximum": 1000, "multipleOf": rng.choice([2, 5, 10])}
    return {"type": kind, "minimum": low, "maximum": high}


def _reference(rng: random.Random, depth: int, definitions: Schema) -> Schema:
    name = f"d{len(definitions)}"
    if definitions and rng.random() < 0.4:
        name = rng.choice(list(definitions))
    else:
        definitions[name] = {}  # its own name, before others are made inside
        definitions[name] = _object(rng, depth, definitions)
    return {"$ref": f"#/$defs/{name}"}


def schemas(seed: int, count: int) -> list[tuple[str, Schema]]:
    """What to ask for, and the schema: `count` of them, those written by hand first."""
    rng = random.Random(seed)
    made = ((rng.choice(TOPICS), made_schema(rng)) for _ in itertools.count())
    return list(itertools.islice(itertools.chain(BY_HAND, made), count))
