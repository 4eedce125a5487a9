"""POST /v1/chat/completions: the assistant's turn."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial

from msgspec import UNSET
from quart import Request, Response

from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.server.answers import ChatChunk, ChatChunkChoice, ChatCompletion, Delta
from jaxserve.server.chat_choices import ChatChoices
from jaxserve.server.fan_in import Item, final_outputs, merged_outputs
from jaxserve.server.generation import Envelope, start
from jaxserve.server.intake import name_request
from jaxserve.server.logprobs import prompt_logprobs
from jaxserve.server.prepared_chat import prepare_chat
from jaxserve.server.respond import LONG_ANSWER, made, whole_response
from jaxserve.server.sse import event, sse_response
from jaxserve.server.state import ServerState


async def chat_completions(state: ServerState, request: Request) -> Response:
    """Answer one request.  Raises ApiError or JaxserveError for what cannot be answered."""
    prepared = await prepare_chat(state, request)
    taken, fields = prepared.taken, prepared.taken.fields
    answer_id = f"chatcmpl-{name_request(fields)}"
    choices = ChatChoices(Envelope.of(state, fields, taken.model, answer_id), prepared)
    streams, headers = start(
        state, fields, [prepared.prompt], prepared.params, answer_id, uuid.uuid4().hex[:8]
    )
    headers = {**taken.headers, **headers}
    if not fields.stream:
        (output,) = await final_outputs(streams)
        return await whole_response([output], lambda: _whole(choices, output), headers)
    items = merged_outputs(streams)
    first = await anext(items)  # a failure before any text is still a plain error with its own status
    return sse_response(_events(choices, first, items), headers, answer_id)


def _whole(choices: ChatChoices, output: RequestOutput) -> ChatCompletion:
    envelope = choices.envelope
    completion = ChatCompletion(
        id=envelope.id,
        object="chat.completion",
        created=envelope.created,
        model=envelope.model,
        choices=[choices.whole(answer) for answer in output.outputs],
        system_fingerprint=envelope.state.system_fingerprint,
        usage=envelope.usage(
            len(output.prompt_token_ids),
            sum(len(answer.token_ids) for answer in output.outputs),
            output.num_cached_tokens,
        ),
    )
    if choices.num_prompt_logprobs is not None and output.prompt_logprobs is not None:
        completion.prompt_logprobs = prompt_logprobs(output.prompt_logprobs, choices.num_prompt_logprobs)
    if envelope.return_token_ids:
        completion.prompt_token_ids = output.prompt_token_ids
    if choices.told_prompt is not None:
        completion.prompt_text = choices.told_prompt
    return completion


async def _events(
    choices: ChatChoices, first: Item, items: AsyncGenerator[Item, None]
) -> AsyncIterator[bytes]:
    envelope = choices.envelope
    num_prompt = len(choices.prompt.token_ids)
    num_cached = first[1].num_cached_tokens
    num_tokens = [0] * choices.n

    def data(choice: ChatChunkChoice) -> bytes:
        chunk = _chunk(envelope, [choice])
        if choice.finish_reason is not None:
            chunk.system_fingerprint = envelope.state.system_fingerprint
        if envelope.continuous_usage:
            chunk.usage = envelope.usage(num_prompt, num_tokens[choice.index], num_cached)
        if choice.delta.role is not UNSET and choice.index == 0:
            if envelope.return_token_ids:
                chunk.prompt_token_ids = choices.prompt.token_ids
            if choices.told_prompt is not None:
                chunk.prompt_text = choices.told_prompt
        return event(chunk)

    def told(answer: CompletionOutput) -> list[bytes]:
        num_tokens[answer.index] += len(answer.token_ids)
        return [data(piece) for piece in choices.pieces(answer)]

    async with aclosing(items):
        for index in range(choices.n):
            yield data(choices.opening(index))
        if choices.echo:
            for index in range(choices.n):
                yield data(ChatChunkChoice(index, Delta(content=choices.echo)))
        item: Item | None = first
        while item is not None:
            for answer in item[1].outputs:
                is_large = len(answer.logprobs or ()) > LONG_ANSWER
                for written in await made(partial(told, answer), is_large=is_large):
                    yield written
            item = await anext(items, None)
    if envelope.include_usage:
        chunk = _chunk(envelope, [])
        chunk.system_fingerprint = envelope.state.system_fingerprint
        chunk.usage = envelope.usage(num_prompt, sum(num_tokens), num_cached)
        yield event(chunk)


def _chunk(envelope: Envelope, choices: list[ChatChunkChoice]) -> ChatChunk:
    return ChatChunk(envelope.id, "chat.completion.chunk", envelope.created, envelope.model, choices)
