"""What the kernels must compute, written to be read: dense, one sequence at a time, float32, no jit."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.kernels_pallas.scoring import Scoring


def paged_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    kv_pages: np.ndarray,
    meta: AttentionMetadata,
    scoring: Scoring,
) -> tuple[np.ndarray, np.ndarray]:
    """attention.attention of q [T, N, H], k and v [T, K, H], normalised and turned.  Padding tokens give zeros."""
    kv_pages = np.array(kv_pages)
    largest = float(jnp.finfo(kv_pages.dtype).max)
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
        kv = np.stack([k[t], v[t]], axis=1).astype(np.float32)
        kv_pages[page, positions[t] % page_size] = np.clip(kv, -largest, largest).astype(kv_pages.dtype)
    out = np.zeros(q.shape, np.float32)
    for t in live:
        position = positions[t]
        first = 0 if scoring.window is None else max(0, position - scoring.window + 1)
        where = np.arange(first, position + 1)
        cached = kv_pages[table[rows[t], where // page_size], where % page_size].astype(
            np.float32
        )  # [C, K, 2, H]
        for head in range(q.shape[1]):
            keys, values = cached[:, head // group, 0], cached[:, head // group, 1]
            scores = keys @ q[t, head].astype(np.float32) * scoring.scale
            if scoring.soft_cap is not None:
                scores = scoring.soft_cap * np.tanh(scores / scoring.soft_cap)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ values
    return out.astype(q.dtype), kv_pages


def grouped_matmul(x: np.ndarray, weight: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Same arguments and result as grouped_matmul.grouped_matmul, but for the backend."""
    out = np.zeros((x.shape[0], weight.shape[2]), np.float32)
    start = 0
    for matrix, size in zip(weight, sizes, strict=True):
        rows = slice(start, start + size)
        out[rows] = x[rows].astype(np.float32) @ matrix.astype(np.float32)
        start += size
    return out.astype(x.dtype)


def mixture(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate_up: np.ndarray, down: np.ndarray
) -> np.ndarray:
    """The sum of experts.mixture's parts, [T, D] float32, for ids and weights [T, C]."""
    out = np.zeros(x.shape, np.float32)
    for token, row in enumerate(x.astype(np.float32)):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            if 0 <= expert < len(down):
                pairs = row @ gate_up[expert].astype(np.float32)
                gate, up = pairs[0::2], pairs[1::2]
                hidden = (gate / (1 + np.exp(-gate)) * up).astype(x.dtype).astype(np.float32)
                out[token] += weight * (hidden @ down[expert].astype(np.float32))
    return out
