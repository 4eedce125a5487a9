"""Images of a step as arrays: where tokens stand for M-RoPE, and which rows of the encoder's cache they are."""

from __future__ import annotations

import numpy as np

from jaxserve.engine.encoder_cache import PAGE_ROWS
from jaxserve.engine.plan import PlanEntry

TEXT = -1  # row of a token that is no image's


def token_places(entry: PlanEntry) -> tuple[np.ndarray, np.ndarray]:
    """Of an entry's T tokens: rotary positions [3, T], and rows of the cache [T], TEXT for those of no image."""
    count = len(entry.token_ids)
    rope_positions = np.tile(np.arange(entry.start, entry.start + count) + entry.rope_delta, (3, 1))
    image_rows = np.full(count, TEXT)
    for span in entry.images:
        begin, end = max(span.start - entry.start, 0), span.end - entry.start
        index = np.arange(entry.start + begin, entry.start + min(end, count)) - span.start
        inside = slice(begin, begin + len(index))
        rope_positions[0, inside] = span.rope_start
        rope_positions[1, inside] = span.rope_start + index // span.num_columns
        rope_positions[2, inside] = span.rope_start + index % span.num_columns
        image_rows[inside] = cache_rows(span.pages)[index]
        rope_positions[:, end:] = np.arange(entry.start + end, entry.start + count) + span.rope_delta
    return rope_positions, image_rows


def cache_rows(pages: tuple[int, ...]) -> np.ndarray:
    """The rows of these pages, in order."""
    return (np.array(pages)[:, None] * PAGE_ROWS + np.arange(PAGE_ROWS)).ravel()
