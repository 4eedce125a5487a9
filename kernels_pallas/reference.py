"""What the kernels must compute, written to be read: dense, one sequence at a time, float32, no jit."""

from __future__ import annotations

import numpy as np

from jaxserve.kernels_pallas.metadata import AttentionMetadata


def paged_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    kv_pages: np.ndarray,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Same arguments and results as attention.paged_attention.  Padding tokens give zeros."""
    kv_pages = np.array(kv_pages)
    page_size = kv_pages.shape[1]
    group = q.shape[1] // k.shape[1]
    table, rows, positions = (
        np.asarray(meta.page_table),
        np.asarray(meta.token_rows),
        np.asarray(meta.positions),
    )
    kv_lens = np.asarray(meta.kv_lens)
    live = [t for t in range(q.shape[0]) if kv_lens[rows[t]] > 0]
    for t in live:
        page = table[rows[t], positions[t] // page_size]
        kv_pages[page, positions[t] % page_size] = np.stack([k[t], v[t]], axis=1)
    out = np.zeros(q.shape, np.float32)
    for t in live:
        position = positions[t]
        first = 0 if window is None else max(0, position - window + 1)
        where = np.arange(first, position + 1)
        cached = kv_pages[table[rows[t], where // page_size], where % page_size].astype(
            np.float32
        )  # [C, K, 2, H]
        for head in range(q.shape[1]):
            keys, values = cached[:, head // group, 0], cached[:, head // group, 1]
            scores = keys @ q[t, head].astype(np.float32) * scale
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ values
    return out.astype(q.dtype), kv_pages
