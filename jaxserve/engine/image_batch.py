"""Images of a step as arrays: where tokens stand for M-RoPE, and which rows of the encoder's cache they are."""

from __future__ import annotations

import numpy as np

from jaxserve.engine.encoder_cache import PAGE_ROWS
from jaxserve.engine.plan import PlanEntry

TEXT = -1  # row of a token that is no image's


def place_tokens(entry: PlanEntry, rope_positions: np.ndarray, image_rows: np.ndarray) -> None:
    """Fill in an entry's tokens: rope_positions [3, T] and image_rows [T], which is TEXT before."""
    rope_positions[:] = np.arange(entry.start, entry.start + len(entry.token_ids)) + entry.rope_delta
    for span in entry.images:
        begin, end = max(span.start - entry.start, 0), span.end - entry.start
        index = np.arange(entry.start + begin, entry.start + min(end, len(entry.token_ids))) - span.start
        inside = slice(begin, begin + len(index))
        rope_positions[0, inside] = span.rope_start
        rope_positions[1, inside] = span.rope_start + index // span.num_columns
        rope_positions[2, inside] = span.rope_start + index % span.num_columns
        image_rows[inside] = cache_rows(span.pages)[index]
        behind = np.arange(entry.start + end, entry.start + len(entry.token_ids))
        rope_positions[:, end:] = behind + span.rope_delta


def cache_rows(pages: tuple[int, ...]) -> np.ndarray:
    """The rows of these pages, in order."""
    return (np.array(pages)[:, None] * PAGE_ROWS + np.arange(PAGE_ROWS)).ravel()
