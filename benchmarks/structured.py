"""Answers that follow a JSON schema: do they validate, what do they cost, and whom do they hold up?

    python benchmarks/structured.py                                  # starts a server of its own
    python benchmarks/structured.py --limit 20 --output result.json
    python benchmarks/structured.py --base-url http://127.0.0.1:8000

1. 200 varied schemas (some by hand, the rest from a seeded generator): the share of answers with finish_reason "stop"
   that `jsonschema` accepts.  Must be 100 %.
2. Time to first token with a schema that the server has never seen, minus the same question's without one (p50).
3. Inter-token time of other requests: before anything arrives, while a question without a schema is answered, and
   while one with a new schema is.  The three take turns, ten times over: the others' answers grow meanwhile, and what
   that costs must not be held against whoever comes last.

Exit status 1 if an answer does not validate or a request fails; the times are for reading.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import jsonschema

from jaxserve.bench.environment import environment
from jaxserve.bench.http_client import HttpClient, TransportError
from jaxserve.bench.load_generator import LoadGenerator, Prompt, RequestRecord
from jaxserve.bench.percentiles import percentile
from jaxserve.bench.server_process import server_at
from jaxserve.errors import JaxserveError

Schema = dict[str, Any]

NUM_SCHEMAS = 200
MAX_TOKENS = 400
CONCURRENCY = 8
NUM_FIRST_TOKENS = 40  # pairs of questions that are timed
NUM_STREAMS = 4  # other requests
NUM_ARRIVALS = 10
ARRIVAL_TOKENS = 24
BEFORE_SECONDS = 1.0  # that the others are timed alone, each time
STREAM_TOKENS = 1600
ALONE, PLAIN = "before", "while questions without a schema arrive"
NEW_SCHEMA = "while questions with new schemas arrive"


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


@dataclass
class Results:
    """What was found, in seconds where it is a time."""

    finish_reasons: Counter[str] = field(default_factory=Counter)
    num_valid: int = 0
    failures: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)  # without a schema
    first_token_new_schema: list[float] = field(default_factory=list)
    inter_token: dict[str, list[float]] = field(default_factory=dict)

    @property
    def num_stopped(self) -> int:
        return self.finish_reasons["stop"]

    @property
    def first_token_cost(self) -> float:
        pairs = zip(self.first_token_new_schema, self.first_token, strict=True)
        return statistics.median(new - plain for new, plain in pairs)


class Asker:
    """Questions to one server, each with its own schema or none."""

    def __init__(self, client: HttpClient, model: str) -> None:
        self._client = client
        self._model = model
        self._serials = itertools.count(1)

    def question(self, topic: str) -> str:
        """A question that no other one shares a prefix with: nothing of it is in the prefix cache."""
        return f"{next(self._serials)}. Give an example of {topic}, as JSON."

    async def ask(
        self,
        question: str,
        schema: Schema | None,
        max_tokens: int,
        on_chunk: Callable[[], None] | None = None,
        **more: Any,
    ) -> RequestRecord:
        body: dict[str, Any] = {"temperature": 0.8, **more}
        if schema is not None:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema, "strict": True},
            }
        generator = LoadGenerator(self._client, api="chat", model=self._model, extra_body=body, timeout=600)
        return await generator.ask(Prompt(question, max_tokens), on_chunk)


async def check_answers(asker: Asker, todo: Sequence[tuple[str, Schema]], results: Results) -> None:
    """Ask for every schema, CONCURRENCY at a time, and validate what ended by itself."""
    queue = iter(enumerate(todo))

    async def worker() -> None:
        for index, (topic, schema) in queue:
            answer = await asker.ask(asker.question(topic), schema, MAX_TOKENS, seed=index)
            _check_answer(index, schema, answer, results)

    async with asyncio.TaskGroup() as group:
        for _ in range(CONCURRENCY):
            group.create_task(worker())


def _check_answer(index: int, schema: Schema, answer: RequestRecord, results: Results) -> None:
    if answer.error is not None:
        results.failures.append(f"schema {index}: {answer.error}")
        return
    results.finish_reasons[str(answer.finish_reason)] += 1
    if answer.finish_reason != "stop":
        return
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    try:
        validator.validate(json.loads(answer.text))
    except (ValueError, jsonschema.ValidationError) as error:
        results.failures.append(f"schema {index}: {str(error).splitlines()[0]} in {answer.text!r}")
    else:
        results.num_valid += 1


async def time_first_tokens(
    asker: Asker, new_schemas: Sequence[tuple[str, Schema]], results: Results
) -> None:
    """One question at a time, in turns with and without a schema that the server has not seen."""
    for topic, schema in new_schemas:
        for one, times in ((None, results.first_token), (schema, results.first_token_new_schema)):
            answer = await asker.ask(asker.question(topic), one, 2)
            seconds = answer.time_to_first_token
            if answer.error is not None or seconds is None:
                raise JaxserveError(f"a question was not answered: {answer.error}")
            times.append(seconds)


async def time_others(asker: Asker, new_schemas: Sequence[tuple[str, Schema]], results: Results) -> None:
    """Inter-token times of NUM_STREAMS long answers: alone, and while others are asked for."""
    names = [ALONE, PLAIN, NEW_SCHEMA]
    results.inter_token = {name: [] for name in names}
    async with _streams(asker) as gaps:
        for topic, schema in new_schemas:
            for name in names:
                gaps.clear()
                if name == ALONE:
                    await asyncio.sleep(BEFORE_SECONDS)
                else:
                    wanted = schema if name == NEW_SCHEMA else None
                    answer = await asker.ask(asker.question(topic), wanted, ARRIVAL_TOKENS, seed=1)
                    if answer.error is not None:
                        results.failures.append(f"a question beside others: {answer.error}")
                results.inter_token[name] += gaps
            names.append(names.pop(0))  # nobody is always the last


@asynccontextmanager
async def _streams(asker: Asker) -> AsyncIterator[list[float]]:
    """Long answers under way; the list fills with the seconds between their tokens."""
    gaps: list[float] = []
    streaming = asyncio.Event()
    counts = [0] * NUM_STREAMS

    def follow(index: int) -> Callable[[], None]:
        last = 0.0

        def see() -> None:
            nonlocal last
            now = time.perf_counter()
            if last:
                gaps.append(now - last)
            last = now
            counts[index] += 1
            if min(counts) > 8:
                streaming.set()

        return see

    async def stream(index: int) -> None:
        see = follow(index)
        while True:  # anew, should one end before the measurement does
            answer = await asker.ask(
                asker.question("a very long story"), None, STREAM_TOKENS, see, ignore_eos=True
            )
            if answer.error is not None:
                raise JaxserveError(f"a long answer failed: {answer.error}")

    tasks = [asyncio.create_task(stream(index)) for index in range(NUM_STREAMS)]
    try:
        await asyncio.wait_for(streaming.wait(), 120)
        yield gaps
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run(url: str, args: argparse.Namespace) -> Results:
    """All three parts."""
    client = HttpClient(f"{url.rstrip('/').removesuffix('/v1')}/v1")
    results = Results()
    try:
        response = await client.get("/models")
        if response.status != 200:
            raise TransportError(f"{client.url}/models answered {response.status}")
        asker = Asker(client, json.loads(response.body)["data"][0]["id"])
        count = min(args.limit, NUM_SCHEMAS)
        print(f"asking for {count} schemas", flush=True)
        await check_answers(asker, schemas(args.seed, count), results)
        # Of another seed, so that the server has not seen them.
        fresh = schemas(args.seed + 1, len(BY_HAND) + NUM_FIRST_TOKENS + NUM_ARRIVALS)[len(BY_HAND) :]
        timed = fresh[: min(args.limit, NUM_FIRST_TOKENS)]
        print(f"timing the first tokens of {len(timed)} new schemas", flush=True)
        await time_first_tokens(asker, timed, results)
        print(f"timing {NUM_STREAMS} other answers while {NUM_ARRIVALS} new schemas arrive", flush=True)
        await time_others(asker, fresh[NUM_FIRST_TOKENS:], results)
    finally:
        client.close()
    return results


def report(results: Results) -> dict[str, Any]:
    """Print tables; the same as a JSON object."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(Console().width, 120))
    stopped, valid = results.num_stopped, results.num_valid
    share = valid / stopped if stopped else 0.0
    table = Table("answers", "", title="JSON schemas")
    table.add_row(
        "ended by themselves / cut by max_tokens", f"{stopped} / {results.finish_reasons['length']}"
    )
    table.add_row("valid, of those that ended by themselves", f"{share:.1%} (must be 100 %)")
    table.add_row("failed or not valid", str(len(results.failures)))
    console.print(table)
    cost = 1000 * results.first_token_cost
    times = Table("time to first token, ms", "p50", "p90", title="a schema never seen before")
    for name, values in (
        ("without a schema", results.first_token),
        ("with it", results.first_token_new_schema),
    ):
        in_ms = sorted(1000 * value for value in values)
        times.add_row(name, f"{percentile(in_ms, 50):.1f}", f"{percentile(in_ms, 90):.1f}")
    times.add_row("more, pair by pair", f"{cost:+.1f} (aim: at most 50)", "")
    console.print(times)
    others = Table(title=f"{NUM_STREAMS} other answers")
    for heading in ("others' inter-token time", "p50, ms", "to before", "mean, ms", "to before"):
        others.add_column(heading)
    before = results.inter_token[ALONE]
    for name, gaps in results.inter_token.items():
        cells = []
        for average in (statistics.median, statistics.fmean):
            cells += [f"{1000 * average(gaps):.1f}", f"{average(gaps) / average(before) - 1:+.1%}"]
        others.add_row(name, *cells)
    others.caption = (
        "aim: p50 within 10 % of before; the mean has the steps in it that read the arrivals' prompts"
    )
    console.print(others)
    for failure in results.failures:
        console.print(failure, style="red", markup=False)
    return {
        "num_answers": results.finish_reasons.total(),
        "finish_reasons": dict(results.finish_reasons),
        "num_valid": valid,
        "valid_share_of_stopped": share,
        "failures": results.failures,
        "ttft_ms": {
            "p50_plain": 1000 * statistics.median(results.first_token),
            "p50_new_schema": 1000 * statistics.median(results.first_token_new_schema),
            "p50_difference": cost,
        },
        "inter_token_ms": {
            name: {"p50": 1000 * statistics.median(gaps), "mean": 1000 * statistics.fmean(gaps)}
            for name, gaps in results.inter_token.items()
        },
    }


def main() -> int:
    """Run the benchmark."""
    args = _parse()
    try:
        with server_at(args.base_url, args.model, args.serve_flag) as url:
            results = asyncio.run(run(url, args))
    except JaxserveError as error:
        print(f"structured: error: {error}", file=sys.stderr)
        return 1
    result = report(results)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({**environment(benchmark="structured", model=args.model), **result}, file, indent=2)
    passed = not results.failures and results.num_valid == results.num_stopped > 0
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", help="a running server (default: start one)")
    parser.add_argument("--model", default="smollm2", help="of the server to start (default: %(default)s)")
    parser.add_argument(
        "--serve-flag", action="append", default=[], help="of the server to start; may be repeated"
    )
    parser.add_argument(
        "--limit", type=int, default=NUM_SCHEMAS, help="schemas to ask for (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
