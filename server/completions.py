"""POST /v1/completions: a text goes on."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial

from msgspec import UNSET
from quart import Request, Response

from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.server.answers import Completion, CompletionChoice
from jaxserve.server.completion_choices import CompletionChoices, Progress, PromptPositions
from jaxserve.server.fan_in import Item, final_outputs, merged_outputs
from jaxserve.server.generation import Envelope, start
from jaxserve.server.intake import name_request
from jaxserve.server.prepared_completion import prepare_completion
from jaxserve.server.respond import LONG_ANSWER, made, whole_response
from jaxserve.server.sse import event, sse_response
from jaxserve.server.state import ServerState

OBJECT = "text_completion"


async def completions(state: ServerState, request: Request) -> Response:
    """Answer one request.  Raises ApiError or JaxserveError for what cannot be answered."""
    prepared = await prepare_completion(state, request)
    taken, fields, prompts, params = prepared.taken, prepared.taken.fields, prepared.prompts, prepared.params
    answer_id = f"cmpl-{name_request(fields)}"
    envelope = Envelope.of(state, fields, taken.model, answer_id)
    choices = CompletionChoices(envelope, fields, params, prompts)
    streams, headers = start(state, fields, prompts, params, answer_id, uuid.uuid4().hex[:8])
    headers = {**taken.headers, **headers}
    if not fields.stream:
        finals = await final_outputs(streams)
        return await whole_response(finals, lambda: _whole(choices, finals), headers)
    items = merged_outputs(streams)
    first = await anext(items)  # a failure before any text is still a plain error with its own status
    return sse_response(_events(choices, first, items), headers, answer_id)


def _whole(choices: CompletionChoices, finals: Sequence[RequestOutput]) -> Completion:
    told = []
    num_tokens = 0
    for prompt_index, output in enumerate(finals):
        for answer in output.outputs:
            progress = Progress()
            told.append(choices.choice(prompt_index, answer, progress, output.prompt_logprobs))
            num_tokens += progress.num_tokens
    envelope = choices.envelope
    return Completion(
        id=envelope.id,
        object=OBJECT,
        created=envelope.created,
        model=envelope.model,
        choices=told,
        system_fingerprint=envelope.state.system_fingerprint,
        usage=envelope.usage(
            sum(len(output.prompt_token_ids) for output in finals),
            num_tokens,
            sum(output.num_cached_tokens for output in finals),
        ),
    )


async def _events(
    choices: CompletionChoices, first: Item, items: AsyncGenerator[Item, None]
) -> AsyncIterator[bytes]:
    envelope, prompts = choices.envelope, choices.prompts
    progress: dict[int, Progress] = {}  # by index of the choice
    num_cached = [0] * len(prompts)

    def data(
        prompt_index: int, answer: CompletionOutput, told: Progress, positions: PromptPositions | None
    ) -> bytes:
        choice = choices.choice(prompt_index, answer, told, positions)
        chunk = _chunk(envelope, [choice])
        if choice.finish_reason is not None:
            chunk.system_fingerprint = envelope.state.system_fingerprint
        if envelope.continuous_usage:
            num_prompt = len(prompts[prompt_index].token_ids)
            chunk.usage = envelope.usage(num_prompt, told.num_tokens, num_cached[prompt_index])
        return event(chunk)

    async with aclosing(items):
        async for prompt_index, output, positions in _with_prompt_logprobs(choices, first, items):
            num_cached[prompt_index] = output.num_cached_tokens
            for answer in output.outputs:
                told = progress.setdefault(prompt_index * choices.n + answer.index, Progress())
                num_positions = choices.num_positions(answer, told, positions)
                yield await made(
                    partial(data, prompt_index, answer, told, positions), is_large=num_positions > LONG_ANSWER
                )
    if envelope.include_usage:
        chunk = _chunk(envelope, [])
        chunk.system_fingerprint = envelope.state.system_fingerprint
        chunk.usage = envelope.usage(
            sum(len(prompt.token_ids) for prompt in prompts),
            sum(told.num_tokens for told in progress.values()),
            sum(num_cached),
        )
        yield event(chunk)


async def _with_prompt_logprobs(
    choices: CompletionChoices, first: Item, items: AsyncGenerator[Item, None]
) -> AsyncIterator[tuple[int, RequestOutput, PromptPositions | None]]:
    """Every output with the log-probabilities of its prompt, where an echo needs them.

    They come once per prompt, with its first answer; other answers that overtake it are held until then.
    """
    positions: list[PromptPositions | None] = [None] * len(choices.prompts)
    held: list[list[RequestOutput]] = [[] for _ in choices.prompts]
    item: Item | None = first
    while item is not None:
        prompt_index, output = item
        if output.prompt_logprobs is not None:
            positions[prompt_index] = output.prompt_logprobs
        held[prompt_index].append(output)
        if positions[prompt_index] is not None or not choices.needs_prompt_logprobs:
            ready, held[prompt_index] = held[prompt_index], []
            for output in ready:
                yield prompt_index, output, positions[prompt_index]
        item = await anext(items, None)


def _chunk(envelope: Envelope, choices: list[CompletionChoice]) -> Completion:
    return Completion(envelope.id, OBJECT, envelope.created, envelope.model, choices, UNSET, UNSET)
