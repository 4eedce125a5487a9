"""The images of one request, from URLs or ready ones to patches; nothing of it on the caller's event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from PIL import Image

from jaxserve.config import ImageProcessorConfig
from jaxserve.errors import RequestError
from jaxserve.media.fetch import Fetcher
from jaxserve.media.image_file import check_size, num_pixels, open_image, upright_rgb
from jaxserve.media.patches import (
    ProcessedImage,
    capped,
    fitted_size,
    max_tokens,
    operators_processor,
    patches_of,
    size_below,
    with_bounds,
)
from jaxserve.media.pixel_budget import PixelBudget, PixelHold
from jaxserve.media.policy import MediaPolicy
from jaxserve.media.refusal import refused
from jaxserve.media.urls import read_url

T = TypeVar("T")

_FETCHES = 8  # of one request at a time
_THREADS = 4  # at most; each may hold a decoded image of the largest kind
_DECODING = (
    threading.Lock()
)  # an image of the caller's, which may come several times and be read from one file


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image that a request brings: its place there, for errors, and a URL or the image itself."""

    where: str
    image: str | Image.Image


class ImageLoader:
    """Loads images by one policy for one model.  Safe on any number of threads and event loops.

    Args:
        processor: how the checkpoint wants images prepared.
        max_image_tokens: of one image; larger ones are shrunk to it.
        max_prompt_tokens: of all images of a request together, for they have to fit into its prompt.

    Raises:
        ConfigError: the policy's processor_kwargs are wrong.
    """

    def __init__(
        self,
        processor: ImageProcessorConfig,
        policy: MediaPolicy,
        *,
        max_image_tokens: int,
        max_prompt_tokens: int,
    ) -> None:
        self.policy = policy
        self._max_image_tokens = max_image_tokens
        self._max_prompt_tokens = max_prompt_tokens
        self._fetcher = Fetcher(policy)
        self._budget = PixelBudget(policy.max_queued_bytes)
        self._processor = capped(operators_processor(processor, policy.processor_kwargs), max_image_tokens)
        self._threads = ThreadPoolExecutor(
            min(_THREADS, os.cpu_count() or 1), thread_name_prefix="jaxserve-images"
        )

    def load_now(
        self, sources: Sequence[ImageSource], kwargs: Mapping[str, Any] | None = None
    ) -> list[ProcessedImage]:
        """`load` for callers without an event loop, or on one that may be held up; of as many requests as they like."""
        with ThreadPoolExecutor(1, thread_name_prefix="jaxserve-image-loop") as own:
            return own.submit(asyncio.run, self.load(sources, kwargs)).result()

    async def load(
        self,
        sources: Sequence[ImageSource],
        kwargs: Mapping[str, Any] | None = None,
        *,
        is_queued: bool = False,
    ) -> list[ProcessedImage]:
        """The images in the order of `sources`, with the bounds that a request sets (mm_processor_kwargs).

        No image is decoded before it is known from the heads of all that they fit into a prompt, and, if the request
        `is_queued`, among those of others that wait.  Files count, too, until there are pixels.

        Raises RequestError naming the field and the image at fault, QueueFullError where too much waits.
        """
        processor = with_bounds(self._processor, kwargs or {})
        if max_tokens(processor) > self._max_image_tokens:
            raise RequestError(
                f"mm_processor_kwargs: max_pixels is {processor.max_pixels}, and the largest images that this server "
                f"takes have {self._max_image_tokens * processor.token_pixels**2}.",
                param="mm_processor_kwargs",
            )
        if len(sources) > self.policy.max_images:
            raise refused(
                sources[self.policy.max_images].where,
                f"is one image too many: {self.policy.max_images} are taken (--limit-mm-per-prompt)",
            )
        if not sources:  # texts do not wait for other requests' images
            return []
        hold = self._budget.hold() if is_queued else None
        try:
            return await self._loaded(sources, processor, hold)
        except BaseException:
            if hold is not None:
                hold.release()
            raise

    async def _loaded(
        self, sources: Sequence[ImageSource], processor: ImageProcessorConfig, hold: PixelHold | None
    ) -> list[ProcessedImage]:
        loop = asyncio.get_running_loop()
        # What comes several times is fetched once, and prepared once.
        keys = [_key(source) for source in sources]
        await loop.run_in_executor(self._threads, _hash_all, keys)
        firsts = dict(zip(reversed(keys), reversed(sources), strict=True))
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        sources = [firsts[key] for key in places]
        opened, num_file_bytes = await self._open_all(sources, hold)
        self._check_pixels(opened, sources)
        sizes = [
            self._fitted(image, processor, source.where)
            for image, source in zip(opened, sources, strict=True)
        ]
        side = processor.token_pixels
        tokens = [width * height // side**2 for width, height in sizes]
        num_tokens = sum(tokens[places[key]] for key in keys)
        if num_tokens >= self._max_prompt_tokens:
            raise refused(
                sources[0].where,
                f"and the other images have {num_tokens} tokens, and this model's maximum context length is "
                f"{self._max_prompt_tokens} tokens, prompt and answer together. Send fewer or smaller ones, or a lower "
                "max_pixels in mm_processor_kwargs",
            )
        if hold is not None:
            hold.add(sum(tokens) * side**2 * 3)
        processed = await _all_of(
            [
                loop.run_in_executor(self._threads, _processed, image, size, processor, source)
                for image, size, source in zip(opened, sizes, sources, strict=True)
            ]
        )
        if hold is not None:
            hold.give_back(num_file_bytes)
        processed = [replace(image, hold=hold) for image in processed]
        return [processed[places[key]] for key in keys]

    async def _open_all(
        self, sources: Sequence[ImageSource], hold: PixelHold | None
    ) -> tuple[list[Image.Image], int]:
        """The images, and the bytes of their files together."""
        limit = self.policy.max_total_bytes
        turns = asyncio.Semaphore(_FETCHES)
        loop = asyncio.get_running_loop()
        num_bytes = 0

        async def opened(source: ImageSource) -> Image.Image:
            nonlocal num_bytes
            if not isinstance(source.image, str):
                check_size(source.image, source.where)
                return source.image
            async with turns:
                data = await read_url(source.image, source.where, self.policy, self._fetcher)
            num_bytes += len(data)
            if num_bytes > limit:
                raise refused(
                    source.where,
                    f"makes all images larger than this server's limit of {limit} bytes together",
                )
            if hold is not None:
                hold.add(len(data))
            return await loop.run_in_executor(self._threads, open_image, data, source.where)

        return await _all_of([opened(source) for source in sources]), num_bytes

    def _check_pixels(self, opened: Sequence[Image.Image], sources: Sequence[ImageSource]) -> None:
        limit, total = self.policy.max_total_pixels, 0
        for image, source in zip(opened, sources, strict=True):
            total += num_pixels(image) if isinstance(source.image, str) else 0
            if total > limit:
                raise refused(
                    source.where,
                    f"makes all images larger than this server's limit of {limit} pixels together",
                )

    def _fitted(self, image: Image.Image, processor: ImageProcessorConfig, where: str) -> tuple[int, int]:
        size = fitted_size(*image.size, processor, where)
        side, most = processor.token_pixels, self._max_image_tokens
        if (
            size[0] * size[1] > most * side**2
        ):  # enlarged to a min_pixels that is close to what the tower takes
            size = size_below(*image.size, most * side**2, side)
        num_tokens = size[0] * size[1] // side**2
        if num_tokens > most:
            raise refused(
                where,
                f"becomes {num_tokens} tokens, and an image may have {most}: make it less long and thin",
            )
        return size


def _key(source: ImageSource) -> str | int:
    """What sources of one image have in common."""
    return source.image if isinstance(source.image, str) else id(source.image)


def _hash_all(keys: Sequence[str | int]) -> None:
    """Let strings find out their hashes, which they keep: those of megabytes take a while."""
    for key in keys:
        hash(key)


def _processed(
    image: Image.Image, size: tuple[int, int], processor: ImageProcessorConfig, source: ImageSource
) -> ProcessedImage:
    is_callers = source.image is image
    with _DECODING if is_callers else nullcontext():
        upright = upright_rgb(image, source.where)
    if upright.size != image.size:  # turned; fitted_size treats both sides alike
        size = (size[1], size[0])
    processed = patches_of(upright, size, processor)
    if not is_callers:  # opened here: hundreds of decoded images of a request would pile up
        image.close()
    return processed


async def _all_of(jobs: Sequence[Awaitable[T]]) -> list[T]:
    """The results in order; the first error ends what still waits, and is raised."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
