"""Asks a server for answers with and without schemas, checks them, and times them and their neighbours."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import jsonschema

from benchmarks.structured_parts.schemas import Schema
from jaxserve.bench.http_client import HttpClient
from jaxserve.bench.load_generator import LoadGenerator, Prompt, RequestRecord
from jaxserve.errors import JaxserveError

MAX_TOKENS = 400
CONCURRENCY = 8
NUM_STREAMS = 4  # other requests
ARRIVAL_TOKENS = 24
BEFORE_SECONDS = 1.0  # that the others are timed alone, each time
STREAM_TOKENS = 1600
ALONE, PLAIN = "before", "while questions without a schema arrive"
NEW_SCHEMA = "while questions with new schemas arrive"


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
