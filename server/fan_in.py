"""Several requests of one caller, read as one: a list of prompts is answered together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from jaxserve.async_llm import AsyncLLM
from jaxserve.inputs import TokenizedPrompt
from jaxserve.outputs import FINISH_ABORT, RequestOutput
from jaxserve.request_stream import RequestStream
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.errors import unavailable

Item = tuple[int, RequestOutput]  # which prompt, what came


def submit(
    llm: AsyncLLM,
    prompts: Sequence[TokenizedPrompt],
    params: SamplingParams,
    request_id: str,
    *,
    priority: int,
    cache_salt: str | None,
) -> list[RequestStream]:
    """Submit every prompt, or none: when one is refused, those before it are taken back."""
    streams: list[RequestStream] = []
    try:
        for i, prompt in enumerate(prompts):
            streams.append(
                llm.generate(prompt, params, f"{request_id}-{i}", priority=priority, cache_salt=cache_salt)
            )
    except BaseException:
        close_all(streams)
        raise
    return streams


def close_all(streams: Sequence[RequestStream]) -> None:
    """Abort what has not ended."""
    for stream in streams:
        stream.close()


async def final_outputs(streams: Sequence[RequestStream]) -> list[RequestOutput]:
    """The last output of every stream, in order.  When one fails or the caller goes, all are aborted."""
    finals = []
    try:
        for stream in streams:
            async for output in stream:
                _refuse_aborted(output)
                finals.append(output)
    finally:
        close_all(streams)
    return finals


async def merged_outputs(streams: Sequence[RequestStream]) -> AsyncGenerator[Item, None]:
    """Outputs of all streams as they come.  When one fails or the generator is closed, all are aborted."""
    items = _of_one(streams[0]) if len(streams) == 1 else _of_many(streams)
    try:
        async for index, output in items:
            _refuse_aborted(output)
            yield index, output
    finally:
        await items.aclose()
        close_all(streams)


async def _of_one(stream: RequestStream) -> AsyncGenerator[Item, None]:
    async for output in stream:
        yield 0, output


async def _of_many(streams: Sequence[RequestStream]) -> AsyncGenerator[Item, None]:
    # Bounded, so that outputs that nobody takes gather in their streams, where they become one.
    queue: asyncio.Queue[Item | BaseException | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int, stream: RequestStream) -> None:
        try:
            async for output in stream:
                await queue.put((index, output))
        except Exception as error:  # noqa: BLE001  # carried over to the reader, who raises it
            await queue.put(error)
        await queue.put(None)

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _refuse_aborted(output: RequestOutput) -> None:
    """An answer that somebody else ended (a drain that ran out of time) is no answer."""
    if any(answer.finish_reason == FINISH_ABORT for answer in output.outputs):
        raise unavailable("The answer was cut off because the server is shutting down.")
