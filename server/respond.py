"""Quart responses out of answers and errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from quart import Response

from jaxserve.outputs import RequestOutput
from jaxserve.server.errors import ApiError

# Positions with log-probabilities that an answer, or a piece of one, may have before writing it would hold up the
# event loop: a hundred with 20 candidates each take some 20 ms.
LONG_ANSWER = 100

T = TypeVar("T")

_encoder = msgspec.json.Encoder()


def json_response(answer: Any, headers: dict[str, str] | None = None) -> Response:
    """200 with `answer` (a msgspec struct or plain data) as JSON."""
    return Response(_encoder.encode(answer), 200, headers, content_type="application/json")


async def whole_response(
    outputs: Sequence[RequestOutput], make: Callable[[], Any], headers: dict[str, str]
) -> Response:
    """200 with what `make` makes of finished outputs; on another thread if they have many log-probabilities."""
    return await made_response(make, headers, is_large=_num_positions(outputs) > LONG_ANSWER)


async def made_response(make: Callable[[], Any], headers: dict[str, str], *, is_large: bool) -> Response:
    """200 with what `make` makes; if that `is_large`, making and writing it would hold up the event loop."""
    body = await made(lambda: _encoder.encode(make()), is_large=is_large)
    return Response(body, 200, headers, content_type="application/json")


async def made(make: Callable[[], T], *, is_large: bool) -> T:
    """What `make` makes; if that `is_large`, it is made on another thread."""
    return await asyncio.to_thread(make) if is_large else make()


def error_response(error: ApiError) -> Response:
    """The error's status and its JSON object."""
    return Response(error.to_json(), error.status, error.headers, content_type="application/json")


def _num_positions(outputs: Sequence[RequestOutput]) -> int:
    """Positions of prompts and answers that have log-probabilities."""
    of_prompts = sum(len(output.prompt_logprobs or ()) for output in outputs)
    return of_prompts + sum(len(answer.logprobs or ()) for output in outputs for answer in output.outputs)
